"""A part of the training documents that no training sees, to choose settings on: the held-out split is for results."""

from __future__ import annotations

from typing import Any

import numpy as np

TUNING = "tuning"
"""The split's name."""


class Part:
    """One side of a view: every `period`-th of its documents (the tuning split), or all others.

    The documents of a store stand in an order that its content decides, so every n-th is a fair sample.

    Attributes:
      documents: their number. tokens_M: int64, tokens of each modality, by the part's share of the whole. weighted: as
      of a `View`.
    """

    def __init__(self, view: Any, share: float, tuning: bool):
        """Args: `share` of the documents that are for tuning, above 0 and at most a half."""
        self._view, self._tuning, self.period = view, tuning, round(1 / share)
        apart = -(-view.documents // self.period)
        self.documents = apart if tuning else view.documents - apart
        tokens = (int(tokens) * self.documents // max(view.documents, 1) for tokens in view.tokens_M)
        self.tokens_M = np.array(list(tokens), np.int64)  # the product may be beyond int64
        self.weighted = view.weighted

    def numbers(self, part_N) -> np.ndarray:
        """The view's numbers of documents of this part, int64 (N,): number 0, n, 2n, ... are the tuning split."""
        part_N = np.asarray(part_N, np.int64)
        return part_N * self.period if self._tuning else part_N + part_N // (self.period - 1) + 1

    def index(self, start: int, stop: int) -> Any:
        """As `View.index`, of documents [start, stop) of this part."""
        if start == stop:
            return self._view.index(0, 0)
        number_N = self.numbers(np.arange(start, stop))
        first = int(number_N[0])
        index = self._view.index(first, int(number_N[-1]) + 1)
        chosen_N, row_N1 = number_N - first, np.asarray(index.span_row_N1, np.int64)
        runs_N = np.diff(row_N1)
        mine_K = np.repeat(np.isin(np.arange(len(runs_N)), chosen_N), runs_N)
        return index._replace(
            length_N=np.asarray(index.length_N)[chosen_N],
            kind_N=np.asarray(index.kind_N)[chosen_N],
            span_row_N1=np.concatenate([[0], np.cumsum(runs_N[chosen_N])]),
            span_modality_K=np.asarray(index.span_modality_K)[mine_K],
            span_length_K=np.asarray(index.span_length_K)[mine_K],
        )

    def read(self, doc_N, start_N, stop_N, array: str = "tokens") -> list[np.ndarray]:
        """As `View.read`."""
        return self._view.read(self.numbers(doc_N), start_N, stop_N, array)
