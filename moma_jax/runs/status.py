"""What a run is doing, in status.json; and how it fails: with one line that names the last good checkpoint."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Annotated, Any, NotRequired, TypedDict

from moma_jax import hosts
from moma_jax.errors import InputError, RunError
from moma_jax.fields import Count, Facts, read_file
from moma_jax.runs.checkpoint import Checkpoints
from moma_jax.runs.directory import RunDir
from moma_jax.storage.directory import Directory
from moma_jax.storage.lease import LeaseLost

EVERY = 10.0
"""Seconds between two writes of status.json to an object store, which allows one a second."""


class Status:
    """status.json, for whoever watches a run.

    Attributes:
      step: updates made; the loop keeps it up to date.
      begun: whether the run has begun; before that, an error leaves no trace of it.
    """

    def __init__(self, run: RunDir, total: int):
        self.step, self.begun = 0, False
        self._run, self._total = run, total
        self._state, self._written = "", 0.0
        self._folder = os.getcwd()  # which relative paths of the config are of

    def write(self, state: str) -> None:
        """Writes running, complete, stopped or failed; "running" not too often for a store that limits writes."""
        now = time.monotonic()
        if state == self._state == "running" and self._run.local is None and now < self._written + EVERY:
            return
        self.begun, self._state, self._written = True, state, now
        status = {"state": state, "step": self.step, "total": self._total, "pid": os.getpid(), "updated": time.time()}
        status["folder"] = self._folder
        self._run.write_json("status.json", status)


@contextlib.contextmanager
def watched(run: RunDir, total: int) -> Iterator[Status]:
    """Marks a run that ends by an exception as failed, once it has begun.

    Raises:
      LeaseLost: another process became the directory's writer.
      RunError: for bad input and refused files that show only after the run has begun, and where another process is
        gone before the runtime noticed and ended this one.
    """
    status = Status(run, total)
    try:
        yield status
    except (SystemExit, LeaseLost):
        raise
    except BaseException as error:
        if not status.begun:
            raise
        with contextlib.suppress(InputError):  # a full disk must not hide what happened
            status.write("failed")
        lost = hosts.several() and "Gloo" in str(error)  # collectives between CPUs fail; others wait to be aborted
        if lost or isinstance(error, (InputError, OSError)):
            cause = "another process of the run is gone" if lost else error
            raise RunError(
                f"step {status.step}: {cause}; last good checkpoint: {last_good(run)}; once that is mended, the same "
                "command goes on from there"
            ) from error
        raise


def last_good(run: RunDir) -> str:
    """Where the newest whole checkpoint is, in words."""
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        latest = checkpoints.latest()
        return "there is none yet" if latest is None else checkpoints.where(latest)


class StatusFile(TypedDict):
    """status.json, as far as it is read."""

    state: str
    step: Count
    total: Count
    updated: NotRequired[Annotated[float, Facts(least=0, most=2**40)]]
    folder: NotRequired[str]


def read_status(path: str) -> StatusFile | dict[str, Any]:
    """status.json of a run directory, empty without one; InputError where it is damaged."""
    found = Directory(path).read_json("status.json")
    return {} if found is None else read_file(StatusFile, found, f"{path}/status.json")
