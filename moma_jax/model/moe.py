"""The feed-forward layer: score, select, dispatch, compute, combine (paper section 2.2, Eq. 1).

    y = sum over the experts j that took x of gate_j(x) * SwiGLU_j(x)   (+ the shared experts' SwiGLU, gate 1)

Dense is one expert for everybody, mixed-modal experts one group, modality-aware experts one group for each modality.
Who takes which token is decided by a routing rule (moma_jax/router.py): in training by its `select`, which looks at
whole routing groups and fills a fixed number of slots; at inference by its `decide`, token by token, and then what is
computed is what was taken.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moma_jax import sharding
from moma_jax.config import ModelConfig
from moma_jax.errors import InputError
from moma_jax.ffn import ExpertGroup
from moma_jax.geometry import GroupSlots, LayerShape
from moma_jax.model import auxiliary
from moma_jax.model.by_modality import Sorted, sort_by_modality
from moma_jax.model.dispatch import add_experts, combine, dispatch_all, exchange_and_compute, swiglu
from moma_jax.model.parameters import MATRICES, ExpertWeights, matrix_axes, router_axes
from moma_jax.model.routing import checked, count_taken, score_of, take_all
from moma_jax.router import Router, Score, Selection, take_entering
from moma_jax.sharding import BATCH, TENSOR

KEPT = "feed_forward"
"""Name, for remat policies, of the layer's output: with it, slots need not be combined anew."""
LOGITS = "router_logits"
"""The same of router logits, by which tokens and experts are chosen."""


class RoutingTokens(NamedTuple):
    """What routing knows about tokens beside their content, for G routing groups of T tokens.

    Attributes:
      modality_GT: int32 modality, -1 on padding.
      hash_GT: uint32 hash of row and position (`routing.position_hash`).
      id_GT: int32 ids. position_GT: int32 positions in their documents.
      group_G: int32 index of the routing group within the update.
      unrouted: Selections (G, 1, C) of the groups that have one expert, by name; equal in all layers.
      by_modality: where they stand when sorted by modality, if these have attention weights of their own; else None.
    """

    modality_GT: Any
    hash_GT: Any
    id_GT: Any
    position_GT: Any
    group_G: Any
    unrouted: dict[str, Selection]
    by_modality: Sorted | None = None

    def facts(self, *shape: int) -> TokenFacts:
        """What tokens that decide by themselves may know, in this shape."""
        return TokenFacts(*(x_GT.reshape(shape) for x_GT in (self.modality_GT, self.id_GT, self.position_GT)))


class TokenFacts(NamedTuple):
    """Of tokens that decide by themselves: int32 modality, -1 for those that are not to be computed, id, and position
    in the document."""

    modality_N: Any
    id_N: Any
    position_N: Any


class RoutingKeys(NamedTuple):
    """Randomness of one layer: uint32 seed of the jitter (fixed), PRNG key of this step, size of its noise."""

    jitter: Any
    step: Any
    noise: Any = 1.0


class RoutingResult(NamedTuple):
    """What routing leaves behind beside the layer's output.

    Attributes:
      state: new state by group of experts; losses: scalars; both averaged over routing groups.
      metrics: scalars, averaged over the routing groups that have tokens, of all shards.
      taken_M3: int32 tokens of each modality taken by 0, 1, 2+ experts; predicted_M4: pairs that the auxiliary routers
        got right (`RoutingReport`); both summed over routing groups.
      selections: (G, E, C) by name.
    """

    state: dict[str, Any]
    losses: dict[str, Any]
    metrics: dict[str, Any]
    taken_M3: Any
    predicted_M4: Any
    selections: dict[str, Selection]


class Routing(NamedTuple):
    """How a layer routes, static.

    Attributes:
      rule: who chooses. groups: groups of experts with their quotas and slots. modalities: number of modalities.
      rows: rows of one routing group. causal: name of a causal routing, under which tokens decide by themselves,
        without gradient; None in training.
      noise: add the rule's Gumbel noise.
    """

    rule: Router
    groups: tuple[GroupSlots, ...]
    modalities: int
    rows: int
    causal: str | None = None
    noise: bool = False

    @property
    def routed(self) -> list[tuple[int, GroupSlots]]:
        """The groups that have a router, with their numbers."""
        return [(number, own) for number, own in enumerate(self.groups) if own.group.routed]


