"""Where documents come from: whatever lies on disk, and generated scenes.

Each source offers `name`, `units()` (how many independent pieces of work it has), `read(unit)` (the documents of one
piece, always the same, in the same order; what is broken comes as `Broken` and never raises), `picture_units(split)`
(the pieces that together hold every picture of a split once, those of other splits left out where the source can tell;
None: of all), `describe()` (what would be read, in lines) and `fingerprint()` (changes with what it reads). A source
may be read from several threads; every process opens its own.

What a source holds and a store would lack without a word is refused when it is opened: pictures of a format that is not
read, a second kind of data beside the first, pickles. Other files that are not read are told, see `Opened`.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from moma_jax.config import PrepareConfig
from moma_jax.data.options import require_consistent, require_heard
from moma_jax.data.sources.columns import PICTURES, UNREAD_PICTURES
from moma_jax.data.sources.files import SPLIT_WORDS, Folder, locate, printable
from moma_jax.data.sources.folder import METADATA, FolderSource
from moma_jax.data.sources.generated import ScenesSource
from moma_jax.data.sources.jsonl import LINES, JsonlSource, first_row
from moma_jax.data.sources.lookup import Lookup
from moma_jax.data.sources.parquet import ParquetSource, has_codes
from moma_jax.data.sources.rows import NAMES_ELSEWHERE, CodesRule, Layout, layout_name
from moma_jax.data.sources.tars import TARS, TarSource
from moma_jax.errors import InputError

__all__ = ["Opened", "open_source", "open_with_rest"]

SUFFIXES = {"parquet": (".parquet",), "tar": TARS, "jsonl": LINES, "folder": PICTURES}
"""Files of each kind of source."""
REFUSED = {
    (".pkl", ".pickle", ".pt", ".pth"): "pickles, which can run code; export them to Parquet or JSON lines",
    UNREAD_PICTURES: "pictures of a format that is not read; convert them to PNG or JPEG",
    (".arrow", ".feather"): "Arrow files; write them as Parquet (datasets: to_parquet)",
    (".zip", ".7z", ".rar", ".tar.bz2", ".tar.xz", ".jsonl.zip", ".jsonl.bz2", ".jsonl.xz"): "archives; unpack them",
    (".tfrecord", ".mds", ".array_record", ".idx"): "records of another loader; export them to Parquet or JSON lines",
    (".ndjson", ".jsonlines"): "lines of JSON; call them .jsonl",
    (".mp4", ".webm", ".wav", ".mp3", ".flac"): "film or sound, which is not read",
}
"""Files with content that is not read: their suffixes, and what to say of them."""


@dataclass(frozen=True)
class Opened:
    """A source, what a user should know of it (files beside it that are not read, a split that its own name says), and
    what finds the pictures that its documents name (None where they name none)."""

    source: Any
    notes: list[str]
    lookup: Lookup | None


def open_source(prepare: PrepareConfig, modalities=(), captions: bool = True):
    """Opens the source that a config names; see `open_with_rest`."""
    return open_with_rest(prepare, modalities, captions).source


def open_with_rest(prepare: PrepareConfig, modalities=(), captions: bool = True) -> Opened:
    """Opens the source that a config names, and says what lies beside it.

    Args:
      prepare: the config's section; kind "auto" looks at what is there.
      modalities: for ready codes, all modalities, text first (`name`, `size`, `span`); where empty, one modality
        "image" with prepare.codebook and prepare.codes_per_image.
      captions: whether pictures of a folder without one are broken.

    Raises:
      InputError: nothing there, nothing readable in it, several kinds of data, or codes without their size declared.
    """
    require_consistent(prepare)
    lookup = None if prepare.images is None else Lookup(prepare.images, prepare.image_map)
    if prepare.kind == "scenes" or (prepare.kind == "auto" and prepare.source == "scenes"):
        require_heard(prepare, "scenes")
        return Opened(ScenesSource(prepare.documents, prepare.seed, prepare.image_side), [], lookup)
    folder, only = locate(prepare.source)
    everything = folder.files(deep=only is None)
    listing = [(name, size) for name, size in everything if only in (None, name)]
    files = {kind: _with(listing, suffixes) for kind, suffixes in SUFFIXES.items()}
    kind = _kind(folder, files, listing, prepare)
    if kind == "folder" and only is not None:  # its caption lies beside it
        stem = posixpath.splitext(only)[0]
        listing = [(n, size) for n, size in everything if n == only or n.lower() == f"{stem}.txt".lower()]
    require_heard(prepare, kind)
    label = posixpath.basename(posixpath.normpath(only or folder.base)) or prepare.source
    layout = Layout(
        label,
        prepare.caption_column,
        prepare.image_column,
        prepare.image_codes_column,
        _rules(prepare, modalities) if kind == "codes" else {},
        None if lookup is None else lookup.read,
        prepare.missing_pictures == "skip",
    )
    source, used = _open(kind, layout, folder, files, listing, prepare, captions)
    notes = []
    if lookup is not None and isinstance(source, ParquetSource) and not source.of_rows:
        raise InputError(
            f"prepare.images: no document of {prepare.source} names a picture kept elsewhere; leave it out"
        )
    if isinstance(source, JsonlSource):
        if lookup is not None and not source.layouts() & {None, *NAMES_ELSEWHERE}:
            notes.append(f"the first lines name no picture of {prepare.images}")
        if beside := len([name for name, _ in files["folder"] if name in used]):
            notes.append(f"of {beside:,} pictures beside the lines, those are read that a line names")
    if unread := _unread(listing, used, prepare):
        notes.append(f"not read: {unread}")
    last = re.findall("[a-z]+", label.lower())[-1:]
    if only is None and last and SPLIT_WORDS.get(last[0], "train") != "train":
        notes.append(f"the source itself is called {label}, which decides nothing; give the folder above for its split")
    return Opened(source, notes, lookup)


def _open(kind: str, layout: Layout, folder: Folder, files, listing, prepare: PrepareConfig, captions: bool):
    """(the source of a kind, names of the files that it reads)."""
    label = layout.source
    if kind == "codes":
        kind = "parquet" if files["parquet"] else "jsonl"
    if kind not in files or not files[kind]:
        wanted = " or ".join(SUFFIXES.get(kind, ("?",)))
        raise InputError(f"prepare.source: {prepare.source} holds no {wanted} file; check it and prepare.kind")
    mine = files[kind]
    match kind:
        case "folder":
            about = [(n, s) for n, s in listing if n.lower().endswith(".txt") or posixpath.basename(n) in METADATA]
            about = [(n, s) for n, s in about if not _is_hidden(n)]
            source = FolderSource(label, folder, mine, about, prepare.caption_column, prepare.image_column, captions)
            mine = [*mine, *source.about]
        case "tar":
            source = TarSource(label, folder, mine, prepare.caption_column, prepare.image_column, captions)
            source.require_known()
        case "jsonl":
            source = JsonlSource(label, folder, mine, layout)
            source.require_known()
            if source.layouts() & {None, "segments", "picture"}:
                mine = [*mine, *files["folder"]]  # which its lines name
        case "parquet":
            source = ParquetSource(label, folder, mine, layout, prepare.image_column, captions)
    return source, {name for name, _ in mine}


def _with(listing: list[tuple[str, int]], suffixes: tuple[str, ...]) -> list[tuple[str, int]]:
    """Files with these suffixes; those of tools and of macOS beside the data are none of a source's."""
    return [(n, s) for n, s in listing if n.lower().endswith(suffixes) and not _is_hidden(n)]


