"""Parquet files of pairs, text, interleaved documents, or ready codes, read one row group at a time.

What a file holds is seen from its columns, never from its folder:

  pairs        caption, image (bytes of a picture file, or a struct with them)
  text         text
  interleaved  segments: list<struct<kind, text, image_id>>; image_id is the id of a pair of the same split
  codes        segments: list<struct<text, codes, modality?>>, or caption and codes

`id` and `group` are optional, and so is `source`. A file called train-* or validation-*, or below a folder of such a
name, has that split; interleaved files need one, because they repeat the pictures of pairs.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moma_jax.data.documents import Broken, Document, Picture, Text, arrange
from moma_jax.data.folders import Folder, fingerprint, first_line, splits
from moma_jax.errors import InputError

UNIT_ROWS = 256
"""Rows of one unit of work at most; a row group is cut into as many units as it needs."""
CACHE_BYTES = 192 << 20
"""Decoded columns kept, so that units of one row group, and documents that share pictures, read them once."""
COLUMNS = {
    "pairs": ("caption", "image"),
    "text": ("text",),
    "interleaved": ("segments",),
    "codes": ("segments", "caption", "codes", "split"),
}
COMMON = ("id", "source", "group")


def has_codes(folder: Folder, path: str) -> bool:
    """Whether the Parquet file holds ready codes."""
    return _collection(_footer(folder, path).schema.to_arrow_schema()) == "codes"


@dataclass(frozen=True)
class _File:
    path: str
    collection: str
    split: str | None
    columns: tuple[str, ...]
    metadata: pq.FileMetaData


class ParquetSource:
    """A folder of Parquet files, or one. `codes` makes the document of a row of ready codes, where that is wanted."""

    def __init__(
        self,
        name: str,
        folder: Folder,
        files: list[tuple[str, int]],
        codes: Callable[[dict, str], Document | Broken] | None,
    ):
        self.name, self.folder, self.codes, self._listing = name, folder, codes, files
        self.files = [self._describe(path, split) for path, split in splits((p for p, _ in files), True).items()]
        for file in self.files:
            if file.collection == "interleaved" and file.split is None:
                raise InputError(
                    f"prepare.source: {file.path} repeats pictures of pairs, and its name says no split, so held-out "
                    "pictures could be trained on; call all files train-*.parquet or validation-*.parquet"
                )
        self._units = [
            (number, group, start, min(start + UNIT_ROWS, rows))
            for number, file in enumerate(self.files)
            for group in range(file.metadata.num_row_groups)
            for rows in [file.metadata.row_group(group).num_rows]
            for start in range(0, rows, UNIT_ROWS)
        ]
        self._lock, self._cache, self._places = threading.Lock(), OrderedDict(), {}

    def _describe(self, path: str, split: str | None) -> _File:
        metadata = _footer(self.folder, path)
        schema = metadata.schema.to_arrow_schema()
        collection = _collection(schema)
        wanted = "codes" if self.codes else "pairs, text or interleaved"
        if collection is None or (collection == "codes") != (self.codes is not None):
            raise InputError(
                f"prepare.source: {path} has columns {', '.join(schema.names)}, which are not those of {wanted}; "
                "move it out of the folder or set prepare.kind"
            )
        columns = tuple(c for c in (*COMMON, *COLUMNS[collection]) if c in schema.names)
        return _File(path, collection, split, columns, metadata)

    def units(self) -> int:
        """Runs of rows within a row group."""
        return len(self._units)

    def picture_units(self, split: str | None = None) -> list[int]:
        """Those of pairs; interleaved documents repeat their pictures."""
        files = [self.files[number] for number, *_ in self._units]
        of_split = [split is None or file.split in (None, split) for file in files]
        return [unit for unit, file in enumerate(files) if file.collection == "pairs" and of_split[unit]]

    def read(self, unit: int) -> Iterator[Document | Broken]:
        """The documents of one run of rows."""
        number, group, start, stop = self._units[unit]
        file = self.files[number]
        first = sum(file.metadata.row_group(g).num_rows for g in range(group)) + start
        try:
            rows = self._rows(number, group, start, stop)
            pictures = self._pictures(file.split, rows) if file.collection == "interleaved" else {}
        except (OSError, pa.ArrowException) as error:
            # Every row counts as broken, so that the report and the 5% limit see what was lost.
            yield from (Broken(f"{file.path}:{first + i}", first_line(error)) for i in range(stop - start))
            return
        for i, row in enumerate(rows):
            row_id = str(row.get("id") or f"{file.path}:{first + i}")
            try:
                yield self._document(file, row, row_id, pictures)
            except ValueError as error:
                yield Broken(row_id, first_line(error))

    def _document(self, file: _File, row: dict, row_id: str, pictures: dict[str, bytes]) -> Document | Broken:
        source, group = row.get("source") or self.name, row.get("group")
        match file.collection:
            case "codes":
                return self.codes(_as_segments(row, file.split), row_id)
            case "pairs":
                segments = [Text(_required(row, "caption")), Picture(_image_bytes(row["image"]))]
            case "text":
                segments = [Text(_required(row, "text"))]
            case "interleaved":
                segments = [_resolve(s, pictures, file.split) for s in _required(row, "segments")]
                segments = [s for s in segments if s != Text("")]
        collection = file.collection
        if collection == "interleaved" and not any(isinstance(s, Picture) for s in segments):
            collection, segments = arrange(segments)
        if not segments:
            raise ValueError("has no content")
        return Document(row_id, str(source), collection, segments, file.split, None if group is None else str(group))

    def _rows(self, number: int, group: int, start: int, stop: int) -> list[dict[str, Any]]:
        columns = self.files[number].columns
        values = [_values(self._column(number, group, c).slice(start, stop - start)) for c in columns]
        return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]

    def _column(self, number: int, group: int, column: str) -> pa.ChunkedArray:
        """One column of one row group, from the cache where it is there."""
        key = (number, group, column)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        file = self.files[number]
        with self.folder.open(file.path) as stream:
            found = pq.ParquetFile(stream, metadata=file.metadata).read_row_group(group, columns=[column]).column(0)
        with self._lock:
            self._cache[key] = found
            while len(self._cache) > 1 and sum(c.nbytes for c in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        return found

    def _pictures(self, split: str | None, rows: list[dict]) -> dict[str, bytes]:
        """The pictures that these interleaved rows refer to, by id; each row group is read once."""
        places = self._split_places(split)
        wanted: dict[tuple[int, int], dict[str, int]] = {}
        for row in rows:
            for segment in row["segments"] or ():
                picture_id = (segment or {}).get("image_id")
                if picture_id in places:
                    number, group, index = places[picture_id]
                    wanted.setdefault((number, group), {})[picture_id] = index
        found = {}
        for (number, group), indices in sorted(wanted.items()):
            images = self._column(number, group, "image").take(list(indices.values())).to_pylist()
            found.update(zip(indices, images, strict=True))
        return found

    def _split_places(self, split: str | None) -> dict[str, tuple[int, int, int]]:
        """File, row group and row of every pair of a split, by id (held in memory: about 200 bytes a pair)."""
        with self._lock:
            if split in self._places:
                return self._places[split]
        places = {}
        for number, file in enumerate(self.files):
            if file.collection == "pairs" and file.split == split and "id" in file.columns:
                for group in range(file.metadata.num_row_groups):
                    for index, picture_id in enumerate(_values(self._column(number, group, "id"))):
                        places.setdefault(picture_id, (number, group, index))
        with self._lock:
            return self._places.setdefault(split, places)

    def fingerprint(self) -> str:
        """Changes with the files' names, sizes and rows."""
        return fingerprint("parquet", self._listing, [f.metadata.num_rows for f in self.files], self.codes is not None)


