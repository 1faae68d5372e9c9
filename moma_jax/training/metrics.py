"""From the reports of updates to records: cumulative counts, and means over the steps since the last record."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moma_jax.config import Config
from moma_jax.routers.choice import loads
from moma_jax.training.step import StepReport


def prediction_figures(predicted_M4: np.ndarray, names: list[str]) -> dict[str, float | None]:
    """How well auxiliary routers predict, by modality's name, from `RoutingReport`'s counts of (token, expert) pairs.

    `precision_<modality>`: of the predicted pairs, the share that was taken; `recall_`: the reverse; `accuracy_`: pairs
    told right; `load_`: predicted over taken pairs.
    """
    figures = {}
    for name, (right, predicted, taken, pairs) in zip(names, predicted_M4, strict=True):
        figures[f"precision_{name}"] = mean(right, predicted)
        figures[f"recall_{name}"] = mean(right, taken)
        figures[f"accuracy_{name}"] = mean(pairs - predicted - taken + 2 * right, pairs)
        figures[f"load_{name}"] = mean(predicted, taken)
    return figures


def threshold_figures(routing_state: Any) -> dict[str, float]:
    """What the running thresholds would pass and did drop in the latest update, by group of experts.

    `threshold_load_<group>`: passing tokens over those that expert choice takes, a mean over layers and experts;
    `threshold_load_<group>_least`: of the expert with the fewest; `dropped_<group>`: share of passing tokens without a
    slot, 0 but where thresholds are the training rule. Empty where the state is of another kind.
    """
    figures = {}
    for name, state in routing_state.items():
        if isinstance(state, dict) and {"passed_E", "taken_E", "dropped_E"} <= set(state):
            load_LE = np.asarray(loads(state))
            figures[f"threshold_load_{name}"] = float(load_LE.mean())
            figures[f"threshold_load_{name}_least"] = float(load_LE.min())
            figures[f"dropped_{name}"] = float(np.mean(state["dropped_E"]))
    return figures


def mean(value: float, count: float) -> float | None:
    """A sum over how many there were; None where there were none."""
    return float(value / count) if count else None


class Wait(NamedTuple):
    """Seconds that a process waited for data, of so many in all."""

    seconds: float
    of: float


class Meter:
    """Counts of a run, kept on the host, saved with every checkpoint.

    Reports stay on the device until `settle`, which the loop calls one step behind, so that the device never waits
    for the host. Numbers are added in the order of steps in float64: a resumed run adds the same numbers.

    Attributes:
      data_wait: how long this process waited for data between its last two records.
    """

    def __init__(
        self,
        sums_of: Callable[[Any], dict[str, Any]],
        saved: dict | None = None,
        *,
        counted: str = "tokens",
        kinds: Sequence[str] = (),
    ):
        """A meter at the start of a run, or where it was saved.

        Args:
          sums_of: a report's numbers by name, to be added up; only of reports whose update was finite.
          saved: `to_json`'s dictionary.
          counted: what a run's length is told in. A report has `tokens_M`, or pictures_M, how many of each of `kinds`,
            or, where there are none, one number; and `finite`.
        """
        self._sums_of, self._counted, self._kinds = sums_of, counted, list(kinds)
        self._total = {counted: [0] * max(len(self._kinds), 1), "wall_seconds": 0.0}
        self._interval: dict[str, Any] = {}
        if saved is not None:
            self._total, self._interval = saved["total"], {k: np.asarray(v) for k, v in saved["interval"].items()}
        self._total = {"spent": {}} | self._total
        self._pending: list[tuple[int, Any]] = []
        self._started = self._last_record = time.perf_counter()
        self._steps_timed = 0
        self._data_before, self.data_wait = self._total["spent"].get("data", 0.0), Wait(0.0, 0.0)

    def add(self, step: int, report: Any) -> None:
        """Takes the report of update `step`, without waiting for it."""
        self._pending.append((step, report))

    def settle(self, leave: int = 0) -> list[int]:
        """Counts all but the newest `leave` reports; returns the steps among them whose update was not finite."""
        bad = []
        while len(self._pending) > leave:
            step, report = self._pending.pop(0)
            report = jax.device_get(report)
            self._count(report)
            if not report.finite:
                bad.append(step)
        return bad

    def _count(self, report: Any) -> None:
        self._steps_timed += 1
        count_M = getattr(report, f"{self._counted}_M")
        total = self._total[self._counted]
        self._total[self._counted] = [a + int(b) for a, b in zip(total, count_M, strict=True)]
        sums = {"steps": 1, f"{self._counted}_M": count_M}
        if report.finite:
            sums |= {"finite_steps": 1} | self._sums_of(report)
        for name, value in sums.items():
            self._interval[name] = self._interval.get(name, 0.0) + np.asarray(value, np.float64)

    def interval(self) -> dict[str, Any]:
        """Sums by name over the steps since the last call, `steps` of them; begins a new interval."""
        seen, self._interval = self._interval, {}
        return seen

    def cumulative(self) -> dict[str, Any]:
        """What was counted so far (of tokens the real ones), overall and by kind."""
        name, total = self._counted, self._total[self._counted]
        return {name: sum(total)} | {f"{name}_{kind}": n for kind, n in zip(self._kinds, total, strict=False)}

    def speed(self, seen: dict[str, Any]) -> dict[str, Any]:
        """Speed of this process since its last record; `seen` is what `interval` gave."""
        now = time.perf_counter()
        seconds, self._last_record = now - self._last_record, now
        steps, self._steps_timed = max(self._steps_timed, 1), 0
        per_step, data = seconds / steps, self._total["spent"].get("data", 0.0)
        self.data_wait, self._data_before = Wait(data - self._data_before, seconds), data
        return {
            "step_seconds": per_step,
            "data_wait_seconds": self.data_wait.seconds,
            f"{self._counted}_per_second": float(np.sum(seen[f"{self._counted}_M"]) / seen["steps"] / per_step),
        }

    def timed(self, name: str, work: Callable[[], Any], apart: bool = True) -> Any:
        """Does `work`, whose seconds are added up under a name (`spent`), and unless it is `apart` are steps' too."""
        before = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - before
        self._total["spent"][name] = self._total["spent"].get(name, 0.0) + seconds
        self._last_record += seconds if apart else 0.0
        return result

    def spent(self) -> dict[str, float]:
        """Seconds so far of what is not computing updates, as `spent_<name>`."""
        return {f"spent_{name}": seconds for name, seconds in self._total["spent"].items()}

    def wall_seconds(self) -> float:
        """Seconds so far, compiling, evaluation and what restarts repeated included."""
        return self._total["wall_seconds"] + time.perf_counter() - self._started

    def to_json(self) -> dict[str, Any]:
        """Plain values that continue this meter exactly; call after `settle`."""
        total = self._total | {"wall_seconds": self.wall_seconds()}
        return {"total": total, "interval": {name: value.tolist() for name, value in self._interval.items()}}


