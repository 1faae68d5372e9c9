"""Whether runs may be compared, their final losses, and every speed-up factor of a study."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from moma_jax.config import Config
from moma_jax.errors import InputError
from moma_jax.fields import may_change
from moma_jax.router import CAUSAL_ROUTINGS
from moma_jax.studies.curves import OVERALL, OWN, Curve, Run, smoothed
from moma_jax.studies.speedup import PowerLaw, Speedup, power_law, speedup
from moma_jax.studies.verdicts import Etas, Verdict, document_interval, etas, pairs, verdict

MAY_CHANGE = may_change(Config)
SIZES_FOR_A_LAW = 3


class Loss(NamedTuple):
    """A loss: its title, whether variants are compared by it, and how to get it of a run as a curve (None without)."""

    title: str
    compared: bool
    of: Callable[[Run, str], Curve | None]


class Final(NamedTuple):
    """Final losses of a variant by modality, one per seed that has one."""

    variant: str
    size: str
    loss: Loss
    by_modality: dict[str, list[float]]


class Compared(NamedTuple):
    """A variant against the baseline, by one loss of one modality.

    Attributes:
      seeds: those that both have.
      flops: eta. seconds: the same by wall time.
      points: of the shortest curve.
      differences: of final losses, variant less baseline, by seed.
    """

    variant: str
    size: str
    loss: Loss
    modality: str
    seeds: tuple[int, ...]
    flops: Speedup
    seconds: Speedup
    points: int
    differences: tuple[float, ...]


class Finished(NamedTuple):
    """The finished runs of a study.

    Attributes:
      by_place: runs of the budget by (size, variant), in the order of the report, each by seed.
      ladder: the baseline's runs of all budgets by size and seed.
    """

    baseline: str
    by_place: dict[tuple[str, str], dict[int, Run]]
    ladder: dict[str, dict[int, list[Run]]]

    @property
    def runs(self) -> list[Run]:
        """All of them."""
        return [run for group in self.by_place.values() for run in group.values()]


def grouped(runs: list[Run], baseline: str) -> Finished:
    """The finished ones among `runs` by size and variant; InputError where none of the baseline is."""
    by_place: dict[tuple[str, str], dict[int, Run]] = {}
    ladder: dict[str, dict[int, list[Run]]] = {}
    for run in (run for run in runs if run.finished):
        if run.budget == 1:
            by_place.setdefault((run.size, run.variant), {})[run.seed] = run
        if run.variant == baseline:
            ladder.setdefault(run.size, {}).setdefault(run.seed, []).append(run)
    if not any(variant == baseline for _, variant in by_place):
        raise InputError(f"no finished run of {baseline}, the baseline, so there is nothing to compare with; train it")
    return Finished(baseline, by_place, ladder)


# Fairness -------------------------------------------------------------------------------------------------------------

DATA = ("data", "train.batch_rows", "train.eval_sets")
"""Parts of a config that decide which tokens a run saw and was evaluated on."""


def require_comparable(finished: Finished, tolerance: float) -> None:
    """InputError where a run has other FLOPs or other data than the baseline of its size and seed."""
    for (size, _), group in finished.by_place.items():
        baseline = finished.by_place.get((size, finished.baseline), {})
        for seed, run in group.items():
            reference = baseline.get(seed) or next(iter(baseline.values()), run)
            _require_same_flops(run, reference, tolerance)
            _require_same_data(run, reference)
        for runs in finished.ladder.get(size, {}).values():
            for run in runs:
                _require_same_data(run, next(iter(baseline.values()), run))


def _require_same_flops(run: Run, reference: Run, tolerance: float) -> None:
    ours, theirs = run.end.flops, reference.end.flops
    if abs(ours / theirs - 1) > tolerance:
        raise InputError(
            f"unequal budgets: {run.path} spent {ours:.4g} FLOPs, {reference.path} {theirs:.4g}, and the tolerance is "
            f"{tolerance:g}; compare runs of one budget"
        )


def _require_same_data(run: Run, reference: Run) -> None:
    """Runs of different seeds have the same data in another order."""
    order = "data.seed " if run.seed != reference.seed else None
    for part in DATA:
        section, _, field = part.partition(".")
        ours, theirs = (r.config.get(section) for r in (run, reference))
        if field and ours is not None and theirs is not None:
            ours, theirs = ours.get(field), theirs.get(field)
        found = _differences(ours, theirs, part)
        if difference := next((d for d in found if order is None or not d.startswith(order)), None):
            raise InputError(f"different data: {run.path} and {reference.path}: {difference}; compare runs on the same")


def _differences(ours: Any, theirs: Any, path: str) -> Iterator[str]:
    """Leaves of two JSON values that differ; fields that only one of two versions has say nothing."""
    if isinstance(theirs, tuple):  # of a config that was not read from JSON
        theirs = list(theirs)
    if ours == theirs or path in MAY_CHANGE:
        return
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in sorted(ours.keys() & theirs.keys()):
            yield from _differences(ours[name], theirs[name], f"{path}.{name}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(*pair, f"{path}.{i}")
    else:
        yield f"{path} is {_short(ours)} and {_short(theirs)}"


def _short(value: Any) -> str:
    return f"{len(value)} items" if isinstance(value, list) else str(value)[:60]


# Losses ---------------------------------------------------------------------------------------------------------------


def eval_sets(finished: Finished) -> list[str]:
    """Names of the evaluation sets, in the order of the records."""
    return list(dict.fromkeys(m.eval_set for run in finished.runs for m in run.curves if m.kind == "eval"))


def modalities(finished: Finished) -> list[str]:
    """OVERALL and the modalities of the runs."""
    return list(dict.fromkeys([OVERALL, *(m for run in finished.runs for m in run.modalities)]))


def losses(finished: Finished) -> list[Loss]:
    """The training loss, smoothed, then those of every evaluation set under every routing that a run recorded."""
    found = [Loss("training", False, _training)]
    recorded = set().union(*(run.routings for run in finished.runs))
    causal = [routing for routing in reversed(CAUSAL_ROUTINGS) if routing in recorded]
    compared = causal_routings(finished.runs)
    for name in eval_sets(finished):
        for routing in dict.fromkeys([*sorted(recorded - set(causal)), *causal, *compared]):
            title = f"{name}, {routing}"
            found.append(Loss(title, routing in compared, lambda run, m, n=name, r=routing: run.held_out(n, r, m)))
    return found


def causal_routings(runs: Iterable[Run]) -> list[str]:
    """The causal routings by which runs are compared: those that were recorded, and OWN where the runs have none in
    common. Beside it nobody needs a routing that is the own one of every run that has it."""
    known = [(own, run.routings) for run in runs if not run.unrouted and (own := run.recorded_as(OWN))]
    causal = [routing for routing in reversed(CAUSAL_ROUTINGS) if any(routing in names for _, names in known)]
    if not known or any(all(routing in names for _, names in known) for routing in causal):
        return causal
    return [*(r for r in causal if any(r in names and r != own for own, names in known)), OWN]


def measured(finished: Finished) -> list[Loss]:
    """Those of `losses` that eta is stated for: training, and held out under causal routings.

    Where no variant has routers every routing is the same, and so causal.
    """
    every = losses(finished)
    compared = [loss for loss in every if loss.compared]
    if not compared and all(run.unrouted for run in finished.runs):
        compared = every[1:]
    return [every[0], *compared]


def _training(run: Run, modality: str) -> Curve | None:
    curve = run.training(modality)
    return None if curve is None else smoothed(curve, run.start.flops)


def final_losses(finished: Finished) -> list[Final]:
    """Of every variant and size by every loss; variants without it are left out."""
    found = []
    for loss in losses(finished):
        for (size, variant), group in finished.by_place.items():
            curves = {m: [c for run in group.values() if (c := loss.of(run, m))] for m in modalities(finished)}
            if curves[OVERALL]:
                by_modality = {m: [float(c.loss_N[-1]) for c in of_seeds] for m, of_seeds in curves.items()}
                found.append(Final(variant, size, loss, by_modality))
    return found


# Speed-up -------------------------------------------------------------------------------------------------------------


def speedups(finished: Finished) -> list[Compared]:
    """Eta of every variant over the baseline of its size, by every measured loss and modality."""
    found = []
    for loss in measured(finished):
        for size, variant in finished.by_place:
            baseline = finished.by_place.get((size, finished.baseline))
            if variant == finished.baseline or baseline is None:
                continue
            for modality in modalities(finished):
                compared = _compared(loss, modality, baseline, finished.by_place[size, variant])
                found += [] if compared is None else [compared]
    return found


def _compared(loss: Loss, modality: str, baseline: dict[int, Run], group: dict[int, Run]) -> Compared | None:
    """None where no seed has the loss in both."""
    shared = [seed for seed in group if seed in baseline]
    pairs = {seed: (loss.of(baseline[seed], modality), loss.of(group[seed], modality)) for seed in shared}
    pairs = {seed: pair for seed, pair in pairs.items() if None not in pair}
    if not pairs:
        return None
    theirs, ours = (list(curves) for curves in zip(*pairs.values(), strict=True))
    first = next(iter(group.values()))
    return Compared(
        first.variant,
        first.size,
        loss,
        modality,
        tuple(pairs),
        speedup([(c.flops_N, c.loss_N) for c in theirs], [(c.flops_N, c.loss_N) for c in ours]),
        speedup([(c.seconds_N, c.loss_N) for c in theirs], [(c.seconds_N, c.loss_N) for c in ours]),
        min(len(c.loss_N) for c in theirs + ours),
        tuple(float(v.loss_N[-1] - b.loss_N[-1]) for b, v in zip(theirs, ours, strict=True)),
    )


# Verdicts -------------------------------------------------------------------------------------------------------------


class Decided(NamedTuple):
    """One thing against another by etas off finished baseline runs: `variant` by `modality` against `against`, which is
    another variant (the baseline's eta is 1) or, for two modalities of one variant, the other modality."""

    size: str
    loss: Loss
    modality: str
    variant: str
    against: str
    verdict: Verdict


class Documents(NamedTuple):
    """Final losses of two variants on the same held-out documents: difference and interval over documents."""

    size: str
    eval_set: str
    routing: str
    modality: str
    variant: str
    against: str
    seeds: tuple[int, ...]
    difference: float
    interval: tuple[float, float]


def decided(finished: Finished) -> list[Decided]:
    """Every verdict by final losses under causal routing, where the baseline has two finished budgets or more."""
    found = []
    for loss in measured(finished)[1:]:
        for size in dict.fromkeys(size for size, _ in finished.by_place):
            by_modality = {m: _etas(finished, loss, size, m) for m in modalities(finished)}
            found += _of_variants(finished.baseline, size, loss, by_modality)
            found += _of_modalities(size, loss, by_modality)
    return found


def _etas(finished: Finished, loss: Loss, size: str, modality: str) -> dict[str, Etas]:
    """Eta by variant."""

    def end(run: Run) -> tuple[float, float] | None:
        curve = loss.of(run, modality)
        return None if curve is None else (curve.flops_N[-1], curve.loss_N[-1])

    ladder = {seed: [e for run in runs if (e := end(run))] for seed, runs in finished.ladder.get(size, {}).items()}
    baseline = {seed: tuple(zip(*ends, strict=True)) for seed, ends in ladder.items() if ends}
    return {
        name: etas(baseline, {seed: e for seed, run in group.items() if (e := end(run))})
        for (s, name), group in finished.by_place.items()
        if s == size and name != finished.baseline
    }


def _of_variants(baseline: str, size: str, loss: Loss, by_modality: dict[str, dict[str, Etas]]) -> list[Decided]:
    found = []
    for modality, of_variant in by_modality.items():
        for name, against in pairs([baseline, *of_variant], baseline):
            result = verdict(of_variant[name], None if against == baseline else of_variant[against])
            found += [] if result is None else [Decided(size, loss, modality, name, against, result)]
    return found


def _of_modalities(size: str, loss: Loss, by_modality: dict[str, dict[str, Etas]]) -> list[Decided]:
    """What later modalities gain against the first, which is text."""
    found = []
    first, *others = [modality for modality in by_modality if modality != OVERALL] or [OVERALL]
    for modality in others:
        for name in by_modality[modality]:
            result = verdict(by_modality[modality][name], by_modality[first][name])
            found += [] if result is None else [Decided(size, loss, modality, name, f"its {first}", result)]
    return found


def over_documents(finished: Finished) -> list[Documents]:
    """Differences of final losses by document, means over the seeds that both variants have, under causal routings."""
    found = []
    for size in dict.fromkeys(size for size, _ in finished.by_place):
        groups = {name: group for (s, name), group in finished.by_place.items() if s == size}
        for name, against in pairs(list(groups), finished.baseline):
            if against in groups:
                found += _paired_documents(size, name, against, groups[name], groups[against])
    return found


def _paired_documents(size: str, name: str, against: str, ours: dict[int, Run], theirs: dict[int, Run]):
    seeds = [seed for seed in ours if seed in theirs and ours[seed].documents and theirs[seed].documents]
    pairs = [(ours[seed], theirs[seed]) for seed in seeds]
    runs = [run for pair in pairs for run in pair]
    sets = dict.fromkeys(eval_set for run in runs for eval_set, _ in run.documents)
    routings = causal_routings(runs)
    if runs and all(run.unrouted for run in runs):  # whatever their routings are called, a set has one loss
        routings = [runs[-1].unrouted]
    for eval_set, routing in itertools.product(sets, routings):
        both = [[run.documents.get((eval_set, run.recorded_as(routing))) for run in pair] for pair in pairs]
        if any(None in pair for pair in both):
            continue
        shared = sorted(set.intersection(*(set(of_run) for pair in both for of_run in pair)))
        for modality in (OVERALL, *runs[0].modalities):
            sums = np.array([[[_sum(of_run[d], modality) for d in shared] for of_run in pair] for pair in both])
            if sums[..., 1].any():  # (seeds, 2, D, nats and weight)
                ours_D2, theirs_D2 = sums.mean(axis=0)
                result = document_interval(ours_D2[:, 0], theirs_D2[:, 0], ours_D2[:, 1])
                yield Documents(size, eval_set, routing, modality, name, against, tuple(seeds), *result)


def _sum(of_document: dict[str, tuple[float, float]], modality: str) -> tuple[float, float]:
    """Nats and weight of one modality, or of all."""
    chosen = of_document.values() if modality == OVERALL else [of_document.get(modality, (0.0, 0.0))]
    return sum(nats for nats, _ in chosen), sum(weight for _, weight in chosen)


# Sizes ----------------------------------------------------------------------------------------------------------------


class Law(NamedTuple):
    """A power law of a variant's final loss over sizes."""

    variant: str
    loss: Loss
    modality: str
    law: PowerLaw


def power_laws(finished: Finished, tolerance: float) -> list[Law] | str:
    """One law for every variant that has enough sizes, by measured loss and modality; or why there is none."""
    budgets = [finished.by_place[p] for p in finished.by_place if p[1] == finished.baseline]
    flops = sorted(next(iter(group.values())).end.flops for group in budgets)
    distinct = [c for before, c in zip([0.0, *flops], flops, strict=False) if c > (1 + tolerance) * before]
    if len(distinct) < SIZES_FOR_A_LAW:
        return (
            f"None: a power law needs at least {SIZES_FOR_A_LAW} sizes of different budgets, and the baseline has "
            f"{len(distinct)} finished."
        )
    variants = dict.fromkeys(variant for _, variant in finished.by_place)
    cases = [(v, loss, m) for loss in measured(finished) for v in variants for m in modalities(finished)]
    return [Law(v, loss, m, law) for v, loss, m in cases if (law := _law(finished, v, loss, m)) is not None]


def _law(finished: Finished, variant: str, loss: Loss, modality: str) -> PowerLaw | None:
    points, sizes = [], 0
    for (_, name), group in finished.by_place.items():
        curves = [loss.of(run, modality) for run in group.values()] if name == variant else []
        points += [(c.flops_N[-1], c.loss_N[-1]) for c in curves if c is not None]
        sizes += any(c is not None for c in curves)
    return power_law(*np.array(points).T, sizes) if sizes >= SIZES_FOR_A_LAW else None
