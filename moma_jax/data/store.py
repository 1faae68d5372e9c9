"""The token store: flat tokens and their index, in immutable parts under one manifest.

    manifest.json                     format version, hashes, counts, checksums; its presence makes a directory a store
    settings.json                     what the store is made from, written first
    vocabulary.json tokenizer.json codec-image.json codec-image.safetensors
    report.json                       broken documents
    parts/00001-of-00008/part.json    one part's counts and checksums
    parts/00001-of-00008/pairs-train/{tokens,bounds,kind,source,hash,spans,...}/   zarr3 arrays

The arrays of one (part, collection, split) with N documents and K spans:

    tokens  (total,)  uint16 or uint32: every document's tokens, one after the other
    bounds  (N+1, 2)  int64: where the tokens and the spans of document n begin; row N is the end
    kind    (N,)      uint8: index into KINDS
    source  (N,)      uint16: index into the part's list of source names
    hash    (N, 16)   uint8: the content hash
    spans   (K, 2)    int32: runs (modality, tokens) over the token sequence
    pictures (P, 4)   uint64: of each picture 64 bits of its pixels, of its codes, and of its row in the source, and the
                      document that it is in
    weights (total,)  float32: every token's weight in the loss; only where one is not 1

    kept/00001-of-00008/pairs-train  (N',) int64: the documents that count, where some were dropped as duplicates

All are raw bytes in zarr3's sharding codec and are read by range, so a store of any size opens at once.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from moma_jax.codec import Codec, codec_of
from moma_jax.codec.interface import description_hash
from moma_jax.data.manifest import Described, read_manifest
from moma_jax.data.parts import COLLECTIONS, KINDS, SPLITS, kept_name, part_name
from moma_jax.data.text import TextCodec
from moma_jax.errors import InputError, RunError, naming
from moma_jax.fields import read_file
from moma_jax.storage.directory import CONTEXT, Directory, first_line
from moma_jax.vocab import Vocabulary

__all__ = ["COLLECTIONS", "KINDS", "SPLITS", "Codecs", "Index", "Store", "View", "open_store", "require_same_codecs"]

WEIGHTS = "codec-image.safetensors"
"""Weights of the image codec, where it has some."""
PER_DOCUMENT = ("bounds", "kind", "source", "hash")
"""Arrays with a row for each document (bounds: and one at the end)."""

# Vocabulary, tokenizer and codec --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codecs:
    """What turns text and pictures into ids, as kept in a store.

    Attributes:
      vocabulary: the id layout.
      tokenizer: content of tokenizer.json; empty where there is none (a converted model that came without).
      image: description of the image codec, plain JSON values with its `kind`; None where a store has no pictures or
        was made from ready codes without their codec.
      weights: reads the image codec's weights, whose hash is in `image`; None of a palette, which has none.
    """

    vocabulary: Vocabulary
    tokenizer: bytes
    image: dict[str, Any] | None
    weights: Callable[[], bytes | None] = field(default=lambda: None, compare=False)

    @classmethod
    def of(cls, vocabulary: Vocabulary, tokenizer: bytes, codec: Codec | None) -> Codecs:
        """Those of a new store; `codec`: of its pictures, None where there is none."""
        if codec is None:
            return cls(vocabulary, tokenizer, None)
        return cls(vocabulary, tokenizer, codec.to_json(), lambda: codec.weights)

    @property
    def hashes(self) -> dict[str, str | None]:
        """What must be equal in two stores whose tokens are to be mixed."""
        return {
            "vocabulary": self.vocabulary.hash,
            "tokenizer": hashlib.sha256(self.tokenizer).hexdigest(),
            "image_codec": None if self.image is None else description_hash(self.image),
        }

    def write(self, directory: Directory) -> None:
        """Writes the files, those that there are, vocabulary.json last."""
        if self.tokenizer:
            directory.write("tokenizer.json", self.tokenizer)
        if (weights := self.weights()) is not None:
            directory.write(WEIGHTS, weights)
        if self.image is not None:
            directory.write_json("codec-image.json", self.image)
        directory.write_json("vocabulary.json", {"layout": self.vocabulary.to_json(), "hashes": self.hashes})


def read_codecs(directory: Directory) -> Codecs | None:
    """The files that `Codecs.write` wrote, None where they are not complete; raises InputError where they differ."""
    description = directory.read_json("vocabulary.json")
    if description is None:
        return None
    where = f"{directory.path}/vocabulary.json"
    hashes = read_file(Described, description, where)["hashes"]
    tokenizer = directory.read("tokenizer.json")
    image = directory.read_json("codec-image.json") if hashes["image_codec"] else None
    with naming(where):
        layout = Vocabulary.from_json(description["layout"])
    codecs = Codecs(layout, tokenizer or b"", image, partial(directory.read, WEIGHTS))
    for name, value in codecs.hashes.items():
        if value != hashes[name]:
            raise InputError(f"{directory.path}: the {name} was changed after the store was made; restore the file")
    return codecs


def text_codec(codecs: Codecs) -> TextCodec:
    """The tokenizer, ready to use; InputError where there is none."""
    if not codecs.tokenizer:
        raise InputError("tokenizer.json: this vocabulary came without one; convert again from a folder that has it")
    return TextCodec.from_json(codecs.tokenizer)


def image_codec(codecs: Codecs) -> Codec | None:
    """The image codec, ready to use; None where there is none, InputError where its codes are not the vocabulary's."""
    if codecs.image is None:
        return None
    codec = codec_of(codecs.image, codecs.weights)
    for own in codecs.vocabulary.modalities:
        if own.name == "image" and (own.span, own.size) != (codec.codes_per_image, codec.codebook):
            raise InputError(
                f"codec-image.json: {codec.codes_per_image} codes of {codec.codebook} a picture, by vocabulary.json "
                f"{own.span} of {own.size}; restore both files"
            )
    return codec


