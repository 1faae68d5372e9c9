"""The feed-forward layer: dense, mixed-modal experts, modality groups, shared experts (paper section 2.2, Eq. 1).

    y = sum over the experts j that took x of gate_j(x) * SwiGLU_j(x)   (+ the shared experts' SwiGLU, gate 1)

Here experts are declared and chosen; model/slots.py computes on what was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moma_jax import sharding
from moma_jax.config import ModelConfig
from moma_jax.errors import InputError
from moma_jax.ffn import ExpertGroup
from moma_jax.model import auxiliary as auxiliary_lib
from moma_jax.model.auxiliary import SUFFIX, Auxiliary, AuxiliaryWeights
from moma_jax.model.precision import EXACT, wide
from moma_jax.model.routing import Quota, Selection, checked, count_taken, make_score, take_all
from moma_jax.model.slots import Experts, axes_of, gathered, in_blocks, in_slots, joined, offset, swiglu
from moma_jax.sharding import BATCH, TENSOR

KEPT = "feed_forward"
"""Name, for remat policies, of router logits and the layer's output: with it, slots need not be combined anew."""


class Place(NamedTuple):
    """What routing knows about tokens beside their content, for G routing groups of T tokens.

    Attributes:
      modality_GT: int32 modality, -1 on padding.
      hash_GT: uint32 hash of row and position (`routing.place_hash`).
      group_G: int32 index of the routing group within the update.
      alone: Selections (G, 1, C) of the groups that have one expert, by name; equal in all layers.
    """

    modality_GT: Any
    hash_GT: Any
    group_G: Any
    alone: dict[str, Selection]


class Drawn(NamedTuple):
    """Randomness of one layer: uint32 seed of the jitter (fixed), PRNG key of this step."""

    jitter: Any
    key: Any


class FfnOutput(NamedTuple):
    """What the layer has to say: y_GTD, new state and losses (averaged over groups), int32 tokens of each modality
    taken by 0, 1, 2+ experts and pairs that the auxiliary routers got right (`RoutingReport`; both summed over
    groups), and the Selections by name."""

    y_GTD: Any
    state: dict[str, Any]
    losses: dict[str, Any]
    taken_M3: Any
    predicted_M4: Any
    selections: dict[str, Selection]


class Rules(NamedTuple):
    """What is static about routing: groups of experts, their quotas, who chooses; whether there are auxiliary routers;
    `filled_only`: compute filled slots alone, for selections of very unequal size, without gradient.
    """

    groups: tuple[ExpertGroup, ...]
    quotas: tuple[Quota, ...]
    modalities: int
    select: Callable
    jitter: float
    gumbel: bool
    dtype: Any
    auxiliary: bool = False
    filled_only: bool = False


# Parameters -----------------------------------------------------------------------------------------------------------


def normal(fan_in: int, scale: float = 1.0):
    """Normal initialiser of standard deviation scale / sqrt(fan_in): keeps a unit-variance input at `scale`."""
    return nn.initializers.normal(scale / math.sqrt(fan_in))


class ExpertWeights(nn.Module):
    """Declares the weights of `experts` SwiGLU experts, every expert drawn independently, and of their router."""

    experts: int
    width: int
    hidden: int
    out_scale: float
    routed: bool

    @nn.compact
    def __call__(self) -> Experts:
        def weight(name, axes, init, shape):
            return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)

        e, d, f = self.experts, self.width, self.hidden
        axes = axes_of(e, self.routed)
        return Experts(
            weight("gate_EDF", axes.gate_EDF, normal(d), (e, d, f)),
            weight("up_EDF", axes.up_EDF, normal(d), (e, d, f)),
            weight("down_EFD", axes.down_EFD, normal(f, self.out_scale), (e, f, d)),
            weight("router_DE", axes.router_DE, normal(d), (d, e)) if self.routed else None,
        )


class Ffn(nn.Module):
    """The feed-forward sub-layer. Parameters: one `Experts` per group, by the group's name, and `shared`."""

    model: ModelConfig
    rules: Rules
    shared: int
    train: bool

    @nn.compact
    def __call__(self, x_GTD, place: Place, drawn: Drawn, state) -> FfnOutput:
        """x_GTD in compute dtype; returns y_GTD in the same."""
        out_scale = output_scale(self.model)

        def weights(name, experts, hidden, routed):
            return ExpertWeights(experts, self.model.width, hidden, out_scale, routed, name=name)()

        routed = {g.name: weights(g.name, g.experts, self.model.hidden, g.experts > 1) for g in self.rules.groups}
        if self.rules.auxiliary:
            for name, experts in [(g.name, g.experts) for g in self.rules.groups if g.routed]:
                predictor = AuxiliaryWeights(experts, self.model.width, name=name + SUFFIX)()
                routed[name] = routed[name]._replace(auxiliary=predictor)
        if self.shared:
            # N always-on experts with gate 1 are one of N times the hidden width.
            routed["shared"] = weights("shared", 1, self.shared * self.model.hidden, False)
        return over_shards(x_GTD, place, drawn, state, routed, rules=self.rules, noise=self.train)


