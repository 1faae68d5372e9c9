"""The feed-forward layer: dense, mixed-modal experts, modality groups, shared experts (paper section 2.2, Eq. 1).

    y = sum over the experts j that took x of gate_j(x) * SwiGLU_j(x)   (+ the shared experts' SwiGLU, gate 1)

Dispatch, computation and combination act on a Selection and do not know who chose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moma_jax import sharding
from moma_jax.config import ModelConfig
from moma_jax.errors import InputError
from moma_jax.ffn import ExpertGroup
from moma_jax.model import auxiliary as auxiliary_lib
from moma_jax.model.auxiliary import SUFFIX, Auxiliary, AuxiliaryWeights
from moma_jax.model.routing import Quota, Selection, checked, count_taken, make_score
from moma_jax.sharding import BATCH

EXACT = jax.lax.Precision.HIGHEST
BLOCK = 256
"""Slots that are computed together where only filled ones are (`in_blocks`)."""


class Experts(NamedTuple):
    """Weights of one group of experts, float32.

    Attributes:
      gate_EDF, up_EDF, down_EFD: projections of each expert's SwiGLU.
      router_DE: None where the group has one expert.
      auxiliary: the auxiliary router, where the model has one.
    """

    gate_EDF: Any
    up_EDF: Any
    down_EFD: Any
    router_DE: Any = None
    auxiliary: Auxiliary | None = None


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
        expert, embed = ("expert", "expert_embed") if sharding.dealt(e) else (None, "embed")
        return Experts(
            weight("gate_EDF", (expert, embed, "ffn"), normal(d), (e, d, f)),
            weight("up_EDF", (expert, embed, "ffn"), normal(d), (e, d, f)),
            weight("down_EFD", (expert, "ffn", embed), normal(f, self.out_scale), (e, f, d)),
            weight("router_DE", ("embed", None), normal(d), (d, e)) if self.routed else None,
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
            for name, experts in [(g.name, g.experts) for g in self.rules.groups if auxiliary_lib.has_auxiliary(g)]:
                predictor = AuxiliaryWeights(experts, self.model.width, name=name + SUFFIX)()
                routed[name] = routed[name]._replace(auxiliary=predictor)
        if self.shared:
            # N always-on experts with gate 1 are one of N times the hidden width.
            always = weights("shared", 1, self.shared * self.model.hidden, False)
        if is_dense(self.rules):
            (experts,) = routed.values()
            modality_N = place.modality_GT.reshape(-1)
            taken_M3 = count_taken(jnp.ones_like(modality_N), modality_N, self.rules.modalities)
            predicted_M4 = jnp.zeros((self.rules.modalities, 4), jnp.int32)
            output = FfnOutput(everywhere(x_GTD, experts), state, {}, taken_M3, predicted_M4, {})
        else:
            output = over_devices(x_GTD, place, drawn, state, routed, rules=self.rules, noise=self.train)
        return output._replace(y_GTD=output.y_GTD + everywhere(x_GTD, always)) if self.shared else output


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


# Computation ----------------------------------------------------------------------------------------------------------


def swiglu(x_END, experts: Experts, weight_EN=None):
    """Weighted SwiGLU of each expert on its own N tokens: weight * (silu(x W_gate) * (x W_up)) W_down.

    Args:
      x_END: compute dtype, in which everything is done. weight_EN: float32 router gates; None for 1.

    The weight multiplies the hidden vector, which is linear in it and saves a pass over the output. The backward pass
    keeps the two projections and computes the hidden vector anew from them: no further matrix product.
    """
    weight_EN = jnp.ones(x_END.shape[:2], x_END.dtype) if weight_EN is None else weight_EN
    operands = (x_END, experts.gate_EDF, experts.up_EDF, experts.down_EFD, weight_EN)
    match sharding.platform():
        case "cpu":
            # One expert after the other, so that its hidden vectors stay in the cache from one product to the next: a
            # batch of experts costs about 6% more.
            return jnp.stack([swiglu_of(*expert) for expert in zip(*map(_unstacked, operands), strict=True)])
        case _:
            return swiglu_of(*operands)


def _unstacked(axis_E) -> list:
    """The slices along the first axis. A split, whose gradient is a concatenation; an index's is padding and a sum."""
    return [part[0] for part in jax.lax.split(axis_E, [1] * len(axis_E))]


