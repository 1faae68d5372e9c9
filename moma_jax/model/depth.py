"""Mixture of depths: some tokens enter a layer, the others pass it by (paper section 2.3).

Every second layer, from layer 0, has routers in front of it that let a share of each row's tokens in. Those go through
the whole layer, attention and mixture of experts ("staged"), and come back weighted by the gate:

    out = x + gate(x) * (layer(x) - x)   for tokens that entered,     out = x   for the others

This is one more Selection, whose expert is a layer: the select functions of experts choose here too, in single rows
instead of routing groups. Tokens that entered keep their order, positions and documents, so attention among them is
causal and stays inside documents.

The paper ranks all tokens together. Then a layer may be full of one modality, and its experts need slots for that. By
default tokens are ranked by modality (`model.depth_by`), each of which gets floor(share * its tokens of the row): then
what enters a layer keeps the quotas of what entered the model, and experts need that share of their slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moma_jax import sharding
from moma_jax.config import ModelConfig
from moma_jax.ffn import ExpertGroup
from moma_jax.model import auxiliary as auxiliary_lib
from moma_jax.model import experts as experts_lib
from moma_jax.model.attention import rotary_angles
from moma_jax.model.auxiliary import SUFFIX, AuxiliaryWeights
from moma_jax.model.experts import Drawn, Place, Rules, as_before, normal, placed
from moma_jax.model.layer import Common, rematerialised
from moma_jax.model.routing import Selection
from moma_jax.model.slots import Experts
from moma_jax.sharding import BATCH

SELECTED = "depth"
"""Name of a layer's Entered among the selections."""


class DepthRules(NamedTuple):
    """What is static about a layer that some tokens enter.

    Attributes:
      routers: of its routers, whose routing groups are single rows.
      inside: of the feed-forward layer on what entered.
      slots: C, tokens of a row that can enter.
    """

    routers: Rules
    inside: Rules
    slots: int


class Entered(NamedTuple):
    """Tokens that entered, row by row in the order of positions; empty slots come last.

    Attributes:
      index_BC: int32 position in the row; a valid one also where the slot is empty.
      gate_BC: float32, exactly 0 where the slot is empty. filled_BC: bool.
    """

    index_BC: Any
    gate_BC: Any
    filled_BC: Any


class Routers(nn.Module):
    """Declares the routers of one layer and their auxiliary ones."""

    groups: tuple[ExpertGroup, ...]
    width: int
    auxiliary: bool

    @nn.compact
    def __call__(self) -> dict[str, Experts]:
        return {group.name: self._router(group.name) for group in self.groups}

    def _router(self, name: str) -> Experts:
        predictor = AuxiliaryWeights(1, self.width, name=name + SUFFIX)() if self.auxiliary else None
        return Experts(router_DE=RouterWeights(self.width, name=name)(), auxiliary=predictor)


class RouterWeights(nn.Module):
    """Declares one router of one column."""

    width: int

    @nn.compact
    def __call__(self):
        axes = nn.with_logical_partitioning(normal(self.width), ("embed", None))
        return self.param("router_DE", axes, (self.width, 1), jnp.float32)


