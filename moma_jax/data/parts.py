"""Writing one part of a store: arrays that grow by appending, published together in one step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from moma_jax.errors import InputError
from moma_jax.storage.directory import CONTEXT, Directory, first_line
from moma_jax.storage.staged import Staged
from moma_jax.vocab import Vocabulary

FORMAT_VERSION = 2
"""1 had neither pictures, kept nor weights."""
COLLECTIONS = ("text", "pairs", "interleaved")
SPLITS = ("train", "validation")
KINDS = ("text", "image-first", "text-first", "interleaved")
COLUMNS = {"bounds": ("int64", (2,)), "kind": ("uint8", ()), "source": ("uint16", ()), "hash": ("uint8", (16,)),
           "spans": ("int32", (2,)), "pictures": ("uint64", (4,)), "weights": ("float32", ())}  # fmt: skip
OPTIONAL = ("pictures", "weights")
"""Arrays that are only there where a document has a picture, or a weight other than 1."""


def part_name(k: int, n: int) -> str:
    """Directory of part k of n, k from 1."""
    return f"parts/{k:05d}-of-{n:05d}"


def kept_name(k: int, n: int, collection: str) -> str:
    """Array of the documents of a collection of part k of n that count."""
    return f"kept/{k:05d}-of-{n:05d}/{collection}"


class Encoded(NamedTuple):
    """One document as tokens: its collection, split, kind (index into KINDS), source name, 16-byte content hash,
    token_N (ids), spans (modality, tokens) that add up to N, weight_N of its tokens in the loss (None: all 1), and of
    each picture 64 bits of its pixels, of its codes, and of the source's row that it is in."""

    collection: str
    split: str
    kind: int
    source: str
    hash: bytes
    token_N: np.ndarray
    spans: list[tuple[int, int]]
    weight_N: np.ndarray | None = None
    pictures: Sequence[tuple[int, int, int]] = ()


