"""Whether a run may begin, or go on, in a directory. What is there is read before anything is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from moma_jax.config import Config, with_router
from moma_jax.config_json import as_recorded, from_json
from moma_jax.data.store import open_store
from moma_jax.errors import InputError
from moma_jax.fields import differences
from moma_jax.rules import as_named, recorded_rule
from moma_jax.runs.checkpoint import Checkpoints
from moma_jax.runs.directory import RunDir
from moma_jax.runs.journal import METRICS, records_of
from moma_jax.vocab import Vocabulary

CONFIG, STATUS, SUMMARY = "config.json", "status.json", "summary.json"
OTHERS = ("manifest.json", "codec.json")
"""What a token store and an image tokenizer have in their folders, which no run may begin in."""


def require_resumable(config: Config) -> None:
    """Reads the directory of a run that is about to begin or to go on.

    Raises:
      InputError: it holds a run with another config, or files of another program.
    """
    run = RunDir(config.run.dir)
    if (found := began_with(run, from_json)) is None:
        return
    began, beside = found
    rule = as_named(recorded_rule(began.model.router, beside), config.model.router)
    require_unchanged(run, differences(as_recorded(with_router(began, rule)), as_recorded(config)))


def began_with(run: RunDir, read: Callable[[Any], Any]) -> tuple[Any, dict[str, Any]] | None:
    """(the config that a run in a directory goes on with, the plain values that were written beside it); None where
    there is nothing to go on from.

    Args:
      read: the content of its config.json, or of a checkpoint's, as a config; raises InputError.

    Raises:
      InputError: the directory holds files of another program, or of another kind of run.
    """
    written = _own_config(run, read)
    if written is not None:
        records_of(run)  # lines that are no records
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        latest = checkpoints.latest()
        meta = None if latest is None else checkpoints.saved(latest).meta
    summary = _complete_summary(run)
    if meta is not None:
        return read(meta.get("config", {})), meta
    if written is not None and summary is not None:
        return written, summary
    if written is None and (strange := [n for n in (METRICS, STATUS, SUMMARY, *OTHERS) if run.read(n) is not None]):
        raise InputError(f"run.dir: {run.path} has {strange[0]} but no run of moma; choose another run.dir")
    return None  # nothing to go on from: the run starts anew


def require_unchanged(run: RunDir, changed: list[str]) -> None:
    """InputError where a run was begun with another config; `changed` says what differs."""
    if changed:
        raise InputError(
            f"run.dir: {run.path} holds a run with another config ({'; '.join(changed)}); change it back, or "
            "choose another run.dir (with run.init_from to start from its weights)"
        )


def finished(run: RunDir, steps: int) -> dict[str, Any] | None:
    """The summary of a run that is complete, after so many steps."""
    summary = _complete_summary(run)
    return summary if summary is not None and summary.get("steps") == steps else None


def hashes_of(config: Config, vocabulary: Vocabulary) -> dict[str, str | None]:
    """What makes ids mean the same: layout, tokenizer and codec of the stores (they are equal in all of them)."""
    if config.data.kind == "synthetic":
        return {"vocabulary": vocabulary.hash}
    return open_store(config.data.stores[0].path).codecs.hashes


def require_same_stores(hashes: dict[str, str | None], before: dict[str, str | None], where: str) -> None:
    """InputError where the stores are no longer those of the checkpoint `where`, which had the hashes `before`."""
    for name, value in before.items():
        if hashes.get(name) != value:
            raise InputError(
                f"data.stores: their {name} is not that of {where}; restore the stores or choose another run.dir"
            )


def _own_config(run: RunDir, read: Callable[[Any], Any]) -> Any:
    """The config that began the run, where there is one."""
    try:
        written = run.read_json(CONFIG)
        return None if written is None else read(written if isinstance(written, dict) else {})
    except InputError as error:
        raise InputError(
            f"run.dir: {run.path} holds no run of this moma_jax ({error}); choose another run.dir"
        ) from error


def _complete_summary(run: RunDir) -> dict[str, Any] | None:
    """summary.json, where status.json says that the run is complete."""
    status, summary = run.read_json(STATUS), run.read_json(SUMMARY)
    complete = isinstance(status, dict) and status.get("state") == "complete" and isinstance(summary, dict)
    return summary if complete else None
