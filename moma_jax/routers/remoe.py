"""ReMoE: a token enters every expert whose logit is positive, weighted by the logit.

Gates are continuous, so the router learns by gradients alone. An L1 term on the gates, heavier for experts that take
much, makes them sparse: its weight grows by `factor` after every update in which tokens entered more than `mean`
experts on average and shrinks otherwise. The paper has one weight for the model, here every layer and group has its
own. In the beginning half of all pairs are positive, so slots need a `slack` of half the experts over `mean`, or tokens
are dropped there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from moma_jax.by_token import ByToken, shares
from moma_jax.errors import InputError
from moma_jax.fields import setting
from moma_jax.late import jax, jnp
from moma_jax.router import MOST

LIGHTEST, HEAVIEST = 1e-8, 1e2
"""Bounds of the L1 term's weight, below which it does nothing and above which it outweighs every other loss: without
them a weight that was pushed one way for long would take hundreds of updates to come back."""


@dataclass(frozen=True)
class ReMoE(ByToken):
    """ReLU routing."""

    mean: float = setting(1.0, least=0.01, most=MOST)
    """Experts of a token on average."""
    first: float = setting(LIGHTEST, least=LIGHTEST, most=1)
    """Weight of the L1 term in the beginning."""
    factor: float = setting(1.2, least=1, most=10)
    """By which it grows or shrinks, per update."""

    losses: ClassVar[tuple[str, ...]] = ("l1",)
    paper: ClassVar[str] = "ReMoE 2412.14711"

    def state(self, experts):
        return super().state(experts) | {"log_weight": np.float32(math.log(self.first))}

    def moved(self, state):
        seen = state["eligible"] > 0
        step = jnp.where(seen, jnp.sign(shares(state).sum(-1) - self.mean), 0.0)
        moved = state["log_weight"] + math.log(self.factor) * step
        return state | {"log_weight": jnp.clip(moved, math.log(LIGHTEST), math.log(HEAVIEST))}

    def choose(self, score, state, key=None):
        return score.logit_TE > 0, jax.nn.relu(score.logit_TE)

    def losses_of(self, score, enters_TE, gate_TE, eligible_T, state):
        count = jnp.maximum(eligible_T.sum(), 1)
        load_E = enters_TE.sum(0) * (enters_TE.shape[1] / self.mean) / count
        mean_E = gate_TE.sum(0) / count
        return {"l1": jnp.exp(state["log_weight"]) * jnp.sum(load_E * mean_E)}

    def first_gate(self, experts):
        raise InputError(
            "model.router: remoe lets nothing in where a new router's logits are 0; upcycle to another rule"
        )

    def experts_of_a_token(self, experts):
        return Fraction(self.mean).limit_denominator(10000)