class Column:
    """Writes one array by appending rows: whole shards as they fill, the rest in `close`."""

    def __init__(self, kvstore: dict, dtype: str, row: tuple[int, ...], shard_bytes: int, chunk_rows: int):
        """Args: the array's place, type and row shape; bytes of a shard file; rows of an inner chunk."""
        self._kvstore, self._dtype, self._row = kvstore, np.dtype(dtype), row
        row_bytes = self._dtype.itemsize * int(np.prod(row, dtype=np.int64))
        self._chunk_rows = chunk_rows
        self._shard_rows = max(1, shard_bytes // (row_bytes * chunk_rows)) * chunk_rows
        self._buffer: list[np.ndarray] = []
        self._buffered = self.rows = 0
        self._array = None
        self._hash = hashlib.sha256()

    @property
    def used(self) -> bool:
        """Whether it has rows."""
        return self.rows + self._buffered > 0

    def append(self, value_N: np.ndarray) -> None:
        """Appends rows; the values must fit the array's type."""
        value_N = np.ascontiguousarray(value_N, self._dtype.newbyteorder("<"))
        self._hash.update(value_N)
        self._buffer.append(value_N)
        self._buffered += len(value_N)
        if self._buffered >= self._shard_rows:
            full = self._buffered // self._shard_rows * self._shard_rows
            value_N = np.concatenate(self._buffer)
            self._write(value_N[:full])
            self._buffer, self._buffered = [value_N[full:].copy()], self._buffered - full

    def close(self) -> str:
        """Writes what is left; returns the SHA-256 of all rows' little-endian bytes, as hex."""
        if self._buffered:
            if self._array is None:  # a small array: no chunk larger than the array
                self._chunk_rows = min(self._chunk_rows, self._buffered)
                self._shard_rows = -(-self._buffered // self._chunk_rows) * self._chunk_rows
            self._write(np.concatenate(self._buffer))
            self._buffer = []
        return self._hash.hexdigest()

    def _write(self, value_N: np.ndarray) -> None:
        stop = self.rows + len(value_N)
        try:
            self._store(value_N, stop)
        except ValueError as error:
            place = f"{self._kvstore.get('bucket', '')}{self._kvstore['path']}"
            full = "the disk is full" if "RESOURCE_EXHAUSTED" in str(error) else first_line(error)
            raise InputError(
                f"{place}: cannot be written: {full}; run it again when that is mended: it goes on"
            ) from error
        self.rows = stop

    def _store(self, value_N: np.ndarray, stop: int) -> None:
        if self._array is None:
            spec = {"driver": "zarr3", "kvstore": self._kvstore, "metadata": self._metadata(stop)}
            # Zeros are written too, so that what a reader does not find is lost and never a zero.
            spec["store_data_equal_to_fill_value"] = True
            # Its place was cleared: what is there already is a write of ours whose answer was cut off.
            self._array = ts.open(spec, context=CONTEXT, create=True, open=True).result()
        elif stop > self._array.shape[0]:
            self._array = self._array.resize(exclusive_max=[stop, *self._row]).result()
        self._array[self.rows : stop].write(value_N).result()

    def _metadata(self, rows: int) -> dict:
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        raw = {"name": "bytes"} if self._dtype.itemsize == 1 else little
        sharding = {
            "chunk_shape": [self._chunk_rows, *self._row],
            "codecs": [raw],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        shard = {"name": "regular", "configuration": {"chunk_shape": [self._shard_rows, *self._row]}}
        return {
            "shape": [rows, *self._row],
            "data_type": self._dtype.name,
            "chunk_grid": shard,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "fill_value": 0,
        }


class _Columns:
    """The arrays of one (part, collection, split)."""

    def __init__(self, directory: Directory, name: str, token_dtype: str, shard_bytes: int, chunk_rows: int):
        def column(array, dtype, row):
            return Column(directory.kvstore(f"{name}/{array}"), dtype, row, shard_bytes, chunk_rows)

        self.tokens = column("tokens", token_dtype, ())
        self.index = {array: column(array, *layout) for array, layout in COLUMNS.items()}
        self.index["bounds"].append(np.zeros((1, 2)))
        self.end_2 = np.zeros(2, np.int64)
        self.documents = 0

    def append(self, documents: list[Encoded], source_N: list[int]) -> None:
        self._append_optional(documents)
        length_N2 = np.array([(len(d.token_N), len(d.spans)) for d in documents], np.int64)
        bounds_N2 = self.end_2 + np.cumsum(length_N2, axis=0)
        self.end_2 = bounds_N2[-1]
        self.documents += len(documents)
        self.tokens.append(np.concatenate([d.token_N for d in documents]))
        self.index["bounds"].append(bounds_N2)
        self.index["kind"].append(np.array([d.kind for d in documents]))
        self.index["source"].append(np.array(source_N))
        self.index["hash"].append(np.frombuffer(b"".join(d.hash for d in documents), np.uint8).reshape(-1, 16))
        self.index["spans"].append(np.array([span for d in documents for span in d.spans]))

    def _append_optional(self, documents: list[Encoded]) -> None:
        numbered = enumerate(documents, self.documents)
        if pictures := [(*keys, number) for number, d in numbered for keys in d.pictures]:
            self.index["pictures"].append(np.array(pictures, np.uint64))
        if not self.index["weights"].used and all(d.weight_N is None for d in documents):
            return
        if not self.index["weights"].used:
            for start in range(0, int(self.end_2[0]), 1 << 20):
                self.index["weights"].append(np.ones(min(1 << 20, int(self.end_2[0]) - start)))
        ones = (np.ones(len(d.token_N)) if d.weight_N is None else d.weight_N for d in documents)
        self.index["weights"].append(np.concatenate(list(ones)))

    def close(self, tokens_M: np.ndarray) -> dict:
        columns = {"tokens": self.tokens, **{k: v for k, v in self.index.items() if k not in OPTIONAL or v.used}}
        with ThreadPoolExecutor(len(columns)) as pool:  # many small files: the waiting is for the disk
            checksums = dict(zip(columns, pool.map(Column.close, columns.values()), strict=True))
        return {"documents": self.documents, "tokens_M": tokens_M.tolist(), "checksums": checksums}


class PartWriter:
    """Writes one part: `append` documents, then `finish`; nothing shows in the store before that.

    A context manager: leaving it without `finish` leaves no part behind. The bytes depend on the documents, their
    order and the settings only, not on how they were batched.
    """

    def __init__(self, directory: Directory, k: int, n: int, vocabulary: Vocabulary, shard_bytes: int, chunk_rows: int):
        self._directory, self._vocabulary = directory, vocabulary
        self._layout = (vocabulary.token_dtype, shard_bytes, chunk_rows)
        self._staged = Staged(directory, part_name(k, n))
        self._columns: dict[tuple[str, str], _Columns] = {}
        self._tokens_M: dict[tuple[str, str], np.ndarray] = {}
        self._sources: dict[str, int] = {}

    def append(self, documents: list[Encoded]) -> None:
        """Adds documents, in order."""
        groups: dict[tuple[str, str], list[Encoded]] = {}
        for document in documents:
            groups.setdefault((document.collection, document.split), []).append(document)
        for key, group in groups.items():
            if key not in self._columns:
                name = f"{self._staged.name}/{key[0]}-{key[1]}"
                self._columns[key] = _Columns(self._directory, name, *self._layout)
                self._tokens_M[key] = np.zeros(len(self._vocabulary.modalities), np.int64)
            source_N = [self._sources.setdefault(d.source, len(self._sources)) for d in group]
            if len(self._sources) > 1 << 16:
                raise InputError("source: more than 65,536 different source names in a part; name fewer, or more parts")
            self._columns[key].append(group, source_N)
            span_K2 = np.array([span for d in group for span in d.spans])
            np.add.at(self._tokens_M[key], span_K2[:, 0], span_K2[:, 1])

    def finish(self, description: dict[str, Any]) -> dict:
        """Publishes the part in one step; returns its part.json: `description` with counts and checksums."""
        collections = {
            f"{collection}-{split}": self._columns[collection, split].close(self._tokens_M[collection, split])
            for collection in COLLECTIONS
            for split in SPLITS
            if (collection, split) in self._columns
        }
        part = {"format_version": FORMAT_VERSION, **description, "sources": list(self._sources),
                "collections": collections}  # fmt: skip
        self._staged.publish("part.json", part)
        return part

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *_) -> None:
        self._staged.close()
