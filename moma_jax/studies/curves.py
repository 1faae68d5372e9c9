"""What a report knows of a run: its files, and its losses as curves over FLOPs, tokens and wall time."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np

from moma_jax.by_token import LOADS
from moma_jax.config_json import of_this_format
from moma_jax.errors import InputError
from moma_jax.evaluation.documents import read_documents
from moma_jax.fields import Count, read_file
from moma_jax.router import CAUSAL_ROUTINGS
from moma_jax.runs.directory import RunDir
from moma_jax.runs.journal import METRICS, SCHEMA, records_of
from moma_jax.runs.status import read_status
from moma_jax.studies.jobs import trained_elsewhere

WINDOW = 0.1
"""Share of the FLOPs so far that a smoothed training loss is the mean of; at the end: the last tenth of the run.

A window that grows with the run keeps curves comparable that differ in speed alone: one that gets everywhere c times
sooner is c times sooner after smoothing too, which no window of a fixed number of updates can say.
"""
OVERALL = ""
"""The modality of a loss over all of them."""
OWN = "own"
"""In place of a routing: each run's own causal one, by thresholds where it has several."""
NEW = "new"
"""The state of a run that has not begun."""


class Measure(NamedTuple):
    """Which loss: `kind` "train" or "eval", the set and routing of an evaluation, a modality or OVERALL.

    The routing of "train" is the one that the run trains under.
    """

    kind: str
    eval_set: str
    routing: str
    modality: str


class Curve(NamedTuple):
    """A loss along a run, nats per token; all float64 (N,), cumulative counts from the beginning of its seed run."""

    step_N: np.ndarray
    tokens_N: np.ndarray
    flops_N: np.ndarray
    seconds_N: np.ndarray
    loss_N: np.ndarray


class Spent(NamedTuple):
    """Updates, tokens, FLOPs and wall seconds."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Run:
    """A run directory as the report reads it.

    Attributes:
      variant, size, seed: its place in the study.
      path: the run directory.
      state: status.json's; NEW without one; stopped where its process was killed.
      step, total: updates made and wanted, those of an upcycled run's seed included, as far as known.
      config, summary: the content of config.json and summary.json, {} where there is none.
      start: what an upcycled run's seed had spent when the run began; zero for others.
      end: what was spent by the last train record, `start` included.
      curves: by measure, as recorded; empty without records.
      unrouted: the routing under which a run whose experts need not choose was evaluated: its losses are those under
        every routing. None where they choose.
      tokens_per_second: median over the train records; None without any.
      loads: under a rule by token, `by_token.LOADS` by group of experts, means over the last WINDOW of the updates.
      left_out: the share of (token, layer) pairs that no expert took, by modality, the same mean.
      documents: of the last evaluation, by (set, routing): by (store, document): by modality the nats and the weight of
        its targets; empty where the run has none.
      budget: share of the study's budget that it has.
    """

    variant: str
    size: str
    seed: int
    path: str
    state: str
    step: int
    total: int | None
    config: dict[str, Any]
    summary: dict[str, Any]
    start: Spent
    end: Spent
    curves: dict[Measure, Curve]
    unrouted: str | None
    tokens_per_second: float | None
    loads: dict[str, dict[str, float]]
    left_out: dict[str, float]
    documents: dict[tuple[str, str], dict[tuple[int, int], dict[str, tuple[float, float]]]]
    budget: float = 1.0

    @property
    def finished(self) -> bool:
        """Whether it trained to its end."""
        return self.state == "complete"

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities it records losses of."""
        return [m.modality for m in self.curves if m.kind == "train" and m.modality != OVERALL]

    @property
    def config_hash(self) -> str | None:
        """Of config.json without `run` and `hosts`, which say where it ran and not what."""
        what = {k: v for k, v in self.config.items() if k not in ("run", "hosts")}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12] if what else None

    def training(self, modality: str = OVERALL) -> Curve | None:
        """The training loss as recorded."""
        return next((c for m, c in self.curves.items() if m.kind == "train" and m.modality == modality), None)

    @property
    def routings(self) -> set[str]:
        """Those that it was evaluated under."""
        return {m.routing for m in self.curves if m.kind == "eval"}

    def recorded_as(self, routing: str) -> str | None:
        """The name under which the run has what another calls `routing`, or OWN; None where it has no causal one."""
        if self.unrouted:  # whose losses are the same under every routing
            return self.unrouted
        return routing if routing != OWN else next((r for r in reversed(CAUSAL_ROUTINGS) if r in self.routings), None)

    def held_out(self, eval_set: str, routing: str, modality: str = OVERALL) -> Curve | None:
        """The loss on an evaluation set."""
        return self.curves.get(Measure("eval", eval_set, self.recorded_as(routing) or "", modality))