MOST_OF_OTHERS, LEAST_SHARE, LEAST_SECONDS = 3.0, 0.05, 1.0
"""A host holds the others up where it waits for data for more than so many times what the median of the others does,
for a larger share of its time, and for longer."""


class Stragglers:
    """Who of several hosts waits for data while the others wait for it; told when it is another one than before."""

    def __init__(self):
        self._told: list[int] = []

    def told(self, waits: Sequence[tuple[str, float, float]]) -> str | None:
        """The line, or None where there is nothing new.

        Args:
          waits: of every host, in the order of their numbers: its name, the seconds that it waited, of so many.
        """
        share_P = [seconds / max(of, 1e-9) for _, seconds, of in waits]
        others_P = [float(np.median([*share_P[:p], *share_P[p + 1 :]] or [np.inf])) for p in range(len(waits))]
        found = [
            p
            for p, (_, seconds, _) in enumerate(waits)
            if share_P[p] > max(LEAST_SHARE, MOST_OF_OTHERS * others_P[p]) and seconds >= LEAST_SECONDS
        ]
        told, self._told = self._told, found
        if not found or found == told:
            return None
        worst = sorted(found, key=lambda p: -share_P[p])
        lines = [f"host {p} ({waits[p][0]}) waits for data: {share_P[p]:.0%} of its time" for p in worst]
        return f"{'; '.join(lines)}; others {others_P[worst[0]]:.0%}"


def token_meter(config: Config, sums_of: Callable[[Any], dict[str, Any]], saved: dict | None = None) -> Meter:
    """The meter of a stage that learns from tokens."""
    return Meter(sums_of, saved, kinds=[m.name for m in config.data.modalities])


def last_figures(records: list[dict[str, Any]], kind: str, eval_kind: str) -> dict[str, Any]:
    """Of records: "final", the last of `kind`; "eval", the last of `eval_kind` by held-out set; figures alone."""
    about = ("schema", "kind", "time", "step", "eval_set")
    final, judged = {}, {}
    for record in records:
        figures = {name: value for name, value in record.items() if name not in about}
        if record["kind"] == kind:
            final = figures
        elif record["kind"] == eval_kind:
            judged[record["eval_set"]] = figures
    return {"final": final, "eval": judged}


