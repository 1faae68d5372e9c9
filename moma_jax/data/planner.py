"""The planner: which piece of which document stands in which row of which routing group.

Planned from the index alone (each document's spans), in independent lanes: routing group g is lane g % lanes' next
one. So a group depends on the stores, the data config and the data seed, never on the batch, the model or the mesh.

In a group atomic spans come first, in whole documents; cuttable documents then fill the rows' remainders exactly. What
fits nowhere waits in the lane and comes first in its next group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moma_jax.data.order import IndexReader, LaneOrder, damaged, look_up
from moma_jax.data.packing import Frame, Group, Piece, best_subset, pieces_of, within
from moma_jax.errors import InputError, require
from moma_jax.fields import shown

AXES = {"lane": 1, "order": 3, "waiting": 3, "supplied": 3, "ended": 1, "documents": 1, "lanes": 0}
"""How many axes the arrays of a cursor have."""
PER_LANE = ("lane", "order", "waiting", "supplied", "ended")
"""Those with a row for each lane."""


@dataclass(frozen=True)
class StoreOrder:
    """One ingredient: a store's view (`documents`, `tokens_M`, `index(start, stop)`) and its shares by modality."""

    name: str
    view: Any
    share_M: Sequence[float]


# One lane -------------------------------------------------------------------------------------------------------------


