"""Parquet files of pairs, text, interleaved documents, or ready codes, read one row group at a time.

What a file holds is seen from its columns, never from its folder:

  pairs        a picture (bytes, or a struct with bytes or a path), and a caption or a list of captions
  text         text
  interleaved  segments: list<struct<kind, text, image_id>>; image_id is the id of a pair of the same split
  rows         any other layout of rows.py: OBELICS' images and texts, ready codes

`id`, `group`, `source`, `split` and `weight` are optional. A file whose name, or a folder's above it, says train or
validation has that split; interleaved files need one, because they repeat the pictures of pairs. Other columns are
metadata, which `moma prepare --dry-run` lists; a file with more text or pictures than one of these has is refused.
"""

from __future__ import annotations

import posixpath
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moma_jax.data.documents import Broken, Document, Picture, Text
from moma_jax.data.sources.columns import (
    ABOUT,
    CAPTIONS,
    LIKE_SPLIT,
    caption_column,
    chosen,
    fields_of,
    holds_bytes,
    image_column,
    is_list,
    is_picture,
    item_of,
    pictures_meant,
)
from moma_jax.data.sources.files import Folder, fingerprint, first_line, splits
from moma_jax.data.sources.rows import (
    INTERLEAVED,
    Layout,
    Refused,
    assembled,
    captions_in,
    documents_of,
    facts_of,
    id_of,
    layout_name,
    weight_of,
)
from moma_jax.errors import InputError

UNIT_ROWS = 256
"""Rows of one unit of work at most; a row group is cut into as many units as it needs."""
FIRST_ROWS = 5
"""Rows of a file of text that are looked at before the work."""
CACHE_BYTES = 192 << 20
"""Decoded columns kept, so that units of one row group, and documents that share pictures, read them once."""


@dataclass(frozen=True)
class _File:
    """A file, and which columns of it are read as what."""

    path: str
    collection: str
    split: str | None
    columns: tuple[str, ...]
    metadata: pq.FileMetaData
    caption: str | None = None
    image: str | None = None