def _is_hidden(name: str) -> bool:
    return any(word.startswith("._") or word == "__MACOSX" or word in _HOUSEKEEPING for word in name.split("/"))


_HOUSEKEEPING = {".git", ".cache", ".DS_Store", ".ipynb_checkpoints", ".gitattributes", ".gitignore", ".huggingface"}


def _kind(folder: Folder, files: dict, listing: list[tuple[str, int]], prepare: PrepareConfig) -> str:
    """The kind of what is at a path; raises InputError where it is of none, of several, or not to be read."""
    if prepare.kind != "auto":
        return prepare.kind
    for suffixes, reason in REFUSED.items():
        if found := _with(listing, suffixes):
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise InputError(f"prepare.source: {printable(found[0][0])}{more}: {reason}")
    present = {kind: found for kind, found in files.items() if found}
    if not present:
        raise InputError(
            f"prepare.source: {prepare.source} holds no Parquet, .tar, .jsonl or picture files; give one of these, "
            'or "scenes" for generated pictures'
        )
    if "tar" in present and "parquet" in present:
        tars = {_stem(name) for name, _ in present["tar"]}
        if all(_stem(name) in tars for name, _ in present["parquet"]):  # img2dataset's, of the same samples
            del present["parquet"]
    if "jsonl" in present and "folder" in present:
        tables = [name for name, _ in present["jsonl"] if posixpath.basename(name) in METADATA]
        if len(tables) == len(present["jsonl"]):
            del present["jsonl"]
        elif not tables and _names_pictures(first_row(folder, present["jsonl"][0][0]), prepare):
            del present["folder"]
    if len(present) > 1:
        told = " and ".join(f"{len(found)} {kind} ({printable(found[0][0])})" for kind, found in present.items())
        raise InputError(
            f"prepare.source: {prepare.source} holds files of several kinds: {told}; say which with --kind, or give "
            "the folder of one"
        )
    kind = next(iter(present))
    declared = prepare.codebook is not None or prepare.image_codes_column is not None
    first = present[kind][0][0]
    if kind == "jsonl" and (declared or _has_codes(first_row(folder, first))):
        return "codes"
    if kind == "parquet" and (declared or has_codes(folder, first)):
        return "codes"
    return kind


