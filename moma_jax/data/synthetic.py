"""Random tokens at the quotas' ratio, for throughput runs: every group has one layout, only its ids differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moma_jax.batch import Packed, batch_of
from moma_jax.data.packing import Frame
from moma_jax.vocab import SPECIAL_NAMES, Vocabulary

_EMPTY, _RANDOM = -2, -1


class SyntheticPlan(NamedTuple):
    """Which groups a batch holds, and the cursor after it."""

    groups: Sequence[int]
    cursor: dict[str, np.ndarray]


class GroupLayout(NamedTuple):
    """One group: id_RS int32 (a fixed id, -1 random, -2 padding), modality_RS, segment_RS, position_RS."""

    id_RS: np.ndarray
    modality_RS: np.ndarray
    segment_RS: np.ndarray
    position_RS: np.ndarray


class Synthetic:
    """Makes batches of random groups, each from (seed, group number) alone."""

    def __init__(self, frame: Frame, vocabulary: Vocabulary, seed: int):
        self._layout, self._seed, self._pad = layout_of(frame, vocabulary), seed, vocabulary.pad
        self._modality_V = vocabulary.modality_V
        ids = [m.code_ids for m in vocabulary.modalities]
        ids[0] = ids[0][len(SPECIAL_NAMES) + 2 * (len(ids) - 1) :] if len(ids[0]) > 4 + 2 * len(ids) else ids[0]
        self._id_V = np.concatenate(ids)
        size_M = np.array([len(m) for m in ids])
        first_M = np.cumsum(size_M) - size_M
        self._random_RS = self._layout.id_RS == _RANDOM
        modality_X = self._layout.modality_RS[self._random_RS]
        self._first_X, self._size_X = first_M[modality_X], size_M[modality_X].astype(np.uint64)

    def packed(self, plan: SyntheticPlan) -> Packed:
        """The batch of a plan."""
        layout, copies = self._layout, len(plan.groups)
        token_GRS = np.stack([self._tokens(group) for group in plan.groups])
        segment_RS = layout.segment_RS
        follows_RS = np.zeros(segment_RS.shape, bool)
        follows_RS[:, :-1] = (segment_RS[:, :-1] == segment_RS[:, 1:]) & (segment_RS[:, :-1] > 0)
        target_GRS = np.where(follows_RS, np.roll(token_GRS, -1, axis=2), np.int32(self._pad))
        weight_RS = follows_RS.astype(np.float32)
        token_BS, target_BS = (a.reshape(-1, a.shape[-1]) for a in (token_GRS, target_GRS))
        rest = (np.tile(a, (copies, 1)) for a in (segment_RS, layout.position_RS, weight_RS))
        return Packed(batch_of(token_BS, target_BS, *rest, self._modality_V), plan.cursor)

    def _tokens(self, group: int) -> np.ndarray:
        token_RS = np.where(self._layout.id_RS == _EMPTY, self._pad, self._layout.id_RS)
        generator = np.random.Generator(np.random.Philox(key=[self._seed % (1 << 64), group]))
        draw_X = generator.integers(0, 1 << 32, len(self._first_X), np.uint64)
        token_RS[self._random_RS] = self._id_V[self._first_X + (draw_X * self._size_X >> np.uint64(32)).astype(int)]
        return token_RS


def layout_of(frame: Frame, vocabulary: Vocabulary) -> GroupLayout:
    """Rows of documents, each a run of text and an atomic span, at the quotas' ratio and never above a quota."""
    tokens, total = frame.rows * frame.sequence, sum(frame.quotas)
    goal_M = [min(quota, quota * tokens // total) for quota in frame.quotas]
    room_R = [frame.sequence] * frame.rows
    documents_R: list[list[list[tuple[int, int, int]]]] = [[] for _ in room_R]  # runs (modality, tokens, id)
    text = frame.quotas[0]
    for m, span in enumerate(frame.spans):
        for _ in range(goal_M[m] // span if span else 0):
            row = max(range(frame.rows), key=room_R.__getitem__)
            if room_R[row] < span + 2 or text < 2:
                break
            ids = vocabulary.modalities[m]
            documents_R[row].append([(0, 1, ids.begin), (m, span, _RANDOM), (0, 1, ids.end)])
            room_R[row] -= span + 2
            text -= 2
    for m, span in enumerate(frame.spans):
        if m and not span:
            for row in range(frame.rows):
                size = min(room_R[row], goal_M[m] // frame.rows)
                documents_R[row].append([(m, size, _RANDOM)])
                room_R[row] -= size
    for row, documents in enumerate(documents_R):
        if not documents:
            documents.append([])
        size = min(room_R[row], text)
        text -= size
        for i, runs in enumerate(documents):
            part = size // len(documents) + (i < size % len(documents))
            runs.insert(0, (0, part, _RANDOM))
    return _fill(documents_R, frame)


def _fill(documents_R: list[list[list[tuple[int, int, int]]]], frame: Frame) -> GroupLayout:
    shape = (frame.rows, frame.sequence)
    layout = GroupLayout(np.full(shape, _EMPTY, np.int32), *(np.zeros(shape, np.int32) for _ in range(3)))
    for row, documents in enumerate(documents_R):
        at = 0
        for segment, runs in enumerate(documents, 1):
            start = at
            for modality, size, token in runs:
                layout.id_RS[row, at : at + size] = token
                layout.modality_RS[row, at : at + size] = modality
                at += size
            layout.segment_RS[row, start:at] = segment
            layout.position_RS[row, start:at] = np.arange(at - start)
    return layout
