"""The order in which a lane takes a store's documents: computed from seeds, never stored.

A store's documents are cut in blocks. Lane l owns blocks l, l + lanes, ... for ever. In each epoch a lane walks its
blocks in windows: a window takes one block from each of some equal stretches of the store, by permutations that are
computed (Feistel networks), so that every window resembles the whole store even where its documents are sorted. Within
the window documents are shuffled by another such permutation. To stand at any document of any epoch, a lane loads one
window.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np

from moma_jax.errors import InputError

BLOCK_DOCUMENTS = 256
BLOCKS_PER_LANE = 64
WHOLE_INDEX_DOCUMENTS = 1 << 18
"""Stores of at most this many documents are indexed by one read, which all lanes share."""
_CHUNK = 256
_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def damaged(what: str) -> str:
    """What to say of a data position that no stream could have had."""
    return f"the checkpoint's data position (cursor) is damaged: {what}; move the checkpoint away"


class OrderedDocument(NamedTuple):
    """What packing has to know of a document.

    Attributes:
      document: its number in the view.
      length: tokens.
      modality: the only modality of its tokens, or -1 where it has several spans or an atomic one.
      count_M: tokens of each modality.
      spans: (modality, tokens) runs in order; None where modality >= 0 or the document is short (`span_limit`).
    """

    document: int
    length: int
    modality: int
    count_M: list[int]
    spans: list[tuple[int, int]] | None


def permute(index_N: np.ndarray, size: int, key: int | np.ndarray) -> np.ndarray:
    """Where a pseudo-random permutation of range(size) takes `index_N`; int64, computed without a table.

    A Feistel network over the next power of four, walked until the image falls inside the range. `key` is an integer
    or one for each index.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    value_N = np.array(index_N, np.uint64)
    key_N = np.broadcast_to(np.asarray(key, np.uint64), value_N.shape)
    pending = np.arange(len(value_N))
    while len(pending):
        left, right, round_key = value_N[pending] >> half, value_N[pending] & mask, key_N[pending]
        for _ in range(_ROUNDS):
            round_key = round_key + _GOLDEN
            left, right = right, left ^ (_mix(_mix(round_key) ^ right) & mask)
        value_N[pending] = (left << half) | right
        pending = pending[value_N[pending] >= size]
    return value_N.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64, on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*parts: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def block_documents(documents: int, lanes: int) -> int:
    """Documents of one block: at most 256, fewer in small stores so that every lane owns about 64 blocks."""
    return max(1, min(BLOCK_DOCUMENTS, documents // (BLOCKS_PER_LANE * lanes)))


class IndexReader:
    """Reads a view's index by blocks; a small index is read once and shared by all lanes.

    Args:
      view: anything with `documents` and `index(start, stop)`.
    """

    def __init__(self, view: Any):
        self.view = view
        self.documents = int(view.documents)
        self._whole: Any = None

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Documents [start, stop): length_N, span_row_N1 from 0, span_modality_K, span_length_K."""
        if self.documents > WHOLE_INDEX_DOCUMENTS:
            index, start, stop = self.view.index(start, stop), 0, stop - start
        else:
            if self._whole is None:
                self._whole = self.view.index(0, self.documents)
            index = self._whole
        row_N1 = np.asarray(index.span_row_N1[start : stop + 1], np.int64)
        first, last = int(row_N1[0]), int(row_N1[-1])
        return (
            np.asarray(index.length_N[start:stop], np.int64),
            row_N1 - first,
            np.asarray(index.span_modality_K[first:last], np.int64),
            np.asarray(index.span_length_K[first:last], np.int64),
        )


class Window:
    """Documents in hand: their numbers and what the index says of them.

    Args:
      reader: the store's index.
      blocks: half-open document ranges.
      spans: tokens of an atomic span of each modality, 0 where it can be cut anywhere.
      span_limit: a document longer than this carries its spans.
    """

    def __init__(self, reader: IndexReader, blocks: list[tuple[int, int]], spans: tuple[int, ...], span_limit: int):
        parts = [reader.read(start, stop) for start, stop in blocks]
        self.document_W = np.concatenate([np.arange(start, stop) for start, stop in blocks])
        self.length_W = np.concatenate([p[0] for p in parts])
        runs_W = np.concatenate([np.diff(p[1]) for p in parts])
        self.row_W1 = np.concatenate([[0], np.cumsum(runs_W)])
        self.modality_K = np.concatenate([p[2] for p in parts]).astype(np.int8)
        self.span_length_K = np.concatenate([p[3] for p in parts])
        self._span_limit = span_limit
        size, modalities = len(self.document_W), len(spans)
        cell_K = np.repeat(np.arange(size), runs_W) * modalities + self.modality_K
        count_C = np.bincount(cell_K, weights=self.span_length_K, minlength=size * modalities)
        self.count_WM = count_C.astype(np.int64).reshape(size, modalities)
        only_W = self.modality_K[np.minimum(self.row_W1[:-1], max(len(self.modality_K) - 1, 0))]
        cuttable_M = np.array([span == 0 for span in spans])
        self.only_W = np.where((runs_W == 1) & cuttable_M[only_W], only_W, -1)

    def take(self, index_N: np.ndarray) -> list[OrderedDocument]:
        """The documents at places `index_N` of the window."""
        columns = (self.document_W, self.length_W, self.only_W, self.count_WM)
        rows = zip(*(column[index_N].tolist() for column in columns), index_N.tolist(), strict=True)
        return [
            OrderedDocument(d, length, only, count, self._spans(i) if only < 0 and length > self._span_limit else None)
            for d, length, only, count, i in rows
        ]

    def _spans(self, i: int) -> list[tuple[int, int]]:
        run = slice(self.row_W1[i], self.row_W1[i + 1])
        return list(zip(self.modality_K[run].tolist(), self.span_length_K[run].tolist(), strict=True))


def look_up(reader: IndexReader, document: int, spans: tuple[int, ...]) -> OrderedDocument:
    """One document by its number, with its spans."""
    return Window(reader, [(document, document + 1)], spans, -1).take(np.zeros(1, np.int64))[0]


class LaneOrder:
    """The documents that one lane takes from one store, one after the other.

    Args:
      reader: the store's index.
      lane, lanes: which lane of how many; every lane has work if documents >= lanes.
      seed, name: of the order, and of the store.
      window_documents: most documents of a window (a block at least).
      spans, span_limit: as in Window.
      epochs: passes after which `draw` returns None; None: no end.

    `epoch` and `position` (places in the epoch) are its whole state.
    """

    def __init__(self, reader, lane, lanes, *, seed, name, window_documents, spans, span_limit, epochs=None):
        self._reader, self._lane, self._lanes, self._epochs = reader, lane, lanes, epochs
        self._seed = (seed, name, lane)
        self._spans, self._span_limit = spans, span_limit
        self._block = block_documents(reader.documents, lanes)
        self._blocks = len(range(lane, -(-reader.documents // self._block), lanes))
        self._windows = -(-self._blocks // max(1, window_documents // self._block))
        self._window_blocks = -(-self._blocks // self._windows)
        self.places = self._windows * self._window_blocks * self._block
        self.seek(0, 0)

    def seek(self, epoch: int, position: int) -> None:
        """Stands at a place of an epoch. The window is loaded when a document is drawn."""
        self.epoch, self.position = epoch, position
        self._window = None

    def draw(self) -> OrderedDocument | None:
        """The next document, or None after the last epoch."""
        if self.epoch == self._epochs:
            return None
        if self._window is None:
            self._load()
        i = self.position - self._start
        if not self._chunk_start <= i < self._chunk_start + len(self._chunk):
            self._chunk_start = i
            self._chunk = self._window.take(self._order_W[i : i + _CHUNK])
        document = self._chunk[i - self._chunk_start]
        self.position += 1
        if i + 1 == len(self._order_W):
            self._leave()
        return document

    def _leave(self) -> None:
        """Goes on to the next window; some places of this one may be without documents."""
        self._window = None
        self.position = self._start + self._window_blocks * self._block
        if self.position == self.places:
            self.epoch, self.position = self.epoch + 1, 0

    def _load(self) -> None:
        number = self.position // (self._window_blocks * self._block)
        self._start = number * self._window_blocks * self._block
        # One block of each stretch of `windows` blocks; the last stretch may be shorter.
        stretch_W = np.arange(self._window_blocks)
        key_W = np.uint64(_key(*self._seed, self.epoch, "blocks")) + stretch_W.astype(np.uint64)
        within_W = permute(np.full(len(stretch_W), number), self._windows, key_W)
        owned_W = stretch_W * self._windows + within_W
        first_W = (self._lane + self._lanes * owned_W[owned_W < self._blocks]) * self._block
        blocks = [(first, min(first + self._block, self._reader.documents)) for first in first_W.tolist()]
        self._window = Window(self._reader, blocks, self._spans, self._span_limit)
        size = len(self._window.document_W)
        self._order_W = permute(np.arange(size), size, _key(*self._seed, self.epoch, number, "documents"))
        if self.position - self._start >= size:  # no draw leaves it there
            raise InputError(damaged(f"place {self.position} of {self._seed[1]} has no document"))
        self._chunk, self._chunk_start = [], -1
