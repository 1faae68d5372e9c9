"""Random routing, a control: tokens enter experts that are drawn anew in every update.

No expert can learn to be different, so what another rule gains over this one it gains by who takes which token. At
inference the draw is a hash of the token's id and position: the same in a whole row, in cached decoding, and in all
layers, which draw by themselves in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moma_jax.by_token import Unlearned, highest
from moma_jax.late import jax, jnp
from moma_jax.router import mixed_bits


@dataclass(frozen=True)
class Random(Unlearned):
    """Random experts."""

    paper: ClassVar[str] = "THOR 2110.04260"

    def entered(self, score, experts, key):
        if key is not None:
            draw_NE = jax.random.uniform(key, (*score.id_T.shape, experts))
        else:
            place_N1 = mixed_bits(mixed_bits(score.id_T + 1) + score.position_T.astype(jnp.uint32))[..., None]
            draw_NE = (mixed_bits(place_N1 + jnp.arange(experts, dtype=jnp.uint32)) >> 8).astype(jnp.float32)
        return highest(draw_NE, self.top)