def swiglu_of(x_ND, gate_DF, up_DF, down_FD, weight_N):
    """SwiGLU of one expert, or of several where every array has a leading axis E."""
    dtype = x_ND.dtype

    def contract(gate_NF, up_NF, weight_N, down_FD):
        hidden_NF = jax.nn.silu(gate_NF) * up_NF * weight_N[..., None].astype(dtype)
        return hidden_NF @ down_FD.astype(dtype)

    gate_NF, up_NF = x_ND @ gate_DF.astype(dtype), x_ND @ up_DF.astype(dtype)
    return jax.checkpoint(contract, prevent_cse=False)(gate_NF, up_NF, weight_N, down_FD)


def everywhere(x_GTD, experts: Experts):
    """One SwiGLU on all tokens, no dispatch."""
    return swiglu(x_GTD.reshape(1, -1, x_GTD.shape[-1]), experts).reshape(x_GTD.shape)


def over_devices(x_GTD, place, drawn, state, routed, *, rules: Rules, noise: bool) -> FfnOutput:
    """`routed_ffn`, on each device's own routing groups where a mesh has an axis "data".

    Inside `jax.shard_map` gathers stay local; left to the partitioner they would be reshuffled over all devices.
    """
    if sharding.size(*BATCH) == 1:
        return routed_ffn(x_GTD, place, drawn, state, routed, rules=rules, noise=noise)
    groups, devices = x_GTD.shape[0], sharding.size(*BATCH)
    if groups % devices:
        raise InputError(
            f"mesh: {groups} routing groups do not split over {devices} devices; use a divisor of {groups}"
        )

    def local(x_GTD, place, drawn, state, routed):
        output = routed_ffn(x_GTD, place, drawn, state, routed, rules=rules, noise=noise)
        return output._replace(
            state=jax.tree.map(lambda s: jax.lax.pmean(s, BATCH), output.state),
            losses=jax.tree.map(lambda s: jax.lax.pmean(s, BATCH), output.losses),
            taken_M3=jax.lax.psum(output.taken_M3, BATCH),
            predicted_M4=jax.lax.psum(output.predicted_M4, BATCH),
        )

    split, same = PartitionSpec(BATCH), PartitionSpec()
    return jax.shard_map(
        local,
        in_specs=(split, split, same, same, same),
        out_specs=FfnOutput(split, same, same, same, same, split),
    )(x_GTD, place, drawn, state, routed)


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
        y_ND = jnp.zeros_like(x_ND)
        for name, selection in taken.items():
            y_ND = in_blocks(y_ND, x_ND, selection, routed[name])
    else:
        y_ND = in_slots(x_ND, taken, routed)
    # One scatter for the slots of all groups of experts.
    index_S, filled_S = (
        _joined(slots) for slots in zip(*((s.index_EC, s.filled_EC) for s in taken.values()), strict=True)
    )
    times_N = jnp.zeros(len(x_ND), jnp.int32).at[index_S].add(filled_S.astype(jnp.int32))
    taken_M3 = count_taken(times_N, place.modality_GT.reshape(-1), rules.modalities)
    return FfnOutput(y_ND.reshape(x_GTD.shape), state, losses, taken_M3, predicted_M4, selections)


