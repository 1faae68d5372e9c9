"""Parameters, FLOPs and bytes of a config in closed form: the only FLOP counter of this project. No JAX.

The convention, used for MFU, for matching models and for `train.flops`:

  * A product of an (m, k) and a (k, n) matrix is 2mkn FLOPs; nothing but matrix products counts.
  * Attention is the full S x S square of a row (as PaLM counts MFU), whatever causality and documents mask.
  * Tokens are split between modalities at the normalised quotas' ratio. An expert takes k_e = capacity * count of its
    group's `count` tokens, not rounded up; its router scores those `count` tokens. A group of one expert takes all and
    has no router. Shared experts take every token.
  * With mixture of depths half of the layers cost the share `model.depth_capacity` of a layer, and the square of it in
    attention; a token meets one column of their routers.
  * The embedding look-up is free; the unembedding is a product with all V ids at every position.
  * The backward pass costs twice the forward pass (`train` = 3 * `forward`); remat, the optimizer and padding are free.
  * Auxiliary routers are no part of the model: neither `total`, `active` nor `train` count them (as the paper does
    not), so that training them beside it changes no comparison.
  * `executed` is `train` as the static shapes run it: every expert computes ceil(capacity * quota) slots, filled or
    not (under rules that let tokens in one by one, those times their slack), routers score every position, auxiliary
    ones too, and positions that are padding (share `padding`, 0 unless given) are charged to the real tokens. Remat is
    not in it.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

from moma_jax.checks import resolve
from moma_jax.config import Config, ModelConfig
from moma_jax.errors import InputError
from moma_jax.ffn import ExpertGroup, projection_groups
from moma_jax.geometry import LayerShape, block_queries, depth_of, depth_rule, group_capacity, layer_of
from moma_jax.router import Parameter

BACKWARD = 2
"""FLOPs of the backward pass over those of the forward pass: one product per operand."""

FLOAT32 = 4
"""Bytes of a parameter, of a gradient and of each of AdamW's two moments."""


def cost(config: Config, *, padding: float = 0.0) -> dict[str, Any]:
    """Everything `moma cost --json` prints, by the convention at the top of this module.

    Args:
      config: a run; derived fields are resolved here.
      padding: share of a batch's positions that are padding, 0 or more and less than 1; it enters `executed` alone.

    Returns:
      "parameters": counts; `active` is what an average token passes, `embedding` both vocabulary tables, `auxiliary`
        those of auxiliary routers, which no other count includes.
      "flops_per_token": `by_part` adds up to `forward`; `executed` compares with `train`.
      "bytes": float32 parameters and AdamW moments, and an estimate of the activations of one microbatch, over all
        devices (see `activation_bytes`).
      "run": updates, positions and FLOPs (`train`) of the whole run.

    Raises:
      InputError: the config contradicts itself, or `padding` is no share.
    """
    config = resolve(config)
    if not 0 <= padding < 1:
        raise InputError(f"padding: {padding:g} is not a share of the positions; give 0 or more and less than 1")
    by_part = _forward_by_part(config)
    forward = sum(by_part.values())
    train = (1 + BACKWARD) * forward
    executed = ((1 + BACKWARD) * sum(_executed_by_part(config).values()) + _auxiliary_flops(config)) / (1 - padding)
    parameters = parameter_count(config)
    trained = parameters["total"] + parameters["auxiliary"]
    steps = total_steps(config)
    tokens = steps * config.batch_tokens
    return {
        "parameters": parameters,
        "flops_per_token": {
            "forward": float(forward),
            "train": float(train),
            "executed": float(executed),
            "by_part": {name: float(flops) for name, flops in by_part.items()},
        },
        "bytes": {
            "parameters": FLOAT32 * trained,
            "optimizer": 2 * FLOAT32 * trained,
            "activations": activation_bytes(config),
        },
        "run": {"steps": steps, "tokens": tokens, "flops": float(train * tokens)},
    }


def flops_per_token(config: Config) -> float:
    """Training FLOPs of one position, forward and backward, by the convention at the top of this module."""
    return float((1 + BACKWARD) * sum(_forward_by_part(resolve(config)).values()))


