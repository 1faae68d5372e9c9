"""Cached decoding: the decoder's layers on the next tokens of rows that were begun before (paper section 2.4).

The same mathematics as the decoder's under a causal routing, arranged for reading weights once: layers are unrolled and
every expert's weights are arrays of their own, so that inside jit nothing is sliced out of a stack, which would copy
it, and experts that no token enters are not read at all (`lax.cond`). docs/results/decode_layouts.py compares this with
stacked, looped over, gathered and fully computed experts: on CPU it alone stays near dense's speed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moma_jax.config import Config
from moma_jax.ffn import ExpertGroup
from moma_jax.model import auxiliary, causal
from moma_jax.model.attention import attend_block, project, project_out, rotary_angles
from moma_jax.model.experts import experts_of
from moma_jax.model.layer import rms_norm, sub_layer
from moma_jax.model.precision import EXACT, compute_dtype, wide
from moma_jax.model.slots import Experts, combine, dispatch, swiglu_of

NOWHERE = 2**31 - 1
"""The place of a key that is not there: behind every position."""

LEAST_BLOCK = 4
"""Tokens that an expert computes together, at least: reading its weights takes as long."""


class Cache(NamedTuple):
    """What rows have been told so far.

    Attributes:
      keys, values: for each layer (B, P, H, K) in compute dtype; P positions are allocated.
      places: for each layer that some tokens alone enter (mixture of depths) int32 (B, P), the position in the row of
        each key; None for the others, where it is the key's own number. A token that passed by left none.
      length_B: int32 tokens in each row. Lowering it rewinds the row: what lies beyond is overwritten, never seen.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    places: tuple[Any, ...]
    length_B: Any