def require_same_codecs(first: Store, second: Store) -> None:
    """Raises InputError where the ids of two stores do not mean the same."""
    for name, value in first.manifest["hashes"].items():
        other = second.manifest["hashes"][name]
        if value != other and None not in (value, other):
            raise InputError(
                f"{second.path}: its {name.replace('_', ' ')} differs from that of {first.path}, so their ids do not "
                f"mean the same; prepare it again with --vocabulary {first.path}"
            )


# Reading --------------------------------------------------------------------------------------------------------------


class Index(NamedTuple):
    """What the planner needs of documents [start, stop).

    Attributes:
      length_N: int64, tokens of each document.
      kind_N: uint8, index into KINDS.
      span_row_N1: int64 (N+1,); document n has the spans span_row[n]:span_row[n+1].
      span_modality_K: uint8, modality of each span.
      span_length_K: int32, tokens of each span.
    """

    length_N: np.ndarray
    kind_N: np.ndarray
    span_row_N1: np.ndarray
    span_modality_K: np.ndarray
    span_length_K: np.ndarray


def open_store(path: str, *, cache_bytes: int = 256 << 20, read_concurrency: int = 64) -> Store:
    """Opens a store for reading: one small file is read, arrays are opened when first used.

    Args:
      path: the store's directory, local, gs:// or s3://.
      cache_bytes: bytes of decoded chunks that are kept, over all views of this store.
      read_concurrency: reads in flight.

    Raises:
      InputError: there is no complete store of a known format at `path`.
    """
    return Store(Directory(path), cache_bytes, read_concurrency)


