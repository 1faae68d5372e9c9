"""One routing group: documents cut into pieces, and pieces placed in rows under the modalities' quotas.

A group never holds more tokens of a modality than its quota: that gives the model static shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moma_jax.config import DataConfig, quota_tokens
from moma_jax.data.order import OrderedDocument
from moma_jax.errors import InputError


@dataclass(frozen=True)
class Frame:
    """The room of one routing group.

    Attributes:
      rows, sequence: rows, and positions S of a row.
      quotas: most tokens of each modality; they add up to at least rows * sequence.
      spans: tokens of one atomic span of each modality, 0 where it can be cut anywhere.
    """

    rows: int
    sequence: int
    quotas: tuple[int, ...]
    spans: tuple[int, ...]

    @property
    def whole_limit(self) -> int:
        """A document of at most this many tokens never exceeds a row or a quota."""
        return min(self.sequence, *self.quotas)


def frame_of(data: DataConfig) -> Frame:
    """The room of a routing group."""
    tokens = data.group_rows * data.sequence
    quotas = tuple(quota_tokens(m, tokens) for m in data.modalities)
    return Frame(data.group_rows, data.sequence, quotas, tuple(m.span for m in data.modalities))


class Piece(NamedTuple):
    """Tokens [start, stop) of a document of `length` tokens, which stand together in one row.

    `modality` >= 0: all of that modality, may be cut anywhere. -1: stays whole; `count_M` are its tokens.
    """

    store: int
    document: int
    start: int
    stop: int
    length: int
    modality: int
    count_M: Sequence[int]


# Cutting --------------------------------------------------------------------------------------------------------------


def pieces_of(store: int, document: OrderedDocument, frame: Frame) -> list[Piece]:
    """A document as the pieces that packing may place: itself where it fits, else cut between spans.

    The marks around an atomic span stay with it. A cuttable run that no row or quota can hold becomes a cuttable
    piece of its own. Depends on the document and the frame alone, so a cursor needs to name only a piece's start.
    """
    number, length, modality, count_M, spans = document
    if modality >= 0 or (length <= frame.sequence and within(count_M, frame.quotas)):
        return [Piece(store, number, 0, length, length, modality, count_M)]
    pieces: list[Piece] = []
    start, stop, count_M = 0, 0, [0] * len(frame.quotas)
    for end, atom_M, cuttable in _atoms(spans, frame):
        size = end - stop
        total_M = [a + b for a, b in zip(count_M, atom_M, strict=True)]
        fits = end - start <= frame.sequence and within(total_M, frame.quotas)
        if fits and cuttable < 0:
            stop, count_M = end, total_M
            continue
        if stop > start:
            pieces.append(Piece(store, number, start, stop, length, -1, count_M))
        start, stop, count_M = stop, end, atom_M
        if cuttable >= 0:
            pieces.append(Piece(store, number, start, stop, length, cuttable, atom_M))
            start, count_M = stop, [0] * len(frame.quotas)
        elif size > frame.sequence or not within(atom_M, frame.quotas):
            raise InputError(
                f"data.sequence: document {number} has a span of {size} tokens with its marks, more than a row of "
                f"{frame.sequence} or the quotas {frame.quotas} hold; raise data.sequence or data.group_rows"
            )
    if stop > start:
        pieces.append(Piece(store, number, start, stop, length, -1, count_M))
    return pieces


def within(count_M: Iterable[int], quotas: Sequence[int]) -> bool:
    """True where no modality exceeds its quota."""
    return all(count <= quota for count, quota in zip(count_M, quotas, strict=False))


def _atoms(spans: list[tuple[int, int]], frame: Frame) -> Iterable[tuple[int, list[int], int]]:
    """Yields (end, count_M, modality) of runs that are not cut, in order; modality >= 0: too long, cut anywhere."""
    zero_M = [0] * len(frame.quotas)
    end, borrowed = 0, 0
    for i, (modality, size) in enumerate(spans):
        count_M = zero_M.copy()
        if frame.spans[modality]:
            count_M[modality] = size
            lead = i > 0 and not frame.spans[spans[i - 1][0]]
            trail = i + 1 < len(spans) and not frame.spans[spans[i + 1][0]]
            if lead:
                count_M[spans[i - 1][0]] += 1
            if trail:
                count_M[spans[i + 1][0]] += 1
            borrowed = int(trail)
            end += size + lead + trail
            yield end, count_M, -1
            continue
        following_atomic = i + 1 < len(spans) and bool(frame.spans[spans[i + 1][0]])
        size -= borrowed + following_atomic
        borrowed = 0
        if size > 0:
            count_M[modality] = size
            end += size
            yield end, count_M, modality if size > min(frame.sequence, frame.quotas[modality]) else -1
        elif size < 0:
            raise InputError("store: a single token stands between two atomic spans; each needs its begin and end mark")


# One group ------------------------------------------------------------------------------------------------------------


class Group:
    """A routing group while it is filled: rows of pieces.

    room_R: positions free; left_M: quota left; whole_M: tokens placed in whole pieces.
    """

    def __init__(self, frame: Frame):
        self.room_R = [frame.sequence] * frame.rows
        self.left_M = list(frame.quotas)
        self.whole_M = [0] * len(frame.quotas)
        self.rows: list[list[Piece]] = [[] for _ in range(frame.rows)]

    def place(self, piece: Piece) -> bool:
        """Puts a whole piece in the fullest row that can take it; False where there is none."""
        if not within(piece.count_M, self.left_M):
            return False
        size, best, best_room = piece.stop - piece.start, -1, 1 << 62
        for row, room in enumerate(self.room_R):
            if size <= room < best_room:
                best, best_room = row, room
        if best < 0:
            return False
        self.put(best, piece)
        return True

    def put(self, row: int, piece: Piece, sign: int = 1) -> None:
        """Puts a whole piece in a row with room for it."""
        self.room_R[row] -= sign * (piece.stop - piece.start)
        for modality, count in enumerate(piece.count_M):
            self.left_M[modality] -= sign * count
            self.whole_M[modality] += sign * count
        if sign > 0:
            self.rows[row].append(piece)

    def remove(self, row: int, piece: Piece) -> None:
        """Takes a whole piece out of a row again."""
        self.put(row, piece, -1)
        self.rows[row].remove(piece)

    def pour(self, piece: Piece, keep: int = 0) -> Piece | None:
        """Fills rows with a cuttable piece, the fullest row first; returns what is left of it.

        `keep` tokens of its modality's quota are not used.
        """
        modality, start, stop = piece.modality, piece.start, piece.stop
        budget = self.left_M[modality] - keep
        while start < stop and budget > 0:
            best, best_room = -1, 1 << 62
            for row, room in enumerate(self.room_R):
                if 0 < room < best_room:
                    best, best_room = row, room
            if best < 0:
                break
            size = min(best_room, budget, stop - start)
            self.rows[best].append(piece._replace(start=start, stop=start + size))
            self.room_R[best] -= size
            self.left_M[modality] -= size
            budget -= size
            start += size
        return piece._replace(start=start) if start < stop else None


def best_subset(sizes: Sequence[int], room: int) -> list[int]:
    """Indices of the sizes whose sum comes closest to `room` from below, earlier ones preferred; exact.

    Subset sums as the bits of one integer each: bit s of reach[i] says that the first i sizes can make s.
    """
    reach, mask = [1], (1 << (room + 1)) - 1
    for size in sizes:
        reach.append((reach[-1] | reach[-1] << size) & mask)
        if reach[-1] >> room:
            break
    rest, chosen = reach[-1].bit_length() - 1, []
    for i in reversed(range(len(reach) - 1)):
        if not reach[i] >> rest & 1:
            chosen.append(i)
            rest -= sizes[i]
    return chosen[::-1]