def routing_tokens(shape: LayerShape, modality_GT, hash_GT, id_GT, position_GT, group_G) -> RoutingTokens:
    """RoutingTokens for a layer of this shape; -1 is the modality of padding."""

    unrouted = {}
    for own in shape.groups:
        if not own.group.routed and not own.everywhere:
            eligible_GT = eligible(own.group, modality_GT)
            unrouted[own.group.name] = jax.vmap(lambda e, quota=own.quota: take_all(e, quota))(eligible_GT)
    facts = modality_GT, hash_GT, id_GT, position_GT, group_G
    return RoutingTokens(*facts, unrouted, sort_by_modality(shape, modality_GT) if shape.projections else None)


def moe(x_GTD, tokens: RoutingTokens, keys: RoutingKeys, state, weights, *, routing: Routing, model: ModelConfig):
    """The layer on each device's own routing groups, with the experts wherever the mesh has them.

    Args:
      x_GTD: activations in compute dtype. state: by group of experts. weights: ExpertWeights by group.

    Returns:
      (y_GTD in the dtype of x, RoutingResult).
    """
    axes = {own.group.name: _axes(own, weights[own.group.name], routing.rule, model) for own in routing.groups}
    everyone = () if routing.causal is None else ("expert",)

    def local(x_GTD, tokens, keys, state, weights):
        weights = {name: _gathered(own, axes[name], x_GTD.dtype, everyone) for name, own in weights.items()}
        y_GTD, copied_GT, result = _on_groups(x_GTD, tokens, keys, state, weights, routing)
        y_GTD = with_copies(sharding.psum(y_GTD, TENSOR), x_GTD, copied_GT)
        return checkpoint_name(y_GTD, KEPT), over_shards(result, state)

    split, same = sharding.spec("batch"), sharding.spec()
    specs = jax.tree.map(lambda _, own: sharding.spec(*own), weights, axes)
    out_specs = (split, RoutingResult(same, same, same, same, same, split))
    run = sharding.shard_map(local, (split, split, same, same, specs), out_specs)
    return run(x_GTD, tokens, keys, state, weights)


def over_shards(result: RoutingResult, before) -> RoutingResult:
    """What routing left behind on all shards of the batch; selections stay where they are. `before`: the old state."""
    state, losses = sharding.pmean((result.state, result.losses), *BATCH)
    taken_M3, predicted_M4 = sharding.psum((result.taken_M3, result.predicted_M4), *BATCH)
    state = jax.tree.map(as_before, state, before)
    return result._replace(state=state, losses=losses, taken_M3=taken_M3, predicted_M4=predicted_M4)


def _axes(own: GroupSlots, weights: ExpertWeights, rule: Router, model: ModelConfig) -> ExpertWeights:
    """Logical axes of a group's weights."""
    routers = router_axes(rule, own.group, model.width, bool(weights.auxiliary))
    return ExpertWeights(*matrix_axes(own.group.experts), *routers)


def _gathered(weights: ExpertWeights, axes: ExpertWeights, dtype, everyone: tuple[str, ...]) -> ExpertWeights:
    """What a device computes with: its experts' matrices (all experts' with `everyone`) in compute dtype, routers in
    float32, whole along the width."""
    stored, count = sharding.STORED + everyone, len(MATRICES)
    pairs = zip(weights[:count], axes[:count], strict=True)
    matrices = (sharding.gather_weight(w, own, dtype, stored) for w, own in pairs)
    networks = jax.tree.map(lambda w, own: sharding.gather_weight(w, own, w.dtype), weights[count:], axes[count:])
    return ExpertWeights(*matrices, *networks)


def as_before(mean, before):
    """A mean of states in the type of the state before; flags and whole numbers are rounded."""
    if not jnp.issubdtype(before.dtype, jnp.floating) and jnp.issubdtype(mean.dtype, jnp.floating):
        mean = jnp.round(mean)
    return mean.astype(before.dtype)


