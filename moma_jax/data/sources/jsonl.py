"""Documents as lines of JSON, in any layout of rows.py, plain or compressed (.gz, .zst)."""

from __future__ import annotations

import io
import json
import math
import posixpath
from collections.abc import Iterator

import pyarrow as pa

from moma_jax.data.documents import Broken, Document
from moma_jax.data.sources.files import Folder, fingerprint, first_line, is_packed, splits
from moma_jax.data.sources.rows import Layout, documents_of, layout_name, unharmed
from moma_jax.errors import InputError

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
LOOKED_AT = 100
"""Files that are opened before the work, at most: object stores answer slowly."""
MAX_LINE_BYTES = 64 << 20
"""Longest line that is read."""


class JsonlSource:
    """A folder of files of lines, or one.

    A file whose name, or a folder's above it, says train or validation has that split where its lines state none. Paths
    of pictures are relative to the file's own folder and stay inside the source.
    """

    def __init__(self, name: str, folder: Folder, files: list[tuple[str, int]], layout: Layout):
        self.name, self.folder, self.files, self.layout = name, folder, files, layout
        self.splits = splits((path for path, _ in files), True)
        plain = sum(size for path, size in files if not is_packed(path))
        block = max(1 << 12, min(1 << 20, math.ceil(plain / 64)))
        self._rows: dict[str, dict | None] = {}
        self._units: list[tuple[str, int, int | None]] = []
        for path, size in files:
            if is_packed(path):
                self._units.append((path, 0, None))
            else:
                self._units += [(path, start, min(start + block, size)) for start in range(0, size, block)]

    def require_known(self) -> None:
        """Raises InputError where the first line of one of the first files has none of the known layouts."""
        for path, _ in self.files[:LOOKED_AT]:
            if (row := self._first(path)) is None:
                continue
            layout, keys = layout_name(row, self.layout), ", ".join(map(str, row)) or "nothing"
            if layout is None:
                raise InputError(
                    f"prepare.source: lines of {path} have {keys}, which is none of the known layouts; name the text's "
                    "key with --caption-column, or set prepare.kind"
                )
            if self.layout.rules and layout not in ("codes", "segments", "text"):
                raise InputError(f"prepare.source: lines of {path} have {keys}: pictures, where ready codes are read")
        if self.layout.rules and not self.layouts() & {None, "codes", "segments"}:
            raise InputError(
                f"prepare.source: lines of {self.files[0][0]} have no codes; name theirs with --image-codes-column, or "
                "leave --codebook and --kind out"
            )

    def layouts(self) -> set[str | None]:
        """Layouts of the first lines of the first files, None for those that cannot be read."""
        rows = [self._first(path) for path, _ in self.files[:LOOKED_AT]]
        return {None if row is None else layout_name(row, self.layout) for row in rows}

    def units(self) -> int:
        """Ranges of bytes, a line belonging to the range in which it starts; a compressed file is one."""
        return len(self._units)

    def describe(self) -> list[str]:
        """A line for each file: its split, and its layout, of the first ones."""
        rows = {path: self._first(path) for path, _ in self.files[:LOOKED_AT]}
        names = {path: f"{layout_name(row, self.layout) if row else 'empty'}, " for path, row in rows.items()}
        return [f"{path}: {names.get(path, '')}split {self.splits[path] or 'by hash'}" for path, _ in self.files]

    def _first(self, path: str) -> dict | None:
        if path not in self._rows:
            self._rows[path] = first_row(self.folder, path)
        return self._rows[path]

    def read(self, unit: int) -> Iterator[Document | Broken]:
        """The documents of the lines that start in one range of bytes."""
        path, start, stop = self._units[unit]
        yield from unharmed(self._read(path, start, stop), self.folder, path)

    def _read(self, path: str, start: int, stop: int | None) -> Iterator[Document | Broken]:
        try:
            with io.BufferedReader(self.folder.stream(path), 1 << 20) as file:
                for offset, line in _lines(file, start, stop):
                    yield from self._line(line, f"{path}:{offset}", path)
        except (OSError, pa.ArrowException) as error:
            yield Broken(f"{path}:{start}", first_line(error))

    def picture_units(self, split: str | None = None) -> range:
        """All of them: a line may say another split than its file."""
        return range(self.units())

    def _line(self, line: bytes | None, row_id: str, path: str) -> Iterator[Document | Broken]:
        if line is None:
            yield Broken(row_id, f"a line longer than {MAX_LINE_BYTES >> 20} MiB")
            return
        if not line.strip():
            return
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Broken(row_id, f"not JSON: {first_line(error)}")
            return
        beside = posixpath.dirname(path)
        yield from documents_of(
            row, row_id, self.layout, self.splits[path], lambda name: self.folder.read(posixpath.join(beside, name))
        )

    def fingerprint(self) -> str:
        """Changes with the files' names and sizes and how rows are read."""
        return fingerprint("jsonl", self.files, self.layout.sizes)


def first_row(folder: Folder, path: str) -> dict | None:
    """The first object of a file of lines, None where its first line holds none."""
    try:
        with io.BufferedReader(folder.stream(path), 1 << 16) as file:
            for _, line in _lines(file, 0, None):
                if line is None or line.strip():
                    row = json.loads(line or b"")
                    return row if isinstance(row, dict) else None
    except (OSError, ValueError, RecursionError, pa.ArrowException):
        return None  # reading names it as broken
    return None


def _lines(file, start: int, stop: int | None) -> Iterator[tuple[int, bytes | None]]:
    """Offset and content of the lines that start in [start, stop); None for the content of one that is too long."""
    position = max(start - 1, 0)
    if start:
        file.seek(position)
        # The line that runs across `start` belongs to the range before.
        position += _skip_line(file)
    while stop is None or position < stop:
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
