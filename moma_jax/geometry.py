"""How many of what: routing groups, quotas, slots, microbatches and their shards. The only place that knows. No JAX.

A routing group is `data.group_rows` rows. The packer keeps at most `quota` tokens of a modality in it, so every expert
has a fixed number of slots. A layer of mixture of depths works on rows of fewer slots, and its experts on fewer tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from moma_jax.config import Config, Modality, ModelConfig
from moma_jax.errors import InputError
from moma_jax.ffn import ExpertGroup, depth_groups, parse_ffn, projection_groups
from moma_jax.router import CAUSAL, THRESHOLD, Quota, Router
from moma_jax.routers.choice import Choice


@dataclass(frozen=True)
class GroupSlots:
    """What one group of experts takes of a routing group: its bound, and the slots C of each expert."""

    group: ExpertGroup
    quota: Quota
    slots: int
    everywhere: bool = False
    """Every token simply passes the one expert: nothing is dispatched."""


class GroupRows(NamedTuple):
    """A routing group as a layer sees it: `rows` rows of `sequence` positions, with at most `quotas` tokens of each
    modality. `everyone`: experts have a slot for every token, as under causal routings, whatever the quotas."""

    modalities: tuple[Modality, ...]
    quotas: tuple[int, ...]
    rows: int
    sequence: int
    everyone: bool = False


@dataclass(frozen=True)
class LayerShape:
    """A kind of layer: rows of `sequence` positions, or slots, with at most `quotas` tokens of each modality in a
    routing group of `tokens`; its groups of experts, shared ones last; and the modalities whose tokens have attention
    weights of their own, none where all share them."""

    sequence: int
    tokens: int
    quotas: tuple[int, ...]
    groups: tuple[GroupSlots, ...]
    projections: tuple[GroupSlots, ...] = ()


@dataclass(frozen=True)
class DepthShape:
    """A layer that some tokens enter (mixture of depths): its routers, which rank tokens of `rows` rows (1, or a whole
    routing group), and its inside, whose rows have as many slots as tokens can enter."""

    share: Fraction
    routers: tuple[GroupSlots, ...]
    inside: LayerShape
    rows: int


def depth_rule(model: ModelConfig) -> Router:
    """The rule of the routers of mixture of depths; by default expert choice, with auxiliary routers where no threshold
    could stand for them in the causal routings of the experts' rule."""
    rule = model.router
    return rule.for_depth() or Choice(auxiliary=CAUSAL in rule.causal and THRESHOLD not in rule.causal)


def rule_of(model: ModelConfig, group: ExpertGroup) -> Router:
    """The rule that routes to a group: to experts, or into a layer of mixture of depths."""
    return depth_rule(model) if group.gated else model.router


def layer_shape(model: ModelConfig, own: GroupRows) -> LayerShape:
    """The layer that all tokens enter."""
    modalities, quotas, rows, sequence, everyone = own
    layout, tokens = parse_ffn(model.ffn, modalities), rows * sequence
    groups = []
    for group in layout.groups + layout.shared:
        bound = tokens if everyone else min(tokens, sum(quotas[m] for m in group.modalities))
        quota = Quota(bound, group_capacity(model, group))
        slots = model.router.slots(quota, tokens) if group.routed else quota.slots
        everywhere = not group.routed and len(group.modalities) == len(modalities)
        groups.append(GroupSlots(group, quota, tokens if everyone else slots, everywhere))
    bounds = [tokens if everyone else min(tokens, quota) for quota in quotas]
    projections = tuple(
        GroupSlots(group, Quota(bound, Fraction(1)), bound)
        for group, bound in zip(projection_groups(model.attention_weights, modalities), bounds, strict=False)
    )
    return LayerShape(sequence, tokens, quotas, tuple(groups), projections)


