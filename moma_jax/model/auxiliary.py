"""Auxiliary routers: small networks that predict, from a token alone, what expert choice takes (paper section 2.4).

    predicted = SiLU(x W1) W2,    W1: d x d/2,  W2: d/2 x |E|;    a token enters an expert iff sigmoid(predicted) > 0.5

They learn by binary cross-entropy against the true selections of the whole routing group, either in a stage of their
own with the model frozen (`moma fit-routers`) or beside the model (`model.auxiliary`). They read a token's activations
behind a stopped gradient and the experts do not know of them, so the model never changes for their sake. The main
router still gives the weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moma_jax.model.routing import Selection

SUFFIX = "_auxiliary"
LOSS = "auxiliary"
"""Name of the cross-entropy among the routing losses: a sum over layers of means over (token, expert) pairs."""


class Auxiliary(NamedTuple):
    """Weights of one group's auxiliary router, float32; A = d/2."""

    in_DA: Any
    out_AE: Any


class AuxiliaryWeights(nn.Module):
    """Declares the auxiliary router of a group of `experts` experts. It starts at "half of everything enters"."""

    experts: int
    width: int

    @nn.compact
    def __call__(self) -> Auxiliary:
        def weight(name, axes, init, shape):
            return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)

        inner = self.width // 2
        return Auxiliary(
            weight("in_DA", ("embed", None), nn.initializers.normal(self.width**-0.5), (self.width, inner)),
            weight("out_AE", (None, None), nn.initializers.zeros, (inner, self.experts)),
        )


def predict(x_ND, auxiliary: Auxiliary):
    """Logits (N, E), float32 on every platform, of tokens x_ND; no gradient flows to the tokens."""
    x_ND = jax.lax.stop_gradient(x_ND).astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    inner_NA = jax.nn.silu(jnp.matmul(x_ND, auxiliary.in_DA, precision=exact))
    return jnp.matmul(inner_NA, auxiliary.out_AE, precision=exact)


def judge(x_GTD, modality_GT, selections: dict[str, Selection], predictors: dict[str, Auxiliary | None], rules):
    """How well the auxiliary routers predict what the experts took.

    Args:
      x_GTD: what routers see. modality_GT: -1 on padding. selections: (G, E, C) each. rules: the layer's
        (`experts.Rules`), for its groups of experts and its number of modalities.

    Returns:
      (cross-entropy summed over groups of experts, int32 predicted_M4 summed over routing groups).
    """
    loss, predicted_M4 = jnp.float32(0), jnp.zeros((rules.modalities, 4), jnp.int32)
    for group in (g for g in rules.groups if g.routed):  # only a router needs to be predicted
        predicted_GTE = predict(x_GTD, predictors[group.name])
        taken_GTE = jax.vmap(lambda chosen: taken_pairs(chosen, x_GTD.shape[1]))(selections[group.name])
        eligible_GT = jnp.isin(modality_GT, jnp.array(group.modalities))
        loss += jax.vmap(cross_entropy)(predicted_GTE, taken_GTE, eligible_GT).mean()
        count = jax.vmap(lambda *x: count_pairs(*x, rules.modalities))
        predicted_M4 += count(predicted_GTE, taken_GTE, eligible_GT, modality_GT).sum(0)
    return loss, predicted_M4


def taken_pairs(selection: Selection, tokens: int):
    """Which expert took which token: bool (T, E) of one routing group's Selection."""
    experts = len(selection.index_EC)
    token_EC = jnp.where(selection.filled_EC, selection.index_EC, tokens)
    taken_ET = jnp.zeros((experts, tokens), bool).at[jnp.arange(experts)[:, None], token_EC].set(True, mode="drop")
    return taken_ET.T


def cross_entropy(predicted_TE, taken_TE, eligible_T):
    """Binary cross-entropy in nats, a mean over the eligible tokens' pairs; a scalar."""
    nats_TE = jax.nn.softplus(predicted_TE) - jnp.where(taken_TE, predicted_TE, 0.0)
    pairs = jnp.maximum(eligible_T.sum() * taken_TE.shape[1], 1)
    return jnp.sum(jnp.where(eligible_T[:, None], nats_TE, 0.0)) / pairs


def count_pairs(predicted_TE, taken_TE, eligible_T, modality_T, modalities: int):
    """(token, expert) pairs by modality, int32 (M, 4): taken and predicted, predicted, taken, all."""
    predicted_TE = predicted_TE > 0
    all_TE = jnp.ones_like(taken_TE)
    kinds = jnp.stack([taken_TE & predicted_TE, predicted_TE, taken_TE, all_TE], axis=-1)
    count_T4 = jnp.where(eligible_T[:, None], kinds.sum(axis=1, dtype=jnp.int32), 0)
    of_modality_MT = modality_T == jnp.arange(modalities)[:, None]
    return jnp.einsum("mt,tk->mk", of_modality_MT.astype(jnp.int32), count_T4)
