"""Running a study: one run after the other in this process; others may work on the same study beside it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from moma_jax import hosts
from moma_jax.config import Config
from moma_jax.errors import InputError, RunError
from moma_jax.runs.directory import RunDir
from moma_jax.runs.progress import RunProgress
from moma_jax.runs.resume import require_resumable
from moma_jax.storage.directory import Directory
from moma_jax.studies.jobs import Job, chosen, jobs, require_same_config, state, trained_elsewhere
from moma_jax.studies.records import keep, unpack
from moma_jax.studies.study import Study, load_study
from moma_jax.studies.sweep import all_jobs, chosen_values, trials, tried
from moma_jax.training.pretrain import prepare_missing_stores, train

COMPLETE, ELSEWHERE, FAILED = "complete", "trained by another process", "failed"
SECONDS_BETWEEN_LOOKS = 5.0
"""While another process trains a trial that runs here wait for."""


def study(study: Study | str | Path, *, index: int | None = None, quiet: bool = False) -> dict[str, str]:
    """Trains the runs of a study that are not complete yet, one after the other.

    Each is an ordinary run directory below `Study.dir`. A run that was interrupted goes on; one that another process
    trains is left to it, so that several processes, or the tasks of an array job, share a study.

    Args:
      study: a study, or its file.
      index: the number of a single run, from 0, as `moma study STUDY.py --list` counts them; all where None.
      quiet: print nothing.

    Returns:
      The name of each run -> "complete" or "trained by another process".

    Raises:
      InputError: the study, or a directory that holds another run, before anything is written; or every run that
        failed did so by its input.
      RunError: runs failed; the others were made.
      SystemExit: 143 after SIGTERM, 130 after SIGINT, when the run that was going on has its checkpoint.
    """
    study = study if isinstance(study, Study) else load_study(study)
    return run_study(study, chosen(all_jobs(study), index), quiet=quiet)


def run_study(study: Study, selected: list[Job], *, quiet: bool = False) -> dict[str, str]:
    """Trains jobs of `all_jobs(study)`; see `study`. Every process of a run that has several calls it.

    Runs whose config waits for trials come after these, which are trained with them, or waited for where another
    process trains them.
    """
    hosts.join(selected[0].config.hosts)
    first = trials(study)
    runs = [job for job in selected if job not in first]
    waiting = {(job.variant, job.size) for job in runs if job.waits}
    needed = [job for job in first if job in selected or (job.variant, job.size) in waiting]
    failures: dict[str, Exception] = {}
    outcomes = _run_jobs(needed, study.records, failures, quiet)
    while waiting and (left := [job for job in needed if outcomes[job.name] == ELSEWHERE]):
        time.sleep(SECONDS_BETWEEN_LOOKS)
        outcomes |= _run_jobs(left, study.records, failures, quiet=True)
    settled = {job.name: job for job in (jobs(study, chosen=chosen_values(study)) if runs else ())}
    ready = [settled[job.name] for job in runs]
    for job in (job for job in ready if job.waits):
        outcomes[job.name], failures[job.name] = FAILED, _waits_in_vain(study, job)
    outcomes |= _run_jobs([job for job in ready if not job.waits], study.records, failures, quiet)
    _raise_for(failures, len(outcomes))
    return outcomes


def _waits_in_vain(study: Study, job: Job) -> InputError:
    """Why a run has no value of the swept field although no trial is under way."""
    losses = next(each.loss_K for each in tried(study) if (each.variant, each.size) == (job.variant, job.size))
    if None in losses:
        return InputError(f"not begun, as trials that choose its {study.sweep.field} failed")
    return InputError(f"not begun, as no trial ended with a finite loss; try other values of {study.sweep.field}")


def _run_jobs(selected: list[Job], records: str | None, failures: dict[str, Exception], quiet: bool) -> dict[str, str]:
    """Trains jobs whose configs are settled, and keeps their records; how each ended, and in `failures` why."""
    if not selected:
        return {}
    for job in selected:
        if records is not None:
            unpack(records, job)
        for config in job.runs:
            _require_same_run(config)
        if job.seed_run is not None:
            _require_upcycled(job)
    say = RunProgress(0, 0, quiet=quiet).say
    outcomes: dict[str, str] = {}
    with _signals_at_last_steps() as end_if_signalled:
        _prepare_stores(selected, quiet)
        for number, job in enumerate(selected):
            say(f"study: run {number + 1} of {len(selected)}, {job.name}: {state(job)['state']}")
            try:
                outcomes[job.name] = _run(job, quiet, end_if_signalled)
                if records is not None and outcomes[job.name] == COMPLETE:
                    keep(records, job)
            except (InputError, RunError) as error:
                failures[job.name] = error
            except Exception as error:
                traceback.print_exc()
                failures[job.name] = error
            if (outcome := outcomes.setdefault(job.name, FAILED)) != COMPLETE:
                say(f"study: {job.name}: {outcome}" + (f": {failures[job.name]}" if outcome == FAILED else ""))
    say(f"study: {list(outcomes.values()).count(COMPLETE)} of {len(selected)} runs are complete")
    return outcomes


def _raise_for(failures: dict[str, Exception], count: int) -> None:
    """One line for all failures: the user's to mend where it was always the input."""
    if not failures:
        return
    kind = InputError if all(isinstance(error, InputError) for error in failures.values()) else RunError
    each = "; ".join(f"{name}: {error}" for name, error in failures.items())
    raise kind(f"study: {len(failures)} of {count} runs failed: {each}")


