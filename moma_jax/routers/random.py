"""Random routing, a control: tokens enter experts that are drawn anew in every update.

No expert can learn to be different, so what another rule gains over this one it gains by who takes which token. At
inference the draw is a hash of the token's id and position: the same in a whole row and in cached decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from moma_jax.by_token import ByToken
from moma_jax.fields import setting
from moma_jax.late import jax, jnp
from moma_jax.router import mixed_bits


@dataclass(frozen=True)
class Random(ByToken):
    """Random experts."""

    top: int = setting(1, above=0)
    """Experts of a token; each weighs 1 / top."""

    paper: ClassVar[str] = "THOR 2110.04260"

    def parameters(self, width, experts):
        return {}

    def logits(self, x_ND, weights):
        return jnp.zeros((*x_ND.shape[:-1], 1), jnp.float32)

    def flops(self, width, experts):
        return 0

    def choose(self, score, state, key=None):
        experts = state["taken_E"].shape[-1]
        shape = (*score.id_T.shape, experts)
        if key is not None:
            draw_NE = jax.random.uniform(key, shape)
        else:
            place_N1 = mixed_bits(mixed_bits(score.id_T + 1) + score.position_T.astype(jnp.uint32))[..., None]
            draw_NE = (mixed_bits(place_N1 + jnp.arange(experts, dtype=jnp.uint32)) >> 8).astype(jnp.float32)
        _, expert_NK = jax.lax.top_k(draw_NE, self.top)
        enters_NE = jax.nn.one_hot(expert_NK, experts, dtype=bool).any(-2)
        return enters_NE, enters_NE.astype(jnp.float32) / self.top

    def experts_of_a_token(self, experts):
        return Fraction(self.top)

    def first_gate(self, experts):
        return Fraction(1, self.top)