def _on_groups(x_GTD, tokens: RoutingTokens, keys: RoutingKeys, state, weights, routing: Routing):
    """The layer on whole routing groups, routed experts, then those that every token passes: (this device's part of
    y_GTD, copied_GT or None, RoutingResult)."""
    modality_N, copied_GT = tokens.modality_GT.reshape(-1), None
    always = [own.group.name for own in routing.groups if own.everywhere]
    if len(always) == len(routing.groups):  # dense
        y_GTD, one_N = None, jnp.ones_like(modality_N)
        counts = count_taken(one_N, modality_N, routing.modalities), jnp.zeros((routing.modalities, 4), jnp.int32)
        result = RoutingResult(state, {}, {}, *counts, {})
    elif routing.causal is None:
        y_GTD, copied_GT, result = _select_and_compute(x_GTD, tokens, keys, state, weights, routing)
    else:
        y_GTD, copied_GT, result = _decide_and_compute(x_GTD, tokens, state, weights, routing)
    for name in always:
        with jax.named_scope(name):
            own_GTD = everywhere(x_GTD, weights[name])
            y_GTD = own_GTD if y_GTD is None else y_GTD + own_GTD
    return y_GTD, copied_GT, result


def everywhere(x_GTD, weights: ExpertWeights):
    """One SwiGLU on all tokens, no dispatch."""
    return swiglu(x_GTD.reshape(1, -1, x_GTD.shape[-1]), weights).reshape(x_GTD.shape)


# In training ----------------------------------------------------------------------------------------------------------


def _select_and_compute(x_GTD, tokens: RoutingTokens, keys: RoutingKeys, state, weights, routing: Routing):
    """Scores, selections, dispatch, experts, combination: every slot is computed, filled or not, since selections fill
    nearly all."""
    with jax.named_scope("select"):
        chosen, copied_GT = select(x_GTD, tokens, keys, state, weights, routing)
    count, width = x_GTD.shape[1:]
    x_ND = x_GTD.reshape(-1, width)
    placed = {own.group.name: offset(chosen.selections[own.group.name], count) for own in dispatched(routing)}
    slots = {name: Selection(*map(flat, selection)) for name, selection in placed.items()}
    with jax.named_scope("dispatch"):
        inputs = dispatch_all(x_ND, [own.index_EC for own in slots.values()])
    y_ND = jnp.zeros_like(x_ND)
    for x_ECD, (name, own) in zip(inputs, slots.items(), strict=True):
        with jax.named_scope(f"experts_{name}"):
            out_ECD = exchange_and_compute(x_ECD, weights[name], own.gate_EC)
        with jax.named_scope("combine"):
            y_ND = combine(y_ND, own.index_EC, out_ECD)
    times_N = _times_taken(placed, routing, len(x_ND))
    taken_M3 = count_taken(times_N, tokens.modality_GT.reshape(-1), routing.modalities)
    return y_ND.reshape(x_GTD.shape), copied_GT, chosen._replace(taken_M3=taken_M3)


def dispatched(routing: Routing) -> list[GroupSlots]:
    """The groups whose tokens travel to slots."""
    return [own for own in routing.groups if not own.everywhere]


def _times_taken(placed: dict[str, Selection], routing: Routing, tokens: int):
    """How many experts took each token, int32 (N,), shared ones apart: one scatter for the slots of all groups."""
    counted = [placed[own.group.name] for own in dispatched(routing) if not own.group.shared]
    times_N = jnp.full(tokens, _passed(routing), jnp.int32)
    if not counted:
        return times_N
    index_S, filled_S = (
        jnp.concatenate([slots.reshape(-1) for slots in slots_of])
        for slots_of in zip(*((own.index_EC, own.filled_EC) for own in counted), strict=True)
    )
    return times_N.at[index_S].add(filled_S.astype(jnp.int32))


def _passed(routing: Routing) -> int:
    """Experts that every token passes, shared ones apart: the one of a dense layer."""
    return sum(own.everywhere and not own.group.shared for own in routing.groups)


def with_copies(y_GTD, x_GTD, copied_GT):
    """The layer's output with what tokens take of their own input, by copy experts; `copied_GT`: weights, or None.

    Added when the parts of a mesh's devices are joined: it would be joined with them.
    """
    return y_GTD if copied_GT is None else y_GTD + copied_GT[..., None].astype(x_GTD.dtype) * x_GTD