def experts_of(params: Any) -> dict[str, Experts]:
    """The weights of an `Ffn`'s parameters by group of experts, auxiliary routers in their places."""
    return {
        name: Experts(**weights, auxiliary=Auxiliary(**params[name + SUFFIX]) if name + SUFFIX in params else None)
        for name, weights in params.items()
        if not name.endswith(SUFFIX)
    }


def is_dense(rules: Rules) -> bool:
    """True where every token simply passes one expert."""
    return len(rules.groups) == 1 and rules.groups[0].experts == 1


def output_scale(model: ModelConfig) -> float:
    """Initial scale of projections that write into the residual stream.

    Pre-norm adds 2L outputs up, so each starts at 1/sqrt(2L) (GPT-2's rule); under swin the norm behind the sub-layer
    sets the scale.
    """
    return 1.0 / math.sqrt(2 * model.layers) if model.norm == "pre" else 1.0


def placed(rules: Rules, modality_GT, hash_GT, group_G) -> Place:
    """The Place of these tokens, for experts of these rules; -1 is the modality of padding."""
    alone = {}
    for group, quota in zip(rules.groups, rules.quotas, strict=True):
        if not group.routed and not is_dense(rules):
            eligible_GT = jnp.isin(modality_GT, jnp.array(group.modalities))
            alone[group.name] = jax.vmap(lambda e, quota=quota: take_all(e, quota))(eligible_GT)
    return Place(modality_GT, hash_GT, group_G, alone)


# Computation ----------------------------------------------------------------------------------------------------------


def everywhere(x_GTD, experts: Experts):
    """One SwiGLU on all tokens, no dispatch."""
    return swiglu(x_GTD.reshape(1, -1, x_GTD.shape[-1]), experts).reshape(x_GTD.shape)


def over_shards(x_GTD, place, drawn, state, weights: dict[str, Experts], *, rules: Rules, noise: bool) -> FfnOutput:
    """`feed_forward` of each device's own routing groups, with the experts wherever the mesh has them."""
    experts = {group.name: group.experts for group in rules.groups} | {"shared": 1}
    axes = {
        name: axes_of(experts[name], own.router_DE is not None, own.auxiliary is not None)
        for name, own in weights.items()
    }

    def local(x_GTD, place, drawn, state, weights):
        weights = {name: gathered(own, axes[name], x_GTD.dtype, rules.filled_only) for name, own in weights.items()}
        output = feed_forward(x_GTD, place, drawn, state, weights, rules=rules, noise=noise)
        return output._replace(
            y_GTD=checkpoint_name(sharding.summed(output.y_GTD, TENSOR), KEPT),
            state=jax.tree.map(as_before, sharding.averaged(output.state, *BATCH), state),
            losses=sharding.averaged(output.losses, *BATCH),
            taken_M3=sharding.summed(output.taken_M3, *BATCH),
            predicted_M4=sharding.summed(output.predicted_M4, *BATCH),
        )

    mine, same = sharding.spec("batch"), sharding.spec()
    specs = jax.tree.map(lambda _, own: sharding.spec(*own), weights, axes)
    out_specs = FfnOutput(mine, same, same, same, same, mine)
    return sharding.on_shards(local, (mine, mine, same, same, specs), out_specs)(x_GTD, place, drawn, state, weights)


def as_before(mean, before):
    """A mean of states in the type of the state before; flags and whole numbers are rounded."""
    if not jnp.issubdtype(before.dtype, jnp.floating) and jnp.issubdtype(mean.dtype, jnp.floating):
        mean = jnp.round(mean)
    return mean.astype(before.dtype)


def feed_forward(x_GTD, place, drawn, state, weights: dict[str, Experts], *, rules: Rules, noise: bool) -> FfnOutput:
    """The layer on whole routing groups: every token through its experts and the shared ones."""
    weights = dict(weights)
    shared = weights.pop("shared", None)
    if is_dense(rules):
        (experts,) = weights.values()
        modality_N = place.modality_GT.reshape(-1)
        taken_M3 = count_taken(jnp.ones_like(modality_N), modality_N, rules.modalities)
        predicted_M4 = jnp.zeros((rules.modalities, 4), jnp.int32)
        output = FfnOutput(everywhere(x_GTD, experts), state, {}, taken_M3, predicted_M4, {})
    else:
        output = routed_ffn(x_GTD, place, drawn, state, weights, rules=rules, noise=noise)
    return output if shared is None else output._replace(y_GTD=output.y_GTD + everywhere(x_GTD, shared))


