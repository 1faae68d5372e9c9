"""The stream of batches: plans groups, reads their tokens ahead in threads, hands out batches with their cursors.

The planner runs in Grain's prefetch thread and hands each planned batch to a few reader threads. Every batch carries
the cursor after it, so reading ahead never runs past a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from moma_jax.batch import Packed
from moma_jax.checks import round_up
from moma_jax.config import Config, DataConfig, Modality, StoreConfig
from moma_jax.data.assembly import Plan, Reader
from moma_jax.data.mixture import resolve_shares
from moma_jax.data.order import damaged
from moma_jax.data.packing import Group, frame_of
from moma_jax.data.planner import PER_LANE, Planner, StoreOrder
from moma_jax.data.store import open_store, require_same_codecs
from moma_jax.data.synthetic import Synthetic, SyntheticPlan
from moma_jax.data.tuning import TUNING, Part
from moma_jax.errors import InputError, require
from moma_jax.fields import shown
from moma_jax.vocab import Vocabulary, contiguous

MOST = 2**53
"""No number of a cursor is larger."""


class Stream:
    """An iterator of Packed; close it, or use it in a `with` statement."""

    def __init__(self, plans: grain.IterDataset, make: Any, prefetch: int, threads: int):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="moma-read")
        submitted = plans.map(lambda plan: self._pool.submit(make, plan))
        self._iterator = iter(grain.experimental.ThreadPrefetchIterDataset(submitted, prefetch_buffer_size=prefetch))
        self._closed = False

    def __iter__(self) -> Iterator[Packed]:
        return self

    def __next__(self) -> Packed:
        if self._closed:
            raise StopIteration
        future: Future[Packed] = next(self._iterator)
        return future.result()

    def close(self) -> None:
        """Stops planning and reading; waits for reads that have begun."""
        if not self._closed:
            self._closed = True
            self._iterator.close()
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_stream(
    config: Config,
    *,
    split: str = "train",
    cursor: dict[str, Any] | None = None,
    seed: int | None = None,
    stores: Sequence[str] | None = None,
    rows: int | None = None,
    epochs: int | None = None,
    mine: Sequence[int] | None = None,
) -> Stream:
    """Opens the batches of a config.

    Args:
      config: a resolved config.
      split: "train" or "validation" documents, or "tuning": those that data.tuning keeps from training.
      cursor: where to go on, from a Packed; None begins.
      seed: of the document order; data.seed where None.
      stores: names of the data.stores to draw from; None or empty: all.
      rows: rows of one batch over all hosts, whole routing groups; train.batch_rows where None.
      epochs: passes after which the stream ends, the last groups and batch padded: one lane then packs everything
        (evaluation). None: no end.
      mine: positions of the routing groups of each batch that are wanted, ascending, where other hosts read the rest;
        None: all.

    Returns:
      Packed batches of the rows of these groups; each one's cursor opens the stream at the next. Cursor, `epochs` and
      `waiting` are those of the lanes that `mine` needs: `merge_cursors` joins those of all hosts.

    Raises:
      InputError: stores, shares, quotas, lanes or the cursor contradict each other.
    """
    data = config.data
    rows = config.train.batch_rows if rows is None else rows
    groups = rows // data.group_rows
    if rows % data.group_rows or not groups:
        raise InputError(
            f"train.batch_rows: {rows} rows do not split into whole routing groups of {data.group_rows} rows; use "
            f"{round_up(max(rows, 1), data.group_rows)}"
        )
    mine = tuple(range(groups) if mine is None else mine)
    seed = data.seed if seed is None else seed
    cursor = None if cursor is None else _numbers(cursor, "step" if data.kind == "synthetic" else "group")
    frame = frame_of(data)
    if data.kind == "synthetic":
        synthetic = Synthetic(frame, contiguous(data.modalities), seed)
        steps = Plans(lambda: _SyntheticIterator(groups, mine, cursor))
        return Stream(steps, synthetic.packed, data.prefetch, data.read_threads)
    chosen = _chosen_stores(data, stores)
    vocabulary, views = _open_views(data, chosen, split)
    planned = planned_positions(data, groups, mine, cursor, epochs)
    planner = make_planner(data, chosen, views, seed=seed, groups=groups, planned=planned, epochs=epochs)
    reader = Reader(views, frame, len(mine) * data.group_rows, vocabulary)
    plans = Plans(lambda: _PlanIterator(planner, groups, mine, planned, cursor, epochs))
    return Stream(plans, reader.packed, data.prefetch, data.read_threads)


def _numbers(cursor: Any, place: str) -> dict[str, np.ndarray]:
    """A cursor as arrays of int64; InputError where it is none. `place`: which of them says how far it is."""
    require(isinstance(cursor, dict), damaged("it is no object"))
    found = {name: np.asarray(value) for name, value in cursor.items() if not isinstance(value, (dict, list))}
    for name in cursor:
        whole = name in found and found[name].dtype.kind in "iu"
        known = whole and (not found[name].size or -1 <= found[name].min() <= found[name].max() <= MOST)
        require(known, damaged(f"{shown(name)} has other numbers than there can be"))
    sound = place in found and found[place].ndim == 0 and found[place] >= 0
    require(sound, damaged(f"it has no {place}"))
    return {name: value.astype(np.int64) for name, value in found.items()}


def planned_positions(
    data: DataConfig, groups: int, mine: Sequence[int], cursor: dict[str, Any] | None, epochs: int | None
) -> Sequence[int]:
    """Positions of every batch that a host has to plan, which reads positions `mine`.

    Its own, where every lane serves one position: lanes a multiple of the batch's `groups`, and the data's position at
    the start of such a batch. Else a lane's groups go to one host after the other, and each plans them all.
    """
    start = 0 if cursor is None else int(cursor["group"])
    apart = epochs is None and data.lanes % groups == 0 and start % groups == 0
    return mine if apart else range(groups)


def make_planner(
    data: DataConfig,
    stores: Sequence[StoreConfig],
    views: Sequence[Any],
    *,
    seed: int,
    groups: int,
    planned: Sequence[int],
    epochs: int | None = None,
) -> Planner:
    """The planner of the lanes that positions `planned` of every batch of `groups` groups need."""
    share_NM = resolve_shares(stores, [view.tokens_M for view in views], data.modalities, check=epochs is None)
    lanes = data.lanes if epochs is None else 1
    needed = [lane for lane in range(lanes) if lane % groups in planned]
    return Planner(
        [StoreOrder(s.name, view, share_M) for s, view, share_M in zip(stores, views, share_NM, strict=True)],
        frame_of(data),
        lanes=lanes,
        mine=needed,
        seed=seed,
        window_documents=data.window_documents,
        wait_documents=data.wait_documents,
        epochs=epochs,
    )


def merge_cursors(cursors: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One cursor of all lanes from the hosts' cursors after the same batch; raises ValueError for others.

    Several hosts may hold the same lane.
    """
    place = "group" if "group" in cursors[0] else "step"
    if len({int(cursor[place]) for cursor in cursors}) > 1:
        raise ValueError("the hosts' cursors are not of the same batch")
    if place == "step":  # random tokens
        return cursors[0]
    _, first_L = np.unique(np.concatenate([cursor["lane"] for cursor in cursors]), return_index=True)
    merged = {name: np.concatenate([cursor[name] for cursor in cursors])[first_L] for name in PER_LANE}
    return {**cursors[0], **merged}


