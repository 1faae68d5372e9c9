"""Experts at work: tokens to slots, slots through the experts wherever they live, and back (paper Eq. 1).

Everything here acts on a Selection and does not know who chose.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moma_jax import sharding
from moma_jax.model.auxiliary import Auxiliary
from moma_jax.model.routing import Selection
from moma_jax.sharding import EXPERT

BLOCK = 256
"""Slots that are computed together where only filled ones are (`in_blocks`)."""


class Experts(NamedTuple):
    """Weights of one group of experts, float32.

    Attributes:
      gate_EDF, up_EDF, down_EFD: projections of each expert's SwiGLU; None where the "expert" is a whole layer that a
        router lets some tokens enter (mixture of depths).
      router_DE: None where the group has one expert and no router.
      auxiliary: the auxiliary router, where the model has one.
    """

    gate_EDF: Any = None
    up_EDF: Any = None
    down_EFD: Any = None
    router_DE: Any = None
    auxiliary: Auxiliary | None = None


def axes_of(experts: int, routed: bool = False, auxiliary: bool = False) -> Experts:
    """Logical axes of the weights of a group of so many experts.

    Experts live on the mesh axis "expert". A group that it does not divide is stored along it in parts of the width,
    like everything else, and each device computes the slots of its own tokens.
    """
    expert, embed = ("expert", "expert_embed") if sharding.dealt(experts) else (None, "embed")
    return Experts(
        (expert, embed, "ffn"),
        (expert, embed, "ffn"),
        (expert, "ffn", embed),
        ("embed", None) if routed else None,
        Auxiliary(("embed", None), (None, None)) if auxiliary else None,
    )


def gathered(experts: Experts, axes: Experts, dtype, everyone: bool = False) -> Experts:
    """What a device computes with: its experts' weights in compute dtype, routers in float32, whole along the width.

    Args:
      axes: of `axes_of`. everyone: experts that live elsewhere too.
    """
    stored = sharding.STORED + (("expert",) if everyone else ())
    matrices = (sharding.whole(w, own, dtype, stored) for w, own in zip(experts[:3], axes[:3], strict=True))
    routers = jax.tree.map(lambda w, own: sharding.whole(w, own, w.dtype), experts[3:], axes[3:])
    return Experts(*matrices, *routers)


def swiglu(x_END, experts: Experts, weight_EN=None):
    """Weighted SwiGLU of each expert on its own N tokens: weight * (silu(x W_gate) * (x W_up)) W_down.

    Args:
      x_END: compute dtype, in which everything is done. weight_EN: float32 router gates; None for 1.

    The weight multiplies the tokens before the projection that SwiGLU is linear in: the narrowest place. The backward
    pass keeps the two projections and computes the hidden vector anew from them: no further matrix product.
    """
    weight_EN = jnp.ones(x_END.shape[:2], x_END.dtype) if weight_EN is None else weight_EN
    operands = (x_END, experts.gate_EDF, experts.up_EDF, experts.down_EFD, weight_EN)
    match sharding.platform():
        case "cpu":
            # One expert after the other, so that its hidden vectors stay in the cache from one product to the next: a
            # batch of experts costs about 6% more.
            return jnp.stack([swiglu_of(*expert) for expert in zip(*map(_unstacked, operands), strict=True)])
        case _:
            return swiglu_of(*operands)


def _unstacked(axis_E) -> list:
    """The slices along the first axis. A split, whose gradient is a concatenation; an index's is padding and a sum."""
    return [part[0] for part in jax.lax.split(axis_E, [1] * len(axis_E))]


def swiglu_of(x_ND, gate_DF, up_DF, down_FD, weight_N):
    """SwiGLU of one expert, or of several where every array has a leading axis E."""
    dtype = x_ND.dtype

    def contract(gate_NF, up_NF, down_FD):
        return (jax.nn.silu(gate_NF) * up_NF) @ down_FD.astype(dtype)

    gate_NF = x_ND @ gate_DF.astype(dtype)
    up_NF = (x_ND * weight_N[..., None].astype(dtype)) @ up_DF.astype(dtype)
    return jax.checkpoint(contract, prevent_cse=False)(gate_NF, up_NF, down_FD)


def in_slots(x_ND, taken: dict[str, Selection], routed: dict[str, Experts]):
    """Every slot computed, filled or not: static work, for selections that fill nearly all. Returns y_ND.

    Args:
      taken: Selections (G, E, C) into the N tokens, by group of experts.
    """
    taken = {name: Selection(*map(flat, selection)) for name, selection in taken.items()}
    y_ND, slots = jnp.zeros_like(x_ND), dispatch_all(x_ND, [own.index_EC for own in taken.values()])
    for x_ECD, (name, own) in zip(slots, taken.items(), strict=True):
        y_ND = combine(y_ND, own.index_EC, through(x_ECD, routed[name], own.gate_EC))
    return y_ND