def depth_shape(model: ModelConfig, own: GroupRows) -> DepthShape:
    """A layer of mixture of depths in a model of such routing groups. floor(share * S) tokens of a row enter, more
    where the rule has slack; or that share of the routing group, at most `depth_room` times as many of one row.

    Where tokens of all modalities are ranked together, or a rule lets tokens in one by one, all that enter may be of
    one modality; where each is ranked by itself, what enters keeps that share of the quotas.
    """
    modalities, quotas, rows, sequence, everyone = own
    rule, share = depth_rule(model), Fraction(model.depth_capacity).limit_denominator(10000)
    over, routers = rows if model.depth_over == "group" else 1, []
    for group in depth_groups(model.depth_by, modalities):
        quota = Quota(min(over * sequence, sum(quotas[m] for m in group.modalities)), share, down=True)
        slots = over * sequence if everyone else rule.slots(quota, over * sequence)
        routers.append(GroupSlots(group, quota, slots))
    if everyone:
        return DepthShape(share, tuple(routers), layer_shape(model, own), over)
    slots = rule.slots(Quota(sequence, share, down=True), sequence)
    if over > 1:
        slots = min(sequence, math.ceil(model.depth_room * slots))
    exact = model.depth_by == "modality" and rule.exact
    entering = tuple(min(rows * slots, math.floor(share * q) if exact else q) for q in quotas)
    return DepthShape(share, tuple(routers), layer_shape(model, own._replace(quotas=entering, sequence=slots)), over)


def group_capacity(model: ModelConfig, group: ExpertGroup) -> Fraction:
    """Share of eligible tokens that each expert of a group takes, exact (paper: c_e = 1/|E|)."""
    return model.router.capacity(group.experts, asked_capacity(model)) if group.routed else Fraction(1)


def asked_capacity(model: ModelConfig) -> Fraction | None:
    """`model.capacity`, exact."""
    return None if model.capacity is None else Fraction(model.capacity).limit_denominator(10000)


def layer_of(config: Config) -> LayerShape:
    """The layer of a config that all tokens enter."""
    return layer_shape(config.model, _rows_of(config))


def depth_of(config: Config) -> DepthShape | None:
    """The layer of a config that some tokens enter; None where there is none."""
    return depth_shape(config.model, _rows_of(config)) if config.experts.depth else None


def _rows_of(config: Config) -> GroupRows:
    return GroupRows(config.data.modalities, config.quotas, config.data.group_rows, config.data.sequence)


# Microbatches and shards ----------------------------------------------------------------------------------------------


def micro_groups(config: Config) -> int:
    """Routing groups of one microbatch."""
    return config.train.batch_rows // (config.train.accumulate * config.data.group_rows)


LEAST_QUERIES, BLOCKS = 128, 8
"""Queries of a block: an eighth of the row, and enough for a product."""


def block_queries(sequence: int, most: int) -> int:
    """Queries whose scores are written out at once (`model.blockwise`), at most so many, in rows of so many places."""
    return min(most, sequence, max(LEAST_QUERIES, -(-sequence // BLOCKS)))


def require_split(config: Config, mesh: Mapping[str, int]) -> None:
    """Raises InputError where the axes of a mesh (axis -> devices, none -1) do not divide what is split over them."""
    model, tensor = config.model, mesh["tensor"]
    stored = mesh["fsdp"] * mesh["expert"]
    if model.width % stored:
        raise InputError(
            f"mesh.fsdp x mesh.expert: {stored} devices do not divide model.width {model.width}; use a divisor of it"
        )
    split = {"model.heads": model.heads, "model.kv_heads": model.key_heads, "model.hidden": model.hidden}
    split["the vocabulary's"] = config.vocabulary_size
    for name, size in split.items():
        if size % tensor:
            raise InputError(f"mesh.tensor: {tensor} devices do not divide {name} {size}; use a divisor of it")
    require_shards(micro_groups(config), mesh["data"] * stored)


GROUPS = "routing groups of a microbatch"


def require_shards(groups: int, shards: int, what: str = GROUPS) -> None:
    """Raises InputError where routing groups, or `what` it is, do not split over so many shards of a batch's rows."""
    if groups % shards:
        remedy = f"use a divisor of {groups}, or another number of {what}"
        if what == GROUPS:
            remedy = (
                f"use a divisor of {groups} (mesh.tensor for the rest), or raise the batch's rows or lower "
                "train.accumulate or data.group_rows"
            )
        raise InputError(
            f"mesh: {groups} {what} do not split over the {shards} devices of data x fsdp x expert; {remedy}"
        )