class Store:
    """A complete store, see `open_store`. All methods may be called from several threads.

    Attributes:
      path: as given.
      manifest: the content of manifest.json.
    """

    def __init__(self, directory: Directory, cache_bytes: int, read_concurrency: int):
        self.path, self.directory = directory.path, directory
        self.manifest = read_manifest(directory)
        limit = {"limit": read_concurrency}
        self._context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": cache_bytes},
                "file_io_concurrency": limit,
                "gcs_request_concurrency": limit,
                "s3_request_concurrency": limit,
            },
            CONTEXT,
        )
        self._arrays: dict[str, ts.TensorStore] = {}
        self._lock = threading.Lock()

    @cached_property
    def codecs(self) -> Codecs:
        """Vocabulary, tokenizer and image codec, checked against the manifest."""
        codecs = read_codecs(self.directory)
        names = [] if codecs is None else [m.name for m in codecs.vocabulary.modalities]
        if codecs is None or (codecs.hashes, names) != (self.manifest["hashes"], self.manifest["modalities"]):
            raise InputError(f"{self.path}: vocabulary.json is not the one of manifest.json; restore the store's files")
        return codecs

    @property
    def vocabulary(self) -> Vocabulary:
        """The id layout."""
        return self.codecs.vocabulary

    def text_codec(self) -> TextCodec:
        """The tokenizer."""
        with naming(self.path):
            return text_codec(self.codecs)

    def image_codec(self) -> Codec | None:
        """The image codec; None where pictures came as ready codes or there are none."""
        with naming(self.path):
            return image_codec(self.codecs)

    def view(self, collection: str = "all", split: str = "train") -> View:
        """The documents of a collection ("text", "pairs", "interleaved" or "all") and split ("train", "validation").

        A view may be empty. Raises InputError for another name.
        """
        if collection not in (*COLLECTIONS, "all"):
            raise InputError(f"collection: {collection!r} is not one of {', '.join(COLLECTIONS)}, all")
        if split not in SPLITS:
            raise InputError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
        return View(self, COLLECTIONS if collection == "all" else (collection,), split)

    def array(self, name: str) -> ts.TensorStore:
        """One array, opened once; parts never change, so nothing is read twice while it is cached."""
        with self._lock:
            array = self._arrays.get(name)
        if array is None:
            spec = {"driver": "zarr3", "kvstore": self.directory.kvstore(name), "fill_missing_data_reads": False}
            opening = ts.open(
                spec, context=self._context, read=True, recheck_cached_data=False, recheck_cached_metadata=False
            )
            array = self.wait(opening)
            with self._lock:
                self._arrays[name] = array
        return array

    def wait(self, future: Any) -> Any:
        """The result of a read; raises RunError naming the file that is lost or damaged."""
        try:
            return future.result()
        except ValueError as error:
            raise RunError(
                f"{self.path}: a file is damaged or unreadable: {first_line(error)}; restore it from a copy, or "
                "prepare the store again in a new directory"
            ) from error

    def verify(self) -> None:
        """Reads everything and compares checksums; raises RunError naming the first array that is damaged."""
        parts = self.manifest["parts"]
        for k, part in enumerate(parts, 1):
            for collection, description in part["collections"].items():
                arrays = {
                    f"{part_name(k, len(parts))}/{collection}/{a}": c for a, c in description["checksums"].items()
                }
                if "kept" in description:
                    arrays[kept_name(k, len(parts), collection)] = description["kept"]
                for name, checksum in arrays.items():
                    if self._checksum(name) != checksum:
                        raise RunError(f"{self.path}/{name}: damaged, its checksum is not that of the manifest")

    def _checksum(self, name: str) -> str:
        array, digest = self.array(name), hashlib.sha256()
        rows = array.chunk_layout.write_chunk.shape[0]
        for start in range(0, array.shape[0], rows):
            value_N = self.wait(array[start : min(start + rows, array.shape[0])].read())
            digest.update(np.ascontiguousarray(value_N, value_N.dtype.newbyteorder("<")))
        return digest.hexdigest()