def select(x_GTD, tokens: RoutingTokens, keys: RoutingKeys, state, weights, routing: Routing):
    """Who takes which token, with what it leaves behind on this shard (metrics: on all); taken_M3 is None.

    Returns:
      (RoutingResult, copied_GT of `Router.copies` or None).
    """
    selections, losses, metrics, state, copied_GT = dict(tokens.unrouted), {}, {}, dict(state), None
    predicted_M4 = jnp.zeros((routing.modalities, 4), jnp.int32)
    for number, own in routing.routed:
        group, before = own.group, state.get(own.group.name)
        eligible_GT = eligible(group, tokens.modality_GT)
        score_GTE, predicted_GTE = scores(x_GTD, weights[group.name], routing.rule)
        answer, quiet, copied = _select_group(score_GTE, predicted_GTE, tokens, keys, before, number, own, routing)
        selections[group.name], copied_GT = answer.selection, added(copied_GT, copied)
        if group.name in state:
            state[group.name] = jax.tree.map(lambda new: new.mean(0), answer.state)
        extra = answer.losses
        if predicted_GTE is not None:
            if auxiliary.LOSS in extra:
                raise InputError(f"router: its loss {auxiliary.LOSS} is the auxiliary routers'; give it another name")
            judged = (predicted_GTE, tokens.modality_GT, eligible_GT, quiet, routing.modalities)
            loss, own_M4 = auxiliary.judge(*judged)
            extra, predicted_M4 = extra | {auxiliary.LOSS: loss}, predicted_M4 + own_M4
        for name, loss_G in extra.items():
            losses[name] = losses.get(name, 0.0) + loss_G.mean()
        for name, value_G in answer.metrics.items():
            metrics[f"{name}_{group.name}"] = _mean_of_groups(value_G, eligible_GT)
    return RoutingResult(state, losses, metrics, None, predicted_M4, selections), copied_GT


def added(one, other):
    """The sum of what may be None."""
    return one if other is None else other if one is None else one + other


def eligible(group: ExpertGroup, modality_X):
    """Which tokens a group of experts is for, bool (X,); padding, -1, is no modality."""
    return jnp.isin(modality_X, jnp.array(group.modalities))


def _mean_of_groups(value_G, eligible_GT):
    """A metric's mean over the routing groups of all shards but those without eligible tokens, which say nothing."""
    has_tokens_G = jnp.any(eligible_GT, axis=1)
    sums = jnp.sum(jnp.where(has_tokens_G, value_G, 0)), jnp.sum(has_tokens_G)
    total, groups = sharding.psum(sums, *BATCH)
    return total / jnp.maximum(groups, 1)


def scores(x_GTD, weights: ExpertWeights, rule: Router):
    """(router logits, auxiliary router's logits or None), float32, of one group of experts."""
    logit_GTE = checkpoint_name(rule.logits(x_GTD, weights.router), LOGITS)
    return logit_GTE, rule.predict(x_GTD, weights.auxiliary) if weights.auxiliary else None


def _select_group(logit_GTE, predicted_GTE, tokens: RoutingTokens, keys, before, number: int, own, routing: Routing):
    """The rule's answer for one group of experts, the selection that it would make without noise, which is what
    auxiliary routers can learn, and its copies; every array has a leading axis G."""
    rule, count = routing.rule, logit_GTE.shape[1]
    order_T = position_order(routing.rows, count)
    eligible_GT = eligible(own.group, tokens.modality_GT)

    def one(logit_TE, eligible_T, hash_T, id_T, position_T, index, predicted_TE):
        key = jax.random.fold_in(jax.random.fold_in(keys.step, index), number)
        noise_key, select_key = jax.random.split(key)

        def answer(noise):
            facts = predicted_TE, order_T, id_T, position_T
            score = score_of(logit_TE, hash_T, keys.jitter, rule, noise, *facts)
            chosen = rule.select(score, eligible_T, own.quota, before, select_key)
            copied_T = rule.copies(score, before)
            copied_T = None if copied_T is None else jnp.where(eligible_T, copied_T, 0.0)
            return checked(chosen, rule, (count, own.group.experts), before), copied_T

        noisy = routing.noise and rule.gumbel
        given, copied_T = answer((noise_key, keys.noise) if noisy else None)
        quiet = answer(None)[0] if noisy and predicted_TE is not None else given
        return given, quiet.selection, copied_T

    facts = tokens.hash_GT, tokens.id_GT, tokens.position_GT, tokens.group_G
    return jax.vmap(one)(logit_GTE, eligible_GT, *facts, predicted_GTE)


def position_order(rows: int, tokens: int):
    """int32 (T,): the tokens of a routing group of so many rows by position, then row."""
    return jnp.arange(tokens).reshape(rows, -1).T.reshape(-1)


