"""Where documents come from: Parquet, folders of pictures, JSON lines, ready codes, and generated scenes.

Each source offers `name`, `units()` (how many independent pieces of work it has), `read(unit)` (the documents of one
piece, always the same, in the same order; what is broken comes as `Broken` and never raises), `picture_units(split)`
(the pieces that together hold every picture of a split once, those of other splits left out where the source can tell;
None: of all) and `fingerprint()` (changes with what it reads). A source may be read from several threads; every process
opens its own.
"""

from __future__ import annotations

import io
import json
import math
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moma_jax.config import PrepareConfig
from moma_jax.data import scenes
from moma_jax.data.documents import (
    Broken,
    Codes,
    Document,
    Picture,
    Text,
    arrange,
    content_hash,
    is_held_out,
)
from moma_jax.data.folders import Folder, fingerprint, first_line, locate, printable, splits
from moma_jax.data.parquet import ParquetSource, has_codes
from moma_jax.errors import InputError

__all__ = [
    "Broken",
    "Codes",
    "CodesRule",
    "Document",
    "FolderSource",
    "JsonlSource",
    "ParquetSource",
    "Picture",
    "ScenesSource",
    "Text",
    "content_hash",
    "is_held_out",
    "open_source",
]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SPLITS = (None, "train", "validation")
MAX_LINE_BYTES = 64 << 20
"""Longest line of a .jsonl file that is read."""


@dataclass(frozen=True)
class CodesRule:
    """What the codes of one modality must look like.

    Attributes:
      codebook: codes run from 0 to codebook - 1.
      span: codes of one span; 0 where any length is right.
    """

    codebook: int
    span: int


def open_source(prepare: PrepareConfig, modalities=(), captions: bool = True):
    """Opens the source that a config names.

    Args:
      prepare: the config's section; kind "auto" looks at what is there.
      modalities: for ready codes, all modalities, text first (`name`, `size`, `span`); where empty, one modality
        "image" with prepare.codebook and prepare.codes_per_image.
      captions: whether pictures of a folder without one are broken.

    Raises:
      InputError: nothing there, nothing readable in it, or codes without their size declared.
    """
    if prepare.kind == "scenes" or (prepare.kind == "auto" and prepare.source == "scenes"):
        return ScenesSource(prepare.documents, prepare.seed, prepare.image_side)
    folder, name = locate(prepare.source)
    label = posixpath.basename(posixpath.normpath(prepare.source))
    kind = prepare.kind if prepare.kind != "auto" else _look(folder, name, prepare)
    match kind:
        case "folder":
            return FolderSource(label, folder, _files(folder, name, *PICTURES), captions)
        case "jsonl":
            return JsonlSource(label, folder, _files(folder, name, ".jsonl"), {})
        case "parquet":
            return ParquetSource(label, folder, _files(folder, name, ".parquet"), None)
        case "codes":
            rules = _rules(prepare, modalities)
            parquet = _files(folder, name, ".parquet", required=False)
            if parquet:
                return ParquetSource(label, folder, parquet, lambda row, row_id: _document(row, row_id, label, rules))
            return JsonlSource(label, folder, _files(folder, name, ".jsonl"), rules)
    raise InputError(f"prepare.kind: {kind!r} is not one of auto, parquet, folder, jsonl, scenes, codes")


def _files(folder: Folder, name: str | None, *suffixes: str, required: bool = True) -> list[tuple[str, int]]:
    """The named file, or all files with these suffixes, with their bytes."""
    if name is not None:
        files = [(found, size) for found, size in folder.files(*suffixes) if found == name]
    else:
        files = folder.files(*suffixes)
    if required and not files:
        where = posixpath.join(folder.base, name or "")
        raise InputError(f"prepare.source: {where} holds no {' or '.join(suffixes)} file; check it and prepare.kind")
    return files


def _look(folder: Folder, name: str | None, prepare: PrepareConfig) -> str:
    """The kind of what is at a path."""
    declared = prepare.codebook is not None
    parquet = _files(folder, name, ".parquet", required=False)
    lines = _files(folder, name, ".jsonl", required=False)
    if parquet:
        return "codes" if declared or has_codes(folder, parquet[0][0]) else "parquet"
    if lines:
        with folder.open(lines[0][0]) as file:
            first = file.read(1 << 16).lstrip().split(b"\n")[0]
        return "codes" if declared or b'"codes"' in first else "jsonl"
    if _files(folder, name, *PICTURES, required=False):
        return "folder"
    raise InputError(
        f"prepare.source: {prepare.source} holds no Parquet, .jsonl or picture files; give one of these, "
        'or "scenes" for generated pictures'
    )


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