def _run(job: Job, quiet: bool, end_if_signalled: Callable[[], None]) -> str:
    """Trains one job to its end, seed run first; says how it stands then."""
    if state(job)["state"] == COMPLETE:
        return COMPLETE
    try:
        if job.seed_run is not None and not _begun(job.config):
            train(job.seed_run, quiet=quiet)
            end_if_signalled()
            try:
                _upcycle(job, quiet)
            except InputError:
                if not _begun(job.config):  # by another process, meanwhile
                    raise
        jax.clear_caches()  # the programs of the run before
        train(job.config, quiet=quiet)
        end_if_signalled()
        jax.clear_caches()
    except InputError:
        if any(trained_elsewhere(config.run.dir) for config in job.runs):
            return ELSEWHERE
        raise
    return COMPLETE


def _upcycle(job: Job, quiet: bool) -> None:
    from moma_jax.upcycling.upcycle import upcycle

    upcycle(job.seed_run.run.dir, job.config, quiet=quiet)


def _begun(config: Config) -> bool:
    """Whether the upcycled run has its first weights; config.json is the last file that `upcycle` writes."""
    return RunDir(config.run.dir).read_json("config.json") is not None


# Before the first run -------------------------------------------------------------------------------------------------


def _require_same_run(config: Config) -> None:
    """InputError where the directory holds a run with another config, or files of another program."""
    written = RunDir(config.run.dir).read_json("config.json")
    if written is not None:
        config = require_same_config(written, config, f"study.dir: {config.run.dir}")
    require_resumable(config)


def _require_upcycled(job: Job) -> None:
    """InputError where the seed run's weights will not do, or the directory holds a run that began from nothing."""
    from moma_jax.upcycling.upcycle import require_growable

    require_growable(job.seed_run, job.config, f"study.variants: {job.variant}")
    where = job.config.run.dir
    if _begun(job.config) and RunDir(where).read_json("ancestry.json") is None:
        raise InputError(f"study.dir: {where} holds a run that was not upcycled; give the study another dir")


def _prepare_stores(selected: list[Job], quiet: bool) -> None:
    """Makes the stores that are missing; processes that share a study wait for the one that does so."""
    configs = {repr(job.config.data): job.config for job in selected if job.config.data.prepare is not None}
    for config in configs.values():
        with contextlib.ExitStack() as held:
            where = Directory(os.path.dirname(config.run.dir)).local
            if where is not None:
                try:
                    os.makedirs(where, exist_ok=True)
                    file = held.enter_context(open(f"{where}/.lock", "a"))
                except OSError as error:
                    raise InputError(f"study.dir: cannot write to {where} ({error.strerror})") from error
                fcntl.flock(file, fcntl.LOCK_EX)
            prepare_missing_stores(config, progress=not quiet)


# Signals --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _signals_at_last_steps() -> Iterator[Callable[[], None]]:
    """A function to call between runs: it ends the process where SIGTERM or SIGINT came during the last run.

    `train` itself stops at a signal, unless it comes at the last step: then it finishes the run and returns. Python
    also writes the number of each signal that it handles into a pipe, if told to; that is where it is found.
    """
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)

    def end_if_signalled() -> None:
        with contextlib.suppress(BlockingIOError):
            for number in os.read(read, 4096):
                if number in (signal.SIGTERM, signal.SIGINT):
                    raise SystemExit(128 + number)

    try:
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    except ValueError:  # not the main thread, as in some notebooks: signals are not ours there
        before = None
    try:
        yield end_if_signalled
    finally:
        if before is not None:
            signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)
