"""Hash routing, a control: a token's id alone says which expert it enters, by a fixed table.

Nothing is learned and nothing of the context is seen. The same in all layers. Frequent ids make loads uneven, which
`routing_dropped_<group>` and `routing_empty_slots_<group>` tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from moma_jax.by_token import ByToken
from moma_jax.fields import setting
from moma_jax.late import jnp
from moma_jax.router import mixed_bits


@dataclass(frozen=True)
class Hash(ByToken):
    """Experts by token id."""

    top: int = setting(1, above=0)
    """Experts of a token; each weighs 1 / top."""
    seed: int = setting(0, least=0, below=2**32)
    """Of the table."""

    paper: ClassVar[str] = "Hash Layers 2106.04426"

    def parameters(self, width, experts):
        return {}

    def logits(self, x_ND, weights):
        return jnp.zeros((*x_ND.shape[:-1], 1), jnp.float32)

    def flops(self, width, experts):
        return 0

    def choose(self, score, state, key=None):
        experts = state["taken_E"].shape[-1]
        drawn_N = mixed_bits(mixed_bits(score.id_T) ^ jnp.uint32(self.seed))
        first_N = (drawn_N % experts).astype(jnp.int32)
        # Further experts are the next ones: distinct, and which is first differs by id.
        behind_NE = (jnp.arange(experts) - first_N[..., None]) % experts
        enters_NE = behind_NE < self.top
        return enters_NE, enters_NE.astype(jnp.float32) / self.top

    def experts_of_a_token(self, experts):
        return Fraction(self.top)

    def first_gate(self, experts):
        return Fraction(1, self.top)