def new_cache(config: Config, rows: int, positions: int) -> Cache:
    """An empty cache of `rows` rows with room for `positions` tokens each."""
    model = config.model
    shape = (rows, positions, model.heads, model.width // model.heads)
    keys, values = (
        tuple(jnp.zeros(shape, compute_dtype(model)) for _ in range(model.layers)) for _ in ("keys", "values")
    )
    # An array for each layer: a cache is donated, and no buffer can be given away twice.
    skipped = range(0, model.layers, 2) if config.depth else ()
    places = tuple(
        jnp.full((rows, positions), NOWHERE, jnp.int32) if number in skipped else None for number in range(model.layers)
    )
    return Cache(keys, values, places, jnp.zeros(rows, jnp.int32))


def unstack(params: Any, config: Config) -> dict[str, Any]:
    """Parameters as decoding reads them: layer by layer, expert by expert, matrices in compute dtype.

    Returns:
      {"embedding_VD", "unembedding_DV", "final_norm_D", "layers": for each layer {"attention", "attention_norm_D",
      "ffn_norm_D", "ffn": {group: {"experts": Experts of two-dimensional weights, "router_DE", "auxiliary"}}, "depth":
      the routers in front of it, Experts by name; {} where every token enters}}.
    """
    dtype = compute_dtype(config.model)

    def layer(number: int) -> dict[str, Any]:
        own = jax.tree.map(lambda x_L: x_L[number // 2 if config.depth else number], params["layers"])
        depth = experts_of(own.pop("depth", {})) if number % 2 == 0 else {}
        own = own[("even", "odd")[number % 2]] if config.depth else own
        matrices = {name: w.astype(dtype) for name, w in own["attention"].items() if not name.endswith("_norm")}
        return {
            "attention": own["attention"] | matrices,
            "attention_norm_D": own["attention_norm"]["scale_D"],
            "ffn_norm_D": own["ffn_norm"]["scale_D"],
            "ffn": {name: _apart(experts, dtype) for name, experts in experts_of(own["ffn"]).items()},
            "depth": depth,
        }

    return {
        "embedding_VD": params["embedding"]["kernel_VD"].astype(dtype),
        "unembedding_DV": params["unembedding"]["kernel_DV"].astype(dtype),
        "final_norm_D": params["final_norm"]["scale_D"],
        "layers": tuple(layer(number) for number in range(config.model.layers)),
    }


def _apart(experts: Experts, dtype) -> dict[str, Any]:
    """One group's weights, each expert's by itself; routers stay float32."""
    stacks = (experts.gate_EDF, experts.up_EDF, experts.down_EFD)
    each = tuple(Experts(*(w.astype(dtype) for w in weights)) for weights in zip(*stacks, strict=True))
    return {"experts": each, "router_DE": experts.router_DE, "auxiliary": experts.auxiliary}


def logits(weights: dict[str, Any], hidden):
    """Logits (..., V), float32, of hidden states (..., D)."""
    return jnp.matmul(hidden, weights["unembedding_DV"], preferred_element_type=jnp.float32)


def extend(
    weights: dict[str, Any],
    cache: Cache,
    token_BQ,
    count_B,
    *,
    config: Config,
    vocabulary_modality_V,
    routing: str,
    routing_state: Any,
) -> tuple[Any, Cache]:
    """Appends the first count_B[b] of Q tokens to each row: Q = 1 decodes, a larger Q is a piece of prefill.

    Args:
      weights: of `unstack`. cache: with room for what is appended; what finds none is not seen by later tokens.
      token_BQ: int32 ids; those behind the count are ignored. count_B: int32, 0 to Q.
      config: the resolved config, static. vocabulary_modality_V: modality of every id.
      routing: "causal" or "threshold", static. routing_state: thresholds.

    Returns:
      (hidden_BQD after the final norm, of no meaning behind the count; the cache).
    """
    model, size = config.model, token_BQ.shape
    token_BQ, count_B = jnp.asarray(token_BQ), jnp.asarray(count_B)
    offset_Q = jnp.arange(size[1])
    position_BQ = cache.length_B[:, None] + offset_Q
    counts_BQ = offset_Q < count_B[:, None]
    angles = rotary_angles(position_BQ, model.width // model.heads, model.rope_theta)
    modality_BQ = jnp.take(jnp.asarray(vocabulary_modality_V, jnp.int32), token_BQ)
    groups = {group.name: group for group in (*config.experts.groups, *config.depth)}
    x_BQD = weights["embedding_VD"][token_BQ]
    memories = []
    for number, layer in enumerate(weights["layers"]):
        thresholds = _of_layer(routing_state, number, config) if routing == "threshold" else {}
        rule = _Rule(groups, routing, thresholds)
        places = _remembered(cache.places[number], cache.length_B)
        memory = (cache.keys[number], cache.values[number], places)

        def through(x_BQD, enters_BQ, memory, layer=layer, rule=rule):
            tokens = _Tokens(position_BQ, jnp.where(enters_BQ, modality_BQ, -1), angles)
            return _layer(x_BQD, tokens, memory, layer, rule, model)

        if layer["depth"]:
            x_BQD, memory = _enter(x_BQD, jnp.where(counts_BQ, modality_BQ, -1), memory, layer["depth"], rule, through)
        else:
            x_BQD, memory = through(x_BQD, counts_BQ, memory)
        memories.append(memory)
    hidden_BQD = rms_norm(x_BQD, weights["final_norm_D"], model.norm_epsilon)
    return hidden_BQD, Cache(*(tuple(part) for part in zip(*memories, strict=True)), cache.length_B + count_B)


class _Rule(NamedTuple):
    """Who enters an expert or a layer: groups by name, the routing's name, the layer's thresholds by group."""

    groups: dict[str, ExpertGroup]
    routing: str
    thresholds: dict[str, Any]


class _Tokens(NamedTuple):
    """What a layer knows of new tokens: position in the row, modality (-1: not to be computed), rotary angles."""

    position_BQ: Any
    modality_BQ: Any
    angles: Any


def _of_layer(routing_state: Any, number: int, config: Config) -> Any:
    """The part of layer `number`; that of mixture of depths is stacked over every second layer."""
    pairs = {group.name for group in config.depth}
    index = {name: number // 2 if name in pairs else number for name in routing_state}
    return {name: jax.tree.map(lambda x_L, n=index[name]: x_L[n], own) for name, own in routing_state.items()}


def _remembered(place_BP, length_B):
    """The places of keys without those that a rewound row forgot; also where no token enters the layer now."""
    return None if place_BP is None else jnp.where(place_BP < length_B[:, None], place_BP, NOWHERE)


def _enter(x_BQD, modality_BQ, memory, routers: dict[str, Experts], rule: _Rule, through):
    """A layer that some tokens alone enter (paper section 2.3): x + gate * (layer(x) - x) for those, else x.

    Where no token of any row does, nothing of the layer is read. Args: through: (x_BQD, enters_BQ, memory) -> the same
    of the layer itself.
    """
    x_ND, modality_N = x_BQD.reshape(-1, x_BQD.shape[-1]), modality_BQ.reshape(-1)
    enters_N, gate_N = jnp.zeros(len(x_ND), bool), jnp.zeros(len(x_ND), jnp.float32)
    for name, router in routers.items():
        passes_N1, gate_N1 = _passes(x_ND, modality_N, name, router.router_DE, router.auxiliary, rule)
        enters_N, gate_N = enters_N | passes_N1[:, 0], jnp.where(passes_N1[:, 0], gate_N1[:, 0], gate_N)
    enters_BQ, gate_BQ = enters_N.reshape(modality_BQ.shape), gate_N.reshape(modality_BQ.shape)

    def enter(x_BQD, memory):
        y_BQD, memory = through(x_BQD, enters_BQ, memory)
        change_BQD = (gate_BQ[..., None] * (y_BQD - x_BQD)).astype(x_BQD.dtype)
        return x_BQD + jnp.where(enters_BQ[..., None], change_BQD, 0), memory

    return jax.lax.cond(enters_BQ.any(), enter, lambda *same: same, x_BQD, memory)


def _layer(x_BQD, tokens: _Tokens, memory, layer, rule: _Rule, model):
    """A whole layer on new tokens: (its output, the memory with them)."""

    def attention(y_BQD):
        return _attend(y_BQD, layer["attention"], memory, tokens, model.norm_epsilon)

    def feed_forward(y_BQD):
        y_ND = _feed_forward(y_BQD.reshape(-1, model.width), tokens.modality_BQ.reshape(-1), layer["ffn"], rule)
        return y_ND.reshape(y_BQD.shape), None

    def norm(name):
        return lambda y_BQD: rms_norm(y_BQD, layer[name], model.norm_epsilon)

    x_BQD, memory = sub_layer(x_BQD, attention, norm("attention_norm_D"), model.norm == "pre")
    x_BQD, _ = sub_layer(x_BQD, feed_forward, norm("ffn_norm_D"), model.norm == "pre")
    return x_BQD, memory


def _attend(x_BQD, weights, memory, tokens: _Tokens, epsilon):
    """The attention sub-layer on new tokens and all that their rows hold; (its output, the memory with them).

    Where some tokens alone enter, keys lie one after the other and their places tell who sees them.
    """
    q_BQHK, k_BQHK, v_BQHK = project(x_BQD, weights, tokens.angles, epsilon)
    key_BPHK, value_BPHK, place_BP = memory
    rows, positions = key_BPHK.shape[:2]
    enters_BQ, row_B1 = tokens.modality_BQ >= 0, jnp.arange(rows)[:, None]
    if place_BP is None:
        slot_BQ, seen_BP = tokens.position_BQ, jnp.broadcast_to(jnp.arange(positions), (rows, positions))
    else:
        held_B1 = (place_BP != NOWHERE).sum(axis=1, dtype=jnp.int32)[:, None]
        slot_BQ = held_B1 + jnp.cumsum(enters_BQ, axis=1, dtype=jnp.int32) - 1
    slot_BQ = jnp.where(enters_BQ, slot_BQ, positions)  # beyond the end: dropped
    key_BPHK, value_BPHK = (
        old.at[row_B1, slot_BQ].set(new, mode="drop") for old, new in ((key_BPHK, k_BQHK), (value_BPHK, v_BQHK))
    )
    if place_BP is not None:
        seen_BP = place_BP = place_BP.at[row_B1, slot_BQ].set(tokens.position_BQ, mode="drop")
    one_BQ, one_BP = jnp.ones_like(tokens.position_BQ), jnp.ones((rows, positions), jnp.int32)
    y_BQHK = attend_block((q_BQHK, one_BQ, tokens.position_BQ), key_BPHK, value_BPHK, one_BP, seen_BP)
    return project_out(y_BQHK, weights), (key_BPHK, value_BPHK, place_BP)


def _passes(x_ND, modality_N, name: str, router_DE, predictor, rule: _Rule):
    """(bool, float32 gate) (N, E) of tokens and the experts of a group, or the layer, that they enter."""
    eligible_N1 = jnp.isin(modality_N, jnp.array(rule.groups[name].modalities))[:, None]
    logit_NE = jnp.matmul(wide(x_ND), router_DE, precision=EXACT)
    match rule.routing:
        case "causal":
            passes_NE = eligible_N1 & causal.passes_prediction(auxiliary.predict(x_ND, predictor))
        case "threshold":
            passes_NE = eligible_N1 & causal.passes_threshold(logit_NE, rule.thresholds[name])
    return passes_NE, jax.nn.sigmoid(logit_NE)


def _feed_forward(x_ND, modality_N, ffn, rule: _Rule):
    """The feed-forward sub-layer (Eq. 1) on N tokens, expert by expert; modality_N is -1 where none is."""
    y_ND = jnp.zeros_like(x_ND)
    one_N = jnp.ones(len(x_ND), jnp.float32)
    for name, own in ffn.items():
        if name not in rule.groups:  # shared: always on, of one expert
            y_ND = add_expert(y_ND, x_ND, modality_N >= 0, one_N, own["experts"][0])
            continue
        if own["router_DE"] is None:
            passes_NE = jnp.isin(modality_N, jnp.array(rule.groups[name].modalities))[:, None]
            gate_NE = one_N[:, None]
        else:
            passes_NE, gate_NE = _passes(x_ND, modality_N, name, own["router_DE"], own["auxiliary"], rule)
        for e, expert in enumerate(own["experts"]):
            y_ND = add_expert(y_ND, x_ND, passes_NE[:, e], gate_NE[:, e], expert)
    return y_ND


def add_expert(y_ND, x_ND, passes_N, gate_N, expert: Experts):
    """Adds one expert's output for the tokens that pass; if there are none its weights are not read.

    Very few tokens are computed together; of more, only those that pass, in blocks of an eighth of all: what one expert
    of 4t4i takes on average.

    Args:
      passes_N: bool. gate_N: float32 weights. expert: two-dimensional weights.
    """
    tokens = len(x_ND)
    size = max(LEAST_BLOCK, tokens // 8)
    weights = (expert.gate_EDF, expert.up_EDF, expert.down_EFD)
    if tokens <= size:
        gate_N = jnp.where(passes_N, gate_N, 0.0)
        return jax.lax.cond(passes_N.any(), lambda y: y + swiglu_of(x_ND, *weights, gate_N), lambda y: y, y_ND)
    slots = -(-tokens // size) * size
    (index_S,) = jnp.nonzero(passes_N, size=slots, fill_value=0)
    count = passes_N.sum()

    def block(number, y_ND):
        start = number * size
        index_C = jax.lax.dynamic_slice(index_S, (start,), (size,))
        gate_C = jnp.where(start + jnp.arange(size) < count, gate_N[index_C], 0.0)
        return combine(y_ND, index_C, swiglu_of(dispatch(x_ND, index_C), *weights, gate_C))

    return jax.lax.fori_loop(0, -(-count // size), block, y_ND)