class Pair(nn.Module):
    """Two layers: some tokens enter the first, all the second. Parameters: `depth`, the routers; `even`; `odd`."""

    model: ModelConfig
    rules: Rules
    depth: DepthRules
    shared: int
    group_rows: int
    train: bool
    return_selections: bool

    @nn.compact
    def __call__(self, x_BSD, scanned, common: Common):
        (even, odd), state_2, own = scanned
        model, rules = self.model, self.depth.routers
        weights = Routers(rules.groups, model.width, rules.auxiliary, name="depth")()
        drawn = Drawn(
            jax.random.bits(jax.random.fold_in(common.jitter_key, model.layers + even)),
            jax.random.fold_in(jax.random.fold_in(common.step_key, even), 3),
        )
        x_BCD, inner, entered, own, losses, entered_M4 = enter(x_BSD, common, drawn, own, weights, self.depth, model)
        y_BCD, of_even = self._layer("even", self.depth.inside)(x_BCD, (even, _part(state_2, 0)), inner)
        x_BSD = leave(x_BSD, x_BCD, y_BCD, entered)
        x_BSD, of_odd = self._layer("odd", self.rules)(x_BSD, (odd, _part(state_2, 1)), common)
        state_2, taken = (jax.tree.map(lambda *x: jnp.stack(x), of_even[i], of_odd[i]) for i in (0, 2))
        for name, loss in [*of_even[1].items(), *of_odd[1].items()]:
            losses = losses | {name: losses.get(name, 0.0) + loss}
        selections = None
        if self.return_selections:
            halves = {"even": of_even[3], "odd": of_odd[3]}
            selections = {f"{half}/{name}": s for half, by_group in halves.items() for name, s in by_group.items()}
            selections[SELECTED] = Selection(*(x_BC[:, None] for x_BC in entered))
        return x_BSD, (state_2, own, losses, (*taken, entered_M4), selections)

    def _layer(self, name: str, rules: Rules) -> nn.Module:
        layer = rematerialised(self.model.remat)
        return layer(self.model, rules, self.shared, self.group_rows, self.train, self.return_selections, name=name)


def _part(state_2, index: int):
    return jax.tree.map(lambda x_2: x_2[index], state_2)