def offset(selection: Selection, tokens: int) -> Selection:
    """Indices into the tokens of all routing groups, one after the other."""
    start_G = jnp.arange(selection.index_EC.shape[0], dtype=jnp.int32) * tokens
    return selection._replace(index_EC=selection.index_EC + start_G[:, None, None])


def flat(slots_GEC):
    """(G, E, C) to (E, G*C): each expert's slots of all routing groups."""
    return jnp.swapaxes(slots_GEC, 0, 1).reshape(slots_GEC.shape[1], -1)


# Token by token -------------------------------------------------------------------------------------------------------


def decide(x_ND, facts: TokenFacts, own: GroupSlots, weights: ExpertWeights, state, routing: Routing):
    """(enters_NE bool, gate_NE float32, copied_N float32 or None): the experts of a group that each token enters by
    itself, and what it takes of its own input.

    Args:
      facts: of N tokens, any axes. state: of this group of experts.
    """
    eligible_N1 = eligible(own.group, facts.modality_N)[..., None]
    if not own.group.routed:
        return eligible_N1, jnp.ones(eligible_N1.shape, jnp.float32), None
    logit_NE, predicted_NE = scores(x_ND, weights, routing.rule)
    known = {"id_T": facts.id_N, "position_T": facts.position_N}
    score = Score(logit_NE, logit_NE, logit_NE, predicted_NE, **known)
    enters_NE, gate_NE = routing.rule.decide(score, state, routing.causal)
    copied_N = routing.rule.copies(score, state)
    return eligible_N1 & enters_NE, gate_NE, None if copied_N is None else jnp.where(eligible_N1[..., 0], copied_N, 0.0)


def add_decided(y_ND, x_ND, facts: TokenFacts, groups: list[GroupSlots], weights, experts, state, routing: Routing):
    """Adds what every token gets of the experts that it enters, which alone are computed; what it takes of its own
    input is left to the caller, as on a mesh devices' parts of this are summed.

    Args:
      weights: ExpertWeights by group, for their routers. experts: what `add_experts` takes, by group.

    Returns:
      (y_ND, (enters_NE, gate_NE) by group of experts, copied_N or None).
    """
    decisions, copied_N = {}, None
    for own in groups:
        name = own.group.name
        *decision, copied = decide(x_ND, facts, own, weights[name], (state or {}).get(name), routing)
        decisions[name], copied_N = decision, added(copied_N, copied)
        with jax.named_scope(f"experts_{name}"):
            y_ND = add_experts(y_ND, x_ND, *decision, experts[name])
    return y_ND, decisions, copied_N


def _decide_and_compute(x_GTD, tokens: RoutingTokens, state, weights, routing: Routing):
    """The layer where tokens decide by themselves; every one finds a slot wherever it goes."""
    groups, count, width = x_GTD.shape
    x_ND = x_GTD.reshape(-1, width)
    facts = tokens.facts(-1)
    zero_ND = sharding.pvary(jnp.zeros_like(x_ND), TENSOR)
    arguments = (zero_ND, x_ND, facts, dispatched(routing), weights, weights, state, routing)
    y_ND, decisions, copied_N = add_decided(*arguments)
    order_T, selections = position_order(routing.rows, count), {}
    times_N = jnp.full(len(x_ND), _passed(routing), jnp.int32)
    for own in dispatched(routing):
        enters_NE, gate_NE = decisions[own.group.name]
        if not own.group.shared:
            times_N += enters_NE.sum(1, dtype=jnp.int32)
        in_groups = (part.reshape(groups, count, -1) for part in (enters_NE, gate_NE))
        taken = jax.vmap(lambda enters_TE, gate_TE: take_entering(enters_TE, gate_TE, order_T, count))(*in_groups)
        selections[own.group.name] = taken
    counts = count_taken(times_N, facts.modality_N, routing.modalities), jnp.zeros((routing.modalities, 4), jnp.int32)
    copied_GT = None if copied_N is None else copied_N.reshape(groups, count)
    return y_ND.reshape(x_GTD.shape), copied_GT, RoutingResult(state, {}, {}, *counts, selections)


def layer_routing(model: ModelConfig, shape: LayerShape, rows: int, causal: str | None, noise: bool) -> Routing:
    """How the experts of a layer of this shape are routed."""
    return Routing(model.router, shape.groups, len(shape.quotas), rows, causal, noise)