class ParquetSource:
    """A folder of Parquet files, or one."""

    def __init__(
        self,
        name: str,
        folder: Folder,
        files: list[tuple[str, int]],
        layout: Layout,
        image: str | None = None,
        captions: bool = True,
    ):
        """Args: layout: how rows are read. image: the pictures' column, where the user named it. captions: whether
        pictures without any are refused."""
        self._captions = captions
        self.name, self.folder, self.layout, self._listing = name, folder, layout, files
        self.files = [self._describe(path, split, image) for path, split in splits((p for p, _ in files), True).items()]
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

    def _describe(self, path: str, split: str | None, image: str | None) -> _File:
        metadata = _footer(self.folder, path)
        schema = _schema(metadata, path)
        where = f"prepare.source: {path}"
        if len(set(schema.names)) < len(schema.names):
            raise InputError(f"{where} has two columns of one name; rename one")
        common = tuple(c for c in schema.names if c.lower() in (*ABOUT, *LIKE_SPLIT))
        if (found := _rows_columns(schema, self.layout)) is not None:
            _require_no_bytes(schema, where, found)
            return _File(path, "rows", split, (*common, *found), metadata)
        if "segments" in schema.names and "image_id" in fields_of(item_of(schema.field("segments").type)):
            return _File(path, "interleaved", split, (*common, "segments"), metadata)
        if "segments" in schema.names:
            kind = schema.field("segments").type
            raise InputError(f"{where}: segments holds {kind}, not lists of structs of text and image_id")
        caption = caption_column(schema, self.layout.caption, where)
        picture = image_column(schema, image, where, but=caption)
        _require_all_read(schema, where, picture, caption)
        if picture is None and caption is not None and self.layout.caption is None:
            _require_text_alone(self.folder, metadata, schema, path, caption)
        if picture is None and caption is None:
            raise InputError(
                f"{where} has columns {', '.join(schema.names)}, which are not those of pairs, text or interleaved "
                "documents; move it out of the folder, set prepare.kind, or name the text with --caption-column"
            )
        if caption is None and self._captions:
            raise InputError(
                f"{where} has pictures ({picture}), and no column with a usual name for captions among "
                f"{', '.join(schema.names)}; name it with --caption-column"
            )
        columns = tuple(dict.fromkeys(c for c in (*common, caption, picture) if c is not None))
        return _File(path, "text" if picture is None else "pairs", split, columns, metadata, caption, picture)

    def describe(self) -> list[str]:
        """A line for each file: what it is, the columns that are read and those that are not, its split."""
        lines = []
        for file in self.files:
            rest = [name for name in file.metadata.schema.to_arrow_schema().names if name not in file.columns]
            ignored = f"; not read: {', '.join(rest)}" if rest else ""
            rows = f"{file.metadata.num_rows:,} rows"
            split = file.split or ("by row" if "split" in file.columns else "by hash")
            lines.append(
                f"{file.path}: {file.collection}, {rows}, columns {', '.join(file.columns)}, split {split}{ignored}"
            )
        return lines

    @property
    def of_rows(self) -> bool:
        """Whether a file may name pictures that are kept elsewhere."""
        return any(file.collection == "rows" for file in self.files)

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
        except InputError:
            raise
        except Exception as error:  # a damaged page makes Arrow raise nearly anything
            # Every row counts as broken, so that the report and the 5% limit see what was lost.
            yield from (Broken(f"{file.path}:{first + i}", first_line(error)) for i in range(stop - start))
            return
        for i, row in enumerate(rows):
            place = f"{file.path}:{first + i}"
            if file.collection == "rows":
                yield from documents_of(row, place, self.layout, file.split, None)
            else:
                yield from self._documents(file, row, place, pictures)

    def _documents(self, file: _File, row: dict, place: str, pictures: dict) -> Iterator[Document | Broken]:
        row_id = id_of(row, place)
        try:
            facts = facts_of(row, self.name, file.split)
            if file.collection == "interleaved":
                alternatives = [[_resolve(s, pictures, file.split) for s in row["segments"] or ()]]
            else:
                shown = [self._picture(file, row[file.image])] if file.image else []
                captions = [None] if file.caption is None else captions_in(row[file.caption])
                alternatives = [[*([] if c is None else [Text(c)]), *shown] for c in captions]
        except (OSError, ValueError) as error:
            yield Broken(row_id, first_line(error))
            return
        yield from assembled(row_id, alternatives, facts, place=place)

    def _picture(self, file: _File, image: Any) -> Picture:
        """A picture of bytes, or of a struct {bytes, path}: a file beside the table where there are no bytes."""
        content, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        if not content and isinstance(path, str) and path:
            content = self.folder.read(posixpath.join(posixpath.dirname(file.path), path))
        if not isinstance(content, bytes) or not content:
            raise Refused("its image is missing")
        return Picture(content)

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
            # Where a file has checksums of its pages, a changed byte is told.
            table = pq.ParquetFile(stream, metadata=file.metadata, page_checksum_verification=True)
            found = table.read_row_group(group, columns=[column]).column(0)
        with self._lock:
            self._cache[key] = found
            while len(self._cache) > 1 and sum(c.nbytes for c in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        return found

    def _pictures(self, split: str | None, rows: list[dict]) -> dict[str, Picture | None]:
        """The pictures that these interleaved rows refer to, by id; each row group is read once."""
        places = self._split_places(split)
        wanted: dict[tuple[int, int], dict[str, int]] = {}
        for row in rows:
            for segment in row["segments"] or ():
                picture_id = str((segment or {}).get("image_id"))
                if picture_id in places:
                    number, group, index = places[picture_id]
                    wanted.setdefault((number, group), {})[picture_id] = index
        found = {}
        for (number, group), indices in sorted(wanted.items()):
            file = self.files[number]
            images = self._column(number, group, file.image).take(list(indices.values())).to_pylist()
            found.update(
                (name, self._picture_or_none(file, image)) for name, image in zip(indices, images, strict=True)
            )
        return found

    def _picture_or_none(self, file: _File, image: Any) -> Picture | None:
        try:
            return self._picture(file, image)
        except (OSError, ValueError):
            return None

    def _split_places(self, split: str | None) -> dict[str, tuple[int, int, int]]:
        """File, row group and row of every pair of a split, by id (held in memory: about 200 bytes a pair).

        Raises:
          InputError: an id occurs twice.
        """
        with self._lock:
            if split in self._places:
                return self._places[split]
        places = {}
        for number, file in enumerate(self.files):
            if file.collection == "pairs" and file.split == split and "id" in file.columns:
                for group in range(file.metadata.num_row_groups):
                    for index, picture_id in enumerate(_values(self._column(number, group, "id"))):
                        if places.setdefault(str(picture_id), place := (number, group, index)) != place:
                            raise InputError(
                                f"prepare.source: two pairs have the id {picture_id!r}, the second in {file.path}, so "
                                "interleaved documents may mean either; make the ids of pairs unique"
                            )
        with self._lock:
            return self._places.setdefault(split, places)

    def fingerprint(self) -> str:
        """Changes with the files' names, sizes and rows, and how rows are read."""
        rows = [f.metadata.num_rows for f in self.files]
        return fingerprint("parquet", self._listing, rows, self.layout.sizes)


def _footer(folder: Folder, path: str) -> pq.FileMetaData:
    try:
        with folder.open(path) as stream:
            return pq.read_metadata(stream)
    except Exception as error:  # a damaged footer makes Arrow raise nearly anything
        raise InputError(f"prepare.source: {path} is no readable Parquet file: {first_line(error)}") from error


def _schema(metadata: pq.FileMetaData, path: str) -> pa.Schema:
    try:
        return metadata.schema.to_arrow_schema()
    except Exception as error:  # as above
        raise InputError(f"prepare.source: {path} is no readable Parquet file: {first_line(error)}") from error


def has_codes(folder: Folder, path: str) -> bool:
    """Whether a Parquet file holds ready codes under the name that we give them."""
    schema = _schema(_footer(folder, path), path)
    if "segments" in schema.names:
        return "codes" in fields_of(item_of(schema.field("segments").type))
    return "codes" in schema.names


def _rows_columns(schema: pa.Schema, layout: Layout) -> tuple[str, ...] | None:
    """The columns of a file whose rows have a layout of rows.py that names no picture file; None of another."""
    names = set(schema.names)
    if layout.rules:
        if "segments" in names and layout.codes is None:
            return ("segments",)
        if layout_name(names, layout) == "codes":
            text = chosen(names, CAPTIONS, layout.caption, "--caption-column", "the source")
            return (layout.codes or "codes", *([text] if text else []))
        raise InputError(
            f"prepare.source: columns {', '.join(schema.names)} hold no codes; name theirs with --image-codes-column"
        )
    for wanted in INTERLEAVED:
        if wanted <= names:
            if other := [name for name in sorted(wanted) if not is_list(schema.field(name).type)]:
                kind = schema.field(other[0]).type
                raise InputError(
                    f"prepare.source: {other[0]} beside {wanted - {other[0]}} holds {kind}, not lists; unpack it"
                )
            if any(is_picture(item_of(schema.field(name).type)) for name in wanted):
                raise InputError("prepare.source: lists of pictures' bytes beside texts are not read; store one a row")
            return tuple(sorted(wanted))
    return None


def _require_all_read(schema: pa.Schema, where: str, picture: str | None, caption: str | None) -> None:
    """Raises InputError where pictures would be dropped without a word."""
    lists = [f.name for f in schema if is_list(f.type) and is_picture(item_of(f.type))]
    if lists:
        raise InputError(f"{where}: {lists[0]} holds lists of pictures, which are not read; store one in each row")
    codes = [name for name in schema.names if name == "codes"]
    if codes:
        raise InputError(f"{where}: {codes[0]} holds ready codes; set prepare.kind codes and --codebook")
    _require_no_bytes(schema, where, (picture, caption))


def _require_no_bytes(schema: pa.Schema, where: str, read) -> None:
    """Raises InputError where bytes lie within columns that are not read, deeper than a picture's would."""
    deep = [f for f in schema if f.name not in read and holds_bytes(f.type) and not is_picture(f.type)]
    if deep:
        raise InputError(
            f"{where}: {deep[0].name} holds bytes within {deep[0].type}, which are not read; store one picture in each "
            "row, as bytes or as a struct of bytes and path"
        )


def _require_text_alone(folder: Folder, metadata, schema: pa.Schema, path: str, caption: str) -> None:
    """Raises InputError where the first rows of a file of text stand for pictures too."""
    try:
        with folder.open(path) as stream:
            batches = pq.ParquetFile(stream, metadata=metadata).iter_batches(FIRST_ROWS)
            rows = next(batches, pa.RecordBatch.from_pylist([], schema)).to_pylist()
    except Exception:  # a damaged page makes Arrow raise nearly anything; reading names it
        return
    meant = next(filter(None, (pictures_meant(row, caption) for row in rows)), None)
    if meant:
        raise InputError(
            f"prepare.source: {path}: {meant}, and the file has no bytes of any; fetch or embed them (img2dataset), or "
            f"say --caption-column {caption} where the text stands alone"
        )


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


def _resolve(segment: dict | None, pictures: dict[str, Picture | None], split: str | None) -> Text | Picture:
    segment = segment if isinstance(segment, dict) else {}
    text, picture_id, weight = segment.get("text"), segment.get("image_id"), weight_of(segment)
    if isinstance(text, str) and picture_id is None:
        return Text(text, weight)
    if picture_id is None or text is not None:
        raise Refused("a segment is neither text nor a picture's id")
    if str(picture_id) not in pictures:
        raise Refused(f"picture {picture_id!r} is no pair of the split {split}")
    if (picture := pictures[str(picture_id)]) is None:
        raise Refused(f"picture {picture_id!r} is missing")
    return Picture(picture.image, weight)
