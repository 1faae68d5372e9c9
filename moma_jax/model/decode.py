"""Cached decoding: the decoder's layers on the next tokens of rows that were begun before (paper section 2.4).

The same `block` as in training, under a causal routing, arranged for reading weights once: every layer's and every
expert's weights are arrays of their own, so that nothing is sliced out of a stack, which would copy it, and experts
that no token enters are not read at all (`lax.cond`). docs/results/decode_layouts.py compares this with stacked, looped
over, gathered and fully computed experts: on CPU it alone stays near dense's speed.

On a mesh every device has its own heads and its own part of each expert's hidden width, whichever of the axes but
`data` its neighbours lie on; two sums a layer join them. Tokens and decisions are everywhere the same.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moma_jax import sharding
from moma_jax.config import Config, ModelConfig
from moma_jax.errors import InputError
from moma_jax.geometry import GroupSlots, depth_of, layer_of
from moma_jax.model import moe
from moma_jax.model.attention import NOWHERE, Memory, attend_cached, rotary_angles
from moma_jax.model.block import block, rms_norm, scale_of
from moma_jax.model.depth import depth_routing, enter_cached
from moma_jax.model.parameters import ATTENTION_AXES, MATRICES, ExpertWeights, unembedding_of, weights_of
from moma_jax.model.precision import compute_dtype

TOGETHER = 4
"""Layers of one program that the host calls: of fewer a call takes a CPU longer beside what they compute, of more they
take longer to compile. Even, as layers of mixture of depths come in pairs."""
DEEP = 12
"""Layers from which a CPU writes tokens by calls from the host: a program of so many takes it longer to compile than
to write some hundred tokens, and wide ones, which deep models have, hide the calls."""

SPLIT = (sharding.FSDP, sharding.EXPERT, sharding.TENSOR)
"""Mesh axes that one model is split over; along `data` there are copies."""
SPLIT_AXIS = {
    **dict.fromkeys(("query_DHK", "key_DHK", "value_DHK", "gate_EDF", "up_EDF", "embedding_VD"), 1),
    **dict.fromkeys(("out_HKD", "scale_HK", "bias_HK", "down_EFD", "unembedding_DV"), 0),
    **dict.fromkeys(("key_BPHK", "value_BPHK"), 2),
}
"""Which axis of an array devices have a part of: heads, hidden width, and the width of embeddings. Matrices of experts
are each expert's own here, without E. What is not named is whole everywhere."""


class Cache(NamedTuple):
    """What rows have been told so far.

    Attributes:
      memories: of each layer.
      length_B: int32 tokens in each row. Lowering it rewinds the row: what lies beyond is overwritten, never seen.
    """

    memories: tuple[Memory, ...]
    length_B: Any


def by_one_program(config: Config) -> bool:
    """Whether tokens are better written by a loop on the device than by calls of `extend` from the host, which would
    take an accelerator longer than what they compute."""
    return sharding.platform() != "cpu" or config.model.layers < DEEP


def new_cache(config: Config, rows: int, positions: int) -> Cache:
    """An empty cache of `rows` rows with room for `positions` tokens each, on the mesh that is in use."""
    model = config.model
    shape = (rows, positions, model.key_heads, model.head_size)
    place = sharding.placed_by(_spec("key_BPHK"))

    def memory(number: int) -> Memory:
        # Arrays of their own for each layer: a cache is donated, and no buffer can be given away twice.
        entered = jnp.full((rows, positions), NOWHERE, jnp.int32) if config.depth and number % 2 == 0 else None
        return Memory(*(jnp.zeros(shape, compute_dtype(model), device=place) for _ in range(2)), entered)

    return Cache(tuple(map(memory, range(model.layers))), jnp.zeros(rows, jnp.int32))


