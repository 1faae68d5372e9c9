"""A field that every variant of a study chooses for itself, such as its learning rate: trial runs, and what they say.

Trials are runs of their own: a share of the budget, a seed of their own, and judged on documents that they keep from
training (`data.tuning`). The runs that count train on all training documents, with the values that won. No JAX.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from moma_jax.config import EvalSet
from moma_jax.data.tuning import TUNING
from moma_jax.errors import InputError
from moma_jax.runs.journal import SKIPPED, read_metrics
from moma_jax.runs.status import read_status
from moma_jax.storage.directory import Directory
from moma_jax.studies.jobs import Job, jobs
from moma_jax.studies.records import unpack
from moma_jax.studies.study import Study, check_study

Place = tuple[str, str]
"""(variant, size)."""


class Tried(NamedTuple):
    """What the trials of one variant at one size say.

    Attributes:
      value_K: what was tried. loss_K: nats per token on the tuning split, None of trials that are not finished.
    """

    variant: str
    size: str
    value_K: tuple[Any, ...]
    loss_K: tuple[float | None, ...]

    @property
    def best(self) -> Any:
        """The value of the least loss; None while a trial is missing, and where no loss is a number."""
        if None in self.loss_K or not any(map(math.isfinite, self.loss_K)):
            return None
        return min(zip(self.loss_K, self.value_K, strict=True), key=lambda each: each[0])[1]

    @property
    def at_edge(self) -> bool:
        """Whether the best value is the first or the last of several: a better one may lie beyond."""
        return len(self.value_K) > 1 and self.best is not None and self.best in (self.value_K[0], self.value_K[-1])


def trials(study: Study) -> list[Job]:
    """The trial runs, variants outermost; none without a sweep. Their names end in the value that is tried."""
    check_study(study)
    sweep, found = study.sweep, []
    for value in sweep.values if sweep else ():
        overrides = {
            sweep.field: value,
            "data.tuning": sweep.tuning,
            "train.eval_sets": (EvalSet(TUNING, split=TUNING, rows=sweep.rows, every=10**9),),
            "train.eval_routings": (),
            "train.on_nan": "skip",  # a value that diverges is a result
            "train.samples": (),
        }
        of_value = dataclasses.replace(
            study,
            sweep=None,
            budgets=(),
            seeds=(sweep.seed,),
            tokens=None if study.tokens is None else study.tokens * sweep.share,
            flops=None if study.flops is None else study.flops * sweep.share,
            sizes={size: {**own, **overrides} for size, own in study.sizes.items()},
        )
        for job in jobs(of_value):
            name = job.name.removesuffix(str(sweep.seed)) + f"trial-{value}"
            found.append(_renamed(job, f"{study.dir.rstrip('/')}/{name}", name, sweep.share))
    order = [variant.name for variant in study.variants]
    return sorted(found, key=lambda job: (order.index(job.variant), list(study.sizes).index(job.size)))


def _renamed(job: Job, where: str, name: str, budget: float) -> Job:
    def placed(config, where):
        return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=where))

    seed_run = None if job.seed_run is None else placed(job.seed_run, f"{where}-seed")
    return dataclasses.replace(job, name=name, config=placed(job.config, where), seed_run=seed_run, budget=budget)


def tried(study: Study) -> list[Tried]:
    """What the trials say so far, by variant and size."""
    by_place: dict[Place, list[Job]] = {}
    for job in trials(study):
        by_place.setdefault((job.variant, job.size), []).append(job)
    stop = study.base.train.on_nan == "stop"
    return [
        Tried(*place, study.sweep.values, tuple(_loss(job, stop) for job in group)) for place, group in by_place.items()
    ]


def chosen_values(study: Study) -> dict[Place, Any]:
    """The best value of every variant and size whose trials are all finished."""
    return {(each.variant, each.size): each.best for each in tried(study) if each.best is not None}


def _loss(job: Job, stop: bool) -> float | None:
    """A finished trial's loss under the routing that it trained with; infinite where its value is of no use.

    Args: `stop` says that an update that is not finite would have ended a run that counts.
    """
    where = job.config.run.dir
    if read_status(where).get("state") != "complete":
        return None
    summary = Directory(where).read_json("summary.json") or {}
    try:
        loss = summary["eval"][TUNING][job.config.model.router.training_name]["loss"]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{where}/summary.json: no loss on the set {TUNING}; restore the file, or remove the run"
        ) from error
    diverged = stop and any(record.get("event") == SKIPPED for record in read_metrics(where))
    return math.inf if loss is None or diverged else float(loss)


def settled_jobs(study: Study) -> list[Job]:
    """The runs that count, with the values that finished trials chose; recorded runs are unpacked for it."""
    for find in (lambda: trials(study), lambda: jobs(study, chosen=chosen_values(study))):
        found = find()
        for job in found if study.records else ():
            unpack(study.records, job)
    return found


def all_jobs(study: Study) -> list[Job]:
    """Every run of a study, trials first, as --list and --index number them."""
    return [*trials(study), *settled_jobs(study)]
