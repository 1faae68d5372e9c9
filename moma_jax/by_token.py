"""Routing rules whose tokens choose, each by itself, so that they are causal by nature: what these share.

A rule is a subclass of `ByToken` with the one method `choose`; moma_jax/routers has several. The contract and the axes
are those of moma_jax/router.py. Imports no JAX.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from moma_jax.errors import InputError
from moma_jax.fields import setting
from moma_jax.late import jax, jnp
from moma_jax.router import CAUSAL, MOST, Routed, Router, Score, name_of, take_entering

LOADS = ("experts_chosen", "dropped", "empty_slots", "busiest")
"""What is recorded of a group of experts: experts that a token chose, the share of choices without a slot, the share of
slots without a token, and the choices of the expert that has most over an even share."""


@dataclass(frozen=True)
class ByToken(Router):
    """A rule whose tokens choose, each by itself and in training as at inference: a subclass says how, in `choose`.

    An expert has `slack` times the slots of its share; in training those go to tokens by position, so that what is
    dropped never depends on later ones, and at inference nothing is dropped. The state says of the latest update how
    many tokens chose each expert, and `moved` may make something of it for the next.
    """

    slack: float = setting(2.0, least=1, most=MOST)
    """Slots of an expert over its even share; beyond them the latest positions are dropped."""

    causal: ClassVar[tuple[str, ...]] = (CAUSAL,)
    starts_from_zero: ClassVar[bool] = False
    sees_later: ClassVar[bool] = False

    def choose(self, score: Score, state: Any, key=None):
        """(enters_NE bool, gate_NE float32), gates 0 where a token does not enter.

        Args:
          state: as `moved`. key: PRNG key in training; None at inference.
        """
        raise NotImplementedError

    def moved(self, state: Any) -> Any:
        """The state with what follows from the latest update, before this one."""
        return state

    def losses_of(self, score: Score, enters_TE, gate_TE, eligible_T, state: Any) -> dict[str, Any]:
        """Losses of one routing group by name, `enters_TE` and `gate_TE` of eligible tokens alone. Their mean over
        routing groups is what trains, each weighing alike, so that microbatches and devices may divide them in any way;
        keep groups large where loads are to be even."""
        return {}

    def experts_of_a_token(self, experts: int) -> Fraction:
        """How many of a group's experts a token enters, on average."""
        return Fraction(1)

    def state(self, experts: int) -> dict[str, Any]:
        return {"taken_E": np.zeros(experts, np.float32), "eligible": np.float32(0)}

    def select(self, score, eligible_T, quota, state, key) -> Routed:
        state = self._told(state)
        enters_TE, gate_TE = self.choose(score, state, key)
        enters_TE &= eligible_T[:, None]
        gate_TE = jnp.where(enters_TE, gate_TE, 0.0)
        selection = take_entering(enters_TE, gate_TE, score.order_T, self.slots(quota, len(eligible_T)))
        wanted, filled = enters_TE.sum(), selection.filled_EC.sum()
        counts = {
            "taken_E": enters_TE.sum(0, dtype=jnp.float32),
            "eligible": eligible_T.sum(dtype=jnp.float32),
        }
        loads = (
            wanted / jnp.maximum(eligible_T.sum(), 1),
            (wanted - filled) / jnp.maximum(wanted, 1),
            1.0 - filled / selection.filled_EC.size,
            enters_TE.sum(0).max() * enters_TE.shape[1] / jnp.maximum(wanted, 1),
        )
        losses = self.losses_of(score, enters_TE, gate_TE, eligible_T, state)
        return Routed(selection, state | counts, losses, dict(zip(LOADS, loads, strict=True)))

    def decide(self, score, state, routing):
        return self.choose(score, self._told(state))

    def _told(self, state: Any) -> Any:
        """The state that this update, or inference, begins with."""
        if not state:
            raise InputError(
                f"routing_state: {name_of(self)} needs what it keeps beside the model; pass its routing_state"
            )
        return self.moved(state)

    def capacity(self, experts, asked):
        return Fraction(self.experts_of_a_token(experts)) / experts

    def slots(self, quota, tokens):
        return quota.with_slack(self.slack, tokens)

    def refuses(self, experts, asked):
        if asked is not None:
            return (
                f"capacity: {float(asked):g}: tokens choose under {name_of(self)}; leave it out and set the rule's own"
            )
        most = self.experts_of_a_token(experts)
        if most > experts:
            return f"router: {name_of(self)}: {float(most):g} experts of a token, of {experts}; name fewer"
        return None


@dataclass(frozen=True)
class Unlearned(ByToken):
    """A rule without a score network: `top` experts of a token, each with the weight 1 / top."""

    top: int = setting(1, above=0, most=MOST)
    """Experts of a token; each weighs 1 / top."""

    def parameters(self, width, experts):
        return {}

    def logits(self, x_ND, weights):
        return jnp.zeros((*x_ND.shape[:-1], 1), jnp.float32)

    def flops(self, width, experts):
        return 0

    def entered(self, score: Score, experts: int, key):
        """enters_NE bool, `top` of each token. Args: key: as of `choose`."""
        raise NotImplementedError

    def choose(self, score, state, key=None):
        enters_NE = self.entered(score, state["taken_E"].shape[-1], key)
        return enters_NE, enters_NE.astype(jnp.float32) / self.top

    def experts_of_a_token(self, experts):
        return Fraction(self.top)

    def first_gate(self, experts):
        return Fraction(1, self.top)


def mean_of(value_T, eligible_T):
    """A mean over the eligible tokens of a routing group; 0 where there are none."""
    return jnp.sum(jnp.where(eligible_T, value_T, 0.0)) / jnp.maximum(eligible_T.sum(), 1)


def balance_loss(chance_TE, enters_TE, eligible_T):
    """E * sum of f_e P_e, 1 where loads are even: the share f of choices that fell on an expert, and the mean P of what
    the router gave it (Switch Transformers, arXiv 2101.03961, Eq. 4)."""
    share_E = enters_TE.sum(0) / jnp.maximum(enters_TE.sum(), 1)
    chance_E = jnp.where(eligible_T[:, None], chance_TE, 0.0).sum(0) / jnp.maximum(eligible_T.sum(), 1)
    return len(share_E) * jnp.sum(jax.lax.stop_gradient(share_E) * chance_E)


def highest(rank_NE, count: int):
    """Which experts are among the `count` highest of their token, bool (..., E); equal ones go to the lower expert."""
    return ahead(rank_NE).sum(-1) < count


def ahead(rank_NE):
    """Whether an expert (last axis) stands before another (the one before it) by rank, bool (..., E, E).

    What is summed over it is one fused pass; accelerators sort so few numbers slowly.
    """
    number_E, rank_NE = jnp.arange(rank_NE.shape[-1]), jax.lax.stop_gradient(rank_NE)
    other_NE, own_NE = rank_NE[..., None, :], rank_NE[..., None]
    return (other_NE > own_NE) | ((other_NE == own_NE) & (number_E < number_E[:, None]))


def shares(state: Any):
    """How many of a group's experts an eligible token chose in the latest update, by expert, (..., E); 0 before it."""
    return state["taken_E"] / jnp.maximum(state["eligible"][..., None], 1.0)
