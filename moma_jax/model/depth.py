"""Mixture of depths: some tokens enter a layer, the others pass it by (paper section 2.3).

Every second layer, from layer 0, has routers in front of it that let a share of each row's tokens in. Those go through
the whole layer, attention and mixture of experts ("staged"), and come back weighted by the gate:

    out = x + gate(x) * (layer(x) - x)   for tokens that entered,     out = x   for the others

A router's "expert" is a layer: the routing rules of experts choose here too, in single rows instead of routing groups.
Tokens that entered keep their order, positions and documents, so attention among them is causal and stays inside
documents.

Tokens are ranked within their row, or over the routing group (`model.depth_over`), which then decides how many of each
row enter, as a threshold does at inference; rows have twice the slots for that.

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
from moma_jax.geometry import DepthShape, GroupSlots, LayerShape, depth_rule
from moma_jax.model import moe
from moma_jax.model.attention import rotary_angles
from moma_jax.model.block import Context, rematerialised
from moma_jax.model.moe import Routing, RoutingKeys, RoutingTokens, TokenFacts, over_shards, routing_tokens
from moma_jax.model.parameters import DepthParameters, ExpertWeights, router_axes
from moma_jax.router import Selection

SELECTED = "depth"
"""Name of a layer's Entered among the selections."""


class Entered(NamedTuple):
    """Tokens that entered, row by row in the order of positions; empty slots come last.

    Attributes:
      index_BC: int32 position in the row; a valid one also where the slot is empty.
      gate_BC: float32, exactly 0 where the slot is empty. filled_BC: bool.
    """

    index_BC: Any
    gate_BC: Any
    filled_BC: Any


class Pair(nn.Module):
    """Two layers: some tokens enter the first, all the second. Parameters: `depth`, the routers; `even`; `odd`.

    Attributes: as of `Layer`; `shape` of the odd layer, `depth` of the even one.
    """

    model: ModelConfig
    shape: LayerShape
    depth: DepthShape
    group_rows: int
    causal: str | None
    train: bool
    return_selections: bool

    @nn.compact
    def __call__(self, x_BSD, scanned, context: Context):
        (even, odd), state_2, own = scanned
        model, rule = self.model, depth_rule(self.model)
        weights = DepthParameters(rule, self.depth.routers, model.width, name="depth")()
        keys = RoutingKeys(
            jax.random.bits(jax.random.fold_in(context.jitter_key, model.layers + even)),
            jax.random.fold_in(jax.random.fold_in(context.step_key, even), 3),
        )
        routing = depth_routing(model, self.depth, len(self.shape.quotas), self.causal)
        arguments = (x_BSD, context, keys, own, weights, routing, self.depth, model)
        with jax.named_scope("depth_router"):
            x_BCD, inside, entered, of_routers = gather_entering(*arguments)
        y_BCD, of_even = self._layer("even", self.depth.inside)(x_BCD, (even, _part(state_2, 0)), inside)
        x_BSD = scatter_back(x_BSD, x_BCD, y_BCD, entered)
        x_BSD, of_odd = self._layer("odd", self.shape)(x_BSD, (odd, _part(state_2, 1)), context)
        return x_BSD, self._joined(of_even, of_odd, of_routers, entered)

    def _layer(self, name: str, shape: LayerShape) -> nn.Module:
        asked = (self.causal, self.train, self.return_selections)
        return rematerialised(self.model.remat)(self.model, shape, self.group_rows, *asked, name=name)

    def _joined(self, of_even: moe.RoutingResult, of_odd: moe.RoutingResult, of_routers: moe.RoutingResult, entered):
        """(RoutingResult of both layers, stacked; that of the routers); losses of all three are in the first."""
        both = [jax.tree.map(lambda *x: jnp.stack(x), a, b) for a, b in zip(of_even[:5], of_odd[:5], strict=True)]
        state_2, _, _, taken_2M3, predicted_2M4 = both
        losses = of_routers.losses
        for name, loss in [*of_even.losses.items(), *of_odd.losses.items()]:
            losses = losses | {name: losses.get(name, 0.0) + loss}
        metrics = jax.tree.map(lambda a, b: (a + b) / 2, of_even.metrics, of_odd.metrics) | of_routers.metrics
        selections = None
        if self.return_selections:
            halves = {"even": of_even.selections, "odd": of_odd.selections}
            selections = {f"{half}/{name}": s for half, by_group in halves.items() for name, s in by_group.items()}
            selections[SELECTED] = Selection(*(x_BC[:, None] for x_BC in entered))
        layers = moe.RoutingResult(state_2, losses, metrics, taken_2M3, predicted_2M4, selections)
        return layers, of_routers._replace(losses={}, metrics={}, selections=None)


