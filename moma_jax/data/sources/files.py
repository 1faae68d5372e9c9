"""The files of a source: a local folder or one on gs:// or s3://, read by names relative to it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa
from pyarrow import fs

from moma_jax.addresses import require_no_credentials
from moma_jax.errors import InputError

SPLIT_WORDS = {"train": "train", "training": "train", "validation": "validation", "val": "validation",
               "valid": "validation", "dev": "validation", "eval": "validation", "heldout": "validation",
               "test": "test"}  # fmt: skip
MAX_FILE_BYTES = 256 << 20
"""Largest picture or caption file that is read whole."""
COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Folder:
    """A folder of a file system. `local` says that symbolic links can occur."""

    filesystem: fs.FileSystem
    base: str
    local: bool = False
    _damages: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def files(self, *suffixes: str, deep: bool = True) -> list[tuple[str, int]]:
        """Relative names and bytes of all files, or those with one of these (lower-case) suffixes, sorted by name; with
        those of folders within where `deep`.

        Raises InputError where a directory is a link: it is not entered, as it may lead anywhere, or round.
        """
        found = self._local_files(deep) if self.local else self._remote_files(deep)
        return sorted((name, size) for name, size in found if not suffixes or name.lower().endswith(suffixes))

    def _local_files(self, deep: bool) -> Iterable[tuple[str, int]]:
        for folder, folders, names in os.walk(self.base, followlinks=False):
            if not deep:
                folders.clear()
            for name in folders:
                if os.path.islink(path := os.path.join(folder, name)):
                    raise InputError(
                        f"{printable(path)}: a link to a folder, which is not followed; give the folder that it leads "
                        "to as a source of its own, or move the link away"
                    )
            for name in names:
                path = os.path.join(folder, name)
                # A link that leads nowhere stays in the list: reading it will name it as broken.
                size = os.path.getsize(path) if os.path.exists(path) else 0
                yield os.path.relpath(path, self.base).replace(os.sep, "/"), size

    def _remote_files(self, deep: bool) -> Iterable[tuple[str, int]]:
        for info in self.filesystem.get_file_info(fs.FileSelector(self.base, recursive=deep)):
            if info.type == fs.FileType.File:
                yield posixpath.relpath(info.path, self.base), info.size

    def open(self, name: str):
        """The file as a seekable binary stream (pyarrow.NativeFile); raises OSError."""
        path = posixpath.join(self.base, name)
        if self.local and os.path.exists(path) and not os.path.isfile(path):
            raise OSError(f"{name!r} is no regular file")  # reading a pipe would wait for ever
        try:
            return self.filesystem.open_input_file(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no file {name!r}") from error

    def stream(self, name: str):
        """The file as a binary stream, unpacked where its name says that it is compressed; raises OSError."""
        file = self.open(name)
        if not is_packed(name):
            return file
        return pa.CompressedInputStream(file, COMPRESSIONS[posixpath.splitext(name.lower())[1]])

    def damage(self, name: str) -> str:
        """What is wrong with a compressed file, whose checksum stands at its end; "" where nothing is or can be."""
        if is_packed(name) and name not in self._damages:  # it takes reading the whole file
            self._damages[name] = self._first_damage(name)
        return self._damages.get(name, "")

    def _first_damage(self, name: str) -> str:
        try:
            with self.stream(name) as stream:
                while stream.read(1 << 20):
                    pass
        except (OSError, pa.ArrowException) as error:
            return first_line(error)
        return ""

    def read(self, name: str) -> bytes:
        """The whole file; raises ValueError where the name leaves the folder (also by a link), OSError otherwise."""
        path = posixpath.normpath(posixpath.join(self.base, name))
        first = posixpath.normpath(name).split("/")[0]
        inside = not posixpath.isabs(name) and first != ".." and "\0" not in name
        if inside and self.local:
            real = os.path.realpath(path)
            inside = any(real.startswith(os.path.join(os.path.realpath(home), "")) for home in self._homes())
        if not inside:
            raise ValueError(f"{name!r} leads out of the folder")
        with self.open(name) as file:
            if file.size() > MAX_FILE_BYTES:
                raise ValueError(f"{name!r} is larger than {MAX_FILE_BYTES >> 20} MiB")
            return file.read()

    def _homes(self) -> list[str]:
        """Where files may lie: the folder, and the blobs that a snapshot of the Hugging Face Hub's cache links to."""
        above, _, below = self.base.rpartition("/snapshots/")
        return [self.base, *([f"{above}/blobs"] if above and below else [])]