def total_steps(config: Config) -> int:
    """Optimizer updates of the run, from whichever of train.steps, train.tokens, train.flops is given, rounded up."""
    train = config.train
    if train.steps is not None:
        return train.steps
    if train.tokens is not None:
        return math.ceil(train.tokens / config.batch_tokens)
    return math.ceil(train.flops / (flops_per_token(config) * config.batch_tokens))


# Parameters -----------------------------------------------------------------------------------------------------------


def parameter_count(config: Config) -> dict[str, int]:
    """Parameters of the initialised decoder, exactly (paper section 4.1, Table 1, plus norms and routers).

    `active` counts, of each expert and router, the share of an average token that passes it. The decoder has `total`
    and `auxiliary` together.
    """
    model, layout = config.model, config.experts
    d, hidden, layers = model.width, model.hidden, model.layers
    expert = 3 * d * hidden
    qk_norm = {"layer": 2 * _head_channels(model), "rms": 2 * model.head_size, "none": 0}[model.qk_norm]
    attention = _head_channels(model) * 2 * d + qk_norm
    norms = 2 * d
    owners = len(projection_groups(model.attention_weights, config.data.modalities)) or 1
    inside = owners * (attention + norms) + sum(g.width for g in layout.shared) * expert
    routed = layers * sum(g.experts * expert + _router_size(config, g) for g in layout.groups)
    passed = attention + norms + sum(_share(config, g) * g.width for g in layout.shared) * expert
    for g in layout.groups:
        taken = g.experts * group_capacity(model, g) * expert
        passed += _share(config, g) * (taken + _router_size(config, g))
    depth = layers // 2 * sum(_size(depth_rule(model).parameters(d, g.experts)) for g in config.depth)
    met = layers // 2 * d if config.depth else 0  # of the routers' columns a token meets one
    embedding = (1 if model.tied_embeddings else 2) * config.vocabulary_size * d
    active = round(_entered_layers(config) * passed) + met + d
    return {
        "total": layers * inside + d + routed + depth + embedding,
        "active": active + embedding,
        "active_non_embedding": active,
        "embedding": embedding,
        "auxiliary": sum(own.number * own.size for own in _predictors(config)),
    }


def _head_channels(model: ModelConfig) -> int:
    """Channels of q and k; the attention's result and v have as many again."""
    return (model.heads + model.key_heads) * model.head_size


def _entered_layers(config: Config) -> Fraction:
    """Layers that an average token enters."""
    layers = config.model.layers
    return Fraction(layers) if not config.depth else layers // 2 * (1 + depth_of(config).share)


def _inside_share(config: Config) -> Fraction:
    """Slots of a row inside a layer that some tokens enter, over its positions."""
    return Fraction(depth_of(config).inside.sequence, config.data.sequence)


class _Predictor(NamedTuple):
    """An auxiliary router in training: layers that have it, its columns and parameters, and the times that a position
    meets it."""

    number: int
    columns: int
    size: int
    met: Fraction


def _predictors(config: Config) -> list[_Predictor]:
    """The auxiliary routers in training; those of experts see the slots of a layer that some tokens enter."""
    rule, of_depth = config.model.router, depth_rule(config.model)
    layers, pairs = config.model.layers, config.model.layers // 2
    met = Fraction(layers) if not config.depth else pairs * (1 + _inside_share(config))
    found = [(rule, layers, g, met) for g in config.experts.groups if g.routed]
    found += [(of_depth, pairs, g, Fraction(pairs)) for g in config.depth]
    return [
        _Predictor(number, g.experts, _size(rule.auxiliary_parameters(config.model.width, g.experts)), met)
        for rule, number, g, met in found
        if rule.auxiliary
    ]


def _size(parameters: dict[str, Parameter]) -> int:
    """Numbers in a score network."""
    return sum(math.prod(parameter.shape) for parameter in parameters.values())


def _router_size(config: Config, group: ExpertGroup) -> int:
    """Parameters of the group's router."""
    return _size(config.model.router.parameters(config.model.width, group.experts)) if group.routed else 0


def _router_flops(config: Config, group: ExpertGroup) -> int:
    """FLOPs of scoring a token for the experts of a group."""
    return config.model.router.flops(config.model.width, group.experts) if group.routed else 0


