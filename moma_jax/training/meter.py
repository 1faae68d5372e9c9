"""From the reports of updates to train records: cumulative counts, and means over the steps since the last record."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moma_jax.config import Config
from moma_jax.training.step import StepReport


def means(sums: Any, names: list[str]) -> dict[str, float | None]:
    """`loss` and `loss_<modality>` in nats per target of summed `objective.Sums`; None where nothing was weighed."""
    nats_M, weight_M = np.asarray(sums.cross_entropy_M, np.float64), np.asarray(sums.weight_M, np.float64)
    losses = {"loss": _over(nats_M.sum(), weight_M.sum())}
    return losses | {f"loss_{n}": _over(a, w) for n, a, w in zip(names, nats_M, weight_M, strict=True)}


def prediction_figures(predicted_M4: np.ndarray, names: list[str]) -> dict[str, float | None]:
    """How well auxiliary routers predict, by modality, from `RoutingReport`'s counts of (token, expert) pairs.

    `precision_<modality>`: of the predicted pairs, the share that was taken; `recall_`: the reverse; `accuracy_`: pairs
    told right; `load_`: predicted over taken pairs.
    """
    figures = {}
    for name, (right, predicted, taken, pairs) in zip(names, predicted_M4, strict=True):
        figures[f"precision_{name}"] = _over(right, predicted)
        figures[f"recall_{name}"] = _over(right, taken)
        figures[f"accuracy_{name}"] = _over(pairs - predicted - taken + 2 * right, pairs)
        figures[f"load_{name}"] = _over(predicted, taken)
    return figures


def threshold_figures(routing_state: Any) -> dict[str, float]:
    """What the running thresholds would pass and did drop in the latest update, by group of experts.

    `threshold_load_<group>`: passing tokens over those that expert choice takes, a mean over layers and experts;
    `threshold_load_<group>_least`: of the expert with the fewest; `dropped_<group>`: share of passing tokens without a
    slot, 0 but where thresholds are the training rule. Empty where the state is of another kind.
    """
    figures = {}
    for name, state in routing_state.items():
        if isinstance(state, dict) and {"load_E", "dropped_E"} <= set(state):
            load_LE = np.asarray(state["load_E"])
            figures[f"threshold_load_{name}"] = float(load_LE.mean())
            figures[f"threshold_load_{name}_least"] = float(load_LE.min())
            figures[f"dropped_{name}"] = float(np.mean(state["dropped_E"]))
    return figures


def _over(value: float, count: float) -> float | None:
    return float(value / count) if count else None


class Meter:
    """Counts of a run, kept on the host, saved with every checkpoint.

    Reports stay on the device until `settle`, which the loop calls one step behind, so that the device never waits
    for the host. Numbers are added in the order of steps in float64: a resumed run adds the same numbers.
    """

    def __init__(self, config: Config, *, flops_per_token: float, peak: float | None, saved: dict | None = None):
        """Args: `peak` FLOP/s of all devices together, None where unknown; `saved` is `to_json`'s dictionary."""
        self._config, self._flops_per_token, self._peak = config, flops_per_token, peak
        self._names = [m.name for m in config.data.modalities]
        self._total = {"tokens": [0] * len(self._names), "wall_seconds": 0.0}
        self._interval: dict[str, Any] = {}
        if saved is not None:
            self._total, self._interval = saved["total"], {k: np.asarray(v) for k, v in saved["interval"].items()}
        self._pending: list[tuple[int, StepReport]] = []
        self._started = self._last_record = time.perf_counter()
        self._steps_timed = 0

    def add(self, step: int, report: StepReport) -> None:
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

    def _count(self, report: StepReport) -> None:
        self._steps_timed += 1
        tokens = [int(n) for n in report.tokens_M]
        self._total["tokens"] = [a + b for a, b in zip(self._total["tokens"], tokens, strict=True)]
        self._sum("steps", 1)
        self._sum("tokens_M", report.tokens_M)
        if not report.finite:
            return
        self._sum("finite_steps", 1)
        self._sum("nats_M", report.sums.cross_entropy_M)
        self._sum("weight_M", report.sums.weight_M)
        self._sum("square_log_partition", report.sums.square_log_partition)
        self._sum("taken_M3", report.taken_M3)
        self._sum("grad_norm", report.grad_norm)
        self._sum("predicted_M4", report.predicted_M4)
        if report.grad_norm_router is not None:
            self._sum("grad_norm_router", report.grad_norm_router)
        for name, value in report.routing_losses.items():
            self._sum(f"routing_{name}", value)

    def _sum(self, name: str, value: Any) -> None:
        self._interval[name] = self._interval.get(name, 0.0) + np.asarray(value, np.float64)

    def record(self, step: int, learning_rate: float, epochs: dict[str, float]) -> dict[str, Any]:
        """The train record of `step`, means over the steps since the last one; begins a new interval."""
        seen, self._interval = self._interval, {}
        record: dict[str, Any] = {"kind": "train", "step": step, **self._losses(seen)}
        record["learning_rate"] = learning_rate
        record |= self._cumulative()
        record |= {f"epoch_{name}": float(value) for name, value in epochs.items()}
        record |= self._speed(seen)
        return record | self._routing(seen)

    def _losses(self, seen: dict[str, Any]) -> dict[str, Any]:
        """Losses weighted by token, norms and routing losses by step; None where every update was skipped."""
        zero_M, steps = np.zeros(len(self._names)), seen.get("finite_steps", 0.0)
        nats_M, weight_M = seen.get("nats_M", zero_M), seen.get("weight_M", zero_M)
        losses = {"loss": _over(nats_M.sum(), weight_M.sum())}
        losses |= {f"loss_{n}": _over(a, w) for n, a, w in zip(self._names, nats_M, weight_M, strict=True)}
        square = _over(seen.get("square_log_partition", 0.0), weight_M.sum())
        losses["z_loss"] = None if square is None else self._config.train.z_loss * square
        losses["grad_norm"] = _over(seen.get("grad_norm", 0.0), steps)
        losses["grad_norm_router"] = _over(seen["grad_norm_router"], steps) if "grad_norm_router" in seen else None
        routing = sorted(name for name in seen if name.startswith("routing_"))
        return losses | {name: _over(seen[name], steps) for name in routing}

    def _cumulative(self) -> dict[str, Any]:
        tokens = self._total["tokens"]
        record = {"tokens": sum(tokens)} | {f"tokens_{n}": t for n, t in zip(self._names, tokens, strict=True)}
        return record | {"flops": sum(tokens) * self._flops_per_token, "wall_seconds": self.wall_seconds()}

    def _speed(self, seen: dict[str, Any]) -> dict[str, Any]:
        """Speed of this process since its last record."""
        now = time.perf_counter()
        seconds, self._last_record = now - self._last_record, now
        steps, self._steps_timed = max(self._steps_timed, 1), 0
        per_step = seconds / steps
        speed = float(np.sum(seen["tokens_M"]) / seen["steps"] / per_step)
        mfu = None if self._peak is None else speed * self._flops_per_token / self._peak
        return {"step_seconds": per_step, "tokens_per_second": speed, "mfu": mfu}

    def _routing(self, seen: dict[str, Any]) -> dict[str, Any]:
        """Quota fill, and shares of (token, layer) pairs taken by 0, 1, 2+ experts."""
        groups = self._config.train.batch_rows // self._config.data.group_rows
        record = {}
        for m, (name, quota) in enumerate(zip(self._names, self._config.quotas, strict=True)):
            record[f"fill_{name}"] = float(seen["tokens_M"][m] / (seen["steps"] * groups * quota))
            taken_3 = seen["taken_M3"][m] if "taken_M3" in seen else np.zeros(3)
            for label, taken in zip(("0", "1", "2plus"), taken_3, strict=True):
                record[f"taken_{name}_{label}"] = _over(taken, taken_3.sum())
        if self._config.model.auxiliary:
            record |= prediction_figures(seen.get("predicted_M4", np.zeros((len(self._names), 4))), self._names)
        return record

    def timed(self, work: Callable[[], Any]) -> Any:
        """Does `work` (compiling, evaluation) without counting its time as that of steps."""
        before = time.perf_counter()
        result = work()
        self._last_record += time.perf_counter() - before
        return result

    def wall_seconds(self) -> float:
        """Seconds so far, compiling, evaluation and what restarts repeated included."""
        return self._total["wall_seconds"] + time.perf_counter() - self._started

    def to_json(self) -> dict[str, Any]:
        """Plain values that continue this meter exactly; call after `settle`."""
        total = self._total | {"wall_seconds": self.wall_seconds()}
        return {"total": total, "interval": {name: value.tolist() for name, value in self._interval.items()}}
