"""Top-p: a token enters its likeliest experts until they have a share p of its probability.

Tokens of which the router is sure enter one expert, others several. The paper fixes p; here p may follow the load, so
that a token enters `mean` experts on average and FLOPs are those of other rules. An entropy loss keeps routers from
being unsure of everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from moma_jax.by_token import ByToken, ahead, balance_loss, mean_of, shares
from moma_jax.fields import setting
from moma_jax.late import jax, jnp
from moma_jax.router import MOST

LEAST_SHARE = 0.01
"""Of p, and of what is left to 1."""


@dataclass(frozen=True)
class TopP(ByToken):
    """Dynamic number of experts."""

    mean: float = setting(2.0, least=1, most=MOST)
    """Experts of a token on average, which slots and FLOPs are counted for."""
    share: float = setting(0.4, least=LEAST_SHARE, most=1 - LEAST_SHARE)
    """p in the beginning."""
    rate: float = setting(0.01, least=0, most=1)
    """How fast p follows the load, per update and expert too many or too few; 0: it stays."""
    balance: float = setting(0.01, least=0)
    """Weight of the load-balancing loss, which goes by shares of choices: 1 where loads are even, whatever the mean."""
    entropy: float = setting(1e-4, least=0)
    """Weight of the entropy of a token's probabilities, in nats."""

    losses: ClassVar[tuple[str, ...]] = ("balance", "entropy")
    paper: ClassVar[str] = "Harder Tasks Need More Experts 2403.07652"

    def state(self, experts):
        return super().state(experts) | {"share": np.float32(self.share)}

    def moved(self, state):
        if not self.rate:
            return state
        surplus = jnp.where(state["eligible"] > 0, shares(state).sum(-1) - self.mean, 0.0)
        return state | {"share": jnp.clip(state["share"] - self.rate * surplus, LEAST_SHARE, 1 - LEAST_SHARE)}

    def choose(self, score, state, key=None):
        chance_NE = jax.nn.softmax(score.logit_TE)
        likelier_NE = jnp.where(ahead(chance_NE), jax.lax.stop_gradient(chance_NE)[..., None, :], 0.0).sum(-1)
        enters_NE = likelier_NE < state["share"]  # the likeliest always does
        return enters_NE, jnp.where(enters_NE, chance_NE, 0.0)

    def losses_of(self, score, enters_TE, gate_TE, eligible_T, state):
        chance_TE = jax.nn.softmax(score.logit_TE)
        nats_T = -(chance_TE * jax.nn.log_softmax(score.logit_TE)).sum(-1)
        return {
            "balance": self.balance * balance_loss(chance_TE, enters_TE, eligible_T),
            "entropy": self.entropy * mean_of(nats_T, eligible_T),
        }

    def experts_of_a_token(self, experts):
        return Fraction(self.mean).limit_denominator(10000)

    def first_gate(self, experts):
        # So many equal probabilities are a share of `share`, whatever number slots are counted for.
        entered = math.ceil(Fraction(self.share).limit_denominator(10000) * experts)
        return Fraction(entered, experts) / self.experts_of_a_token(experts)