# Planning -------------------------------------------------------------------------------------------------------------


class Plans(grain.IterDataset):
    """Grain's view of a planning iterator."""

    def __init__(self, iterator: Any):
        super().__init__()
        self._make_iterator = iterator

    def __iter__(self) -> grain.DatasetIterator:
        return self._make_iterator()


class _PlanIterator(grain.DatasetIterator):
    """Plans batch after batch; its state is the cursor."""

    def __init__(
        self,
        planner: Planner,
        groups: int,
        mine: tuple[int, ...],
        planned: Sequence[int],
        cursor: dict | None,
        epochs: int | None,
    ):
        super().__init__()
        self._planner, self._groups, self._mine, self._epochs = planner, groups, mine, epochs
        self._planned = planned
        self._group, self._state = 0, {}
        self.set_state(cursor if cursor is not None else {"group": 0, **planner.cursor()})

    def __next__(self) -> Plan:
        lanes = self._planner.lanes
        planned = [(p, self._planner.next_group((self._group + p) % lanes)) for p in self._planned]
        if self._epochs is not None and not any(any(group.rows) for _, group in planned):
            raise StopIteration
        self._group += self._groups
        rows = self._planner.frame.rows
        own = [group for position, group in planned if position in self._mine]
        piece_N6 = np.concatenate([pieces_of_group(group, n * rows) for n, group in enumerate(own)])
        self._state = {"group": np.array(self._group, np.int64), **self._planner.cursor()}
        return Plan(piece_N6, self._state, self._planner.epochs(), self._planner.waiting())

    def get_state(self) -> dict[str, np.ndarray]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        self._state = {name: np.asarray(value, np.int64) for name, value in state.items()}
        self._group = int(self._state["group"])
        self._planner.restore(self._state)