def _footer(folder: Folder, path: str) -> pq.FileMetaData:
    try:
        with folder.open(path) as stream:
            return pq.read_metadata(stream)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"prepare.source: {path} is no readable Parquet file: {first_line(error)}") from error


def _collection(schema: pa.Schema) -> str | None:
    """What rows of this schema are; None if nothing that is known."""
    kinds = {field.name: field.type for field in schema}
    if "segments" in kinds:
        items = getattr(kinds["segments"], "value_type", None)
        fields = {items.field(i).name for i in range(items.num_fields)} if isinstance(items, pa.StructType) else set()
        return "codes" if "codes" in fields else "interleaved" if "image_id" in fields else None
    if _is_text(kinds.get("caption")) and "codes" in kinds:
        return "codes"
    if _is_text(kinds.get("caption")) and "image" in kinds:
        return "pairs"
    return "text" if _is_text(kinds.get("text")) else None


def _is_text(kind: pa.DataType | None) -> bool:
    kind = getattr(kind, "value_type", kind)  # of a dictionary-encoded column
    return kind is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _values(column: pa.ChunkedArray) -> list:
    """The column's values; None for text that is no UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(item) for item in column]


def _value(item: pa.Scalar):
    try:
        return item.as_py()
    except UnicodeDecodeError:
        return None


def _required(row: dict, column: str):
    if not row[column]:
        raise ValueError(f"its {column} is missing, empty or no UTF-8")
    return row[column]


def _image_bytes(image: Any) -> bytes:
    """The bytes of a picture's file, from a binary column or a struct {bytes, path}."""
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes) or not content:
        raise ValueError("its image is missing")
    return content


def _resolve(segment: dict | None, pictures: dict[str, Any], split: str | None) -> Text | Picture:
    match segment:
        case {"text": str() as text, **rest} if rest.get("image_id") is None:
            return Text(text)
        case {"image_id": str() as picture_id}:
            if picture_id not in pictures:
                raise ValueError(f"picture {picture_id!r} is no pair of the split {split}")
            return Picture(_image_bytes(pictures[picture_id]))
    raise ValueError("a segment is neither text nor a picture's id")


def _as_segments(row: dict, split: str | None) -> dict:
    """A row of ready codes in the form of a JSON line."""
    row = {**row, "split": row.get("split") or split}
    if "segments" not in row:
        row["segments"] = [{"text": row["caption"]}, {"codes": row["codes"]}]
    return row