def is_packed(name: str) -> bool:
    """Whether a file's name says that it is compressed."""
    return posixpath.splitext(name.lower())[1] in COMPRESSIONS


def locate(path: str, option: str = "prepare.source") -> tuple[Folder, str | None]:
    """The folder at `path`, or the folder of the file at `path` and the file's name; raises InputError."""
    require_no_credentials(path, option)
    path = path.removeprefix("file://")
    try:
        local = "://" not in path
        plain = os.path.abspath(os.path.expanduser(path)) if local else path
        filesystem, base = (fs.LocalFileSystem(), plain) if local else fs.FileSystem.from_uri(path)
        kind = filesystem.get_file_info(base).type
    except (OSError, ValueError) as error:
        raise InputError(f"{option}: cannot reach {path}: {first_line(error)}") from error
    if kind == fs.FileType.Directory:
        return Folder(filesystem, base, local), None
    if kind == fs.FileType.File:
        folder, name = posixpath.split(base)
        return Folder(filesystem, folder, local), name
    more = ', or "scenes"' if option == "prepare.source" else ""
    raise InputError(f"{option}: {path} does not exist; give a file or a folder{more}")


def splits(paths: Iterable[str], names: bool) -> dict[str, str | None]:
    """The split of each file: "train", "validation", or None for all of them where no name says one.

    A folder called train, validation, val, valid, dev or eval, at any depth, decides for the files below it; so do
    train2017, split=val and cc3m_train.

    Args:
      paths: relative to the source.
      names: words of a file's name (train-00000-of-00001.parquet, cc3m-train-0.tar) decide as well. Not for pictures: a
        picture called train.png may show one.

    Raises:
      InputError: a split test, two splits in one path, or names that say a split beside names that do not.
    """
    found = {path: _split(path, names) for path in paths}
    silent = [path for path, split in found.items() if split is None]
    if silent and len(silent) < len(found):
        telling = next(path for path, split in found.items() if split is not None)
        raise InputError(
            f"prepare.source: {printable(telling)} names its split, {printable(silent[0])} does not; name every file "
            f"or folder train or validation, or none"
        )
    return found


def _split(path: str, names: bool) -> str | None:
    """The split that one path says, as in `splits`; raises InputError."""
    *parts, name = path.lower().split("/")
    words = [word for part in [*parts, *([name] if names else [])] for word in re.findall("[a-z]+", part)]
    found = sorted({SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS})
    if "test" in found:
        raise InputError(
            f"prepare.source: {printable(path)} is of the split test, which no store holds; move it out of the source"
        )
    if len(found) > 1:
        raise InputError(f"prepare.source: {printable(path)} names both train and validation; keep one of them")
    return found[0] if found else None


def text_rows(content: bytes, name: str) -> list[dict]:
    """The rows of a small table: CSV, or else lines of JSON objects; raises ValueError, RecursionError, csv.Error."""
    text = content.decode("utf-8-sig")
    if name.endswith(".csv"):
        csv.field_size_limit(MAX_FILE_BYTES)
        return [_filled(row) for row in csv.DictReader(io.StringIO(text, newline=""), strict=True)]
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]  # splitlines also splits at U+2028
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is not an object")
    return rows


def _filled(row: dict[str, str]) -> dict:
    """A row of CSV with None for empty cells; raises ValueError."""
    if None in row:
        raise ValueError(f"a row has more cells than the first one: {', '.join(row[None])[:80]}")
    return {key: cell or None for key, cell in row.items()}


def fingerprint(kind: str, files: list[tuple[str, int]], *settings: object) -> str:
    """SHA-256, as hex, of what a source reads: names, sizes and the settings that change its documents.

    A file whose content changes but not its size is not noticed: reading every byte would cost as much as preparing,
    and times of change differ between the machines of an array job.
    """
    return hashlib.sha256(repr((kind, files, settings)).encode()).hexdigest()


def first_line(error: BaseException) -> str:
    """An exception's message on one line."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0][:200])


def printable(name: str) -> str:
    """The name as UTF-8 can hold it: JSON and file names can carry halves of surrogate pairs."""
    return name.encode("utf-8", "replace").decode()