class _SyntheticIterator(grain.DatasetIterator):
    """Numbers batch after batch; the cursor is the step."""

    def __init__(self, groups: int, mine: tuple[int, ...], cursor: dict | None):
        super().__init__()
        self._groups, self._mine = groups, mine
        self.set_state(cursor if cursor is not None else {"step": 0})

    def __next__(self) -> SyntheticPlan:
        first = int(self._state["step"]) * self._groups
        self.set_state({"step": self._state["step"] + 1})
        return SyntheticPlan([first + position for position in self._mine], self._state)

    def get_state(self) -> dict[str, np.ndarray]:
        return self._state

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        self._state = {"step": np.asarray(state["step"], np.int64)}


def pieces_of_group(group: Group, first_row: int) -> np.ndarray:
    """A group's pieces in the order of their rows: int64 (N, 6) store, document, start, stop, length, row."""
    flat = [(*piece[:5], first_row + row) for row, pieces in enumerate(group.rows) for piece in pieces]
    return np.array(flat, np.int64).reshape(-1, 6)


# Stores ---------------------------------------------------------------------------------------------------------------


def vocabulary_of(config: Config) -> Vocabulary:
    """The id space of a config's stores, which must be data.modalities'; of random tokens the contiguous one.

    Raises:
      InputError: a store is missing or differs from the config or from the first store.
    """
    if config.data.kind == "synthetic":
        return contiguous(config.data.modalities)
    data = config.data
    return _check_vocabularies(data, data.stores, [_open(store, data) for store in data.stores])


def require_held_out(config: Config) -> None:
    """Raises InputError where an evaluation set draws from a store without held-out documents. Opens manifests only."""
    data = config.data
    for eval_set in config.train.eval_sets if data.kind == "store" else ():
        for store in _chosen_stores(data, eval_set.stores):
            if not _view(_open(store, data), store.collection, eval_set.split, data).documents:
                raise InputError(
                    f"train.eval_sets: {eval_set.name} draws from {store.name} ({store.path}), which has no held-out "
                    f"documents of collection {store.collection}; raise data.prepare.held_out or add documents and "
                    f"prepare it into another directory, or leave the evaluation set out"
                )


def _open(store: StoreConfig, data: DataConfig) -> Any:
    return open_store(store.path, cache_bytes=data.cache_bytes, read_concurrency=data.read_concurrency)


def _chosen_stores(data: DataConfig, names: Sequence[str] | None) -> list[StoreConfig]:
    known = {store.name: store for store in data.stores}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise InputError(f"data.stores: there is no {unknown[0]!r}; the stores are {', '.join(known)}")
    return [store for store in data.stores if not names or store.name in names]


def _open_views(data: DataConfig, stores: Sequence[StoreConfig], split: str) -> tuple[Vocabulary, list[Any]]:
    by_path = {store.path: _open(store, data) for store in stores}
    opened = [by_path[store.path] for store in stores]
    vocabulary = _check_vocabularies(data, stores, opened)
    views = [_view(found, store.collection, split, data) for store, found in zip(stores, opened, strict=True)]
    for store, view in zip(stores, views, strict=True):
        if not view.documents:
            raise InputError(
                f"data.stores: {store.name} ({store.path}) has no {split} documents of collection {store.collection}; "
                f"name another collection or prepare the store with some"
            )
    return vocabulary, views


def _view(store: Any, collection: str, split: str, data: DataConfig) -> Any:
    """The documents of a split; training's and the tuning split's are parts of the store's training documents."""
    if split == "validation" or not data.tuning:
        return store.view(collection, split)
    return Part(store.view(collection, "train"), data.tuning, split == TUNING)


def _check_vocabularies(data: DataConfig, stores: Sequence[StoreConfig], opened: Sequence[Any]) -> Vocabulary:
    for store, found in zip(stores, opened, strict=True):
        _check_modalities(data.modalities, found.vocabulary, store)
        require_same_codecs(opened[0], found)
    return opened[0].vocabulary


def _check_modalities(modalities: Sequence[Modality], vocabulary: Vocabulary, store: StoreConfig) -> None:
    have, want = [m.name for m in vocabulary.modalities], [m.name for m in modalities]
    if have != want:
        raise InputError(
            f"data.modalities: they are {', '.join(want)}, the store {store.name} has {', '.join(have)}; name these"
        )
    for modality, ids in zip(modalities, vocabulary.modalities, strict=True):
        for field, right in (("size", ids.size), ("span", ids.span)):
            stated = getattr(modality, field)
            if stated != right:
                raise InputError(
                    f"data.modalities: {modality.name} has {field}={stated}, the store {store.name} ({store.path}) "
                    f"has {right}; set {field}={right}"
                )
