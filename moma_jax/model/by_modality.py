"""Tokens sorted by modality, so that each meets weights of its modality's own, and put back (Mixture-of-Transformers).

A routing group has as many slots for a modality as its quota, one modality's after the other's, given by position:
beyond a quota, which the packer keeps, the latest positions would have none. Every token has one slot and every slot
one token at most, so both ways, and both gradients, are gathers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moma_jax.geometry import GroupSlots, LayerShape


class Sorted(NamedTuple):
    """Where tokens stand when sorted: S slots of a routing group of T tokens.

    Attributes:
      token_GS: int32 token of each slot, T where it is empty. slot_GT: int32 slot of each token, S where it has none.
    """

    token_GS: Any
    slot_GT: Any


def sort_by_modality(shape: LayerShape, modality_GT) -> Sorted:
    """The tokens of G routing groups sorted into the slots of `shape.projections`; padding, -1, has none."""
    groups, tokens = modality_GT.shape
    slots, start = sum(own.slots for own in shape.projections), 0
    slot_GT = jnp.full(modality_GT.shape, slots, jnp.int32)
    for own in shape.projections:
        here_GT = modality_GT == own.group.modalities[0]
        by_position_GT = here_GT.reshape(groups, -1, shape.sequence).swapaxes(1, 2).reshape(groups, tokens)
        rank_GT = jnp.cumsum(by_position_GT, axis=1, dtype=jnp.int32) - 1
        rank_GT = rank_GT.reshape(groups, shape.sequence, -1).swapaxes(1, 2).reshape(groups, tokens)
        slot_GT = jnp.where(here_GT & (rank_GT < own.slots), start + rank_GT, slot_GT)
        start += own.slots
    token_GS = jnp.full((groups, slots), tokens, jnp.int32)
    own_T = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), slot_GT.shape)
    return Sorted(token_GS.at[jnp.arange(groups)[:, None], slot_GT].set(own_T, mode="drop"), slot_GT)


def on_slots(
    run: Callable, x_GTX, where: Sorted, projections: tuple[GroupSlots, ...], beside: Sequence[Any] = ()
) -> tuple:
    """What `run` gives every token under the weights of its modality; several arrays, 0 for tokens without a slot.

    Args:
      run: (modality's name, its slots' x_GCX, what they have of each of `beside`) -> arrays (G, C, ...).
      x_GTX: any axes behind the tokens. beside: further arrays (G, T, ...), without gradient.
    """
    sorted_GSX = moved(x_GTX, where.token_GS, where.slot_GT)
    others = [moved(each, where.token_GS, where.slot_GT) for each in beside]
    found, start = [], 0
    for own in projections:
        part = slice(start, start + own.slots)
        found.append(run(own.group.name, sorted_GSX[:, part], *(each[:, part] for each in others)))
        start += own.slots
    whole = (jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    return tuple(moved(out_GSX, where.slot_GT, where.token_GS) for out_GSX in whole)


@jax.custom_vjp
def moved(x_GAX, from_GB, to_GA):
    """x_GAX[g, from_GB[g, b]], (G, B, ...), 0 where that is A; `to_GA` is the way back, by which gradients go."""
    flat_GAX = x_GAX.reshape(*x_GAX.shape[:2], -1)
    out_GBX = jnp.take_along_axis(flat_GAX, from_GB[..., None], axis=1, mode="fill", fill_value=0)
    return out_GBX.reshape(*from_GB.shape, *x_GAX.shape[2:])


moved.defvjp(
    lambda x_GAX, from_GB, to_GA: (moved(x_GAX, from_GB, to_GA), (from_GB, to_GA)),
    lambda saved, d_out_GBX: (moved(d_out_GBX, saved[1], saved[0]), None, None),
)