class ScenesSource:
    """Generated scenes: `documents` training documents, then a tenth as many (at least one) held-out ones.

    About 80% are pairs, 20% stories of two or three pictures. No training picture shows a scene that is held out.
    """

    name = "scenes"

    def __init__(self, documents: int, seed: int, side: int):
        if documents <= 0:
            raise InputError(f"prepare.documents: {documents} scenes; give at least 1")
        self.documents, self.seed = documents, seed
        # Shapes need a grid of 16 to be told apart; the codec reduces by a whole factor.
        self.side = side * math.ceil(scenes.GRID / side)
        self.total = documents + max(documents // 10, 1)
        self.block = max(1, min(512, math.ceil(self.total / 64)))

    def units(self) -> int:
        """Blocks of documents."""
        return math.ceil(self.total / self.block)

    def read(self, unit: int) -> Iterator[Document]:
        """The documents of one block."""
        for index in range(unit * self.block, min((unit + 1) * self.block, self.total)):
            if index < self.documents:
                yield scenes.document(self.seed, "train", index, self.side)
            else:
                yield scenes.document(self.seed, "validation", index - self.documents, self.side)

    def fingerprint(self) -> str:
        """Changes with the generator's version and settings."""
        return fingerprint("scenes", [], scenes.VERSION, self.documents, self.seed, self.side)


class FolderSource:
    """Pictures with captions: `NAME.png` (or another format) and `NAME.txt` beside it, in any depth of folders.

    Pictures below a folder train/ or validation/, at any depth, have that split. Links are followed only within
    the folder.
    """

    def __init__(self, name: str, folder: Folder, files: list[tuple[str, int]], captions: bool = True):
        """Args: `captions` says whether a picture without one is broken, or stands alone."""
        self.name, self.folder, self.files, self.captions = name, folder, files, captions
        self.splits = splits((path for path, _ in files), False)
        self.block = max(1, min(256, math.ceil(len(files) / 64)))

    def units(self) -> int:
        """Blocks of pictures in the order of their names."""
        return math.ceil(len(self.files) / self.block)

    def read(self, unit: int) -> Iterator[Document | Broken]:
        """The pairs of one block."""
        for path, _ in self.files[unit * self.block : (unit + 1) * self.block]:
            try:
                caption = self._caption(path)
                picture = self.folder.read(path)
            except (OSError, ValueError) as error:
                yield Broken(printable(path), first_line(error))
                continue
            if not caption and self.captions:
                yield Broken(printable(path), "its caption is empty")
                continue
            segments = [Text(caption), Picture(picture)] if caption else [Picture(picture)]
            yield Document(printable(path), self.name, "pairs", segments, self.splits[path])

    def _caption(self, path: str) -> str:
        try:
            return self.folder.read(posixpath.splitext(path)[0] + ".txt").decode("utf-8-sig").strip()
        except FileNotFoundError:
            if self.captions:
                raise
            return ""

    def picture_units(self, split: str | None = None) -> list[int]:
        """Blocks with a picture that may be of the split."""
        wanted = {None, split}
        blocks = (self.files[unit * self.block : (unit + 1) * self.block] for unit in range(self.units()))
        return [n for n, files in enumerate(blocks) if split is None or any(self.splits[f] in wanted for f, _ in files)]

    def fingerprint(self) -> str:
        """Changes with the pictures' and captions' names and sizes."""
        return fingerprint("folder", self.folder.files(".txt", *PICTURES))


class JsonlSource:
    """Documents as JSON lines: {"id"?, "split"?, "group"?, "segments": [{"text": ...} | {"image": "relative/path"}]}.

    A file called train* or validation*, or below a folder of such a name, has that split where its lines state none.
    Paths are relative to the file's own folder and stay inside the source. With `rules`, pictures are
    {"codes": [...], "modality"?: name} instead. Empty texts are left out.
    """

    def __init__(self, name: str, folder: Folder, files: list[tuple[str, int]], rules: dict[str, CodesRule]):
        self.name, self.folder, self.files, self.rules = name, folder, files, rules
        self.splits = splits((path for path, _ in files), True)
        block = max(1 << 12, min(1 << 20, math.ceil(sum(size for _, size in files) / 64)))
        self._units = [
            (path, start, min(start + block, size)) for path, size in files for start in range(0, size, block)
        ]

    def units(self) -> int:
        """Ranges of bytes; a line belongs to the range in which it starts."""
        return len(self._units)

    def read(self, unit: int) -> Iterator[Document | Broken]:
        """The documents of the lines that start in one range of bytes."""
        path, start, stop = self._units[unit]
        try:
            with io.BufferedReader(self.folder.open(path), 1 << 20) as file:
                for offset, line in _lines(file, start, stop):
                    document = self._line(line, f"{path}:{offset}", path)
                    if document is not None:
                        yield document
        except OSError as error:
            yield Broken(f"{path}:{start}", first_line(error))

    def picture_units(self, split: str | None = None) -> range:
        """All of them: a line may say another split than its file."""
        return range(self.units())

    def _line(self, line: bytes | None, row_id: str, path: str) -> Document | Broken | None:
        if line is None:
            return Broken(row_id, f"a line longer than {MAX_LINE_BYTES >> 20} MiB")
        if not line.strip():
            return None
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            return Broken(row_id, f"not JSON: {first_line(error)}")
        if isinstance(row, dict) and row.get("split") is None:
            row["split"] = self.splits[path]
        read = None if self.rules else lambda name: self.folder.read(posixpath.join(posixpath.dirname(path), name))
        return _document(row, row_id, self.name, self.rules, read)

    def fingerprint(self) -> str:
        """Changes with the files' names and sizes and the rules for codes."""
        return fingerprint("jsonl", self.files, sorted((k, v.codebook, v.span) for k, v in self.rules.items()))


def _lines(file, start: int, stop: int) -> Iterator[tuple[int, bytes | None]]:
    """Offset and content of the lines that start in [start, stop); None for the content of one that is too long."""
    position = max(start - 1, 0)
    file.seek(position)
    if start:
        # The line that runs across `start` belongs to the range before.
        position += _skip_line(file)
    while position < stop:
        line = file.readline(MAX_LINE_BYTES)
        if not line:
            return
        length = len(line)
        if length == MAX_LINE_BYTES and not line.endswith(b"\n"):
            length, line = length + _skip_line(file), None
        yield position, line
        position += length


def _skip_line(file) -> int:
    """Reads to the end of the line; returns the bytes that were read."""
    total = 0
    while piece := file.readline(1 << 20):
        total += len(piece)
        if piece.endswith(b"\n"):
            break
    return total


class _Refused(ValueError):
    """Why a row cannot be used."""


def _document(row: Any, row_id: str, source: str, rules: dict[str, CodesRule], read=None) -> Document | Broken:
    """The document of one row of segments. `read(name)` gives a picture's bytes; None where pictures are codes."""
    try:
        if not isinstance(row, dict):
            raise _Refused("not an object")
        row_id = printable(str(row.get("id") or row_id))
        split, group, segments = row.get("split"), row.get("group"), row.get("segments")
        if split not in SPLITS:
            raise _Refused(f"split is {split!r}, not train or validation")
        if not isinstance(segments, list):
            raise _Refused("has no list of segments")
        parts = [_segment(segment, rules, read) for segment in segments]
        collection, parts = arrange([part for part in parts if part != Text("")])
        if not parts:
            raise _Refused("has no content")
        return Document(row_id, source, collection, parts, split, None if group is None else printable(str(group)))
    except (OSError, ValueError) as error:
        return Broken(row_id, first_line(error))


def _segment(segment: Any, rules: dict[str, CodesRule], read) -> Text | Picture | Codes:
    present = {k: v for k, v in segment.items() if v is not None} if isinstance(segment, dict) else {}
    match present:
        case {"text": str() as text}:
            text.encode()  # JSON can spell half of a surrogate pair, which is no Unicode text
            return Text(text)
        case {"image": str() as name} if read is not None:
            return Picture(read(name))
        case {"codes": list() as codes} if read is None:
            return _codes(present.get("modality", "image"), codes, rules)
    wanted = '{"codes": [...]}' if read is None else '{"image": "relative/path"}'
    raise _Refused(f'a segment is neither {{"text": "..."}} nor {wanted}')


def _codes(modality: Any, codes: list, rules: dict[str, CodesRule]) -> Codes:
    rule = rules.get(modality) if isinstance(modality, str) else None
    if rule is None:
        raise _Refused(f"codes of modality {modality!r}; declared: {', '.join(rules)}")
    if not all(type(code) is int for code in codes):
        raise _Refused(f"codes of {modality} that are not whole numbers")
    if not codes or (rule.span and len(codes) != rule.span):
        raise _Refused(f"{len(codes)} codes of {modality}, not {rule.span or 'at least 1'}")
    if min(codes) < 0 or max(codes) >= rule.codebook:
        raise _Refused(f"codes of {modality} outside 0..{rule.codebook - 1}")
    return Codes(modality, np.array(codes, np.int32))