def unstack(params: Any, config: Config, routing_state: Any) -> dict[str, Any]:
    """A model as decoding reads it: layer by layer, expert by expert, matrices in compute dtype.

    Under a mesh every device gets its part, whatever parts it had of the parameters.

    Returns:
      {"embedding_VD", "unembedding_DV", "final_norm_D", "layers": for each layer {"attention", "attention_norm",
      "ffn_norm", "ffn": {group: ExpertWeights of the routers alone}, "experts": {group: each expert's
      ExpertWeights of two-dimensional arrays}, "depth": the routers in front of it by name; {} where all enter,
      "state": its part of the routing state}}.

    Raises:
      InputError: the devices do not divide the heads or the hidden width.
    """
    require_parts(config)
    dtype = compute_dtype(config.model)

    def layer(number: int) -> dict[str, Any]:
        own, depth, state = layer_part(params, routing_state, config, number)
        ffn = weights_of(own["ffn"])
        return _placed({
            "attention": _in_dtype(own["attention"], dtype),
            "attention_norm": _scales(own["attention_norm"]),
            "ffn_norm": _scales(own["ffn_norm"]),
            "ffn": {name: weights._replace(gate_EDF=None, up_EDF=None, down_EFD=None) for name, weights in ffn.items()},
            "experts": {name: _apart(weights, dtype) for name, weights in ffn.items()},
            "depth": weights_of(depth),
            "state": state,
        })  # fmt: skip

    ends = _placed({
        "embedding_VD": params["embedding"]["kernel_VD"].astype(dtype),
        "unembedding_DV": unembedding_of(params).astype(dtype),
        "final_norm_D": params["final_norm"]["scale_D"],
    })  # fmt: skip
    return ends | {"layers": tuple(layer(number) for number in range(config.model.layers))}