def _unrouted(records: list[dict[str, Any]]) -> str | None:
    """The routing of training, where losses under it are recorded as causal ones: with their perplexity."""
    causal = (r["routing"] for r in records if r["kind"] == "eval" and "perplexity" in r)
    return next((routing for routing in causal if routing not in CAUSAL_ROUTINGS), None)


def _training_routing(config: dict[str, Any]) -> str:
    """The routing rule of training by its name."""
    router = config.get("model", {}).get("router", {})
    return str(router.get("rule", "choice")) if isinstance(router, dict) else "choice"


def read_run(variant: str, size: str, seed: int | None, path: str) -> Run:
    """Reads a run directory: status.json, summary.json, metrics.jsonl, config.json, and ancestry.json if upcycled.

    Args:
      seed: None: the config's `train.seed`.

    Raises:
      InputError: a file is damaged or of another format, or a complete run has no records.
    """
    home = RunDir(path)
    status, summary = read_status(path), _content(home, "summary.json", Summary)
    config = of_this_format(_content(home, "config.json", Recorded))
    start, records = _start(home), _records(home)
    train = [r for r in records if r["kind"] == "train"]
    curves = _curves(records, start, _training_routing(config))
    state = status.get("state", NEW)
    if state == "running" and not trained_elsewhere(path):
        state = "stopped"
    trained = any(m.kind == "train" and m.modality == OVERALL for m in curves)
    if state == "complete" and not (trained and summary):
        lost = "summary.json" if trained else f"training losses in {METRICS}"
        raise InputError(f"{path}: a complete run without {lost}; restore the file")
    if state == "complete":
        _require_whole(path, curves, start.step + status["total"] if "total" in status else None)
    speeds = [r["tokens_per_second"] for r in train if r.get("tokens_per_second") is not None]
    return Run(
        variant=variant,
        size=size,
        seed=_seed(config) if seed is None else seed,
        path=path,
        state=state,
        step=start.step + status.get("step", 0),
        total=start.step + status["total"] if "total" in status else None,
        config=config,
        summary=summary,
        start=start,
        end=_end(start, train),
        curves=curves,
        unrouted=_unrouted(records),
        tokens_per_second=float(np.median(speeds)) if speeds else None,
        loads=_loads(train),
        left_out=_last_means(train, "taken_", "_0"),
        documents=read_documents(home) if state == "complete" else {},
    )


def smoothed(curve: Curve, start: float = 0.0) -> Curve:
    """The training loss as a mean over the last WINDOW of the FLOPs so far, none before `start` (FLOPs).

    A record is the mean over the updates since the one before, so the sum of loss times FLOPs is known at every record
    and linear between them.
    """
    edges = np.concatenate([[start], curve.flops_N])
    total = np.concatenate([[0.0], np.cumsum(curve.loss_N * np.diff(edges))])
    begin_N = np.maximum(start, (1 - WINDOW) * curve.flops_N)
    loss_N = (total[1:] - np.interp(begin_N, edges, total)) / (curve.flops_N - begin_N)
    return curve._replace(loss_N=loss_N)


# Reading --------------------------------------------------------------------------------------------------------------

Plain = dict[str, Any]


class Recorded(TypedDict):
    """config.json, as far as reports look at it where this version cannot read it as a config."""

    model: NotRequired[Plain]
    data: NotRequired[Plain]
    optimizer: NotRequired[Plain]
    train: NotRequired[Plain]


class Summary(TypedDict):
    """summary.json, as far as reports and pages read it."""

    device: NotRequired[Plain]
    versions: NotRequired[dict[str, str]]
    time: NotRequired[dict[str, float]]
    command: NotRequired[str]
    commit: NotRequired[str | None]


class Ancestry(TypedDict):
    """ancestry.json, as far as it is read: what its seed had spent, in the order of `Spent`."""

    seed_step: Count
    seed_real_tokens: Count
    seed_real_flops: float
    seed_wall_seconds: float


def _content(home: RunDir, file: str, kind: type) -> dict[str, Any]:
    """The content of a file, empty without one; InputError where it is damaged."""
    return read_file(kind, home.read_json(file) or {}, f"{home.path}/{file}")


def _seed(config: dict[str, Any]) -> int:
    """The config's `train.seed`."""
    seed = config.get("train", {}).get("seed", 0)
    return seed if type(seed) is int else 0


