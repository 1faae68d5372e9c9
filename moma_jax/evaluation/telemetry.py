"""What every expert does, layer by layer, on held-out rows: a small Parquet file for each evaluation of a run.

SET-STEP.parquet has one row for each routing, layer, group of experts and expert, as COLUMNS says. It is counted from
the Selections of the evaluation's own forward passes, by NumPy beside the device, on the first MOST_TOKENS positions of
a held-out set. Layers that some tokens alone enter (mixture of depths) have a group `depth_<modality>` of one expert,
the layer; their experts' shares are of the tokens that entered.

SET-STEP.row.parquet is one packed row, the first of the set, as the model saw it: under each routing a row for each
token, with its id, document, modality and place in a picture, and for each layer the experts that took it, as bits
(expert 0 is 1, expert 1 is 2; the last one, 2^62, stands for expert 62 and all from there).

The files' metadata holds the hashes of the stores whose ids they count (`hashes_in`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from moma_jax.batch import Batch
from moma_jax.config import Config
from moma_jax.evaluation.documents import to_bytes
from moma_jax.geometry import group_capacity
from moma_jax.late import pa
from moma_jax.model.depth import SELECTED
from moma_jax.router import Selection
from moma_jax.routers.choice import thresholds
from moma_jax.runs.resume import hashes_of
from moma_jax.vocab import Vocabulary

FOLDER = "routing/"
"""Of a run's directory."""
TABLE, ROW = ".parquet", ".row.parquet"
"""Ends of the names of an evaluation's files."""
MOST_TOKENS = 1 << 17
"""Positions of a held-out set that are counted, in whole routing groups."""
LAST_BIT = 62
HASHES = "moma_hashes"
"""Name of the files' metadata that `hashes_in` reads."""
TOP = 32
"""Ids of an expert that are listed."""
COLUMNS = {
    "routing": "under which it was counted",
    "layer": "from 0",
    "group": "of experts",
    "expert": "from 0, within its group",
    "tokens": "of the group's modalities, that the expert could take",
    "taken": "of these",
    "load": "taken over the share that the paper's capacity gives it",
    "gate_mean": "of the tokens it took",
    "gate_entropy": "bits, of the gates as chances, a mean over the tokens it took",
    "gates": "how many of its tokens had a gate in each tenth from 0 to 1",
    "none": "share of the group's tokens that no expert of it took",
    "one": "that one took",
    "more": "that two or more took",
    "load_entropy": "of the loads of the group's experts, 1 where all are alike; null for a single one",
    "together": "share of its tokens that each expert of the group took too, itself apart (null)",
    "kept": "its tokens then and now over those of either, against the evaluation before; null after a start",
    "threshold": "of causal inference, a router logit; null where the rule keeps none",
    "specialisation": "bits, of the ids it took against those it could take (Kullback-Leibler)",
    "top_ids": f"the {TOP} ids of which it takes most beyond its share",
    "top_taken": "how many of each it took",
    "top_seen": "how many of each it could take",
    "place_taken": "by place in a span (of a picture), how many it took; null for groups without spans",
    "place_seen": "how many it could take",
}


class Members(NamedTuple):
    """Which tokens N of some batches the experts of a group took, in layers L that are alike.

    Attributes:
      group: its name. layer_L: their numbers. modalities: indices of those it serves.
      eligible_LN: bool, tokens that could be taken; (1, N) where they are the same in all these layers.
      taken_LNE: bool. at_K: where it is True, flat. gate_K: float32, the gates there.
    """

    group: str
    layer_L: tuple[int, ...]
    modalities: tuple[int, ...]
    eligible_LN: np.ndarray
    taken_LNE: np.ndarray
    at_K: np.ndarray
    gate_K: np.ndarray