def _stem(name: str) -> str:
    return name[: -len(next(s for s in (*TARS, ".parquet") if name.lower().endswith(s)))]


def _names_pictures(row: dict | None, prepare: PrepareConfig) -> bool:
    """Whether lines like this one name pictures that lie beside them."""
    layout = Layout("", prepare.caption_column, prepare.image_column)
    return row is None or layout_name(row, layout) not in ("text", "codes")


def _has_codes(row: dict | None) -> bool:
    """Whether a line holds ready codes."""
    segments = (row or {}).get("segments")
    parts = [s for s in segments if isinstance(s, dict)] if isinstance(segments, list) else []
    return "codes" in (row or {}) or any(part.get("codes") is not None for part in parts)


def _rules(prepare: PrepareConfig, modalities) -> dict[str, CodesRule]:
    """What each modality's codes must look like, by its name."""
    rules = {m.name: CodesRule(m.size, m.span) for m in modalities[1:]}
    if prepare.codebook is not None or not rules:
        for field in ("codebook", "codes_per_image"):
            value = getattr(prepare, field)
            if value is None or value <= 0:
                raise InputError(f"prepare.{field}: is {value}; a source of ready codes must declare it, at least 1")
        rules["image"] = CodesRule(prepare.codebook, prepare.codes_per_image)
    return rules


def _unread(listing: list[tuple[str, int]], used: set[str], prepare: PrepareConfig) -> str:
    """Files that are not read, in words; those of the pictures that documents name apart."""
    homes = () if prepare.images is None or "://" in prepare.images else (os.path.abspath(prepare.images),)
    base = os.path.abspath(prepare.source) if "://" not in prepare.source else prepare.source
    rest = [n for n, _ in listing if n not in used and not os.path.join(base, n).startswith(homes or ("\0",))]
    if not rest:
        return ""
    kinds = Counter(os.path.splitext(posixpath.basename(name))[1].lower() or "no suffix" for name in rest)
    most = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))[:6]
    return f"{', '.join(f'{n} {kind}' for kind, n in most)}, such as {printable(rest[0])}"