# Train records --------------------------------------------------------------------------------------------------------


class Hardware(NamedTuple):
    """FLOPs of a token, and FLOP/s that all devices together could do; None where unknown."""

    flops_per_token: float
    peak: float | None


def step_sums(report: StepReport) -> dict[str, Any]:
    """What is added up of a training step."""
    sums = {
        "nats_M": report.sums.cross_entropy_J,
        "weight_M": report.sums.weight_J,
        "square_log_partition": report.sums.square_log_partition,
        "masked_2": report.masked_2,
        "taken_M3": report.taken_M3,
        "grad_norm": report.grad_norm,
        "predicted_M4": report.predicted_M4,
        "entered_M4": report.entered_M4,
    }
    if report.grad_norm_router is not None:
        sums["grad_norm_router"] = report.grad_norm_router
    sums |= {f"routing_{name}": value for name, value in report.routing_losses.items()}
    return sums | {f"routing_{name}": value for name, value in report.routing_metrics.items()}


def train_record(
    config: Config, meter: Meter, hardware: Hardware, step: int, learning_rate: float, epochs: dict[str, float]
) -> dict[str, Any]:
    """The train record of `step`, means over the steps since the last one; begins a new interval."""
    seen, flops = meter.interval(), hardware.flops_per_token
    record: dict[str, Any] = {"kind": "train", "step": step, **_losses(config, seen)}
    record["learning_rate"] = learning_rate
    record |= meter.cumulative()
    record |= {"flops": record["tokens"] * flops, "wall_seconds": meter.wall_seconds(), **meter.spent()}
    record |= {f"epoch_{name}": float(value) for name, value in epochs.items()}
    record |= meter.speed(seen)
    record["mfu"] = None if hardware.peak is None else record["tokens_per_second"] * flops / hardware.peak
    return record | _routing(config, seen)


def _losses(config: Config, seen: dict[str, Any]) -> dict[str, Any]:
    """Losses weighted by token, norms and routing losses by step; None where every update was skipped."""
    names = [m.name for m in config.data.modalities]
    zero_M, steps = np.zeros(len(names)), seen.get("finite_steps", 0.0)
    nats_M, weight_M = seen.get("nats_M", zero_M), seen.get("weight_M", zero_M)
    losses = {"loss": mean(nats_M.sum(), weight_M.sum())}
    losses |= {f"loss_{n}": mean(a, w) for n, a, w in zip(names, nats_M, weight_M, strict=True)}
    losses["masked"] = mean(*seen.get("masked_2", np.zeros(2)))
    square = mean(seen.get("square_log_partition", 0.0), weight_M.sum())
    losses["z_loss"] = None if square is None else config.train.z_loss * square
    losses["grad_norm"] = mean(seen.get("grad_norm", 0.0), steps)
    losses["grad_norm_router"] = mean(seen["grad_norm_router"], steps) if "grad_norm_router" in seen else None
    routing = sorted(name for name in seen if name.startswith("routing_"))
    return losses | {name: mean(seen[name], steps) for name in routing}


def _routing(config: Config, seen: dict[str, Any]) -> dict[str, Any]:
    """Quota fill, and shares of (token, layer) pairs taken by 0, 1, 2+ experts."""
    names = [m.name for m in config.data.modalities]
    groups = config.train.batch_rows // config.data.group_rows
    record = {}
    for m, (name, quota) in enumerate(zip(names, config.quotas, strict=True)):
        record[f"fill_{name}"] = float(seen["tokens_M"][m] / (seen["steps"] * groups * quota))
        taken_3 = seen["taken_M3"][m] if "taken_M3" in seen else np.zeros(3)
        for label, taken in zip(("0", "1", "2plus"), taken_3, strict=True):
            record[f"taken_{name}_{label}"] = mean(taken, taken_3.sum())
    if config.model.router.auxiliary:
        record |= layers_predicted(config, seen.get("predicted_M4"), seen.get("entered_M4"))
    return record


def layers_predicted(config: Config, predicted_M4: np.ndarray | None, entered_M4: np.ndarray | None) -> dict[str, Any]:
    """`prediction_figures` of experts, and as accuracy_depth_text of mixture of depths; None: nothing was counted."""
    names, zero_M4 = [m.name for m in config.data.modalities], np.zeros((len(config.data.modalities), 4))
    figures = prediction_figures(zero_M4 if predicted_M4 is None else predicted_M4, names)
    if config.depth:
        figures |= prediction_figures(zero_M4 if entered_M4 is None else entered_M4, [f"depth_{n}" for n in names])
    return figures