def _require_whole(path: str, curves: dict[Measure, Curve], total: int | None) -> None:
    """InputError where a complete run's last records are lost: a loss inside the run would pass for its final one."""
    last = max(curve.step_N[-1] for measure, curve in curves.items() if measure.kind == "train")
    last = last if total is None else total
    for measure, curve in curves.items():
        if curve.step_N[-1] < last:
            what = f"{measure.eval_set} ({measure.routing})" if measure.kind == "eval" else "training"
            raise InputError(
                f"{path}/{METRICS}: the records of {what} end at step {curve.step_N[-1]:.0f} of {last:.0f}, and the "
                "run is complete; restore the file"
            )


def _records(home: RunDir) -> list[dict[str, Any]]:
    """Train and eval records; InputError where they are not what this version writes."""
    records = [r for r in records_of(home) or [] if r["kind"] in ("train", "eval")]
    for record in records:
        if record.get("schema") != SCHEMA:
            raise InputError(f"{home.path}/{METRICS}: schema {record.get('schema')!r}; this moma_jax reads {SCHEMA}")
        counts = ("tokens", "flops", "wall_seconds") if record["kind"] == "train" else ()
        missing = [name for name in counts if record.get(name) is None] + ["loss"] * ("loss" not in record)
        if missing:
            raise InputError(
                f"{home.path}/{METRICS}: step {record['step']}: no {missing[0]}; not a record of moma train"
            )
    steps = [r["step"] for r in records if r["kind"] == "train"]
    if any(b <= a for a, b in zip(steps, steps[1:], strict=False)):
        raise InputError(f"{home.path}/{METRICS}: its steps do not rise; it is damaged, restore it")
    return records


def _start(home: RunDir) -> Spent:
    """What ancestry.json says that the seed of an upcycled run had spent, as its journal counted it."""
    ancestry = home.read_json("ancestry.json")
    if ancestry is None:
        return Spent()
    ancestry = read_file(Ancestry, ancestry, f"{home.path}/ancestry.json")
    return Spent(*(ancestry[name] for name in Ancestry.__annotations__))


def _end(start: Spent, train: list[dict[str, Any]]) -> Spent:
    """What was spent by the last train record."""
    if not train:
        return start
    last = [train[-1][name] for name in ("step", "tokens", "flops", "wall_seconds")]
    return Spent(*(begun + more for begun, more in zip(start, last, strict=True)))


def _loads(train: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How full experts were, by group of experts."""
    found: dict[str, dict[str, float]] = {}
    for figure in LOADS:
        for group, mean in _last_means(train, f"routing_{figure}_").items():
            found.setdefault(group, {})[figure] = mean
    return found


def _last_means(train: list[dict[str, Any]], begun: str, ended: str = "") -> dict[str, float]:
    """Means over the last WINDOW of the updates, by what is left of the names; a record is the mean over the updates
    since the one before."""
    steps = np.array([0, *(r["step"] for r in train)])
    last = [(r, n) for r, n in zip(train, np.diff(steps), strict=True) if r["step"] > (1 - WINDOW) * steps[-1]]
    found = {}
    for name in (name for name in (train[-1] if train else ()) if name.startswith(begun) and name.endswith(ended)):
        known = [(r[name], n) for r, n in last if r.get(name) is not None]
        if known:
            mean = np.average([value for value, _ in known], weights=[n for _, n in known])
            found[name.removeprefix(begun).removesuffix(ended)] = float(mean)
    return found


def _curves(records: list[dict[str, Any]], start: Spent, routing: str) -> dict[Measure, Curve]:
    """Every recorded loss; evaluations take their tokens, FLOPs and seconds from the train records around them."""
    train = [r for r in records if r["kind"] == "train"]
    if not train:
        return {}
    steps = np.array([0, *(r["step"] for r in train)], np.float64)
    counts = [
        begun + np.array([0.0, *(r[name] for r in train)], np.float64)
        for name, begun in (("tokens", start.tokens), ("flops", start.flops), ("wall_seconds", start.seconds))
    ]
    modalities = [n.removeprefix("loss_") for n in train[0] if n.startswith("loss_") and f"tokens_{n[5:]}" in train[0]]
    points: dict[Measure, list[tuple[float, float]]] = {}
    for record in records:
        evaluated = record["kind"] == "eval"
        about = ("eval", record["eval_set"], record["routing"]) if evaluated else ("train", "", routing)
        for modality in (OVERALL, *modalities):
            loss = record.get(f"loss_{modality}" if modality else "loss")
            if loss is not None and record["step"] > 0:
                points.setdefault(Measure(*about, modality), []).append((record["step"], loss))
    curves = {}
    for measure, found in points.items():
        step_N, loss_N = np.array(found, np.float64).T
        curves[measure] = Curve(start.step + step_N, *(np.interp(step_N, steps, count) for count in counts), loss_N)
    return curves