def members(config: Config, selections: dict[str, Selection], batch: Batch) -> Iterator[Members]:
    """Every routed group of a batch, from the Selections of its forward pass (NumPy, `DecoderOutput.selections`)."""
    modality_N = np.where(batch.segment_BS > 0, batch.modality_BS, -1).reshape(-1)
    layers, halves = config.model.layers, {"": slice(None)}
    if config.depth:
        halves = {"even/": slice(0, None, 2), "odd/": slice(1, None, 2)}
        entered = _offset(selections[SELECTED], batch.token_BS.shape[1])  # its groups are rows
        depth_PN1, at_K, gate_K = _dense(entered, len(modality_N))
        for group in config.depth:
            eligible_1N = np.isin(modality_N, group.modalities)[None]
            mine_K = eligible_1N[0, at_K % len(modality_N)]
            of_group = (depth_PN1 & eligible_1N[..., None], at_K[mine_K], gate_K[mine_K])
            yield Members(group.name, tuple(range(0, layers, 2)), group.modalities, eligible_1N, *of_group)
    for half, which in halves.items():
        layer_L = tuple(range(layers))[which]
        for group in (group for group in config.experts.groups if group.routed):
            own = selections[half + group.name]
            size = len(modality_N) // own.index_EC.shape[1]
            placed = _through(own, entered, size) if half == "even/" else _offset(own, size)
            eligible_LN = np.isin(modality_N, group.modalities)[None]
            if half == "even/":
                eligible_LN = eligible_LN & depth_PN1[:, :, 0]
            yield Members(group.name, layer_L, group.modalities, eligible_LN, *_dense(placed, len(modality_N)))


def _offset(own: Selection, size: int) -> Selection:
    """(L, G, E, C) with tokens numbered over all groups, which have `size` each."""
    return own._replace(index_EC=own.index_EC + np.arange(own.index_EC.shape[1])[:, None, None] * size)


def _through(own: Selection, entered: Selection, size: int) -> Selection:
    """Selections among the slots of a layer that some tokens entered, as selections of tokens."""
    pairs, groups = own.index_EC.shape[:2]
    token_PGC = entered.index_EC.reshape(pairs, groups, -1)
    index = np.take_along_axis(token_PGC, own.index_EC.reshape(pairs, groups, -1), axis=2)
    return own._replace(index_EC=index.reshape(own.index_EC.shape))


