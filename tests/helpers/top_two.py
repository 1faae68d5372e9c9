"""A routing rule of somebody's own, as one writes it outside the package: every token chooses two experts.

Softmax gates, a load-balancing loss (Switch Transformers), a bias that follows the load and lives in the checkpoint
(DeepSeek-V3), slots given away by position, one recorded metric; causal by nature.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moma_jax.fields import setting
from moma_jax.router import CAUSAL, Routed, Router, take_entering


@dataclass(frozen=True)
class TopTwo(Router):
    """Token choice."""

    top: int = setting(2, above=0)
    """Experts of a token."""
    slack: float = setting(1.5, least=1)
    """Slots of an expert over its even share."""
    balance: float = setting(0.01, least=0)
    """Weight of the load-balancing loss."""
    rate: float = setting(0.01, least=0)
    """How fast biases follow the load, per update."""
    causal: ClassVar[tuple[str, ...]] = (CAUSAL,)

    def state(self, experts):
        return {"bias_E": np.zeros(experts, np.float32), "load_E": np.full(experts, 1 / experts, np.float32)}

    def decide(self, score, state, routing):
        """The `top` experts of the highest biased logit; gates are their softmax, without the bias."""
        logit_NE = score.plain_TE
        _, expert_NK = jax.lax.top_k(jax.lax.stop_gradient(logit_NE) + state["bias_E"], self.top)
        enters_NE = jax.nn.one_hot(expert_NK, logit_NE.shape[-1], dtype=bool).any(-2)
        gate_NE = jax.nn.softmax(jnp.where(enters_NE, logit_NE, -jnp.inf), axis=-1)
        return enters_NE, jnp.where(enters_NE, gate_NE, 0.0)

    def select(self, score, eligible_T, quota, state, key):
        # The load of the update before, a mean over routing groups and devices, so that all of them move alike.
        mean = 1 / len(state["load_E"])
        state = state | {"bias_E": state["bias_E"] + self.rate * jnp.sign(mean - state["load_E"])}
        enters_TE, gate_TE = self.decide(score, state, CAUSAL)
        enters_TE &= eligible_T[:, None]
        selection = take_entering(enters_TE, gate_TE, score.order_T, self.slots(quota, len(eligible_T)))
        count = jnp.maximum(eligible_T.sum(), 1)
        load_E = enters_TE.sum(0) / (self.top * count)
        chance_E = jnp.where(eligible_T[:, None], jax.nn.softmax(score.plain_TE), 0).sum(0) / count
        dropped = 1 - selection.filled_EC.sum() / jnp.maximum(enters_TE.sum(), 1)
        loss = self.balance * len(load_E) * jnp.sum(jax.lax.stop_gradient(load_E) * chance_E)
        return Routed(selection, state | {"load_E": load_E}, {"balance": loss}, {"token_drop": dropped})

    def capacity(self, experts, asked):
        return Fraction(min(self.top, experts), experts)

    def slots(self, quota, tokens):
        return min(tokens, int(np.ceil(quota.slots * self.slack)))

    def first_gate(self, experts):
        return Fraction(1, min(self.top, experts))


def first_come(score, eligible_T, quota, state, key):
    """The short form of a rule: every expert takes the first tokens of the routing group."""
    from moma_jax.router import Selection

    (index_C,) = jnp.nonzero(eligible_T, size=quota.slots, fill_value=0)
    filled_C = jnp.arange(quota.slots) < quota.take(eligible_T.sum())
    index_EC, filled_EC = (jnp.broadcast_to(x, (score.logit_TE.shape[1], quota.slots)) for x in (index_C, filled_C))
    gate_EC = jax.nn.sigmoid(jnp.take_along_axis(score.logit_TE.T, index_EC, axis=1))
    return Selection(index_EC, gate_EC, filled_EC), state, {}