class View:
    """Documents of some collections and one split: 0..documents-1, collection after collection, part after part.

    Attributes:
      documents: their number.
      tokens_M: int64, their tokens of each modality.
    """

    def __init__(self, store: Store, collections: tuple[str, ...], split: str):
        self._store, self._pieces, self._kept, counts = store, [], [], []
        parts = store.manifest["parts"]
        tokens_M = np.zeros(len(store.manifest["modalities"]), np.int64)
        self._sources, self._weighted = [], []
        for collection in collections:
            for k, part in enumerate(parts, 1):
                description = part["collections"].get(f"{collection}-{split}")
                if description is not None:
                    self._pieces.append(f"{part_name(k, len(parts))}/{collection}-{split}")
                    kept = kept_name(k, len(parts), f"{collection}-{split}") if "kept" in description else None
                    self._kept.append(kept)
                    self._weighted.append("weights" in description["checksums"])
                    self._sources.append(part["sources"])
                    counts.append(description["documents"])
                    tokens_M += description["tokens_M"]
        self._start_P = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        self.documents = int(self._start_P[-1])
        self.tokens_M = tokens_M

    @property
    def weighted(self) -> bool:
        """Whether a token may have another weight in the loss than 1."""
        return any(self._weighted)

    def index(self, start: int, stop: int) -> Index:
        """Lengths, kinds and spans of documents [start, stop); reads only these. Raises IndexError outside."""
        pieces, wait = self._overlaps(start, stop), self._store.wait
        rows = [self._rows(p, a, b) for p, a, b in pieces]
        kinds = [self._array(p, "kind")[own].read() for (p, _, _), own in zip(pieces, rows, strict=True)]
        bounds = [self._both_bounds(p, own) for (p, _, _), own in zip(pieces, rows, strict=True)]
        bounds = [found() for found in bounds]
        spans = [self._spans(p, bound_N22[:, :, 1]) for (p, _, _), bound_N22 in zip(pieces, bounds, strict=True)]
        step_N2 = np.concatenate([np.zeros((0, 2), np.int64), *(np.diff(b, axis=1)[:, 0] for b in bounds)])
        span_K2 = np.concatenate([np.zeros((0, 2), np.int32), *(found() for found in spans)])
        return Index(
            length_N=step_N2[:, 0],
            kind_N=np.concatenate([np.zeros(0, np.uint8), *(wait(future) for future in kinds)]),
            span_row_N1=np.concatenate([[0], np.cumsum(step_N2[:, 1])]),
            span_modality_K=span_K2[:, 0].astype(np.uint8),
            span_length_K=span_K2[:, 1],
        )

    def read(self, doc_N, start_N, stop_N, array: str = "tokens") -> list[np.ndarray]:
        """Tokens [start, stop) of each document, uint16 or uint32; all reads are in flight together.

        Args: equally long sequences of document numbers and of positions in those documents; array "weights" gives the
        tokens' weights in the loss instead, float32. Raises IndexError for a document or position that does not exist.
        """
        doc_N, start_N, stop_N = (np.asarray(a, np.int64) for a in (doc_N, start_N, stop_N))
        if len(doc_N) and (doc_N.min() < 0 or doc_N.max() >= self.documents):
            raise IndexError(f"document numbers {doc_N.min()} to {doc_N.max()}; the view has {self.documents}")
        piece_N = np.searchsorted(self._start_P, doc_N, "right") - 1
        groups = [(int(p), np.flatnonzero(piece_N == p)) for p in np.unique(piece_N)]
        bounds = [self._bounds(p, self._row(p, doc_N[chosen_N] - self._start_P[p])) for p, chosen_N in groups]
        futures: list[Any] = [None] * len(doc_N)
        for (p, chosen_N), bound_N2 in zip(groups, bounds, strict=True):
            begin_N, end_N = self._store.wait(bound_N2).reshape(-1, 2).T
            first_N, last_N = begin_N + start_N[chosen_N], begin_N + stop_N[chosen_N]
            if np.any((start_N[chosen_N] < 0) | (first_N > last_N) | (last_N > end_N)):
                raise IndexError("positions outside a document")
            there = array != "weights" or self._weighted[p]
            values = self._array(p, array) if there else None
            for n, first, last in zip(chosen_N.tolist(), first_N.tolist(), last_N.tolist(), strict=True):
                futures[n] = values[first:last].read() if there else np.ones(last - first, np.float32)
        return [found if isinstance(found, np.ndarray) else self._store.wait(found) for found in futures]

    def provenance(self, start: int, stop: int) -> tuple[list[str], np.ndarray]:
        """Source names and content hashes, uint8 (N, 16), of documents [start, stop)."""
        names, hashes = [], [np.zeros((0, 16), np.uint8)]
        for p, a, b in self._overlaps(start, stop):
            rows = self._rows(p, a, b)
            source_N = self._store.wait(self._array(p, "source")[rows].read())
            if np.any(source_N >= len(self._sources[p])):
                raise RunError(
                    f"{self._store.path}/manifest.json: names {len(self._sources[p])} sources, and a document is of "
                    f"number {source_N.max()}; restore the file, it is damaged"
                )
            names += [self._sources[p][s] for s in source_N]
            hashes.append(self._store.wait(self._array(p, "hash")[rows].read()))
        return names, np.concatenate(hashes)

    def _rows(self, piece: int, start: int, stop: int) -> slice | np.ndarray:
        """Where documents [start, stop) of a piece stand in its arrays."""
        return slice(start, stop) if self._kept[piece] is None else self._row(piece, np.arange(start, stop))

    def _row(self, piece: int, doc_N: np.ndarray) -> np.ndarray:
        """Where documents of a piece stand in its arrays, (N,)."""
        kept = self._kept[piece]
        return doc_N if kept is None else self._store.wait(self._sized(piece, kept, 0)[doc_N].read())

    def _bounds(self, piece: int, row_N: np.ndarray):
        """A future of where the tokens of documents of a piece begin and end, (N, 2, 1)."""
        return self._array(piece, "bounds")[np.stack([row_N, row_N + 1], axis=1), 0].read()

    def _both_bounds(self, piece: int, rows: slice | np.ndarray) -> Callable[[], np.ndarray]:
        """What gives where tokens and spans of documents begin and end, (N, 2, 2); the read is in flight."""
        array = self._array(piece, "bounds")
        if isinstance(rows, slice):
            future = array[rows.start : rows.stop + 1].read()
            return lambda: np.stack([self._store.wait(future)[:-1], self._store.wait(future)[1:]], axis=1)
        future = array[np.stack([rows, rows + 1], axis=1)].read()
        return lambda: self._store.wait(future)

    def _spans(self, piece: int, bound_N2: np.ndarray) -> Callable[[], np.ndarray]:
        """What gives the spans of documents whose spans begin and end there, (K, 2); the read is in flight."""
        if not len(bound_N2):
            return lambda: np.zeros((0, 2), np.int32)
        first, last = int(bound_N2[0, 0]), int(bound_N2[-1, 1])
        future, count_N = self._array(piece, "spans")[first:last].read(), np.diff(bound_N2, axis=1)[:, 0]
        if count_N.sum() == last - first:
            return lambda: self._store.wait(future)
        place_K = np.repeat(bound_N2[:, 0] - first - np.cumsum(count_N) + count_N, count_N) + np.arange(count_N.sum())
        return lambda: self._store.wait(future)[place_K]

    def _array(self, piece: int, array: str) -> ts.TensorStore:
        name = f"{self._pieces[piece]}/{array}"
        if array not in PER_DOCUMENT or self._kept[piece] is not None:
            return self._store.array(name)
        return self._sized(piece, name, int(array == "bounds"))

    def _sized(self, piece: int, name: str, more: int) -> ts.TensorStore:
        """An array with a row for each document of a piece, and `more`; RunError where it has not."""
        found, documents = self._store.array(name), int(self._start_P[piece + 1] - self._start_P[piece])
        if found.shape[0] != documents + more:
            raise RunError(
                f"{self._store.path}/{name}: has {found.shape[0]} rows, and {documents + more} by manifest.json; "
                "restore both from a copy, or prepare the store again in a new directory"
            )
        return found

    def _overlaps(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The pieces that hold documents [start, stop), each with its own range."""
        if not 0 <= start <= stop <= self.documents:
            raise IndexError(f"documents {start} to {stop}; the view has {self.documents}")
        first = int(np.searchsorted(self._start_P, start, "right")) - 1
        last = int(np.searchsorted(self._start_P, stop, "left"))
        starts = self._start_P.tolist()
        return [
            (p, max(start, starts[p]) - starts[p], min(stop, starts[p + 1]) - starts[p])
            for p in range(first, min(last, len(self._pieces)))
        ]