def in_slots(x_ND, taken: dict[str, Selection], routed: dict[str, Experts]):
    """Every slot computed, filled or not: static work, for selections that fill nearly all. Returns y_ND.

    Args:
      taken: Selections (G, E, C) into the N tokens, by group of experts.
    """
    width, taken = x_ND.shape[1], {name: Selection(*map(flat, s)) for name, s in taken.items()}
    # One gather and one scatter for the slots of all groups of experts.
    index_S = _joined([t.index_EC for t in taken.values()])
    x_SD = jax.lax.split(dispatch(x_ND, index_S), [t.index_EC.size for t in taken.values()])
    outputs = [
        swiglu(x_SD.reshape(*t.index_EC.shape, width), routed[name], t.gate_EC).reshape(-1, width)
        for x_SD, (name, t) in zip(x_SD, taken.items(), strict=True)
    ]
    return combine(jnp.zeros_like(x_ND), index_S, jnp.concatenate(outputs))


def in_blocks(y_ND, x_ND, selection: Selection, experts: Experts):
    """Adds the experts' outputs to y_ND, block by block of slots; blocks without a filled slot cost nothing.

    So every token may have a slot at every expert (C = T), and what is computed is what was taken, rounded up to
    blocks. A loop of unknown length: no gradient.

    Args:
      selection: (G, E, C), indices into the N tokens; blocks of an expert and routing group begin at its first slot.
    """
    groups, count, slots = selection.index_EC.shape
    size = min(BLOCK, slots)
    pad = ((0, 0), (0, 0), (0, -slots % size))
    index_KB, gate_KB, filled_KB = (jnp.pad(x_GEC, pad).reshape(-1, size) for x_GEC in selection)
    expert_K = jnp.broadcast_to(jnp.arange(count)[:, None], (groups, count, len(index_KB) // (groups * count))).reshape(
        -1
    )
    used_K = filled_KB.any(axis=1)
    order_K = jnp.argsort(~used_K, stable=True)

    def one(i, y_ND):
        k = order_K[i]
        own = [experts.gate_EDF[expert_K[k]], experts.up_EDF[expert_K[k]], experts.down_EFD[expert_K[k]]]
        return combine(y_ND, index_KB[k], swiglu_of(dispatch(x_ND, index_KB[k]), *own, gate_KB[k]))

    return jax.lax.fori_loop(0, used_K.sum(), one, y_ND)


def _joined(slots):
    """Slots of all groups of experts, one after the other."""
    return jnp.concatenate([slots_EC.reshape(-1) for slots_EC in slots])


def dispatch(x_ND, index_EN):
    """Tokens to slots."""
    return x_ND.at[index_EN].get(mode="promise_in_bounds")


def combine(y_ND, index_EN, out_END):
    """Adds the slots' (weighted) outputs to their tokens'; an empty slot's is 0."""
    return y_ND.at[index_EN].add(out_END, mode="promise_in_bounds")


def choose(x_GTD, place, drawn, state, routed, *, rules: Rules, noise: bool):
    """Selections (G, E, C) by group name, the new state and the losses, both averaged over routing groups."""
    many = [(g, q, i) for i, (g, q) in enumerate(zip(rules.groups, rules.quotas, strict=True)) if g.experts > 1]
    selections, losses = dict(place.alone), {}
    if not many:
        return selections, state, losses
    # One product for all routers, in float32 on every platform.
    routers_DE = jnp.concatenate([routed[g.name].router_DE for g, _, _ in many], axis=1)
    logit_GTE = jnp.einsum("gtd,de->gte", x_GTD.astype(jnp.float32), routers_DE, precision=EXACT)
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
            state[group.name] = jax.tree.map(lambda new, old: new.mean(0).astype(old.dtype), after, before)
        for name, loss_G in extra.items():
            losses[name] = losses.get(name, 0.0) + loss_G.mean()
    return selections, state, losses


def offset(selection: Selection, tokens: int) -> Selection:
    """Indices into the tokens of all routing groups, one after the other."""
    start_G = jnp.arange(selection.index_EC.shape[0], dtype=jnp.int32) * tokens
    return selection._replace(index_EC=selection.index_EC + start_G[:, None, None])


def flat(slots_GEC):
    """(G, E, C) to (E, G*C): each expert's slots of all routing groups."""
    return jnp.swapaxes(slots_GEC, 0, 1).reshape(slots_GEC.shape[1], -1)