def depth_routing(model: ModelConfig, depth: DepthShape, modalities: int, causal: str | None) -> Routing:
    """How routers let tokens enter a layer: in single rows or in routing groups, without noise."""
    return Routing(depth_rule(model), depth.routers, modalities, depth.rows, causal)


def _part(state_2, index: int):
    return jax.tree.map(lambda x_2: x_2[index], state_2)


def of_pairs(state: dict[str, Any], routers: tuple[GroupSlots, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The routing state as pairs of layers are scanned: of experts (P, 2, ...) and of the routers (P, ...)."""
    names = {own.group.name for own in routers}
    own = {name: value for name, value in state.items() if name in names}
    layers = {name: value for name, value in state.items() if name not in names}
    return jax.tree.map(lambda x_L: x_L.reshape(-1, 2, *x_L.shape[1:]), layers), own


def of_layers(tree_P2):
    """What was stacked over pairs and their two layers, stacked over layers."""
    return jax.tree.map(lambda x_P2: x_P2.reshape(-1, *x_P2.shape[2:]), tree_P2)


# On whole rows --------------------------------------------------------------------------------------------------------


def gather_entering(
    x_BSD, context: Context, keys, state, weights, routing: Routing, depth: DepthShape, model: ModelConfig
):
    """Who enters, by row, on each device's own rows.

    Returns:
      (x_BCD of those who do, their Context, Entered, RoutingResult of the routers).
    """
    axes = {}
    for own in routing.groups:
        auxiliary = bool(weights[own.group.name].auxiliary)
        networks = router_axes(routing.rule, own.group, model.width, auxiliary)
        axes[own.group.name] = ExpertWeights(None, None, None, *networks)

    def local(x_BSD, segment_BS, position_BS, tokens: RoutingTokens, keys, state, weights):
        weights = {
            name: jax.tree.map(lambda w, own: sharding.gather_weight(w, own, w.dtype), own, axes[name])
            for name, own in weights.items()
        }
        entered, result = choose(x_BSD, tokens, keys, state, weights, routing, depth)
        taken = take(x_BSD, segment_BS, position_BS, tokens, entered, depth.inside)
        return (*taken, entered, over_shards(result, state))

    split, same = sharding.spec("batch"), sharding.spec()
    specs = jax.tree.map(lambda _, own: sharding.spec(*own), weights, axes)
    arguments = (x_BSD, context.segment_BS, context.position_BS, context.tokens, keys, state, weights)
    run = sharding.shard_map(local, (*(split,) * 4, same, same, specs), (*(split,) * 5, same))
    x_BCD, segment_BC, position_BC, tokens, entered, result = run(*arguments)
    angles = rotary_angles(position_BC, model)
    inside = context._replace(segment_BS=segment_BC, position_BS=position_BC, angles=angles, tokens=tokens)
    return x_BCD, inside, entered, result


def choose(x_BSD, tokens: RoutingTokens, keys, state, weights, routing: Routing, depth: DepthShape):
    """(Entered, RoutingResult without selections) of whole rows; the routers see x as it is."""
    rows, sequence, width = x_BSD.shape
    ranked = tokens._replace(unrouted={}) if routing.rows > 1 else by_row(tokens, rows)
    if routing.causal is None:
        units, count = ranked.modality_GT.shape
        result, _ = moe.select(x_BSD.reshape(units, count, width), ranked, keys, state, weights, routing)
        chosen = jax.vmap(lambda chosen: by_token(list(chosen.values()), count))(result.selections)
        gate_BS, enters_BS = (x.reshape(rows, sequence) for x in chosen)
    else:
        gate_BS, enters_BS = decide(x_BSD, tokens.facts(rows, -1), weights, state, routing)
        zero_M4 = jnp.zeros((routing.modalities, 4), jnp.int32)
        result = moe.RoutingResult(state, {}, {}, None, zero_M4, None)
    entered = jax.vmap(lambda gate_S, enters_S: ordered(gate_S, enters_S, depth.inside.sequence))(gate_BS, enters_BS)
    return entered, result._replace(selections=None)


def by_row(tokens: RoutingTokens, rows: int) -> RoutingTokens:
    """What routing knows about tokens, with every row a routing group of its own."""
    group_rows = rows // len(tokens.group_G)
    row_B = (tokens.group_G[:, None] * group_rows + jnp.arange(group_rows)).reshape(-1)
    facts = (x_GT.reshape(rows, -1) for x_GT in tokens[:4])
    return RoutingTokens(*facts, row_B, {})


def by_token(selections: list[Selection], tokens: int):
    """(gate_S, enters_S) of the selections (1, C) of one row, or of one routing group."""
    gate_S, enters_S = jnp.zeros(tokens, jnp.float32), jnp.zeros(tokens, bool)
    for index_1C, gate_1C, filled_1C in selections:
        gate_S = gate_S.at[index_1C[0]].add(gate_1C[0])
        enters_S = enters_S.at[index_1C[0]].max(filled_1C[0])
    return gate_S, enters_S


def ordered(gate_S, enters_S, slots: int) -> Entered:
    """The first C = `slots` tokens of one row that enter."""
    tokens = len(enters_S)
    # Earlier positions rank higher; float32 holds them exactly and sorts fastest.
    rank_S = jnp.where(enters_S, jnp.float32(tokens) - jnp.arange(tokens, dtype=jnp.float32), 0.0)
    _, index_C = jax.lax.top_k(rank_S, slots)
    filled_C = jnp.arange(slots) < enters_S.sum()
    return Entered(index_C, jnp.where(filled_C, gate_S[index_C], 0.0), filled_C)


def take(x_BSD, segment_BS, position_BS, tokens: RoutingTokens, entered: Entered, inside: LayerShape):
    """(x_BCD, segment_BC, position_BC, RoutingTokens) of those who entered; an empty slot is padding."""
    rows, groups = len(x_BSD), len(tokens.group_G)

    def picked(x_BS, empty):
        x_BC = jnp.take_along_axis(x_BS.reshape(rows, -1), entered.index_BC, axis=1)
        return jnp.where(entered.filled_BC, x_BC, empty)

    x_BCD = jnp.take_along_axis(x_BSD, entered.index_BC[..., None], axis=1)
    empty = (-1, tokens.hash_GT.dtype.type(0), 0, 0)
    facts = (picked(x_GT, none).reshape(groups, -1) for x_GT, none in zip(tokens[:4], empty, strict=True))
    inner = routing_tokens(inside, *facts, tokens.group_G)
    return x_BCD, picked(segment_BS, 0), picked(position_BS, 0), inner


def scatter_back(x_BSD, x_BCD, y_BCD, entered: Entered):
    """All tokens behind the layer: x + gate * (y - x) where y is the layer's output for x, else x."""

    def local(x_BSD, x_BCD, y_BCD, entered):
        change_BCD = (entered.gate_BC[..., None] * (y_BCD - x_BCD)).astype(x_BSD.dtype)
        return x_BSD.at[jnp.arange(len(x_BSD))[:, None], entered.index_BC].add(change_BCD)

    split = sharding.spec("batch")
    return sharding.shard_map(local, (split,) * 4, split)(x_BSD, x_BCD, y_BCD, entered)


# Token by token -------------------------------------------------------------------------------------------------------


def decide(x_BSD, facts: TokenFacts, weights: dict[str, ExpertWeights], state, routing: Routing):
    """(gate_BS float32, enters_BS bool) of every token by itself; modality -1 never enters."""
    gate_BS, enters_BS = jnp.zeros(x_BSD.shape[:2], jnp.float32), jnp.zeros(x_BSD.shape[:2], bool)
    for own in routing.groups:
        name = own.group.name
        *decision, _ = moe.decide(x_BSD, facts, own, weights[name], (state or {}).get(name), routing)
        own_BS, own_gate_BS = (part[..., 0] for part in decision)
        enters_BS, gate_BS = enters_BS | own_BS, jnp.where(own_BS, own_gate_BS, gate_BS)
    return gate_BS, enters_BS


def enter_cached(x_BQD, facts: TokenFacts, memory, weights, state, routing: Routing, layer):
    """A layer that some tokens alone enter, in cached decoding; where no token of any row does, nothing of it is read.

    Args:
      facts: of the tokens, (B, Q). layer: (x_BQD, enters_BQ, memory) -> (x_BQD, memory).
    """
    gate_BQ, enters_BQ = decide(x_BQD, facts, weights, state, routing)

    def enter(x_BQD, memory):
        y_BQD, memory = layer(x_BQD, enters_BQ, memory)
        change_BQD = (gate_BQ[..., None] * (y_BQD - x_BQD)).astype(x_BQD.dtype)
        return x_BQD + jnp.where(enters_BQ[..., None], change_BQD, 0), memory

    return jax.lax.cond(enters_BQ.any(), enter, lambda *same: same, x_BQD, memory)