def _share(config: Config, group: ExpertGroup) -> Fraction:
    """Share of all tokens that an expert group is responsible for, at the normalised quotas' ratio."""
    quotas = config.quotas
    return Fraction(sum(quotas[m] for m in group.modalities), sum(quotas))


# FLOPs ----------------------------------------------------------------------------------------------------------------


def _forward_by_part(config: Config) -> dict[str, Fraction | int]:
    """Forward FLOPs of one position, by part."""
    model, taken, scored = config.model, Fraction(0), Fraction(0)
    for group in config.experts.groups:
        share = _share(config, group)
        taken += share * group.experts * group_capacity(model, group)
        scored += share * _router_flops(config, group)
    beside = sum((_share(config, g) * g.width for g in config.experts.shared), Fraction(0))
    whole = _Layers(model.layers, Fraction(1), Fraction(1), taken, beside, scored)
    if not config.depth:
        return _by_part(config, [whole])
    share, pairs = depth_of(config).share, model.layers // 2
    skipped = _Layers(pairs, share, share, share * taken, share * beside, share * scored)
    return _by_part(config, [skipped, whole._replace(number=pairs)], columns=1)


def _executed_by_part(config: Config) -> dict[str, Fraction | int]:
    """Forward FLOPs of one position as the static shapes run them: slots instead of k_e tokens."""
    layers, depth = config.model.layers, depth_of(config)
    if depth is None:
        return _by_part(config, [_executed_layers(config, layers, layer_of(config))])
    both = [_executed_layers(config, layers // 2, shape) for shape in (depth.inside, layer_of(config))]
    return _by_part(config, both, columns=len(config.depth))


def _executed_layers(config: Config, number: int, shape: LayerShape) -> _Layers:
    """Layers of this shape, with their experts' slots."""
    share = Fraction(shape.sequence, config.data.sequence)
    slots = {False: 0, True: 0}
    for own in shape.groups:
        of_one = shape.tokens if own.everywhere else own.slots
        slots[own.group.shared] += own.group.experts * own.group.width * of_one
    taken, beside = (Fraction(slots[shared], config.group_tokens) for shared in (False, True))
    scored = share * sum(_router_flops(config, own.group) for own in shape.groups)
    projected = Fraction(sum(own.slots for own in shape.projections) or shape.tokens, config.group_tokens)
    return _Layers(number, share, projected, taken, beside, scored)


def _auxiliary_flops(config: Config) -> Fraction:
    """FLOPs of the auxiliary routers at one position, forward and backward; nothing flows back to what they read."""
    d, inner = config.model.width, config.model.width // 2
    first, second = 2 * d * inner, 2 * inner
    return sum((own.met * (2 * first + 3 * second * own.columns) for own in _predictors(config)), Fraction(0))


class _Layers(NamedTuple):
    """Layers alike, and what an average position of the model does in one of them: the `share` of it that enters and
    that is `projected` by the attention, the routed experts that it passes, the shared ones (in hidden sizes), and the
    FLOPs of the routers that score it."""

    number: int
    share: Fraction
    projected: Fraction
    taken: Fraction
    beside: Fraction
    scored: Fraction


def _by_part(config: Config, layers: list[_Layers], columns: int = 0) -> dict[str, Fraction | int]:
    """Forward FLOPs of one position; `columns`: of the routers of mixture of depths that it meets in every pair."""
    model = config.model
    d = model.width
    expert = 3 * 2 * d * model.hidden
    scores = 2 * 2 * config.data.sequence * model.heads * model.head_size
    projections = 2 * 2 * d * _head_channels(model)
    parts = {
        "attention_projections": sum(own.number * own.projected for own in layers) * projections,
        "attention_scores": sum(own.number * own.share**2 for own in layers) * scores,
        "router": sum(own.number * own.scored for own in layers),
        "experts": sum(own.number * own.taken for own in layers) * expert,
        "shared_experts": sum(own.number * own.beside for own in layers) * expert,
        "unembedding": 2 * config.vocabulary_size * d,
    }
    return parts | ({"depth_router": model.layers // 2 * columns * 2 * d} if columns else {})


# Bytes ----------------------------------------------------------------------------------------------------------------


def activation_bytes(config: Config) -> int:
    """Estimate of what one microbatch keeps for its backward pass, plus what one layer and the loss need at once.

    Bytes over all devices; data parallelism divides all but the loss chunk. The compute type counts 4 bytes for
    float32 and 2 otherwise (auto is taken to be bfloat16). Kept per position and layer, by `model.remat`:

      full: the layer's input, d.
      dots: besides, the results of its products: q, k, v, the attention's output and projection (5d where heads share
        no keys), and gate, up and down of every slot (2F + d).
      none: besides, the operands of norms and rotations and the slots' inputs (about 9d).

    The layer that is being differentiated holds what `none` keeps, with the scores of one block of queries. The
    attention's weights are never kept.
    """
    config = resolve(config)
    model, data = config.model, config.data
    d, hidden = model.width, model.hidden
    layers = Fraction(model.layers) if not config.depth else model.layers // 2 * (1 + _inside_share(config))
    width = FLOAT32 if model.dtype == "float32" else 2
    positions = config.batch_tokens // config.train.accumulate
    executed = _executed_by_part(config)
    slots = (executed["experts"] + executed["shared_experts"]) / (layers * 6 * d * hidden)
    products = 2 * _head_channels(model) + 2 * d + slots * (2 * hidden + d)
    one_block = FLOAT32 * model.heads * block_queries(data.sequence, model.attention_chunk)
    predictors = sum(own.met for own in _predictors(config)) / layers
    inner = FLOAT32 * (d // 2) * predictors  # of auxiliary routers; kept before and after SiLU
    everything = width * (products + 9 * d) + 2 * inner
    per_layer = {"full": width * d, "dots": width * products + inner, "none": everything}[model.remat]
    logits = 2 * FLOAT32 * min(config.train.loss_chunk, positions) * config.vocabulary_size
    seen = width * d * (model.layers // 2 if config.depth else 0)  # by the routers of mixture of depths
    return math.ceil(positions * (layers * per_layer + seen + everything + one_block + 2 * width * d) + logits)


# Devices --------------------------------------------------------------------------------------------------------------

_PEAKS = (  # how device kinds begin, less "NVIDIA", the longer name first; bf16 FLOP/s without sparsity
    ("tpu v2", 22.5e12),  # a JAX device is one of the chip's two cores
    ("tpu v3", 61.5e12),
    ("tpu v4 lite", 138e12),
    ("tpu v4", 275e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5e", 197e12),
    ("tpu v5", 459e12),
    ("tpu v5p", 459e12),
    ("tpu v6 lite", 918e12),
    ("tpu v6e", 918e12),
    ("tpu7x", 1153.5e12),  # one of the chip's two cores
    ("a100", 312e12),
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h100", 989e12),
    ("gh200", 989e12),
    ("h200", 989e12),
    ("b200", 2250e12),
    ("l40s", 362e12),
    ("l4", 121e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one JAX device, by `jax.Device.device_kind`; None for CPUs and what is not known."""
    kind = device_kind.lower().replace("nvidia", "").strip()
    return next((peak for name, peak in _PEAKS if kind == name or kind.startswith((name + " ", name + "-"))), None)


# For people -----------------------------------------------------------------------------------------------------------


def format_cost(figures: dict[str, Any]) -> str:
    """`cost`'s dictionary as a table for the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", "", box=None, show_header=False, pad_edge=False)
    for name, count in figures["parameters"].items():
        table.add_row("parameters", name.replace("_", " "), f"{count:,}")
    flops = figures["flops_per_token"]
    for name in ("forward", "train", "executed"):
        table.add_row("FLOPs per token", name, f"{flops[name]:.4g}")
    for name, part in flops["by_part"].items():
        share = part / flops["forward"]
        table.add_row("  of forward", name.replace("_", " "), f"{part:.4g}  {share:6.1%}")
    for name, size in figures["bytes"].items():
        label = "activations (a microbatch, all devices)" if name == "activations" else name
        table.add_row("bytes", label, f"{size:.4g}  {size / 2**30:,.2f} GiB")
    for name, value in figures["run"].items():
        table.add_row("run", name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
