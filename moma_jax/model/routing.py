"""From router logits to a rule's answer: scores with their ties broken, answers checked, tokens counted.

The rules themselves are in moma_jax/routers, their contract in moma_jax/router.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moma_jax.errors import InputError
from moma_jax.router import Quota, Routed, Router, Score, Selection, mixed_bits, name_of


class RoutingReport(NamedTuple):
    """What the routed experts took, layer by layer.

    Attributes:
      taken_LM3: int32 real tokens of each modality taken by 0, 1, and 2 or more routed experts.
      count_LM: int32 real tokens of each modality that entered the layer: all, without mixture of depths.
      predicted_LM4: int32 (token, expert) pairs of each modality's tokens: taken and predicted, predicted by the
        auxiliary router, taken, all; zeros where the model has none.
      entered_PM4: the same of the tokens that a layer of mixture of depths let in, in the P layers that have it.
    """

    taken_LM3: Any
    count_LM: Any
    predicted_LM4: Any
    entered_PM4: Any


def score_of(
    logit_TE, hash_T, seed, rule: Router, noise=None, predicted_TE=None, order_T=None, id_T=None, position_T=None
) -> Score:
    """Logits to a Score: Gumbel noise on logits if `noise` is given, jitter on ranks only.

    Args:
      logit_TE: float32 router logits.
      hash_T: uint32 hashes of each token's row and position (`position_hash`).
      seed: uint32 scalar of this run's seed and this layer.
      noise: (PRNG key, size) of Gumbel-Sigmoid noise (paper Eq. 5) in logit and rank; the difference of two Gumbel
        samples is one logistic sample.
      predicted_TE: logits of the auxiliary router. order_T, id_T, position_T: as of `Score`.
    """
    plain_TE = logit_TE
    if noise is not None:
        key, size = noise
        logit_TE = logit_TE + size * jax.random.logistic(key, logit_TE.shape, jnp.float32)
    expert_E = jnp.arange(logit_TE.shape[1], dtype=jnp.uint32)
    bits_TE = mixed_bits(hash_T[:, None] ^ mixed_bits(seed + expert_E * jnp.uint32(0x9E3779B9)))
    # 24 bits are exact in float32.
    uniform_TE = (bits_TE >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)
    rank_TE = jax.lax.stop_gradient(logit_TE) + rule.jitter * uniform_TE
    return Score(logit_TE, rank_TE, plain_TE, predicted_TE, order_T, id_T, position_T)


def position_hash(row, position):
    """uint32 hash of a token's row (within the update) and position in the row; broadcasts."""
    return mixed_bits(mixed_bits(jnp.asarray(row) + 1) + jnp.asarray(position).astype(jnp.uint32))


def checked(answer: Any, rule: Router, shape: tuple[int, int], state: Any) -> Routed:
    """What a rule's `select` returned, if it keeps the contract.

    A slot whose index lies outside the routing group counts as empty, and an empty slot weighs nothing, whatever the
    rule says of it.

    Args:
      answer: what `select` returned. shape: tokens T, experts E. state: the state it was given.

    Raises:
      InputError: the form, a shape or a dtype is not that of the contract.
    """
    name = f"router: {name_of(rule)}"
    if not (isinstance(answer, Routed) and isinstance(answer.selection, Selection)):
        raise InputError(f"{name} must return Routed(selection, state, ...), returned {type(answer).__name__}")
    (index_EC, gate_EC, filled_EC), after, losses, metrics = answer
    if not (isinstance(losses, dict) and isinstance(metrics, dict)):
        raise InputError(f"{name} must return losses and metrics as dictionaries of scalars by name; {{}} for none")
    tokens, experts = shape
    for field, value, kind in (
        ("index", index_EC, jnp.integer),
        ("gate", gate_EC, jnp.floating),
        ("filled", filled_EC, bool),
    ):
        fits = jnp.shape(value) == jnp.shape(index_EC) and jnp.ndim(value) == 2 and value.shape[0] == experts
        if not (fits and jnp.issubdtype(value.dtype, kind)):
            raise InputError(
                f"{name} returned {field}_EC as {value.dtype}{list(jnp.shape(value))}; it must be "
                f"{kind.__name__} of shape (E, C) with E = {experts}, the same C in all three"
            )
    for what, scalars in (("loss", losses), ("metric", metrics)):
        for key, value in scalars.items():
            if jnp.shape(value) != ():
                raise InputError(f"{name} returned the {what} {key} of shape {jnp.shape(value)}; make it a scalar")
    forms = [jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree) for tree in (state, after)]
    if jax.tree.leaves(state) and forms[0] != forms[1]:
        raise InputError(f"{name} returned a state of another form, {forms[1]}; it was given {forms[0]}")
    filled_EC = filled_EC & (index_EC >= 0) & (index_EC < tokens)
    index_EC = jnp.clip(index_EC, 0, tokens - 1).astype(jnp.int32)
    return answer._replace(selection=Selection(index_EC, jnp.where(filled_EC, gate_EC, 0.0), filled_EC))


def take_all(eligible_T, quota: Quota) -> Selection:
    """The Selection (1, C) of a group of one expert: all eligible tokens in order, gate 1 (no router)."""
    (index_C,) = jnp.nonzero(eligible_T, size=quota.slots, fill_value=0)
    filled_C = jnp.arange(quota.slots) < jnp.sum(eligible_T, dtype=jnp.int32)
    return Selection(index_C[None].astype(jnp.int32), filled_C[None].astype(jnp.float32), filled_C[None])


def count_taken(times_T, modality_T, modalities: int):
    """Tokens of each modality taken by 0, 1, 2+ experts: int32 (M, 3).

    Args:
      times_T: int32, experts that took each token. modality_T: int32, -1 on padding.
    """
    of_modality_MT = modality_T == jnp.arange(modalities)[:, None]
    times_3T = jnp.minimum(times_T, 2) == jnp.arange(3)[:, None]
    return jnp.sum(of_modality_MT[:, None] & times_3T, axis=-1, dtype=jnp.int32)
