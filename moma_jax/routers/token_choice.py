"""Token choice: every token enters its best k experts, whose loads a loss or a bias evens.

Loads are kept even by a loss (Switch Transformers), or without one by a bias that is added to the scores for choosing
alone, and that rises where fewer tokens came than the mean and sinks where more did (DeepSeek-V3). The z loss keeps
logits small (ST-MoE). Fine-grained experts beside a shared one (DeepSeekMoE, arXiv 2401.06066) are `model.ffn`
16t16i+1x, a quarter of the hidden size, and `top` 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import numpy as np

from moma_jax.by_token import ByToken, balance_loss, highest, mean_of, shares
from moma_jax.fields import setting
from moma_jax.late import jax, jnp
from moma_jax.router import MOST


@dataclass(frozen=True)
class TokenChoice(ByToken):
    """Top-k token choice."""

    top: int = setting(1, above=0, most=MOST)
    """Experts of a token."""
    gates: Literal["softmax", "sigmoid"] = "softmax"
    """What the router's logits become: shares of all experts, or a gate for each by itself."""
    normalise: bool = False
    """Gates of a token's experts are divided by their sum, for `top` above 1."""
    balance: float = setting(0.01, least=0)
    """Weight of the load-balancing loss."""
    z: float = setting(0.001, least=0)
    """Weight of the z loss, the mean square of the logarithm of a token's partition function."""
    bias_rate: float = setting(0.0, least=0)
    """How fast biases follow the load, per update; 0: there are none. The loss stays unless `balance` is 0, too."""

    losses: ClassVar[tuple[str, ...]] = ("balance", "z")
    paper: ClassVar[str] = "Switch Transformers 2101.03961, ST-MoE 2202.08906, loss-free 2408.15664"

    def state(self, experts):
        bias = {"bias_E": np.zeros(experts, np.float32)} if self.bias_rate else {}
        return super().state(experts) | bias

    def moved(self, state):
        if not self.bias_rate:
            return state
        share_E = shares(state)
        surplus_E = share_E - share_E.mean(-1, keepdims=True)
        return state | {"bias_E": state["bias_E"] - self.bias_rate * jnp.sign(surplus_E)}

    def choose(self, score, state, key=None):
        affinity_NE = self._affinities(score.logit_TE)
        bias_E = state["bias_E"] if self.bias_rate else 0.0
        enters_NE = highest(affinity_NE + bias_E, self.top)
        gate_NE = jnp.where(enters_NE, affinity_NE, 0.0)
        if self.normalise and self.top > 1:
            gate_NE /= jnp.maximum(gate_NE.sum(-1, keepdims=True), 1e-9)
        return enters_NE, gate_NE

    def _affinities(self, logit_NE):
        return jax.nn.softmax(logit_NE) if self.gates == "softmax" else jax.nn.sigmoid(logit_NE)

    def losses_of(self, score, enters_TE, gate_TE, eligible_T, state):
        affinity_TE = self._affinities(score.logit_TE)
        chance_TE = affinity_TE / affinity_TE.sum(-1, keepdims=True)
        z_T = jnp.square(jax.nn.logsumexp(score.logit_TE, axis=-1))
        return {
            "balance": self.balance * balance_loss(chance_TE, enters_TE, eligible_T),
            "z": self.z * mean_of(z_T, eligible_T),
        }

    def experts_of_a_token(self, experts):
        return Fraction(self.top)

    def first_gate(self, experts):
        if self.normalise and self.top > 1:
            return Fraction(1, self.top)
        return Fraction(1, 2) if self.gates == "sigmoid" else Fraction(1, experts)