class Lane:
    """Packs its own documents: the order of each store, the pieces that wait, what each store has supplied.

    A waiting entry is what is left of one document: the list of its pieces, the next one first.
    """

    def __init__(self, orders: list[LaneOrder], candidates_M: list[list[int]], share_NM, frame: Frame, wait: int):
        self.orders, self._candidates_M, self._share_NM = orders, candidates_M, share_NM
        self._frame, self._wait = frame, wait
        self._atomic = [m for m, span in enumerate(frame.spans) if span]
        self._cuttable = [m for m, span in enumerate(frame.spans) if not span]
        self._hold = max(1, wait // 2)
        self.waiting: list[list[Piece]] = []
        self.supplied_NM = [[0] * len(frame.spans) for _ in orders]
        self.ended = False

    def next_group(self) -> Group:
        """The lane's next group; one without pieces after the last epoch."""
        group = Group(self._frame)
        self.waiting = [rest for entry in self.waiting if (rest := _place(group, entry))]
        for modality in self._atomic:
            self._place_spans(group, modality)
        for modality in self._cuttable:
            self._pour_waiting(group, modality)
            self._pour_new(group, modality)
        for row, room in enumerate(group.room_R):
            if room and self.waiting:
                self._repack(group, row)
        return group

    def _place_spans(self, group: Group, modality: int) -> None:
        """Draws documents until no further span of the modality has room, or half the waiting places are taken."""
        span, left_M = self._frame.spans[modality], group.left_M
        while left_M[modality] >= span and max(group.room_R) >= span + 2:
            if sum(entry[0].modality < 0 for entry in self.waiting) >= self._hold:
                return
            if len(self.waiting) >= self._wait and not self._make_place(group, modality):
                return
            entry = self._draw(modality)
            if entry is None:
                return
            if entry := _place(group, entry):
                self.waiting.append(entry)

    def _make_place(self, group: Group, modality: int) -> bool:
        """Pours the oldest cuttable piece early to free a waiting place, where the group can spare the quota.

        What the spans still to come will need of it, at the ratio of the whole pieces so far, is kept.
        """
        placed = self._frame.quotas[modality] - group.left_M[modality]
        for i, entry in enumerate(self.waiting):
            other = entry[0].modality
            if other < 0:
                continue
            keep = -(-group.left_M[modality] * group.whole_M[other] // placed) if placed else 0
            if rest := group.pour(entry[0], keep):
                entry[0] = rest
                return False
            if not (entry := _place(group, entry[1:])):
                del self.waiting[i]
                return True
            self.waiting[i] = entry
        return False

    def _pour_waiting(self, group: Group, modality: int) -> None:
        kept = []
        for entry in self.waiting:
            while entry and entry[0].modality == modality:
                rest = group.pour(entry[0])
                entry[:1] = [rest] if rest else []
                if rest:
                    break
                entry = _place(group, entry)
            if entry:
                kept.append(entry)
        self.waiting = kept

    def _pour_new(self, group: Group, modality: int) -> None:
        """Draws documents until the modality's quota or the rows are full, or the waiting places are taken.

        A few places stay free for what repacking exchanges.
        """
        most = max(1, self._wait - self._wait // 8)
        while group.left_M[modality] > 0 and len(self.waiting) < most and any(group.room_R):
            entry = self._draw(modality)
            if entry is None:
                return
            while entry := _place(group, entry):
                piece = entry[0]
                rest = group.pour(piece) if piece.modality == modality else piece
                if rest:
                    entry[0] = rest
                    self.waiting.append(entry)
                    break
                del entry[0]

    def _repack(self, group: Group, row: int) -> None:
        """Fills a row that no cuttable piece could fill by exchanging whole documents with those that wait.

        The row's first piece stays, so that the oldest waiting documents do get their turn.
        """
        loose = [piece for piece in group.rows[row][1:] if _is_document(piece)]
        held = [i for i, entry in enumerate(self.waiting) if _is_document(entry[0])]
        before = group.room_R[row]
        for piece in loose:
            group.remove(row, piece)
        both = loose + [self.waiting[i][0] for i in held]
        chosen = best_subset([piece.length for piece in both], group.room_R[row])
        gain = sum(both[i].length for i in chosen) - (group.room_R[row] - before)
        fits = within(map(sum, zip(*(both[i].count_M for i in chosen), strict=True)), group.left_M)
        if gain <= 0 or not fits or len(self.waiting) + len(loose) - len(chosen) > self._wait:
            chosen = range(len(loose))
        for i in chosen:
            group.put(row, both[i])
        leaving = {held[i - len(loose)] for i in chosen if i >= len(loose)}
        self.waiting = [entry for i, entry in enumerate(self.waiting) if i not in leaving]
        self.waiting += [[piece] for i, piece in enumerate(loose) if i not in chosen]

    def _draw(self, modality: int) -> list[Piece] | None:
        """A new document of the store most behind its share of the modality, as pieces; None after the last epoch."""
        candidates = self._candidates_M[modality]
        if self.ended or not candidates:
            return None
        store = candidates[0]
        if len(candidates) > 1:
            store = min(candidates, key=lambda n: self.supplied_NM[n][modality] / self._share_NM[n][modality])
        document = self.orders[store].draw()
        if document is None:
            self.ended = True
            return None
        supplied_M = self.supplied_NM[store]
        for m, count in enumerate(document.count_M):
            supplied_M[m] += count
        return pieces_of(store, document, self._frame)


def _is_document(piece: Piece) -> bool:
    return piece.modality < 0 and piece.start == 0 and piece.stop == piece.length


def _place(group: Group, entry: list[Piece]) -> list[Piece]:
    """Places an entry's whole pieces as far as they go; returns what is left of it."""
    done = 0
    while done < len(entry) and entry[done].modality < 0 and group.place(entry[done]):
        done += 1
    return entry[done:] if done else entry


# All lanes ------------------------------------------------------------------------------------------------------------


class Planner:
    """The lanes of one host, their groups and their cursor.

    Args:
      sources: the mixture.
      frame: the room of a group.
      lanes: how many lanes there are; every source has at least as many documents.
      mine: the lanes that this planner plans.
      seed: of the document order.
      window_documents, wait_documents: as in DataConfig.
      epochs: passes after which the lanes end (when the first store does); None: never.
    """

    def __init__(
        self,
        sources: Sequence[StoreOrder],
        frame: Frame,
        *,
        lanes: int,
        seed: int,
        window_documents: int,
        wait_documents: int,
        mine: Iterable[int] | None = None,
        epochs: int | None = None,
    ):
        self.frame, self.lanes, self.sources = frame, lanes, list(sources)
        self._wait = wait_documents
        self._readers = [IndexReader(source.view) for source in sources]
        for source, reader in zip(sources, self._readers, strict=True):
            if reader.documents < lanes:
                raise InputError(
                    f"data.lanes: {lanes} lanes, but {source.name} has {reader.documents} documents; use "
                    f"{max(reader.documents, 1)} lanes at most, or more documents"
                )
        # Rounded, so that ties between stores fall alike on every machine.
        share_NM = [[round(float(share), 9) for share in source.share_M] for source in sources]
        candidates_M = _candidates(self.sources, share_NM)

        self._lanes: dict[int, Lane] = {}
        for lane in range(lanes) if mine is None else mine:
            orders = [
                LaneOrder(
                    reader, lane, lanes, seed=seed, name=source.name, window_documents=window_documents,
                    spans=frame.spans, span_limit=frame.whole_limit, epochs=epochs,
                )
                for source, reader in zip(self.sources, self._readers, strict=True)
            ]  # fmt: skip
            self._lanes[lane] = Lane(orders, candidates_M, share_NM, frame, wait_documents)

    def next_group(self, lane: int) -> Group:
        """The next group of one of this planner's lanes."""
        return self._lanes[lane].next_group()

    def epochs(self) -> dict[str, float]:
        """Passes over each source so far, by name: the mean over this planner's lanes."""
        passes = {}
        for n, source in enumerate(self.sources):
            orders = [lane.orders[n] for lane in self._lanes.values()]
            done = sum(order.epoch * order.places + order.position for order in orders)
            passes[source.name] = done / sum(order.places for order in orders)
        return passes

    def waiting(self) -> int:
        """Documents that wait, over this planner's lanes."""
        return sum(len(lane.waiting) for lane in self._lanes.values())

    def cursor(self) -> dict[str, np.ndarray]:
        """The lanes' states: int64 arrays of fixed shape, one row per lane of this planner.

        lane (L,); order (L, N, 2) epoch and position of each source; waiting (L, P, 3) source, document and first
        token of what waits, -1 where nothing does; supplied (L, N, M) tokens drawn; ended (L,); documents (N,) of
        the sources, to recognise a store that has changed; lanes () of all hosts, which decide who gets a document.
        """
        lanes = list(self._lanes.values())
        waiting_LP3 = np.full((len(lanes), self._wait, 3), -1, np.int64)
        for row_P3, lane in zip(waiting_LP3, lanes, strict=True):
            if lane.waiting:
                row_P3[: len(lane.waiting)] = [entry[0][:3] for entry in lane.waiting]
        return {
            "lane": np.array(list(self._lanes), np.int64),
            "order": np.array([[(o.epoch, o.position) for o in lane.orders] for lane in lanes], np.int64),
            "waiting": waiting_LP3,
            "supplied": np.array([lane.supplied_NM for lane in lanes], np.int64),
            "ended": np.array([lane.ended for lane in lanes], np.int64),
            "documents": np.array([reader.documents for reader in self._readers], np.int64),
            "lanes": np.array(self.lanes, np.int64),
        }

    def restore(self, cursor: dict[str, np.ndarray]) -> None:
        """Stands where `cursor` says; it may hold more lanes than this planner has.

        Raises:
          InputError: the cursor is of other stores, lanes or waiting places, or damaged.
        """
        self._require_form(cursor)
        row_of = {int(lane): row for row, lane in enumerate(cursor["lane"])}
        documents_N = np.array([reader.documents for reader in self._readers])
        if not np.array_equal(cursor["documents"], documents_N):
            raise InputError(
                f"data.stores: the checkpoint's data position is of stores with {shown(cursor['documents'].tolist())} "
                f"documents, these have {documents_N.tolist()}; use the stores that the run began with"
            )
        lanes, wait = int(cursor["lanes"]), cursor["waiting"].shape[1]
        if (lanes, wait) != (self.lanes, self._wait) or not set(self._lanes) <= set(row_of):
            raise InputError(
                f"data.lanes: the checkpoint's data position has {len(row_of)} of {lanes} lanes and {wait} "
                f"data.wait_documents; use these"
            )
        rows = {
            "order": (len(self.sources), 2),
            "waiting": (wait, 3),
            "supplied": (len(self.sources), len(self.frame.spans)),
        }
        for name, shape in rows.items():
            require(cursor[name].shape[1:] == shape, damaged(f"its {name} has rows of {cursor[name].shape[1:]}"))
        for number, lane in self._lanes.items():
            row = row_of[number]
            for order, (epoch, position) in zip(lane.orders, cursor["order"][row].tolist(), strict=True):
                require(0 <= position < order.places, damaged(f"order: {position} of {order.places} places"))
                order.seek(epoch, position)
            lane.supplied_NM = cursor["supplied"][row].tolist()
            lane.ended = bool(cursor["ended"][row])
            lane.waiting = [self._remainder(*entry) for entry in cursor["waiting"][row].tolist() if entry[0] >= 0]

    def _require_form(self, cursor: dict[str, np.ndarray]) -> None:
        """InputError unless the cursor has the arrays of `cursor`, all but `waiting` of numbers from 0."""
        lanes = len(cursor["lane"]) if np.ndim(cursor.get("lane")) == 1 else 0
        for name, axes in AXES.items():
            value_X = cursor.get(name)
            known = value_X is not None and value_X.ndim == axes and (name not in PER_LANE or len(value_X) == lanes)
            require(known and (name == "waiting" or bool(np.all(value_X >= 0))), damaged(f"its {name} is none"))

    def _remainder(self, store: int, document: int, start: int) -> list[Piece]:
        """What is left of a document from token `start` on."""
        known = store < len(self._readers) and 0 <= document < self._readers[store].documents
        require(known, damaged(f"document {document} of store {store} waits"))
        found = look_up(self._readers[store], document, self.frame.spans)
        pieces = [piece for piece in pieces_of(store, found, self.frame) if piece.stop > start]
        begins = bool(pieces) and start >= 0 and (pieces[0].start == start or pieces[0].modality >= 0)
        require(begins, damaged(f"document {document} waits from token {start}, where no piece of it begins"))
        pieces[0] = pieces[0]._replace(start=start)
        return pieces


def _candidates(sources: list[StoreOrder], share_NM: list[list[float]]) -> list[list[int]]:
    """Sources to draw from when a modality is needed.

    A source is drawn for what it has most of beside text, and its text comes along. Text is drawn from sources of
    text alone where there are any.
    """
    modalities = range(len(share_NM[0]))
    drawn_for = [max(modalities, key=lambda m, s=source: (m > 0) * s.view.tokens_M[m]) for source in sources]
    supply = [[n for n, share_M in enumerate(share_NM) if share_M[m] > 0] for m in modalities]
    return [[n for n in supply[m] if drawn_for[n] == m] or supply[m] for m in modalities]
