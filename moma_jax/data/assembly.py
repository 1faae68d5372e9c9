"""From planned pieces to batches: reads their tokens and lays them out in rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moma_jax.batch import Batch, Packed, batch_of
from moma_jax.data.packing import Frame
from moma_jax.vocab import Vocabulary


class Plan(NamedTuple):
    """One planned batch: piece_N6 (store, document, start, stop, document's length, row) and where planning stands."""

    piece_N6: np.ndarray
    cursor: dict[str, np.ndarray]
    epochs: dict[str, float]
    waiting: int


class Reader:
    """Turns plans into batches.

    Args:
      views: stores' views, with `weighted` and `read(doc_N, start_N, stop_N, array)`.
      frame: the room of a group.
      rows: rows of a batch on this host.
      vocabulary: says the padding id, and which id is of which modality.
    """

    def __init__(self, views: Sequence[Any], frame: Frame, rows: int, vocabulary: Vocabulary):
        self._views, self._frame, self._rows, self._vocabulary = views, frame, rows, vocabulary

    def packed(self, plan: Plan) -> Packed:
        """Reads and assembles a planned batch."""
        _, _, start_N, stop_N, _, row_N = plan.piece_N6.T
        tokens = self._read(plan.piece_N6, "tokens")
        weighted = any(view.weighted for view in self._views)
        weights = self._read(plan.piece_N6, "weights") if weighted else None
        ids = self._vocabulary.pad, self._vocabulary.modality_V
        batch = assemble(tokens, stop_N - start_N, row_N, self._rows, self._frame.sequence, *ids, weights)
        return Packed(batch, plan.cursor, plan.epochs, plan.waiting, plan.piece_N6)

    def _read(self, piece_N6: np.ndarray, array: str) -> list[np.ndarray]:
        """Tokens or weights of all pieces, each with the next of its document where there is one."""
        store_N, document_N, start_N, stop_N, length_N, _ = piece_N6.T
        values: list[Any] = [None] * len(store_N)
        ahead_N = np.minimum(stop_N + 1, length_N)
        for store, view in enumerate(self._views):
            place_K = np.flatnonzero(store_N == store)
            if len(place_K):
                found = view.read(document_N[place_K], start_N[place_K], ahead_N[place_K], array)
                for place, value_T in zip(place_K.tolist(), found, strict=True):
                    values[place] = value_T
        return values


def assemble(
    tokens: Sequence[np.ndarray],
    size_N: np.ndarray,
    row_N: np.ndarray,
    rows: int,
    sequence: int,
    pad: int,
    modality_V,
    weights: Sequence[np.ndarray] | None = None,
) -> Batch:
    """Lays pieces out in rows.

    Args:
      tokens: each piece's tokens, and the next token of its document where there is one.
      size_N: tokens of each piece, without that next one.
      row_N: each piece's row, ascending.
      rows, sequence: shape of the batch.
      pad: the padding id. modality_V: int8 modality of every id.
      weights: of `tokens`, in the loss of predicting them; None: all 1.
    """
    read_N = np.fromiter(map(len, tokens), np.int64, len(tokens))
    continued_N = read_N > size_N
    token_R = np.concatenate([*tokens, [pad]]).astype(np.int32) if len(tokens) else np.full(1, pad, np.int32)
    # Positions in token_R of the tokens that stand in rows: all but the extra ones.
    keep_R = np.ones(len(token_R), bool)
    keep_R[-1] = False
    end_N = np.cumsum(read_N)
    keep_R[end_N[continued_N] - 1] = False
    source_T = np.flatnonzero(keep_R)
    last_N = np.cumsum(size_N) - 1
    weight_T = np.ones(len(source_T), np.float32)
    if weights is not None:
        weight_T = np.concatenate([*weights, [0]]).astype(np.float32)[source_T + 1]
    weight_T[last_N[~continued_N]] = 0
    target_T = token_R[source_T + 1]
    target_T[last_N[~continued_N]] = pad
    number_N = np.arange(len(size_N))
    first_N = number_N - np.searchsorted(row_N, row_N)
    segment_T = np.repeat((first_N + 1).astype(np.int32), size_N)
    position_T = np.arange(len(source_T), dtype=np.int32) - np.repeat((last_N + 1 - size_N).astype(np.int32), size_N)
    fill_B = np.bincount(row_N, weights=size_N, minlength=rows).astype(np.int64)
    taken_BS = np.arange(sequence) < fill_B[:, None]

    def spread(value_T: np.ndarray, empty: float) -> np.ndarray:
        value_BS = np.full((rows, sequence), empty, value_T.dtype)
        value_BS[taken_BS] = value_T
        return value_BS

    ids = spread(token_R[source_T], pad), spread(target_T, pad)
    about = spread(segment_T, 0), spread(position_T, 0), spread(weight_T, 0)
    return batch_of(*ids, *about, modality_V)
