"""Sinkhorn: a token enters the experts of the largest entries of an even transport plan of its routing group's logits.

In training every expert has a price, found by Sinkhorn's iterations over all eligible tokens (arXiv 2202.01169), so
that loads are even without a loss; it depends on later tokens. Fewer tokens than experts cannot be spread evenly and
meet no prices. At inference there are none: a token enters the experts of its highest logits. The gate is the sigmoid
of the logit, as in BASE layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from moma_jax.by_token import ByToken, highest
from moma_jax.fields import setting
from moma_jax.late import jax, jnp
from moma_jax.router import MOST


@dataclass(frozen=True)
class Sinkhorn(ByToken):
    """Token choice at prices that even the load."""

    top: int = setting(1, above=0, most=MOST)
    """Experts of a token."""
    iterations: int = setting(8, least=1, most=1000)
    """Of rows and columns in turn."""

    sees_later: ClassVar[bool] = True
    paper: ClassVar[str] = "BASE 2103.16716, Sinkhorn-BASE 2202.01169"

    def select(self, score, eligible_T, quota, state, key):
        logit_TE = jax.lax.stop_gradient(score.logit_TE)

        def dearer(_, price_E):
            share_TE = jax.nn.softmax(logit_TE - price_E) * eligible_T[:, None]
            return price_E + jnp.log(jnp.maximum(share_TE.sum(0), 1e-9))  # of equal loads it moves all alike

        price_E = jax.lax.fori_loop(1, self.iterations, dearer, dearer(0, 0.0))
        price_E = jnp.where(eligible_T.sum() < len(price_E), 0.0, price_E)
        return super().select(score._replace(rank_TE=logit_TE - price_E), eligible_T, quota, state, key)

    def choose(self, score, state, key=None):
        enters_NE = highest(score.rank_TE, self.top)
        return enters_NE, jnp.where(enters_NE, jax.nn.sigmoid(score.logit_TE), 0.0)

    def experts_of_a_token(self, experts):
        return Fraction(self.top)
