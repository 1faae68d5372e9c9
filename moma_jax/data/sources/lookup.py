"""Pictures that documents name: a folder of picture files or tars, found by name, by key, or by address."""

from __future__ import annotations

import csv
import io
import posixpath
import threading
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from moma_jax.data.sources.columns import ADDRESSES, PICTURES
from moma_jax.data.sources.files import MAX_FILE_BYTES, fingerprint, first_line, locate, text_rows
from moma_jax.data.sources.rows import Missing
from moma_jax.data.sources.tars import DAMAGES, TARS, members_of
from moma_jax.errors import InputError

MAP_FILES = (".parquet", ".csv", ".jsonl")


class _Place(NamedTuple):
    """Where a picture is: a file, and for one within a tar its first byte and bytes."""

    file: str
    start: int = 0
    size: int | None = None


class Lookup:
    """The pictures below `path`; `addresses`: a file that says which key an address has.

    A picture is found by its path in the folder or tar, by its file's name, and by that without its suffix; where
    addresses are known, by its address. Where nothing says which address has which key, the Parquet files that
    img2dataset leaves beside its tars do. What is where is looked at once, when the first picture is wanted.
    """

    def __init__(self, path: str, addresses: str | None):
        """Lists the files; raises InputError where there are no pictures."""
        self.path = path
        self._folder, only = locate(path, "prepare.images")
        listing = [(name, size) for name, size in self._folder.files(deep=only is None) if only in (None, name)]
        self._tars = [name for name, _ in listing if name.lower().endswith(".tar")]
        self._files = [name for name, _ in listing if name.lower().endswith(PICTURES)]
        if packed := [name for name, _ in listing if name.lower().endswith(TARS) and name not in set(self._tars)]:
            raise InputError(
                f"prepare.images: {packed[0]} is compressed, and pictures are fetched here and there; unpack it"
            )
        if not self._tars and not self._files:
            raise InputError(f"prepare.images: {path} holds no pictures and no .tar of them; check it")
        self._listing, self._lock, self._places = listing, threading.Lock(), None
        beside = [name for name, _ in listing if name.endswith(".parquet") and f"{name[:-8]}.tar" in set(self._tars)]
        self._maps = [(self._folder, name) for name in beside]
        if addresses is not None:
            folder, name = locate(addresses, "prepare.image_map")
            names = [name] if name else [found for found, _ in folder.files(*MAP_FILES)]
            if not names or not all(name.lower().endswith(MAP_FILES) for name in names):
                raise InputError(f"prepare.image_map: {addresses} is no {', '.join(MAP_FILES)}; give one of these")
            self._maps = [(folder, name) for name in names]

    def fingerprint(self) -> str:
        """Changes with the files' names and sizes."""
        return fingerprint("images", self._listing, [name for _, name in self._maps])

    def read(self, name: str) -> bytes:
        """The bytes of a picture's file; raises Missing where there is none of that name, OSError, ValueError."""
        place = self._all().get(name)
        if place is None:
            raise Missing(f"picture {name[:80]!r} is not in {self.path}")
        if place is _TWICE:
            raise ValueError(f"{name[:80]!r} is the name of several pictures in {self.path}")
        if place.size is None:
            return self._folder.read(place.file)
        if place.size > MAX_FILE_BYTES:
            raise ValueError(f"{name!r} is larger than {MAX_FILE_BYTES >> 20} MiB")
        with self._folder.open(place.file) as file:
            file.seek(place.start)
            return file.read(place.size)

    def _all(self) -> dict[str, _Place]:
        with self._lock:
            if self._places is None:
                self._places = self._look()
            return self._places

    def _look(self) -> dict[str, _Place]:
        places: dict[str, _Place] = {}
        for name in self._files:
            _remember(places, name, _Place(name))
        for tar in self._tars:
            try:
                with self._folder.open(tar) as file:
                    for member in members_of(io.BufferedReader(file)):
                        if member.isreg() and member.name.lower().endswith(PICTURES):
                            _remember(places, member.name, _Place(tar, member.offset_data, member.size))
            except DAMAGES as error:
                raise InputError(f"prepare.images: {tar} is damaged: {first_line(error)}") from error
        keys = {}
        for folder, name in self._maps:
            for address, key in _addresses(folder, name):
                if keys.setdefault(address, key) != key:
                    raise InputError(f"prepare.image_map: {name} gives {address!r} two keys; keep one")
        return places | {address: places[key] for address, key in keys.items() if key in places}


_TWICE = _Place("")
"""Stands for a name that several pictures have."""


def _remember(places: dict[str, _Place], path: str, place: _Place) -> None:
    """Enters a picture by all its names; a name of several pictures means none of them."""
    base = posixpath.basename(path)
    for name in {path, base, posixpath.splitext(base)[0], posixpath.splitext(path)[0]}:
        places[name] = _TWICE if name in places else place


def _addresses(folder, name: str):
    """(address, key) of each line of a map."""
    try:
        with folder.open(name) as file:
            if name.endswith(".parquet"):
                table = pq.read_table(file)
                columns = {column: table.column(column) for column in table.column_names}
            else:
                rows = text_rows(file.read(), name)
                columns = {column: [row.get(column) for row in rows] for column in (rows[0] if rows else ())}
    except (OSError, ValueError, RecursionError, pa.ArrowException, csv.Error) as error:
        raise InputError(f"prepare.image_map: {name} cannot be read: {first_line(error)}") from error
    address = next((column for column in columns if column.lower() in ADDRESSES), None)
    own = next((column for column in columns if column.lower() == "key"), None)
    if address is None or own is None:
        raise InputError(f"prepare.image_map: {name} has columns {', '.join(columns)}; it needs url and key")
    for found, key in zip(columns[address], columns[own], strict=True):
        found, key = (value.as_py() if isinstance(value, pa.Scalar) else value for value in (found, key))
        if found is not None and key is not None:
            yield str(found), str(key)
