"""Cached decoding: the decoder's layers on the next tokens of rows that were begun before (paper section 2.4).

The same `block` as in training, under a causal routing, arranged for reading weights once: layers are unrolled and
every expert's weights are arrays of their own, so that inside jit nothing is sliced out of a stack, which would copy
it, and experts that no token enters are not read at all (`lax.cond`). docs/results/decode_layouts.py compares this with
stacked, looped over, gathered and fully computed experts: on CPU it alone stays near dense's speed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moma_jax.config import Config
from moma_jax.geometry import depth_of, layer_of
from moma_jax.model import moe
from moma_jax.model.attention import NOWHERE, Memory, attend_cached, rotary_angles
from moma_jax.model.block import block, rms_norm
from moma_jax.model.depth import depth_routing, enter_cached
from moma_jax.model.parameters import MATRICES, ExpertWeights, weights_of
from moma_jax.model.precision import compute_dtype


class Cache(NamedTuple):
    """What rows have been told so far.

    Attributes:
      memories: of each layer.
      length_B: int32 tokens in each row. Lowering it rewinds the row: what lies beyond is overwritten, never seen.
    """

    memories: tuple[Memory, ...]
    length_B: Any


def new_cache(config: Config, rows: int, positions: int) -> Cache:
    """An empty cache of `rows` rows with room for `positions` tokens each."""
    model = config.model
    shape = (rows, positions, model.heads, model.width // model.heads)

    def memory(number: int) -> Memory:
        # Arrays of their own for each layer: a cache is donated, and no buffer can be given away twice.
        entered = jnp.full((rows, positions), NOWHERE, jnp.int32) if config.depth and number % 2 == 0 else None
        return Memory(*(jnp.zeros(shape, compute_dtype(model)) for _ in range(2)), entered)

    return Cache(tuple(map(memory, range(model.layers))), jnp.zeros(rows, jnp.int32))


def unstack(params: Any, config: Config) -> dict[str, Any]:
    """Parameters as decoding reads them: layer by layer, expert by expert, matrices in compute dtype.

    Returns:
      {"embedding_VD", "unembedding_DV", "final_norm_D", "layers": for each layer {"attention", "attention_norm",
      "ffn_norm", "ffn": {group: ExpertWeights of the routers alone}, "experts": {group: each expert's
      ExpertWeights of two-dimensional arrays}, "depth": the routers in front of it by name; {} where all enter}}.
    """
    dtype = compute_dtype(config.model)

    def layer(number: int) -> dict[str, Any]:
        own = jax.tree.map(lambda x_L: x_L[number // 2 if config.depth else number], params["layers"])
        depth = weights_of(own.pop("depth", {})) if number % 2 == 0 else {}
        own = own[("even", "odd")[number % 2]] if config.depth else own
        matrices = {name: w.astype(dtype) for name, w in own["attention"].items() if not name.endswith("_norm")}
        ffn = weights_of(own["ffn"])
        return {
            "attention": own["attention"] | matrices,
            "attention_norm": own["attention_norm"]["scale_D"],
            "ffn_norm": own["ffn_norm"]["scale_D"],
            "ffn": {name: weights._replace(gate_EDF=None, up_EDF=None, down_EFD=None) for name, weights in ffn.items()},
            "experts": {name: _apart(weights, dtype) for name, weights in ffn.items()},
            "depth": depth,
        }

    return {
        "embedding_VD": params["embedding"]["kernel_VD"].astype(dtype),
        "unembedding_DV": params["unembedding"]["kernel_DV"].astype(dtype),
        "final_norm_D": params["final_norm"]["scale_D"],
        "layers": tuple(layer(number) for number in range(config.model.layers)),
    }


def _apart(weights: ExpertWeights, dtype) -> tuple[ExpertWeights, ...]:
    """One group's matrices, each expert's by itself."""
    stacks = zip(*weights[: len(MATRICES)], strict=True)
    return tuple(ExpertWeights(*(w.astype(dtype) for w in matrices)) for matrices in stacks)


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
      routing: name of a causal routing of the config's rule, static. routing_state: of the model.

    Returns:
      (hidden_BQD after the final norm, of no meaning behind the count; the cache).
    """
    model = config.model
    token_BQ, count_B = jnp.asarray(token_BQ), jnp.asarray(count_B)
    offset_Q = jnp.arange(token_BQ.shape[1])
    position_BQ = cache.length_B[:, None] + offset_Q
    modality_BQ = jnp.take(jnp.asarray(vocabulary_modality_V, jnp.int32), token_BQ)
    modality_BQ = jnp.where(offset_Q < count_B[:, None], modality_BQ, -1)
    angles = rotary_angles(position_BQ, model.width // model.heads, model.rope_theta)
    modalities, depth = len(config.data.modalities), depth_of(config)
    of_experts = moe.layer_routing(model, layer_of(config), 1, routing, False)
    of_depth = depth_routing(model, depth.routers, modalities, routing) if depth else None
    x_BQD = weights["embedding_VD"][token_BQ]
    memories = []
    for number, layer in enumerate(weights["layers"]):
        state = _of_layer(routing_state, number, config)
        memory = _without_rewound(cache.memories[number], cache.length_B)

        def through(x_BQD, enters_BQ, memory, layer=layer, state=state):
            modality_N = jnp.where(enters_BQ, modality_BQ, -1).reshape(-1)
            return _layer(x_BQD, layer, memory, position_BQ, enters_BQ, angles, modality_N, state, of_experts, model)

        if layer["depth"]:
            arguments = (x_BQD, modality_BQ, memory, layer["depth"], state, of_depth, through)
            x_BQD, memory = enter_cached(*arguments)
        else:
            x_BQD, memory = through(x_BQD, modality_BQ >= 0, memory)
        memories.append(memory)
    hidden_BQD = rms_norm(x_BQD, weights["final_norm_D"], model.norm_epsilon)
    return hidden_BQD, Cache(tuple(memories), cache.length_B + count_B)


def _layer(x_BQD, layer, memory, position_BQ, enters_BQ, angles, modality_N, state, routing: moe.Routing, model):
    """`block` on new tokens: (its output, the memory with them)."""

    def attend(y_BQD):
        tokens = (memory, position_BQ, enters_BQ, angles)
        return attend_cached(y_BQD, layer["attention"], *tokens, model.norm_epsilon)

    def experts(y_BQD):
        x_ND = y_BQD.reshape(-1, model.width)
        arguments = (jnp.zeros_like(x_ND), x_ND, modality_N, routing.groups, layer["ffn"], layer["experts"])
        y_ND = moe.add_decided(*arguments, state, routing)[0]
        return y_ND.reshape(y_BQD.shape), None

    x_BQD, memory, _ = block(x_BQD, layer, attend, experts, model)
    return x_BQD, memory


def _of_layer(routing_state: Any, number: int, config: Config) -> Any:
    """The part of layer `number`; that of mixture of depths is stacked over every second layer."""
    pairs = {group.name for group in config.depth}
    index = {name: number // 2 if name in pairs else number for name in routing_state or {}}
    return {name: jax.tree.map(lambda x_L, n=n: x_L[n], routing_state[name]) for name, n in index.items()}


def _without_rewound(memory: Memory, length_B) -> Memory:
    """The memory without the keys that a rewound row forgot; also where no token enters the layer now."""
    position_BP = memory.position_BP
    if position_BP is None:
        return memory
    return memory._replace(position_BP=jnp.where(position_BP < length_B[:, None], position_BP, NOWHERE))
