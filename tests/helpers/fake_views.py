"""Views and stores in memory, with the reader's interface, for tests of packing and the stream."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from moma_jax.config import Config, DataConfig, Modality, StoreConfig, TrainConfig
from moma_jax.vocab import contiguous


class Index(NamedTuple):
    length_N: Any
    kind_N: Any
    span_row_N1: Any
    span_modality_K: Any
    span_length_K: Any


class FakeView:
    """Documents given as lists of (modality, tokens) runs; tokens are made from the document's number on demand."""

    def __init__(self, documents, vocabulary=None, modalities=2):
        self.documents, self.vocabulary = len(documents), vocabulary
        self._row = np.concatenate([[0], np.cumsum([len(d) for d in documents])])
        runs = np.array([run for d in documents for run in d]).reshape(-1, 2)
        self._modality, self._length = runs[:, 0].astype(np.uint8), runs[:, 1].astype(np.int32)
        self.length_N = np.array([sum(size for _, size in d) for d in documents])
        self.tokens_M = np.bincount(runs[:, 0], weights=runs[:, 1], minlength=modalities).astype(np.int64)

    def index(self, start, stop):
        row = self._row[start : stop + 1]
        run = slice(row[0], row[-1])
        return Index(
            self.length_N[start:stop], np.zeros(stop - start, np.uint8), row - row[0], self._modality[run],
            self._length[run],
        )  # fmt: skip

    def tokens(self, document):
        """A document's ids: modality by its runs, value by document and position."""
        run = slice(self._row[document], self._row[document + 1])
        modality_T = np.repeat(self._modality[run], self._length[run])
        place_T = np.arange(len(modality_T)) * 7 + document * 31
        token_T = np.zeros(len(modality_T), np.int64)
        for m, ids in enumerate(self.vocabulary.modalities):
            chosen_T = modality_T == m
            token_T[chosen_T] = ids.code_ids[place_T[chosen_T] % ids.size]
        return token_T.astype(np.uint16)

    weighted = False

    def read(self, doc_N, start_N, stop_N, array="tokens"):
        return [self.tokens(d)[a:b] for d, a, b in zip(doc_N, start_N, stop_N, strict=True)]


class FakeStore:
    """Views by (collection, split)."""

    def __init__(self, modalities, views):
        self.vocabulary, self._views, self.path = contiguous(modalities), views, "fake"
        self.manifest = {"hashes": {"vocabulary": self.vocabulary.hash, "tokenizer": "same"}}
        for view in views.values():
            view.vocabulary = self.vocabulary

    def view(self, collection, split):
        return self._views[collection, split]


def pair(rng, span=16):
    """A picture with a caption, either first."""
    text = int(rng.integers(4, 10))
    runs = [(0, 2), (1, span), (0, text)]
    return runs if rng.random() < 0.5 else runs[::-1]


def text(rng, mean=60):
    """A document of text alone."""
    return [(0, int(min(500, 3 + rng.exponential(mean))))]


def page(rng, pictures=5, span=16):
    """An interleaved document."""
    runs = [(0, int(rng.integers(4, 20)))]
    for _ in range(int(rng.integers(2, pictures + 1))):
        runs += [(1, span), (0, int(rng.integers(2, 30)))]
    return runs


def corpus(seed, counts, modalities=2):
    """Three views: pairs, text, interleaved."""
    rng = np.random.default_rng(seed)
    kinds = {"pairs": pair, "text": text, "interleaved": page}
    return {
        name: FakeView([kinds[name](rng) for _ in range(n)], modalities=modalities)
        for name, n in zip(kinds, counts, strict=True)
    }


MODALITIES = (
    Modality("text", "t", size=4096, quota=0.5),
    Modality("image", "i", size=256, span=16, quota=0.5),
)
STORES = (
    StoreConfig("pairs", "here", "pairs", {"image": 0.5}),
    StoreConfig("text", "here", "text"),
    StoreConfig("pages", "here", "interleaved"),
)


def config(**data) -> Config:
    """Of `corpus` in a `FakeStore`: rows of 128 in groups of 2."""
    fields = {"modalities": MODALITIES, "stores": STORES, "sequence": 128, "group_rows": 2, "lanes": 8} | data
    fields = {"window_documents": 64, "wait_documents": 16, "prefetch": 3} | fields
    return Config(data=DataConfig(**fields), train=TrainConfig(steps=1, batch_rows=8))