@jax.custom_vjp
def dispatch_all(x_ND, indices):
    """`dispatch` for several groups of experts. Their gradients are added up in place, one after the other."""
    return [dispatch(x_ND, index_EN) for index_EN in indices]


def _dispatch_gradient(saved, d_slots):
    x_ND, indices = saved
    d_x_ND = jnp.zeros_like(x_ND)
    for index_EN, d_x_END in zip(indices, d_slots, strict=True):
        d_x_ND = combine(d_x_ND, index_EN, d_x_END)
    return d_x_ND, [None] * len(indices)


dispatch_all.defvjp(lambda x_ND, indices: (dispatch_all(x_ND, indices), (x_ND, indices)), _dispatch_gradient)


def through(x_END, experts: Experts, gate_EN):
    """`swiglu` of all E experts of a group; slots travel to those that live on other devices, and back."""
    devices = sharding.size(EXPERT)
    if devices == 1 or not sharding.dealt(len(x_END)):
        return swiglu(x_END, experts, gate_EN)

    # The exchange is of whole leading parts: along an inner axis a TPU would rearrange all bytes before and after it.
    def exchanged(a_EN):
        return jax.lax.all_to_all(a_EN, EXPERT, 0, 0, tiled=True)

    def arrived(a_EN):
        """(devices of origin * own experts, N, ...) to (own experts, devices of origin * N, ...)."""
        a_XEN = a_EN.reshape(devices, -1, *a_EN.shape[1:])
        return a_XEN.swapaxes(0, 1).reshape(a_XEN.shape[1], -1, *a_EN.shape[2:])

    y_END = swiglu(arrived(exchanged(x_END)), experts, arrived(exchanged(gate_EN)))
    y_EXN = y_END.reshape(len(y_END), devices, *x_END.shape[1:])
    return exchanged(y_EXN.swapaxes(0, 1).reshape(x_END.shape))


def in_blocks(y_ND, x_ND, selection: Selection, experts: Experts):
    """Adds the experts' outputs to y_ND, block by block of slots; blocks without a filled slot cost nothing.

    So every token may have a slot at every expert (C = T), and what is computed is what was taken, rounded up to
    blocks. A loop of unknown length: no gradient.

    Args:
      selection: (G, E, C), indices into the N tokens; blocks of an expert and routing group begin at its first slot.
    """
    groups, count, slots = selection.index_EC.shape
    size = min(BLOCK, slots)
    pad = ((0, 0), (0, 0), (0, -slots % size))
    index_KB, gate_KB, filled_KB = (jnp.pad(x_GEC, pad).reshape(-1, size) for x_GEC in selection)
    expert_K = jnp.broadcast_to(jnp.arange(count)[:, None], (groups, count, len(index_KB) // (groups * count))).reshape(
        -1
    )
    used_K = filled_KB.any(axis=1)
    order_K = jnp.argsort(~used_K, stable=True)

    def one(i, y_ND):
        k = order_K[i]
        own = [experts.gate_EDF[expert_K[k]], experts.up_EDF[expert_K[k]], experts.down_EFD[expert_K[k]]]
        return combine(y_ND, index_KB[k], swiglu_of(dispatch(x_ND, index_KB[k]), *own, gate_KB[k]))

    return jax.lax.fori_loop(0, used_K.sum(), one, y_ND)


def joined(slots):
    """Slots of all groups of experts, one after the other."""
    return jnp.concatenate([slots_EC.reshape(-1) for slots_EC in slots])


def dispatch(x_ND, index_EN):
    """Tokens to slots."""
    return x_ND.at[index_EN].get(mode="promise_in_bounds")


def combine(y_ND, index_EN, out_END):
    """Adds the slots' (weighted) outputs to their tokens'; an empty slot's is 0."""
    return y_ND.at[index_EN].add(out_END, mode="promise_in_bounds")


def offset(selection: Selection, tokens: int) -> Selection:
    """Indices into the tokens of all routing groups, one after the other."""
    start_G = jnp.arange(selection.index_EC.shape[0], dtype=jnp.int32) * tokens
    return selection._replace(index_EC=selection.index_EC + start_G[:, None, None])


def flat(slots_GEC):
    """(G, E, C) to (E, G*C): each expert's slots of all routing groups."""
    return jnp.swapaxes(slots_GEC, 0, 1).reshape(slots_GEC.shape[1], -1)
