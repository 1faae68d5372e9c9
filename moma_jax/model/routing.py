"""Who takes which token: selections are data (paper section 2.2).

A select function looks at one routing group and one group of experts and answers with a `Selection`; `experts`
computes on it and does not know who chose. `expert_choice` is the paper's; any function of the same signature may be
passed to the decoder or to `moma_jax.train(config, select=...)`:

    select(score: Score, eligible_T, quota: Quota, state, key) -> (Selection, state, losses)

The caller maps it over routing groups, averages the returned states and losses over them, and sums losses over
layers. `state` is the layer's and expert group's part of the routing state (None where the run has none), `key` a PRNG
key of this step, layer, routing group and group of experts, `losses` a dictionary of float32 scalars that are added to
the objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moma_jax.errors import InputError


@dataclass(frozen=True)
class Quota:
    """How much one expert may take.

    Attributes:
      tokens: hard bound on the eligible tokens of one routing group; the packer keeps it.
      capacity: share of the eligible tokens that each expert takes, exact.
      down: the share is rounded down, so that shares of several modalities never add up to more than that of all.
    """

    tokens: int
    capacity: Fraction
    down: bool = False

    @property
    def slots(self) -> int:
        """Slots C of one expert, static: what it takes when the quota is full."""
        return self.take(self.tokens)

    def take(self, count):
        """Tokens k_e = ceil(count * capacity) for `count` eligible ones (floor if `down`), in exact integers.

        `count` may be a Python int or a traced int32 scalar; split so that products stay far below 2^31.
        """
        over, under = self.capacity.numerator, self.capacity.denominator
        whole, rest = count // under, count % under
        return whole * over + (rest * over + (0 if self.down else under - 1)) // under


class Score(NamedTuple):
    """What a router says about the T tokens of a routing group, for the E experts of one group.

    Attributes:
      logit_TE: float32 router logits, noise included where it is on; the gate is their sigmoid.
      rank_TE: float32, what experts rank tokens by: the logits (a sigmoid saturates, so it would tie) plus a small
        fixed jitter, because packed documents share exact prefixes and so tie exactly.
      plain_TE: float32 logits without noise and jitter: a function of the token alone.
      predicted_TE: float32 logits of the auxiliary router, where the model has one.
    """

    logit_TE: Any
    rank_TE: Any
    plain_TE: Any
    predicted_TE: Any = None


class Selection(NamedTuple):
    """Tokens that each expert took. Axes may be preceded by layers L and routing groups G.

    Attributes:
      index_EC: int32 token of each slot; a valid token also where the slot is not filled.
      gate_EC: float32 weight of the expert's output; exactly 0 where the slot is not filled.
      filled_EC: bool, True where the slot holds a token.
    """

    index_EC: Any
    gate_EC: Any
    filled_EC: Any


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


def expert_choice(score: Score, eligible_T, quota: Quota, state, key):
    """Each expert takes its k_e best eligible tokens (paper section 2.2).

    Args:
      score: float32 logits and ranks, (T, E) each.
      eligible_T: bool, tokens of the expert group's modalities; padding is never eligible.
      quota: slots and capacity; k_e = ceil(count * capacity) of the true count, at most `quota.slots`.
      state: returned as it is. key: unused.

    Returns:
      A Selection of shapes (E, C), the state, and no losses. Equal ranks go to the lower token.
    """
    del key
    rank_ET = jnp.where(eligible_T, score.rank_TE.T, -jnp.inf)
    _, index_EC = jax.lax.top_k(jax.lax.stop_gradient(rank_ET), quota.slots)
    k = quota.take(jnp.sum(eligible_T, dtype=jnp.int32))
    filled_EC = jnp.broadcast_to(jnp.arange(quota.slots) < k, index_EC.shape)
    gate_EC = jax.nn.sigmoid(jnp.take_along_axis(score.logit_TE.T, index_EC, axis=1))
    return Selection(index_EC, jnp.where(filled_EC, gate_EC, 0.0), filled_EC), state, {}


def checked(answer, select, shape: tuple[int, int], state):
    """The answer of a select function, if it keeps the contract.

    A slot whose index lies outside the routing group counts as empty, and an empty slot weighs nothing, whatever the
    function says of it.

    Args:
      answer: what `select` returned. shape: (T, E) of its scores. state: the state it was given.

    Raises:
      InputError: the form, a shape or a dtype is not that of the contract.
    """
    name = getattr(select, "__name__", type(select).__name__)
    if not (isinstance(answer, tuple) and len(answer) == 3 and isinstance(answer[0], Selection)):
        raise InputError(f"select: {name} must return (Selection, state, losses), returned {type(answer).__name__}")
    (index_EC, gate_EC, filled_EC), after, losses = answer
    tokens, experts = shape
    for field, value, kind in (
        ("index", index_EC, jnp.integer),
        ("gate", gate_EC, jnp.floating),
        ("filled", filled_EC, bool),
    ):
        fits = jnp.shape(value) == jnp.shape(index_EC) and jnp.ndim(value) == 2 and value.shape[0] == experts
        if not (fits and jnp.issubdtype(value.dtype, kind)):
            raise InputError(
                f"select: {name} returned {field}_EC as {value.dtype}{list(jnp.shape(value))}; it must be "
                f"{kind.__name__} of shape (E, C) with E = {experts}, the same C in all three"
            )
    for loss, value in losses.items():
        if jnp.shape(value) != ():
            raise InputError(f"select: {name} returned the loss {loss} of shape {jnp.shape(value)}; make it a scalar")
    forms = [jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree) for tree in (state, after)]
    if state is not None and forms[0] != forms[1]:
        raise InputError(f"select: {name} returned a state of another form, {forms[1]}; it was given {forms[0]}")
    filled_EC = filled_EC & (index_EC >= 0) & (index_EC < tokens)
    index_EC = jnp.clip(index_EC, 0, tokens - 1).astype(jnp.int32)
    return Selection(index_EC, jnp.where(filled_EC, gate_EC, 0.0), filled_EC), after, losses


def take_all(eligible_T, quota: Quota) -> Selection:
    """The Selection (1, C) of a group of one expert: all eligible tokens in order, gate 1 (no router)."""
    (index_C,) = jnp.nonzero(eligible_T, size=quota.slots, fill_value=0)
    filled_C = jnp.arange(quota.slots) < jnp.sum(eligible_T, dtype=jnp.int32)
    return Selection(index_C[None].astype(jnp.int32), filled_C[None].astype(jnp.float32), filled_C[None])


def make_score(logit_TE, place_T, seed, jitter: float, noise_key=None, predicted_TE=None) -> Score:
    """Logits to a Score: Gumbel noise on logits if `noise_key` is given, jitter on ranks only.

    Args:
      logit_TE: float32 router logits.
      place_T: uint32 hashes of each token's row and position (`place_hash`).
      seed: uint32 scalar of this run's seed and this layer.
      jitter: size of the tie-breaking term.
      noise_key: Gumbel-Sigmoid noise (paper Eq. 5) in logit and rank; the difference of two Gumbel samples is one
        logistic sample.
      predicted_TE: logits of the auxiliary router, handed on.
    """
    plain_TE = logit_TE
    if noise_key is not None:
        logit_TE = logit_TE + jax.random.logistic(noise_key, logit_TE.shape, jnp.float32)
    expert_E = jnp.arange(logit_TE.shape[1], dtype=jnp.uint32)
    bits_TE = _mix(place_T[:, None] ^ _mix(seed + expert_E * jnp.uint32(0x9E3779B9)))
    # 24 bits are exact in float32.
    uniform_TE = (bits_TE >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)
    return Score(logit_TE, jax.lax.stop_gradient(logit_TE) + jitter * uniform_TE, plain_TE, predicted_TE)


def place_hash(row, position):
    """uint32 hash of a token's row (within the update) and position in the row; broadcasts."""
    return _mix(_mix(jnp.asarray(row).astype(jnp.uint32) + jnp.uint32(1)) + jnp.asarray(position).astype(jnp.uint32))


def _mix(bits):
    """The finaliser of MurmurHash3: every input bit flips every output bit about half of the time."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def count_taken(times_T, modality_T, modalities: int):
    """Tokens of each modality taken by 0, 1, 2+ experts: int32 (M, 3).

    Args:
      times_T: int32, experts that took each token. modality_T: int32, -1 on padding.
    """
    of_modality_MT = modality_T == jnp.arange(modalities)[:, None]
    times_3T = jnp.minimum(times_T, 2) == jnp.arange(3)[:, None]
    return jnp.sum(of_modality_MT[:, None] & times_3T, axis=-1, dtype=jnp.int32)
