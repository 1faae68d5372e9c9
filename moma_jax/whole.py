"""Whether what was stored is whole: parts of a token store, checkpoints and records of a run, to the last byte."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from moma_jax.data.prepare import belongs_to_store
from moma_jax.data.store import open_store
from moma_jax.errors import InputError, RunError
from moma_jax.runs.checkpoint import belongs_to_checkpoint
from moma_jax.runs.directory import RunDir
from moma_jax.runs.journal import METRICS, SEGMENTS, records_of
from moma_jax.storage.contents import FILE, verify

PART, CHECKPOINT = re.compile(r"parts/[^/.]+/"), re.compile(r"(.*/)?checkpoints/\d+/")
JOURNAL = re.compile(rf"(.*/)?(?={re.escape(METRICS)}$|{SEGMENTS})")
NAMED = 3
"""Damaged files that are named of a piece; all are counted."""


class Piece(NamedTuple):
    """A part of a store, a checkpoint, or a run's records: where it is, what was found, whether that is well, and what
    helps where it is not."""

    name: str
    about: str
    whole: bool
    remedy: str = "restore it from a copy, move it away, or make it again"


def verified(path: str) -> Iterator[Piece]:
    """Reads a store or a run, and says of each piece whether it is as it was written.

    Raises:
      InputError: there is neither at `path`, or it cannot be read.
    """
    home = RunDir(path)
    names = home.names("")
    pieces = sorted({found[0] for name in names for pattern in (PART, CHECKPOINT) if (found := pattern.match(name))})
    store = any(name in names for name in ("manifest.json", "settings.json"))
    journals = sorted({found[0] for name in names if (found := JOURNAL.match(name))})
    if not (store or pieces or journals):
        raise InputError(f"{path}: neither a store nor a run; name one")
    if store and FILE not in names and not any(f"{piece}{FILE}" in names for piece in pieces):
        yield _by_manifest(path)
        return
    if store:
        yield _piece(home, belongs_to_store)
    for name in pieces:
        yield _piece(RunDir(home.join(name.rstrip("/"))), belongs_to_checkpoint)
    for name in journals:
        yield _journal(RunDir(home.join(name.rstrip("/"))) if name else home)


def _piece(directory: RunDir, belongs: Callable[[str], bool]) -> Piece:
    found = verify(directory, belongs)
    if found is None:
        return Piece(directory.path, f"has no {FILE}: not finished, or of an earlier version", True)
    if found.damages:
        named = "; ".join(f"{damage.name} {damage.what}" for damage in found.damages[:NAMED])
        more = f"; and {len(found.damages) - NAMED} more" if len(found.damages) > NAMED else ""
        return Piece(directory.path, f"DAMAGED: {named}{more}", False)
    others = f"; not in the list: {', '.join(found.unlisted[:NAMED])}" if found.unlisted else ""
    return Piece(directory.path, f"whole: {found.objects} files, {found.bytes:,} bytes{others}", True)


def _journal(directory: RunDir) -> Piece:
    """The records of a run, or of a stage that has a directory in it. One that is missing is not noticed."""
    name = directory.join(METRICS if directory.local else SEGMENTS.rstrip("/"))
    try:
        records = records_of(directory) or []
    except InputError as error:
        words, _, remedy = str(error).removeprefix(f"{directory.path}/").rpartition("; ")
        return Piece(name, f"DAMAGED: {words}", False, remedy)
    cut = not (directory.read(METRICS) or b"\n").endswith(b"\n")
    return Piece(name, f"whole: {len(records):,} records{', and one that was cut off' if cut else ''}", True)


def _by_manifest(path: str) -> Piece:
    """A store that was made before there were lists."""
    try:
        open_store(path).verify()
    except RunError as error:
        return Piece(path, f"DAMAGED: {error}", False)
    return Piece(path, f"whole by the checksums of its manifest; it has no {FILE}", True)
