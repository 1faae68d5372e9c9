"""Hash routing, a control: a token's id alone says which expert it enters, by a fixed table.

Nothing is learned and nothing of the context is seen. The same in all layers. Frequent ids make loads uneven, which
`routing_dropped_<group>` and `routing_empty_slots_<group>` tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moma_jax.by_token import Unlearned
from moma_jax.fields import setting
from moma_jax.late import jnp
from moma_jax.router import mixed_bits


@dataclass(frozen=True)
class Hash(Unlearned):
    """Experts by token id."""

    seed: int = setting(0, least=0, below=2**32)
    """Of the table."""

    paper: ClassVar[str] = "Hash Layers 2106.04426"

    def entered(self, score, experts, key):
        drawn_N = mixed_bits(mixed_bits(score.id_T) ^ jnp.uint32(self.seed))
        first_N = (drawn_N % experts).astype(jnp.int32)
        # Further experts are the next ones: distinct, and which is first differs by id.
        behind_NE = (jnp.arange(experts) - first_N[..., None]) % experts
        return behind_NE < self.top