def of_pairs(state: dict[str, Any], routers: tuple[ExpertGroup, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The routing state as pairs of layers are scanned: of experts (P, 2, ...) and of the routers (P, ...)."""
    names = {group.name for group in routers}
    own = {name: value for name, value in state.items() if name in names}
    layers = {name: value for name, value in state.items() if name not in names}
    return jax.tree.map(lambda x_L: x_L.reshape(-1, 2, *x_L.shape[1:]), layers), own


def of_layers(tree_P2):
    """What was stacked over pairs and their two layers, stacked over layers."""
    return jax.tree.map(lambda x_P2: x_P2.reshape(-1, *x_P2.shape[2:]), tree_P2)


# Computation ----------------------------------------------------------------------------------------------------------


def enter(
    x_BSD, common: Common, drawn: Drawn, state, weights: dict[str, Experts], depth: DepthRules, model: ModelConfig
):
    """Who enters, by row, on each device's own rows.

    Returns:
      (x_BCD of those who do, what a layer has to know about them, Entered, the routers' state and losses, averaged over
      rows, int32 entered_M4 (`RoutingReport`)).
    """
    axes = {name: _axes(own) for name, own in weights.items()}

    def local(x_BSD, segment_BS, position_BS, place: Place, drawn, state, weights):
        weights = {
            name: jax.tree.map(lambda w, own: sharding.whole(w, own, w.dtype), own, axes[name])
            for name, own in weights.items()
        }
        entered, after, losses, entered_M4 = choose(x_BSD, place, drawn, state, weights, depth)
        x_BCD, segment_BC, position_BC, place = take(x_BSD, segment_BS, position_BS, place, entered, depth.inside)
        after = jax.tree.map(as_before, sharding.averaged(after, *BATCH), state)
        said = (sharding.averaged(losses, *BATCH), sharding.summed(entered_M4, *BATCH))
        return x_BCD, segment_BC, position_BC, place, entered, after, *said

    mine, same = sharding.spec("batch"), sharding.spec()
    specs = jax.tree.map(lambda _, own: sharding.spec(*own), weights, axes)
    arguments = (x_BSD, common.segment_BS, common.position_BS, common.place, drawn, state, weights)
    run = sharding.on_shards(local, (*(mine,) * 4, same, same, specs), (*(mine,) * 5, *(same,) * 3))
    x_BCD, segment_BC, position_BC, place, entered, *said = run(*arguments)
    angles = rotary_angles(position_BC, model.width // model.heads, model.rope_theta)
    inner = common._replace(segment_BS=segment_BC, position_BS=position_BC, angles=angles, place=place)
    return x_BCD, inner, entered, *said


def _axes(own: Experts) -> Experts:
    """Logical axes of a router's weights."""
    return Experts(
        router_DE=("embed", None),
        auxiliary=None if own.auxiliary is None else auxiliary_lib.Auxiliary(("embed", None), (None, None)),
    )


def choose(x_BSD, place: Place, drawn: Drawn, state, weights: dict[str, Experts], depth: DepthRules):
    """(Entered, the routers' new state, losses, entered_M4) of whole rows; the routers see x as it is."""
    rows, sequence = x_BSD.shape[:2]
    group_rows = rows // len(place.group_G)
    row_B = (place.group_G[:, None] * group_rows + jnp.arange(group_rows)).reshape(-1)
    of_rows = Place(place.modality_GT.reshape(rows, -1), place.hash_GT.reshape(rows, -1), row_B, {})
    rules = depth.routers
    selections, state, losses = experts_lib.choose(x_BSD, of_rows, drawn, state, weights, rules=rules, noise=False)
    entered_M4 = jnp.zeros((rules.modalities, 4), jnp.int32)
    if rules.auxiliary and not rules.filled_only:
        predictors = {name: own.auxiliary for name, own in weights.items()}
        loss, entered_M4 = auxiliary_lib.judge(x_BSD, of_rows.modality_GT, selections, predictors, rules)
        losses = losses | {auxiliary_lib.LOSS: loss}
    in_order = jax.vmap(lambda chosen: ordered(list(chosen.values()), sequence, depth.slots))
    return in_order(selections), state, losses, entered_M4


def ordered(selections: list[Selection], tokens: int, slots: int) -> Entered:
    """One row's selections (1, C) as the C = `slots` first tokens that any of them took."""
    gate_S, taken_S = jnp.zeros(tokens, jnp.float32), jnp.zeros(tokens, bool)
    for index_1C, gate_1C, filled_1C in selections:
        gate_S = gate_S.at[index_1C[0]].add(gate_1C[0])
        taken_S = taken_S.at[index_1C[0]].max(filled_1C[0])
    # Earlier positions rank higher; float32 holds them exactly and sorts fastest.
    rank_S = jnp.where(taken_S, jnp.float32(tokens) - jnp.arange(tokens, dtype=jnp.float32), 0.0)
    _, index_C = jax.lax.top_k(rank_S, slots)
    filled_C = jnp.arange(slots) < taken_S.sum()
    return Entered(index_C, jnp.where(filled_C, gate_S[index_C], 0.0), filled_C)


def take(x_BSD, segment_BS, position_BS, place: Place, entered: Entered, inside: Rules):
    """(x_BCD, segment_BC, position_BC, Place) of those who entered; an empty slot is padding."""
    rows, groups = len(x_BSD), len(place.group_G)

    def picked(x_BS, empty):
        x_BC = jnp.take_along_axis(x_BS.reshape(rows, -1), entered.index_BC, axis=1)
        return jnp.where(entered.filled_BC, x_BC, empty)

    x_BCD = jnp.take_along_axis(x_BSD, entered.index_BC[..., None], axis=1)
    modality_GT = picked(place.modality_GT, -1).reshape(groups, -1)
    hash_GT = picked(place.hash_GT, place.hash_GT.dtype.type(0)).reshape(groups, -1)
    inner = placed(inside, modality_GT, hash_GT, place.group_G)
    return x_BCD, picked(segment_BS, 0), picked(position_BS, 0), inner


def leave(x_BSD, x_BCD, y_BCD, entered: Entered):
    """All tokens behind the layer: x + gate * (y - x) where y is the layer's output for x, else x."""

    def local(x_BSD, x_BCD, y_BCD, entered):
        change_BCD = (entered.gate_BC[..., None] * (y_BCD - x_BCD)).astype(x_BSD.dtype)
        return x_BSD.at[jnp.arange(len(x_BSD))[:, None], entered.index_BC].add(change_BCD)

    mine = sharding.spec("batch")
    return sharding.on_shards(local, (mine,) * 4, mine)(x_BSD, x_BCD, y_BCD, entered)