def _dense(own: Selection, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`Members.taken_LNE`, `at_K`, `gate_K` of selections (L, G, E, C) of tokens that are numbered over all groups."""
    layers, _, experts, slots = shape = own.index_EC.shape
    (held_K,) = np.nonzero(own.filled_EC.reshape(-1))
    expert_K, layer_K = held_K // slots % experts, held_K // int(np.prod(shape[1:]))
    at_K = (layer_K * tokens + own.index_EC.reshape(-1)[held_K]) * experts + expert_K
    gate_K, taken_LNE = own.gate_EC.reshape(-1)[held_K], np.zeros((layers, tokens, experts), bool)
    taken_LNE.reshape(-1)[at_K] = True
    if np.count_nonzero(taken_LNE) < len(at_K):  # a rule filled two slots of an expert with one token
        at_K, first = np.unique(at_K, return_index=True)
        gate_K = gate_K[first]
    return taken_LNE, at_K, gate_K


# Counting -------------------------------------------------------------------------------------------------------------


class Telemetry:
    """Counts the experts of one evaluation, and remembers who took what for the next one."""

    def __init__(self, config: Config, vocabulary: Vocabulary):
        self._config, self._vocabulary = config, vocabulary
        self._about = {HASHES: json.dumps(hashes_of(config, vocabulary))}
        self._before: dict[Any, list[np.ndarray]] = {}
        self._now: dict[Any, list[np.ndarray]] = {}
        self._counts: dict[Any, dict[str, Any]] = {}
        self._row: dict[str, pa.Table] = {}
        self._tokens = 0

    @property
    def wants(self) -> bool:
        """Whether this evaluation has not counted enough yet."""
        return self._tokens < MOST_TOKENS

    def add(self, batch: Batch, selections: dict[str, dict[str, Selection]]) -> None:
        """Counts a batch, or the part of it that is still wanted; `selections` by routing."""
        batch, selections = self._wanted(batch, selections)
        id_N, place_N = batch.token_BS.reshape(-1), places(self._vocabulary, batch).reshape(-1)
        sequence = batch.token_BS.shape[1]
        for routing, own in selections.items():
            experts_SL = np.zeros((sequence, self._config.model.layers), np.int64)
            for found in members(self._config, own, batch):
                key = (routing, found.group, found.layer_L)
                if found.group not in (gated.name for gated in self._config.depth):
                    experts_SL[:, found.layer_L] |= _bits(found.taken_LNE[:, :sequence]).T
                bits = np.packbits(found.taken_LNE, axis=1)
                self._now.setdefault(key, []).append(bits)
                self._count(key, found, id_N, place_N)
            if not self._tokens:
                columns = {"routing": [routing] * sequence, "token": id_N[:sequence], "document": batch.segment_BS[0]}
                columns |= {"modality": batch.modality_BS[0], "place": place_N[:sequence]}
                self._row[routing] = pa.table(columns | {"experts": experts_SL.tolist()})
        self._tokens += id_N.size

    def _wanted(self, batch: Batch, selections: dict[str, dict[str, Selection]]):
        """The first routing groups, as many as MOST_TOKENS leave room for, one at least."""
        rows, sequence = batch.token_BS.shape
        group_rows = self._config.data.group_rows
        groups = max((MOST_TOKENS - self._tokens) // (group_rows * sequence), 1)
        kept = min(rows, groups * group_rows)
        # Selections are by row or by routing group.
        cut = lambda chosen: Selection(*(x[:, : x.shape[1] * kept // rows] for x in chosen))  # noqa: E731
        cut_all = {routing: {name: cut(x) for name, x in own.items()} for routing, own in selections.items()}
        return Batch(*(x[:kept] for x in batch)), cut_all

    def _count(self, key: Any, found: Members, id_N: np.ndarray, place_N: np.ndarray) -> None:
        layers, _, experts = shape = found.taken_LNE.shape
        wide, ids = found.taken_LNE.astype(np.float32), self._vocabulary.size
        layer_K, token_K, expert_K = np.unravel_index(found.at_K, shape)
        cell_K = layer_K * experts + expert_K
        gate_K = np.clip(found.gate_K.astype(np.float64), 1e-7, 1 - 1e-7)
        bits_K = -gate_K * np.log2(gate_K) - (1 - gate_K) * np.log2(1 - gate_K)
        of_expert = lambda weight_K: np.bincount(cell_K, weight_K, layers * experts).reshape(layers, experts)  # noqa: E731
        times_LN, eligible_LN = wide.sum(2), found.eligible_LN
        tokens_L = np.broadcast_to(eligible_LN.sum(1), layers)
        one_L, more_L = (np.count_nonzero(each, axis=1) for each in (times_LN == 1, times_LN > 1))
        parts = {
            "tokens_L": tokens_L,
            "taken_LE": of_expert(None),
            "gate_LE": of_expert(found.gate_K),
            "bits_LE": of_expert(bits_K),
            "gates_LE10": _histogram(cell_K, (gate_K * 10).astype(int), 10, shape),
            "times_L3": np.stack([tokens_L - one_L - more_L, one_L, more_L], -1),
            "together_LEE": (np.swapaxes(wide, 1, 2) @ wide).astype(np.int64),
            "id_LEV": _histogram(cell_K, id_N[token_K], ids, shape),
            "id_LV": _seen(eligible_LN, id_N, ids, layers),
        }
        span = max(self._vocabulary.modalities[m].span for m in found.modalities)
        if span:
            placed_K = place_N[token_K] >= 0
            parts["place_LEP"] = _histogram(cell_K[placed_K], place_N[token_K[placed_K]], span, shape)
            parts["place_LP"] = _seen(eligible_LN & (place_N >= 0), place_N, span, layers)
        before = self._counts.get(key)
        self._counts[key] = parts if before is None else {name: before[name] + part for name, part in parts.items()}

    def files(self, routing_state: Any) -> dict[str, bytes]:
        """The Parquet files of this evaluation by the end of their names; the next one begins."""
        rows = []
        for (routing, group, layer_L), counts in self._counts.items():
            kept_LE = self._kept((routing, group, layer_L))
            threshold = _applied((routing_state or {}).get(group), counts["taken_LE"].shape[1])
            threshold_LE = None if threshold is None else _of_layers(threshold, layer_L, self._config)
            about = {"routing": routing, "group": group}
            rows += [about | row for row in self._rows(group, layer_L, counts, kept_LE, threshold_LE)]
        rows.sort(key=lambda row: (row["routing"], row["layer"]))
        table, packed = pa.Table.from_pylist(rows, _schema()), list(self._row.values())
        table, *packed = (each.replace_schema_metadata(self._about) for each in (table, *packed))
        self._before, self._now, self._counts, self._row, self._tokens = self._now, {}, {}, {}, 0
        return {TABLE: to_bytes([table]), ROW: to_bytes(packed)}

    def _kept(self, key: Any) -> np.ndarray | None:
        """Of each expert's tokens of this evaluation and the one before, those of both over those of either."""
        now, before = self._now[key], self._before.get(key)
        if before is None or [bits.shape for bits in before] != [bits.shape for bits in now]:
            return None
        both, either = (
            sum(np.bitwise_count(how(a, b)).sum(1, dtype=np.int64) for a, b in zip(now, before, strict=True))
            for how in (np.bitwise_and, np.bitwise_or)
        )
        return both / np.maximum(either, 1)

    def _rows(self, group, layer_L, counts, kept_LE, threshold_LE) -> Iterator[dict[str, Any]]:
        config = self._config
        own = next(each for each in config.routed if each.name == group)
        share = float(config.model.depth_capacity if own.gated else group_capacity(config.model, own))
        experts = counts["taken_LE"].shape[1]
        for number, layer in enumerate(layer_L):
            tokens, times_3 = int(counts["tokens_L"][number]), counts["times_L3"][number]
            taken_E, together_EE = counts["taken_LE"][number], counts["together_LEE"][number]
            shares_3 = (times_3 / max(tokens, 1)).tolist()
            for expert in range(experts):
                taken = int(taken_E[expert])
                others = [
                    None if e == expert else n / max(taken, 1) for e, n in enumerate(together_EE[expert].tolist())
                ]
                yield {
                    "layer": layer,
                    "expert": expert,
                    "tokens": tokens,
                    "taken": taken,
                    "load": taken / (share * tokens) if tokens else None,
                    "gate_mean": float(counts["gate_LE"][number, expert] / taken) if taken else None,
                    "gate_entropy": float(counts["bits_LE"][number, expert] / taken) if taken else None,
                    "gates": counts["gates_LE10"][number, expert].tolist(),
                    **dict(zip(("none", "one", "more"), shares_3, strict=True)),
                    "load_entropy": _evenness(taken_E) if experts > 1 else None,
                    "together": others,
                    "kept": None if kept_LE is None else float(kept_LE[number, expert]),
                    "threshold": None if threshold_LE is None else float(threshold_LE[number, expert]),
                    **_ids(counts["id_LEV"][number, expert], counts["id_LV"][number]),
                    "place_taken": counts["place_LEP"][number, expert].tolist() if "place_LP" in counts else None,
                    "place_seen": counts["place_LP"][number].tolist() if "place_LP" in counts else None,
                }


def _bits(taken_LNE: np.ndarray) -> np.ndarray:
    """Experts as bits of an int64 (L, N)."""
    bit_E = np.int64(1) << np.minimum(np.arange(taken_LNE.shape[2]), LAST_BIT)
    return np.bitwise_or.reduce(np.where(taken_LNE, bit_E, np.int64(0)), axis=2)


def hashes_in(metadata: dict[bytes, bytes] | None) -> dict[str, str | None] | None:
    """The hashes of the stores that a file was counted on, from its Parquet metadata; None where it does not say."""
    found = (metadata or {}).get(HASHES.encode())
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(hashes := json.loads(found or b"null"), dict):
            return hashes
    return None


def _histogram(cell_K: np.ndarray, value_K: np.ndarray, length: int, shape: tuple[int, int, int]) -> np.ndarray:
    """How often an expert took each value, int64 (L, E, length); a cell is layer * E + expert."""
    layers, _, experts = shape
    counted = np.bincount(cell_K * length + value_K, minlength=layers * experts * length)
    return counted.reshape(layers, experts, length)


def _seen(eligible_LN: np.ndarray, value_N: np.ndarray, length: int, layers: int) -> np.ndarray:
    """How often each value could be taken, (layers, length)."""
    counted = [np.bincount(value_N[eligible_N], minlength=length) for eligible_N in eligible_LN]
    return np.broadcast_to(np.stack(counted), (layers, length))


def _applied(state: Any, experts: int) -> np.ndarray | None:
    """The thresholds by which causal inference lets tokens enter; None where a rule keeps none of this kind."""
    if not isinstance(state, dict) or "threshold_E" not in state:
        return None
    ours = {"passed_E", "taken_E", "distance_E"} <= state.keys() or "unseen_E" in state
    found = np.asarray(thresholds(state) if ours else state["threshold_E"])
    return found if found.ndim and found.shape[-1] == experts else None


def _of_layers(threshold: np.ndarray, layer_L: tuple[int, ...], config: Config) -> np.ndarray:
    """Thresholds (len(layer_L), E) of a state that is stacked over layers, over pairs of layers, or over the first of
    every pair."""
    by_layer = threshold.reshape(-1, threshold.shape[-1])
    return by_layer if len(by_layer) == len(layer_L) else by_layer[list(layer_L)]


def _evenness(taken_E: np.ndarray) -> float | None:
    """Entropy of the shares over that of equal ones."""
    share_E = taken_E[taken_E > 0] / max(taken_E.sum(), 1)
    return float(-(share_E * np.log(share_E)).sum() / np.log(len(taken_E)))


def _ids(taken_V: np.ndarray, seen_V: np.ndarray) -> dict[str, Any]:
    """Divergence of an expert's ids from those it could take, and the ids that it takes most beyond its share."""
    taken, seen = taken_V.sum(), seen_V.sum()
    if not taken:
        return {"specialisation": None, "top_ids": [], "top_taken": [], "top_seen": []}
    (held,) = np.nonzero(taken_V)
    share = taken_V[held] / taken
    beyond = taken_V[held] - seen_V[held] * (taken / seen)
    order = np.argsort(-beyond, kind="stable")[:TOP]
    top = held[order[beyond[order] > 0]]
    return {
        "specialisation": float((share * np.log2(share * seen / seen_V[held])).sum()),
        "top_ids": top.tolist(),
        "top_taken": taken_V[top].tolist(),
        "top_seen": seen_V[top].tolist(),
    }


def places(vocabulary: Vocabulary, batch: Batch) -> np.ndarray:
    """Each code's place in its span (of a picture), int (B, S); -1 for other tokens, and where neither of the marks
    around the span is in the row."""
    token_BS, segment_BS = np.asarray(batch.token_BS), np.asarray(batch.segment_BS)
    at_S = np.arange(token_BS.shape[1])
    place_BS = np.full(token_BS.shape, -1)
    for number, own in enumerate(vocabulary.modalities):
        if not own.span:
            continue
        codes_BS = (np.asarray(batch.modality_BS) == number) & (segment_BS > 0)
        begin_BS = np.maximum.accumulate(np.where(token_BS == own.begin, at_S, -1), axis=1)
        end_BS = np.where(token_BS == own.end, at_S, len(at_S))
        end_BS = np.minimum.accumulate(end_BS[:, ::-1], axis=1)[:, ::-1]
        last = len(at_S) - 1
        opened = (begin_BS >= 0) & _same(segment_BS, np.maximum(begin_BS, 0)) & (at_S - begin_BS <= own.span)
        closed = (end_BS <= last) & _same(segment_BS, np.minimum(end_BS, last)) & (end_BS - at_S <= own.span)
        found_BS = np.where(opened, at_S - begin_BS - 1, np.where(closed, own.span - (end_BS - at_S), -1))
        place_BS = np.where(codes_BS, found_BS, place_BS)
    return place_BS


def _same(segment_BS: np.ndarray, at_BS: np.ndarray) -> np.ndarray:
    return np.take_along_axis(segment_BS, at_BS, axis=1) == segment_BS


def _schema() -> pa.Schema:
    """Arrow types of COLUMNS."""
    numbers, whole = pa.list_(pa.float32()), pa.list_(pa.int32())
    kinds = dict.fromkeys(("routing", "group"), pa.string())
    kinds |= dict.fromkeys(("layer", "expert"), pa.int16()) | dict.fromkeys(("tokens", "taken"), pa.int64())
    kinds |= {"together": numbers}
    kinds |= dict.fromkeys(("gates", "top_ids", "top_taken", "top_seen", "place_taken", "place_seen"), whole)
    return pa.schema([(name, kinds.get(name, pa.float32())) for name in COLUMNS])
