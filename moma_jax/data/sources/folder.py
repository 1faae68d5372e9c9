"""Pictures in folders, with captions in .txt files beside them or in a metadata file, as imagefolder has it."""

from __future__ import annotations

import csv
import math
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from moma_jax.data.documents import Broken, Document, Picture, Text
from moma_jax.data.sources.columns import ABOUT, CAPTIONS, PICTURE_NAMES, chosen
from moma_jax.data.sources.files import Folder, fingerprint, first_line, printable, splits, text_rows
from moma_jax.data.sources.rows import Refused, assembled, captions_in, facts_of
from moma_jax.errors import InputError

METADATA = ("metadata.csv", "metadata.jsonl")
READ_AT_ONCE = 8
"""Files of a block that are read at once: object stores answer slowly, and many at a time."""


class FolderSource:
    """Pictures in any depth of folders, each with a caption: `NAME.txt` beside it, or a line of metadata.csv/.jsonl in
    its folder or one above, with the columns file_name and a caption.

    Pictures below a folder train/ or validation/, at any depth, have that split. Links are followed only within
    the folder.
    """

    def __init__(
        self,
        name: str,
        folder: Folder,
        files: list[tuple[str, int]],
        about: list[tuple[str, int]],
        caption: str | None = None,
        image: str | None = None,
        captions: bool = True,
    ):
        """Args: files: pictures. about: metadata files and captions. caption, image: columns of the metadata, where
        they are not the usual ones. captions: whether a picture without one is broken, or stands alone."""
        self.name, self.folder, self.files, self.captions = name, folder, files, captions
        self.splits = splits((path for path, _ in files), False)
        self.block = max(1, min(256, math.ceil(len(files) / 64)))
        tables = [path for path, _ in about if posixpath.basename(path) in METADATA]
        self.texts = {posixpath.splitext(path)[0]: path for path, _ in about if path not in tables}
        if len(self.texts) + len(tables) < len(about):
            twice = [path for path, _ in about if path not in {*tables, *self.texts.values()}]
            raise InputError(f"prepare.source: {twice[0]} has a twin but for capitals; keep one of the two")
        self.about = [(path, size) for path, size in about if not tables or path in tables]
        described = self.texts.keys() & {posixpath.splitext(path)[0] for path, _ in files}
        if tables and described:
            raise InputError(
                f"prepare.source: {tables[0]} and {self.texts[min(described)]} both have captions; move one kind away"
            )
        homes = [posixpath.dirname(table) for table in tables]
        if twice := sorted({home for home in homes if homes.count(home) > 1}):
            raise InputError(
                f"prepare.source: {twice[0] or 'the folder'} has both {' and '.join(METADATA)}; move one away"
            )
        if image is not None and not tables:
            raise InputError(f"--image-column: is one of {' or '.join(METADATA)}, which are not there")
        self._unread: set[str] = set()
        self.rows = None if not tables else {}
        for table in tables:
            found, unread = _metadata(folder, table, caption, image)
            if twice := sorted(self.rows.keys() & found.keys()):
                raise InputError(
                    f"prepare.source: {table} and another table both speak of {twice[0]}; keep one of them"
                )
            self.rows |= found
            self._unread |= unread
        self.lost = sorted(set(self.rows or ()) - {path for path, _ in files})
        if self.rows is None:
            self.lost = [self.texts[name] for name in sorted(self.texts.keys() - described) if not _is_about(name)]

    def units(self) -> int:
        """Blocks of pictures in the order of their names."""
        return math.ceil(len(self.files) / self.block)

    def describe(self) -> list[str]:
        """Pictures of each split, and where their captions are."""
        counts: dict[str | None, int] = {}
        for split in self.splits.values():
            counts[split] = counts.get(split, 0) + 1
        where = (
            "NAME.txt" if self.rows is None else ", ".join(sorted({t for t, _ in self.about if t.endswith(METADATA)}))
        )
        rest = f"; not read: {', '.join(sorted(self._unread))}" if self._unread else ""
        return [f"{n} pictures, captions in {where}, split {split or 'by hash'}{rest}" for split, n in counts.items()]

    def read(self, unit: int) -> Iterator[Document | Broken]:
        """The pairs of one block; with the first, captions of pictures that are not there are named."""
        if unit == 0:
            for name in self.lost:
                yield Broken(printable(name), "there is no picture of this name")
        paths = [path for path, _ in self.files[unit * self.block : (unit + 1) * self.block]]
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            for found in pool.map(self._pair, paths):
                yield from found

    def _pair(self, path: str) -> list[Document | Broken]:
        try:
            row = {} if self.rows is None else self.rows.get(path)
            if row is None:
                raise Refused("the metadata has no line for it")
            if row.get("differs"):
                raise Refused("its lines in the metadata differ in split, group, source or weight")
            captions = self._captions(path, row)
            picture = Picture(self.folder.read(path))
            if not captions and self.captions:
                raise Refused("its caption is empty")
            facts = facts_of(row, self.name, self.splits[path])
        except (OSError, ValueError) as error:
            return [Broken(printable(path), first_line(error))]
        return list(assembled(printable(path), [[Text(c), picture] for c in captions] or [[picture]], facts))

    def _captions(self, path: str, row: dict) -> list[str]:
        if self.rows is not None:
            return captions_in(row["caption"]) if row["caption"] else []
        if (text := self.texts.get(posixpath.splitext(path)[0])) is None:
            if self.captions:
                raise Refused(f"has no caption: there is no {posixpath.splitext(posixpath.basename(path))[0]}.txt")
            return []
        caption = self.folder.read(text).decode("utf-8-sig").strip()
        return [caption] if caption else []

    def picture_units(self, split: str | None = None) -> list[int]:
        """Blocks with a picture that may be of the split."""
        wanted = {None, split}
        blocks = (self.files[unit * self.block : (unit + 1) * self.block] for unit in range(self.units()))
        return [n for n, files in enumerate(blocks) if split is None or any(self.splits[f] in wanted for f, _ in files)]

    def fingerprint(self) -> str:
        """Changes with the pictures' and captions' names and sizes."""
        return fingerprint("folder", sorted([*self.files, *self.about]))


