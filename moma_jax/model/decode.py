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
from moma_jax.model.decoder import compute_dtype, rms_norm, sub_layer
from moma_jax.model.experts import EXACT, experts_of
from moma_jax.model.slots import Experts, combine, dispatch, swiglu_of

LEAST_BLOCK = 4
"""Tokens that an expert computes together, at least: reading its weights takes as long."""


class Cache(NamedTuple):
    """What rows have been told so far.

    Attributes:
      keys, values: for each layer (B, P, H, K) in compute dtype; P positions are allocated.
      length_B: int32 tokens in each row. Lowering it rewinds the row: what lies beyond is overwritten, never seen.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    length_B: Any


def new_cache(config: Config, rows: int, positions: int) -> Cache:
    """An empty cache of `rows` rows with room for `positions` tokens each."""
    model = config.model
    shape = (rows, positions, model.heads, model.width // model.heads)
    keys, values = (
        tuple(jnp.zeros(shape, compute_dtype(model)) for _ in range(model.layers)) for _ in ("keys", "values")
    )
    return Cache(keys, values, jnp.zeros(rows, jnp.int32))


def unstack(params: Any, config: Config) -> dict[str, Any]:
    """Parameters as decoding reads them: layer by layer, expert by expert, matrices in compute dtype.

    Returns:
      {"embedding_VD", "unembedding_DV", "final_norm_D", "layers": for each layer {"attention", "attention_norm_D",
      "ffn_norm_D", "ffn": {group: {"experts": Experts of two-dimensional weights, "router_DE", "auxiliary"}}}}.
    """
    dtype = compute_dtype(config.model)

    def layer(number: int) -> dict[str, Any]:
        own = jax.tree.map(lambda x_L: x_L[number], params["layers"])
        matrices = {name: w.astype(dtype) for name, w in own["attention"].items() if not name.endswith("_norm")}
        return {
            "attention": own["attention"] | matrices,
            "attention_norm_D": own["attention_norm"]["scale_D"],
            "ffn_norm_D": own["ffn_norm"]["scale_D"],
            "ffn": {name: _apart(experts, dtype) for name, experts in experts_of(own["ffn"]).items()},
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
    model = config.model
    token_BQ, count_B = jnp.asarray(token_BQ), jnp.asarray(count_B)
    offset_Q = jnp.arange(token_BQ.shape[1])
    position_BQ = cache.length_B[:, None] + offset_Q
    counts_BQ = offset_Q < count_B[:, None]
    angles = rotary_angles(position_BQ, model.width // model.heads, model.rope_theta)
    modality_BQ = jnp.take(jnp.asarray(vocabulary_modality_V, jnp.int32), token_BQ)
    modality_N = jnp.where(counts_BQ, modality_BQ, -1).reshape(-1)
    groups = {group.name: group for group in config.experts.groups}
    x_BQD = weights["embedding_VD"][token_BQ]
    keys, values = [], []
    for number, layer in enumerate(weights["layers"]):
        thresholds = jax.tree.map(lambda x_L, n=number: x_L[n], routing_state) if routing == "threshold" else {}
        memory = (cache.keys[number], cache.values[number])

        def attention(y_BQD, layer=layer, memory=memory):
            return _attend(y_BQD, layer["attention"], memory, position_BQ, counts_BQ, angles, model.norm_epsilon)

        def feed_forward(y_BQD, layer=layer, thresholds=thresholds):
            x_ND = y_BQD.reshape(-1, model.width)
            y_ND = _feed_forward(x_ND, modality_N, groups, layer["ffn"], routing, thresholds)
            return y_ND.reshape(y_BQD.shape), None

        def norm(name, layer=layer):
            return lambda y_BQD: rms_norm(y_BQD, layer[name], model.norm_epsilon)

        x_BQD, (key, value) = sub_layer(x_BQD, attention, norm("attention_norm_D"), model.norm == "pre")
        x_BQD, _ = sub_layer(x_BQD, feed_forward, norm("ffn_norm_D"), model.norm == "pre")
        keys.append(key)
        values.append(value)
    hidden_BQD = rms_norm(x_BQD, weights["final_norm_D"], model.norm_epsilon)
    return hidden_BQD, Cache(tuple(keys), tuple(values), cache.length_B + count_B)


def _attend(x_BQD, weights, memory, position_BQ, counts_BQ, angles, epsilon):
    """The attention sub-layer on new tokens and all that their rows hold; (its output, the memory with them)."""
    q_BQHK, k_BQHK, v_BQHK = project(x_BQD, weights, angles, epsilon)
    rows, positions = memory[0].shape[:2]
    place_BQ = jnp.where(counts_BQ, position_BQ, positions)  # beyond the end: dropped
    row_B1 = jnp.arange(rows)[:, None]
    memory = tuple(
        old.at[row_B1, place_BQ].set(new, mode="drop") for old, new in zip(memory, (k_BQHK, v_BQHK), strict=True)
    )
    one_BQ, one_BP = jnp.ones_like(position_BQ), jnp.ones((rows, positions), jnp.int32)
    query = (q_BQHK, one_BQ, position_BQ)
    y_BQHK = attend_block(query, *memory, one_BP, jnp.broadcast_to(jnp.arange(positions), (rows, positions)))
    return project_out(y_BQHK, weights), memory


def _feed_forward(x_ND, modality_N, groups: dict[str, ExpertGroup], ffn, routing: str, thresholds):
    """The feed-forward sub-layer (Eq. 1) on N tokens, expert by expert; modality_N is -1 where none is."""
    y_ND = jnp.zeros_like(x_ND)
    one_N = jnp.ones(len(x_ND), jnp.float32)
    for name, own in ffn.items():
        if name not in groups:  # shared: always on, of one expert
            y_ND = add_expert(y_ND, x_ND, modality_N >= 0, one_N, own["experts"][0])
            continue
        eligible_N = jnp.isin(modality_N, jnp.array(groups[name].modalities))
        passes_NE, gate_NE = eligible_N[:, None], one_N[:, None]
        if own["router_DE"] is not None:
            logit_NE = jnp.matmul(x_ND.astype(jnp.float32), own["router_DE"], precision=EXACT)
            gate_NE = jax.nn.sigmoid(logit_NE)
            match routing:
                case "causal":
                    passes_NE &= causal.passes_prediction(auxiliary.predict(x_ND, own["auxiliary"]))
                case "threshold":
                    passes_NE &= causal.passes_threshold(logit_NE, thresholds[name])
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
