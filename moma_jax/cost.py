"""Parameters, FLOPs and bytes of a config in closed form: the only FLOP counter of this project. No JAX.

The convention, used for MFU, for matching models and for `train.flops`:

  * A product of an (m, k) and a (k, n) matrix is 2mkn FLOPs; nothing but matrix products counts.
  * Attention is the full S x S square of a row (as PaLM counts MFU), whatever causality and documents mask.
  * Tokens are split between modalities at the normalised quotas' ratio. An expert takes k_e = capacity * count of its
    group's `count` tokens, not rounded up; its router scores those `count` tokens. A group of one expert takes all and
    has no router. Shared experts take every token.
  * The embedding look-up is free; the unembedding is a product with all V ids at every position.
  * The backward pass costs twice the forward pass (`train` = 3 * `forward`); remat, the optimizer and padding are free.
  * Auxiliary routers are no part of the model: neither `total`, `active` nor `train` count them (as the paper does
    not), so that training them beside it changes no comparison.
  * `executed` is `train` as the static shapes run it: every expert computes ceil(capacity * quota) slots, filled or
    not (under threshold routing, those times its slack), routers score every position, auxiliary ones too, and
    positions that are padding (share `padding`, 0 unless given) are charged to the real tokens. Remat is not in it.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from moma_jax.config import Config, resolve
from moma_jax.errors import InputError
from moma_jax.ffn import ExpertGroup

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
    qk_norm = 4 * d  # scale and bias for every head of q and of k
    attention = 4 * d * d + qk_norm
    norms = 2 * d
    always = layers * (attention + norms + layout.shared * expert) + d
    routed = layers * sum(g.experts * expert + _router_width(g) * d for g in layout.groups)
    passed = layers * sum(
        share * (g.experts * g.capacity(model.capacity) * expert + _router_width(g) * d)
        for g, share in zip(layout.groups, _group_shares(config), strict=True)
    )
    embedding = 2 * config.vocabulary_size * d
    active = round(always + passed)
    return {
        "total": always + routed + embedding,
        "active": active + embedding,
        "active_non_embedding": active,
        "embedding": embedding,
        "auxiliary": layers * sum(d * (d // 2) + d // 2 * e for e in _predicted_experts(config)),
    }


def _predicted_experts(config: Config) -> list[int]:
    """Experts of each group that has an auxiliary router in training."""
    return [g.experts for g in config.experts.groups if config.model.auxiliary and g.experts > 1]


def _router_width(group: ExpertGroup) -> int:
    """Columns of the group's router."""
    return group.experts if group.experts > 1 else 0


def _group_shares(config: Config) -> list[Fraction]:
    """Share of all tokens that each expert group is responsible for, at the normalised quotas' ratio."""
    quotas = config.quotas
    return [Fraction(sum(quotas[m] for m in g.modalities), sum(quotas)) for g in config.experts.groups]


# FLOPs ----------------------------------------------------------------------------------------------------------------


def _forward_by_part(config: Config) -> dict[str, Fraction | int]:
    """Forward FLOPs of one position, by part."""
    model = config.model
    taken = scored = Fraction(0)
    for group, share in zip(config.experts.groups, _group_shares(config), strict=True):
        taken += share * group.experts * group.capacity(model.capacity)
        scored += share * _router_width(group)
    return _by_part(config, taken, scored)


def _executed_by_part(config: Config) -> dict[str, Fraction | int]:
    """Forward FLOPs of one position as the static shapes run them: slots instead of k_e tokens."""
    layout = config.experts
    if layout.dense:
        return _by_part(config, Fraction(1), Fraction(0))
    slots = sum(g.experts * group_slots(config, g) for g in layout.groups)
    return _by_part(config, Fraction(slots, config.group_tokens), sum(map(_router_width, layout.groups)))


def _auxiliary_flops(config: Config) -> int:
    """FLOPs of the auxiliary routers at one position, forward and backward; nothing flows back to what they read."""
    d, inner = config.model.width, config.model.width // 2
    first, second = 2 * d * inner, 2 * inner
    return config.model.layers * sum(2 * first + 3 * second * experts for experts in _predicted_experts(config))


def group_slots(config: Config, group: ExpertGroup) -> int:
    """Slots C of one expert of `group` in a routing group: ceil(capacity * quota); more under threshold routing."""
    model = config.model
    quota = min(config.group_tokens, sum(config.quotas[m] for m in group.modalities))
    slots = math.ceil(quota * group.capacity(model.capacity))
    if model.routing == "choice" or group.experts == 1:
        return slots
    return min(config.group_tokens, math.ceil(slots * model.routing_slack))


def _by_part(config: Config, taken, scored) -> dict[str, Fraction | int]:
    """Forward FLOPs of one position that passes `taken` routed experts and meets `scored` router columns."""
    model = config.model
    d, layers = model.width, model.layers
    expert = 3 * 2 * d * model.hidden
    return {
        "attention_projections": layers * 4 * 2 * d * d,
        "attention_scores": layers * 2 * 2 * config.data.sequence * d,
        "router": layers * scored * 2 * d,
        "experts": layers * taken * expert,
        "shared_experts": layers * config.experts.shared * expert,
        "unembedding": 2 * config.vocabulary_size * d,
    }


# Bytes ----------------------------------------------------------------------------------------------------------------


def activation_bytes(config: Config) -> int:
    """Estimate of what one microbatch keeps for its backward pass, plus what one layer and the loss need at once.

    Bytes over all devices; data parallelism divides all but the loss chunk. The compute type counts 4 bytes for
    float32 and 2 otherwise (auto is taken to be bfloat16). Kept per position and layer, by `model.remat`:

      full: the layer's input, d.
      dots: besides, the results of its products: q, k, v, the attention's output and projection (5d), and gate, up and
        down of every slot (2F + d).
      none: besides, the operands of norms and rotations and the slots' inputs (about 9d), and, where a row is no longer
        than `attention_chunk`, the attention's weights, S per head in float32; longer rows compute them anew.

    The layer that is being differentiated holds what `none` keeps, with the weights of one chunk of queries.
    """
    config = resolve(config)
    model, data = config.model, config.data
    d, hidden, layers = model.width, model.hidden, model.layers
    width = FLOAT32 if model.dtype == "float32" else 2
    positions = config.batch_tokens // config.train.accumulate
    slots = _executed_by_part(config)["experts"] / (layers * 6 * d * hidden) + config.experts.shared
    products = 6 * d + slots * (2 * hidden + d)
    weights = FLOAT32 * model.heads * data.sequence if data.sequence <= model.attention_chunk else 0
    one_chunk = FLOAT32 * model.heads * min(model.attention_chunk, data.sequence)
    inner = FLOAT32 * (d // 2) * len(_predicted_experts(config))  # of auxiliary routers; kept before and after SiLU
    everything = width * (products + 9 * d) + weights + 2 * inner
    per_layer = {"full": width * d, "dots": width * products + inner, "none": everything}[model.remat]
    logits = 2 * FLOAT32 * min(config.train.loss_chunk, positions) * config.vocabulary_size
    return math.ceil(positions * (layers * per_layer + everything + one_chunk + 2 * width * d) + logits)


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


def print_cost(figures: dict[str, Any]) -> None:
    """Prints `format_cost`."""
    print(format_cost(figures), end="")
