"""Auxiliary routers in training: how they learn what the experts take (paper section 2.4).

    predicted = SiLU(x W1) W2,    W1: d x d/2,  W2: d/2 x |E|;    a token enters an expert iff sigmoid(predicted) > 0.5

They learn by binary cross-entropy against the true selections of the whole routing group, either in a stage of their
own with the model frozen (`moma routers fit`) or beside the model (the rule's option `auxiliary`). They read a token's
activations behind a stopped gradient and the experts do not know of them, so the model never changes for their sake.
The main router still gives the weight. The network is declared in moma_jax/router.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moma_jax.router import Selection

SUFFIX = "_auxiliary"
"""How the names of their parameters end: <group>_auxiliary."""
LOSS = "auxiliary"
"""Name of the cross-entropy among the routing losses: a sum over layers of means over (token, expert) pairs."""


def judge(predicted_GTE, modality_GT, eligible_GT, selection: Selection, modalities: int):
    """How well an auxiliary router predicts what the experts of its group took.

    Args:
      predicted_GTE: its logits. modality_GT: -1 on padding. eligible_GT: tokens of the group. selection: (G, E, C).

    Returns:
      (cross-entropy, a mean over routing groups; int32 predicted_M4 (`RoutingReport`) summed over them).
    """
    taken_GTE = jax.vmap(lambda chosen: taken_pairs(chosen, predicted_GTE.shape[1]))(selection)
    loss = jax.vmap(cross_entropy)(predicted_GTE, taken_GTE, eligible_GT).mean()
    count = jax.vmap(lambda *x: count_pairs(*x, modalities))
    return loss, count(predicted_GTE, taken_GTE, eligible_GT, modality_GT).sum(0)


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
    counted = jnp.stack([taken_TE & predicted_TE, predicted_TE, taken_TE, all_TE], axis=-1)
    count_T4 = jnp.where(eligible_T[:, None], counted.sum(axis=1, dtype=jnp.int32), 0)
    of_modality_MT = modality_T == jnp.arange(modalities)[:, None]
    return jnp.einsum("mt,tk->mk", of_modality_MT.astype(jnp.int32), count_T4)
