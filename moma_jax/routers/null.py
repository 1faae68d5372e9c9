"""Null experts: token choice among real experts and such as compute nothing or pass the token on.

A token whose choices fall on null experts passes fewer real ones, so the number of experts varies by token. Zero
experts give nothing, copy experts give the token itself, weighted by its gate. Their loads are balanced as one: which
of them a token meets does not matter. Gates are softmax probabilities, as in MoE++; AdaMoE divides those of a token's
real experts by their sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from moma_jax.by_token import ByToken, balance_loss, highest
from moma_jax.errors import InputError
from moma_jax.fields import setting
from moma_jax.late import jax, jnp
from moma_jax.router import MOST, Parameter


@dataclass(frozen=True)
class Null(ByToken):
    """Token choice with null experts."""

    top: int = setting(2, above=0, most=MOST)
    """Experts of a token, null ones included."""
    zero: int = setting(4, least=0, most=MOST)
    """Null experts that give nothing, beside each group's real ones."""
    copy: int = setting(0, least=0, most=MOST)
    """Null experts that give the token itself."""
    balance: float = setting(0.01, least=0)
    """Weight of the load-balancing loss over real and null experts."""

    losses: ClassVar[tuple[str, ...]] = ("balance",)
    paper: ClassVar[str] = "AdaMoE 2406.13233, MoE++ 2410.07348"

    def parameters(self, width, experts):
        columns = experts + self.zero + self.copy
        return {"router_DE": Parameter((width, columns), ("embed", None), 1 / math.sqrt(width))}

    def flops(self, width, experts):
        return 2 * width * (experts + self.zero + self.copy)

    def choose(self, score, state, key=None):
        enters_NX, gate_NX = self._of_all(score)
        experts = state["taken_E"].shape[-1]
        return enters_NX[..., :experts], gate_NX[..., :experts]

    def copies(self, score, state):
        return self._of_all(score)[1][..., -self.copy :].sum(-1) if self.copy else None

    def _of_all(self, score):
        """(enters, gates) of real experts, zero ones and copies, in this order."""
        chance_NX = jax.nn.softmax(score.logit_TE)
        enters_NX = highest(score.logit_TE, self.top)
        return enters_NX, jnp.where(enters_NX, chance_NX, 0.0)

    def losses_of(self, score, enters_TE, gate_TE, eligible_T, state):
        experts, nulls = enters_TE.shape[1], self.zero + self.copy
        enters_TX = self._of_all(score)[0] & eligible_T[:, None]
        null_T1 = enters_TX[:, experts:].sum(-1, keepdims=True) / max(nulls, 1)  # as if each had its even part
        even_TX = jnp.concatenate([enters_TX[:, :experts].astype(jnp.float32), jnp.repeat(null_T1, nulls, axis=1)], 1)
        return {"balance": self.balance * balance_loss(jax.nn.softmax(score.logit_TE), even_TX, eligible_T)}

    def experts_of_a_token(self, experts):
        return Fraction(self.top * experts, experts + self.zero + self.copy)

    def refuses(self, experts, asked):
        if self.top > (every := experts + self.zero + self.copy):
            return f"router.top: {self.top} experts of a token, of {every} with null ones; give {every} or fewer"
        return super().refuses(experts, asked)

    def first_gate(self, experts):
        if self.copy:
            raise InputError("model.router: null: copies would add to the seed's function; upcycle with copy=0")
        return Fraction(1, experts + self.zero + self.copy)