def layer_part(params: Any, routing_state: Any, config: Config, number: int) -> tuple[dict, dict, dict]:
    """What one layer has of stacked parameters and routing state: (its own parameters, those of the routers in front of
    it, {} where all enter, its state by group)."""
    pairs = {group.name for group in config.depth}
    own = jax.tree.map(lambda x_L: x_L[number // 2 if pairs else number], params["layers"])
    depth = own.pop("depth", {})
    own = own[("even", "odd")[number % 2]] if pairs else own
    place = {name: number // 2 if name in pairs else number for name in routing_state or {}}
    state = {name: jax.tree.map(lambda x_L, n=n: x_L[n], routing_state[name]) for name, n in place.items()}
    return own, depth if number % 2 == 0 else {}, state


def require_parts(config: Config) -> None:
    """Raises InputError where the devices that share a model cannot be given equal parts of it."""
    parts = sharding.size(*SPLIT)
    model = config.model
    for name, number in {"heads": model.heads, "kv_heads": model.key_heads, "hidden": model.hidden}.items():
        if number % parts:
            raise InputError(
                f"mesh: to write, heads and model.hidden are split over fsdp x expert x tensor; these are {parts} "
                f"devices, which do not divide model.{name} {number}; use a divisor, and data for the rest"
            )


def _spec(name: str) -> PartitionSpec:
    """Where an array of this name lies."""
    places = sharding.split_axes(*SPLIT)
    return PartitionSpec(*[None] * SPLIT_AXIS[name], places) if places and name in SPLIT_AXIS else PartitionSpec()


def specs_of(tree: Any) -> Any:
    """Where each array of weights or of a cache lies on the mesh that is in use, by its name."""

    def one(path, _) -> PartitionSpec:
        names = (getattr(key, "key", getattr(key, "name", None)) for key in reversed(path))
        return _spec(next((name for name in names if isinstance(name, str)), ""))

    return jax.tree_util.tree_map_with_path(one, tree)


def _placed(tree: Any) -> Any:
    """Arrays where they belong on the mesh that is in use."""
    if sharding.size(*sharding.AXES) == 1:
        return tree
    return jax.device_put(tree, jax.tree.map(sharding.placed_by, specs_of(tree)))


def _in_dtype(attention: dict[str, Any], dtype) -> dict[str, Any]:
    """The attention's weights, of all or by modality, with matrices in compute dtype."""

    def one(name: str, own: Any) -> Any:
        if name in ATTENTION_AXES:
            return own.astype(dtype)
        return own if name.endswith("_norm") else _in_dtype(own, dtype)

    return {name: one(name, own) for name, own in attention.items()}


def _scales(norm: dict[str, Any]) -> Any:
    """A norm's scale, or that of each modality by name."""
    return norm["scale_D"] if "scale_D" in norm else {name: own["scale_D"] for name, own in norm.items()}


def _apart(weights: ExpertWeights, dtype) -> tuple[ExpertWeights, ...]:
    """One group's matrices, each expert's by itself."""
    matrices = weights[: len(MATRICES)]
    # By number: iterating over an array that is split brings it through the host.
    return tuple(ExpertWeights(*(w[e].astype(dtype) for w in matrices)) for e in range(len(matrices[0])))


def logits(weights: dict[str, Any], hidden):
    """Logits (..., V), float32, of hidden states (..., D)."""
    return _unembedded(hidden, weights["unembedding_DV"])


@jax.jit
def _unembedded(hidden, unembedding_DV):
    def local(hidden, unembedding_DV):
        logits = jnp.matmul(hidden, unembedding_DV, preferred_element_type=jnp.float32)
        return sharding.psum(logits, *SPLIT)

    own = PartitionSpec(*[None] * (hidden.ndim - 1), *_spec("unembedding_DV"))
    specs = own, _spec("unembedding_DV")
    return sharding.shard_map(local, specs, PartitionSpec(), check=False)(hidden, unembedding_DV)


def extend(
    weights: dict[str, Any],
    cache: Cache,
    token_BQ,
    count_B,
    *,
    config: Config,
    vocabulary_modality_V,
    routing: str,
) -> tuple[Any, Cache]:
    """Appends the first count_B[b] of Q tokens to each row: Q = 1 decodes, a larger Q is a piece of prefill.

    Inside jit it becomes part of that program. Called from the host it is a few programs, of which one is called for
    every TOGETHER layers: what there is to compile does not grow with depth.

    Args:
      weights: of `unstack`. cache: with room for what is appended; what finds none is not seen by later tokens. From
        the host it is used up.
      token_BQ: int32 ids; those behind the count are ignored. count_B: int32, 0 to Q.
      config: the resolved config, static. vocabulary_modality_V: modality of every id.
      routing: name of a causal routing of the config's rule, static.

    Returns:
      (hidden_BQD after the final norm, of no meaning behind the count; the cache).
    """
    model, depth = config.model, depth_of(config)
    of_depth = depth_routing(model, depth, len(config.data.modalities), routing) if depth else None
    shape = layer_of(config)
    static = _Static(model, moe.layer_routing(model, shape, 1, routing, False), of_depth, shape.projections)
    arguments = (token_BQ, count_B, cache.length_B, jnp.asarray(vocabulary_modality_V, jnp.int32))
    x_BQD, new, length_B = _looked_up(weights["embedding_VD"], *arguments, model=model)
    memories = []
    for start in range(0, model.layers, TOGETHER):
        some = slice(start, start + TOGETHER)
        arguments = (cache.memories[some], x_BQD, weights["layers"][some], new, cache.length_B)
        x_BQD, written = _through_layers(*arguments, static=static)
        memories += written
    hidden_BQD = _normed(x_BQD, weights["final_norm_D"], model.norm_epsilon)
    return hidden_BQD, Cache(tuple(memories), length_B)


class _Static(NamedTuple):
    """What programs are made for."""

    model: ModelConfig
    of_experts: moe.Routing
    of_depth: moe.Routing | None
    projections: tuple[GroupSlots, ...]


class _New(NamedTuple):
    """What layers know of new tokens, (B, Q); their modality is -1 behind the count."""

    facts: moe.TokenFacts
    angles: Any


@functools.partial(jax.jit, static_argnames="model")
def _looked_up(embedding_VD, token_BQ, count_B, length_B, vocabulary_modality_V, *, model: ModelConfig):
    """(x_BQD, _New, the rows' new lengths)."""
    offset_Q = jnp.arange(token_BQ.shape[1])
    position_BQ = length_B[:, None] + offset_Q
    modality_BQ = jnp.take(vocabulary_modality_V, token_BQ)
    modality_BQ = jnp.where(offset_Q < count_B[:, None], modality_BQ, -1)
    angles = rotary_angles(position_BQ, model)

    def look_up(embedding_VD, token_BQ):
        return sharding.all_gather(embedding_VD[token_BQ], 2, *SPLIT)

    places = _spec("embedding_VD"), PartitionSpec()
    x_BQD = sharding.shard_map(look_up, places, PartitionSpec(), check=False)(embedding_VD, token_BQ)
    return x_BQD, _New(moe.TokenFacts(modality_BQ, token_BQ, position_BQ), angles), length_B + count_B


_normed = jax.jit(rms_norm, static_argnums=2)


@functools.partial(jax.jit, static_argnames="static", donate_argnums=0)
def _through_layers(memories, x_BQD, layers, new: _New, length_B, *, static: _Static):
    """Some layers, which some tokens alone may enter: (x_BQD, the memories with them)."""
    arguments = (memories, x_BQD, layers, new, length_B)
    specs = specs_of(arguments)
    run = functools.partial(_through_parts, static=static)
    return sharding.shard_map(run, specs, (PartitionSpec(), list(specs[0])), check=False)(*arguments)


def _through_parts(memories, x_BQD, layers, new: _New, length_B, *, static: _Static):
    """`_through_layers` by a device's own parts of memories and layers."""
    written = []
    for memory, layer in zip(memories, layers, strict=True):
        memory = _without_rewound(memory, length_B)

        def through(x_BQD, enters_BQ, memory, layer=layer):
            modality_BQ = jnp.where(enters_BQ, new.facts.modality_N, -1)
            tokens = (memory, new.facts.position_N, enters_BQ, new.angles)
            return _layer(x_BQD, layer, tokens, new.facts._replace(modality_N=modality_BQ), static)

        if layer["depth"]:
            arguments = (x_BQD, new.facts, memory, layer["depth"], layer["state"], static.of_depth, through)
            x_BQD, memory = enter_cached(*arguments)
        else:
            x_BQD, memory = through(x_BQD, new.facts.modality_N >= 0, memory)
        written.append(memory)
    return x_BQD, written


def _layer(x_BQD, layer, tokens, facts: moe.TokenFacts, static: _Static):
    """`block` on new tokens, whose `facts` are (B, Q): (its output, the memory with them)."""
    model, routing, modality_BQ = static.model, static.of_experts, facts.modality_N
    numbers = {own.group.name: own.group.modalities[0] for own in static.projections}
    scales = {name: scale_of(layer[name], static.projections, modality_BQ) for name in ("attention_norm", "ffn_norm")}

    def attend(y_BQD):
        of = (numbers, modality_BQ) if numbers else None
        y_BQD, memory = attend_cached(y_BQD, layer["attention"], *tokens, model.norm_epsilon, of)
        return sharding.psum(y_BQD, *SPLIT), memory

    def experts(y_BQD):
        x_ND, of_N = y_BQD.reshape(-1, model.width), moe.TokenFacts(*(x_BQ.reshape(-1) for x_BQ in facts))
        arguments = (jnp.zeros_like(x_ND), x_ND, of_N, routing.groups, layer["ffn"], layer["experts"])
        y_ND, _, copied_N = moe.add_decided(*arguments, layer["state"], routing)
        return moe.with_copies(sharding.psum(y_ND, *SPLIT), x_ND, copied_N).reshape(y_BQD.shape), None

    x_BQD, memory, _ = block(x_BQD, scales, attend, experts, model)
    return x_BQD, memory


def _without_rewound(memory: Memory, length_B) -> Memory:
    """The memory without the keys that a rewound row forgot; also where no token enters the layer now."""
    position_BP = memory.position_BP
    if position_BP is None:
        return memory
    return memory._replace(position_BP=jnp.where(position_BP < length_B[:, None], position_BP, NOWHERE))