def _number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell  # reading the row says what is wrong with it


def _is_about(name: str) -> bool:
    """Whether a text file is about the folder, and no caption."""
    return posixpath.basename(name).lower() in ("readme", "license", "licence", "copying", "requirements", "classes")


def _metadata(folder: Folder, path: str, caption: str | None, image: str | None) -> tuple[dict[str, dict], set[str]]:
    """The rows of a metadata file by the path of their picture, each with its caption under "caption"; the names of
    columns that are not read."""
    try:
        rows = text_rows(folder.read(path), path)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"prepare.source: {path} cannot be read: {first_line(error)}") from error
    if not rows:
        raise InputError(f"prepare.source: {path} has no lines; write them, or remove it")
    column = chosen(rows[0], CAPTIONS, caption, "--caption-column", path)
    named = chosen(rows[0], PICTURE_NAMES, image, "--image-column", path)
    if named is None:
        raise InputError(f"prepare.source: {path} has no column file_name; it has {', '.join(map(str, rows[0]))}")
    unread = {key for row in rows for key in row if key not in (named, column) and key.lower() not in ABOUT}
    weights = [key for key in rows[0] if key.lower() == "weight"] if path.endswith(".csv") else []
    found: dict[str, dict] = {}
    for row in rows:
        row |= {key: _number(row[key]) for key in weights if row[key] is not None}
        name = posixpath.normpath(posixpath.join(posixpath.dirname(path), str(row.get(named))))
        text = row.get(column) if column else None
        if name in found:  # another caption of the same picture
            before = found[name]["caption"]
            found[name]["caption"] = [*(before if isinstance(before, list) else [before]), text]
            about = [key for key in row.keys() | found[name].keys() if key.lower() in ABOUT and key.lower() != "id"]
            found[name]["differs"] |= any(row.get(key) != found[name].get(key) for key in about)
        else:
            found[name] = {**row, "caption": text, "differs": False}
    return found, unread
