"""The runs of a study: which there are, where they live, and how far each is. No JAX."""

from __future__ import annotations

import dataclasses
import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moma_jax.checks import resolve
from moma_jax.config import Config
from moma_jax.config_json import as_recorded, from_json
from moma_jax.cost import total_steps
from moma_jax.errors import InputError, require
from moma_jax.fields import differences
from moma_jax.runs.status import read_status
from moma_jax.storage.directory import Directory
from moma_jax.studies.matching import Matched, match_variants
from moma_jax.studies.study import Study


@dataclass(frozen=True)
class Job:
    """One run of a study; independent of all others but for the store that they read."""

    name: str
    """The last part of its directory: VARIANT-SEED, with the size before the seed where there are several sizes, and
    then with xBUDGET for further budgets."""
    variant: str
    """Name of the variant."""
    size: str
    """Name of the size."""
    seed: int
    """Seed of weights, noise and order of documents."""
    config: Config
    """The run, resolved; `run.dir` is its directory."""
    seed_run: Config | None
    """The run that an upcycled one begins from, in the directory of the same name with -seed."""
    budget: float = 1.0
    """Share of the study's budget that it has; other than 1 for further runs of the baseline and for trials."""
    waits: bool = False
    """A field of its config is still to be chosen by trials (`studies.sweep`)."""

    @property
    def runs(self) -> list[Config]:
        """What is trained, in order."""
        return [self.config] if self.seed_run is None else [self.seed_run, self.config]


def jobs(study: Study, matched: list[Matched] | None = None, chosen: Mapping[tuple[str, str], Any] = {}) -> list[Job]:
    """The jobs of a study in the order in which they are run: seeds outermost, then sizes, then variants.

    The trials of a sweep are not among them (`studies.sweep`); where they are unfinished, jobs have `waits`.

    Args:
      matched: `match_variants(study, chosen)`, where it is at hand.
      chosen: values of the sweep's field by (variant, size), `studies.sweep.chosen_values(study)`.

    Raises:
      InputError: as `match_variants`; or two runs would live in one directory.
    """
    matched = match_variants(study, chosen) if matched is None else matched
    found = [_job(study, each, seed, chosen) for seed in study.seeds for each in matched]
    places = [run.run.dir for job in found for run in job.runs]
    twice = next((place for place in places if places.count(place) > 1), None)
    require(twice is None, f"study.variants: two runs would live in {twice}; rename a variant or a size")
    return found


def _job(study: Study, matched: Matched, seed: int, chosen: Mapping[tuple[str, str], Any]) -> Job:
    size = [matched.size] if len(study.sizes) > 1 else []
    budget = [] if matched.budget == 1 else [f"x{matched.budget:g}"]
    name = "-".join((matched.variant.name, *size, *budget, str(seed)))
    where = f"{study.dir.rstrip('/')}/{name}"
    seed_run = None if matched.seed_run is None else _placed(matched.seed_run, f"{where}-seed", seed)
    waits = study.sweep is not None and (matched.variant.name, matched.size) not in chosen
    config = _placed(matched.config, where, seed)
    return Job(name, matched.variant.name, matched.size, seed, config, seed_run, matched.budget, waits)


def _placed(config: Config, where: str, seed: int) -> Config:
    return resolve(
        dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, seed=seed),
            train=dataclasses.replace(config.train, seed=seed),
            run=dataclasses.replace(config.run, dir=where),
        )
    )


def require_same_config(written: Any, config: Config, where: str, remedy: str = "dir") -> Config:
    """The config with what was decided when the run began; InputError where a run's config.json, its content or bytes,
    says another run.

    Args:
      where: what holds it, for the message. remedy: the study's field that another value would mend, too.
    """
    try:
        before = from_json(json.loads(written) if isinstance(written, bytes) else written)
    except ValueError as error:
        raise InputError(f"{where}: its config.json is damaged ({error}); restore it") from error
    if config.model.dtype == "auto":  # decided when it began, by the hardware
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=before.model.dtype))
    if changed := differences(as_recorded(before), as_recorded(config)):
        raise InputError(
            f"{where} holds a run with another config ({'; '.join(changed)}); change the study back, or give it "
            f"another {remedy}"
        )
    return config


# How far each is ------------------------------------------------------------------------------------------------------


def state(job: Job) -> dict[str, Any]:
    """Where a job stands: {"state", "step", "total"}, updates of the seed run included.

    state is new, running, stopped, failed or complete; a run whose process was killed is stopped.
    """
    done, total, word = 0, sum(map(total_steps, job.runs)), "new"
    for config in job.runs:
        status = read_status(config.run.dir)
        done += status.get("step", 0)
        word = status.get("state", word if word == "new" else "stopped")
        word = "stopped" if word == "running" and not trained_elsewhere(config.run.dir) else word
        if word != "complete":
            break
    return {"state": word, "step": done, "total": total}


def trained_elsewhere(path: str) -> bool:
    """Whether another process holds the run directory (`RunDir.locked`); always False for one in an object store."""
    local = Directory(path).local
    if local is None:
        return False
    try:
        file = open(f"{local}/.lock")  # noqa: SIM115
    except OSError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def chosen(found: list[Job], index: int | None, where: str = "--index") -> list[Job]:
    """All jobs, or the one of this number, which `where` said."""
    if index is None:
        return found
    if not 0 <= index < len(found):
        raise InputError(f"{where}: {index} is no job of this study; give 0 to {len(found) - 1}, see --list")
    return [found[index]]