def routed_ffn(x_GTD, place: Place, drawn: Drawn, state, routed, *, rules: Rules, noise: bool) -> FfnOutput:
    """Scores, selections, dispatch, experts, combination (Eq. 1) on whole routing groups.

    Args:
      x_GTD: activations in compute dtype. state: by group name, for stateful select functions.
      routed: `Experts` by group name. noise: True in training; adds Gumbel noise where the rules have it.
    """
    selections, state, losses = choose(x_GTD, place, drawn, state, routed, rules=rules, noise=noise)
    predicted_M4 = jnp.zeros((rules.modalities, 4), jnp.int32)
    if rules.auxiliary and not rules.filled_only:
        predictors = {name: experts.auxiliary for name, experts in routed.items()}
        if auxiliary_lib.LOSS in losses:
            raise InputError(f"select: its loss {auxiliary_lib.LOSS} is that of model.auxiliary; give it another name")
        judged = auxiliary_lib.judge(x_GTD, place.modality_GT, selections, predictors, rules)
        losses, predicted_M4 = losses | {auxiliary_lib.LOSS: judged[0]}, judged[1]
    tokens, width = x_GTD.shape[1:]
    x_ND = x_GTD.reshape(-1, width)
    taken = {group.name: offset(selections[group.name], tokens) for group in rules.groups}
    if rules.filled_only:
        y_ND = sharding.varying(jnp.zeros_like(x_ND), TENSOR)
        for name, selection in taken.items():
            y_ND = in_blocks(y_ND, x_ND, selection, routed[name])
    else:
        y_ND = in_slots(x_ND, taken, routed)
    # One scatter for the slots of all groups of experts.
    index_S, filled_S = (
        joined(slots) for slots in zip(*((s.index_EC, s.filled_EC) for s in taken.values()), strict=True)
    )
    times_N = jnp.zeros(len(x_ND), jnp.int32).at[index_S].add(filled_S.astype(jnp.int32))
    taken_M3 = count_taken(times_N, place.modality_GT.reshape(-1), rules.modalities)
    return FfnOutput(y_ND.reshape(x_GTD.shape), state, losses, taken_M3, predicted_M4, selections)


@jax.custom_vjp
def router_logits(x_GTD, router_DE):
    """Router logits, float32 on every platform, so that all choose alike; gradients are as exact as all others are."""
    return jnp.einsum("gtd,de->gte", wide(x_GTD), router_DE, precision=EXACT)


def _router_gradients(saved, d_logit_GTE):
    x_GTD, router_DE = saved
    d_x_GTD = jnp.einsum("gte,de->gtd", d_logit_GTE, router_DE).astype(x_GTD.dtype)
    return d_x_GTD, jnp.einsum("gtd,gte->de", x_GTD, d_logit_GTE, preferred_element_type=jnp.float32)


router_logits.defvjp(lambda *operands: (router_logits(*operands), operands), _router_gradients)


def choose(x_GTD, place, drawn, state, routed, *, rules: Rules, noise: bool):
    """Selections (G, E, C) by group name, the new state and the losses, both averaged over routing groups."""
    many = [(g, q, i) for i, (g, q) in enumerate(zip(rules.groups, rules.quotas, strict=True)) if g.routed]
    selections, losses = dict(place.alone), {}
    if not many:
        return selections, state, losses
    # One product for all routers, in float32 on every platform.
    routers_DE = jnp.concatenate([routed[g.name].router_DE for g, _, _ in many], axis=1)
    logit_GTE = checkpoint_name(router_logits(x_GTD, routers_DE), KEPT)
    state, start = dict(state), 0
    for group, quota, number in many:
        own_GTE = logit_GTE[..., start : start + group.experts]
        start += group.experts
        eligible_GT = jnp.isin(place.modality_GT, jnp.array(group.modalities))
        before, predictor = state.get(group.name), routed[group.name].auxiliary
        predicted_GTE = None if predictor is None else auxiliary_lib.predict(x_GTD, predictor)

        def one(logit_TE, eligible_T, hash_T, index, predicted_TE, number=number, quota=quota, before=before):
            key = jax.random.fold_in(jax.random.fold_in(drawn.key, index), number)
            noise_key, select_key = jax.random.split(key)
            noise_key = noise_key if noise and rules.gumbel else None
            score = make_score(logit_TE, hash_T, drawn.jitter, rules.jitter, noise_key, predicted_TE)
            answer = rules.select(score, eligible_T, quota, before, select_key)
            return checked(answer, rules.select, logit_TE.shape, before)

        chosen, after, extra = jax.vmap(one)(own_GTE, eligible_GT, place.hash_GT, place.group_G, predicted_GTE)
        selections[group.name] = chosen
        if group.name in state:
            state[group.name] = jax.tree.map(lambda new: new.mean(0), after)
        for name, loss_G in extra.items():
            losses[name] = losses.get(name, 0.0) + loss_G.mean()
    return selections, state, losses
