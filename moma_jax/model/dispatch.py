"""Experts at work: tokens to slots, slots through the experts wherever they live, and back (paper Eq. 1).

Everything here acts on slots or on decisions and does not know who chose.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moma_jax import sharding
from moma_jax.model.parameters import MATRICES, ExpertWeights
from moma_jax.sharding import EXPERT

BLOCK = (4, 256)
"""Tokens that an expert computes together, at least and at most, where only those that enter are: of very few, reading
its weights takes as long."""


def swiglu(x_END, experts: ExpertWeights, weight_EN=None):
    """Weighted SwiGLU of each expert on its own N tokens: weight * (silu(x W_gate) * (x W_up)) W_down.

    Args:
      x_END: compute dtype, in which everything is done. weight_EN: float32 router gates; None for 1.

    The weight multiplies the tokens before the projection that SwiGLU is linear in: the narrowest place. The backward
    pass keeps the two projections and computes the hidden vector anew from them: no further matrix product.
    """
    weight_EN = jnp.ones(x_END.shape[:2], x_END.dtype) if weight_EN is None else weight_EN
    operands = (x_END, *experts[: len(MATRICES)], weight_EN)
    match sharding.platform():
        case "cpu":
            # One expert after the other, so that its hidden vectors stay in the cache from one product to the next: a
            # batch of experts costs about 6% more.
            return jnp.stack([swiglu_of(*expert) for expert in zip(*map(unstacked, operands), strict=True)])
        case _:
            return swiglu_of(*operands)


def unstacked(axis_E) -> list:
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


# All slots ------------------------------------------------------------------------------------------------------------


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


def exchange_and_compute(x_END, experts: ExpertWeights, gate_EN):
    """`swiglu` of all E experts of a group; slots travel to those that live on other devices, and back."""
    devices = sharding.size(EXPERT)
    if devices == 1 or not sharding.experts_are_split(len(x_END)):
        return swiglu(x_END, experts, gate_EN)

    # The exchange is of whole leading parts: along an inner axis a TPU would rearrange all bytes before and after it.
    def all_to_all(a_EN):
        return jax.lax.all_to_all(a_EN, EXPERT, 0, 0, tiled=True)

    def by_expert(a_EN):
        """(devices of origin * own experts, N, ...) to (own experts, devices of origin * N, ...)."""
        a_XEN = a_EN.reshape(devices, -1, *a_EN.shape[1:])
        return a_XEN.swapaxes(0, 1).reshape(a_XEN.shape[1], -1, *a_EN.shape[2:])

    y_END = swiglu(by_expert(all_to_all(x_END)), experts, by_expert(all_to_all(gate_EN)))
    y_EXN = y_END.reshape(len(y_END), devices, *x_END.shape[1:])
    return all_to_all(y_EXN.swapaxes(0, 1).reshape(x_END.shape))


def dispatch(x_ND, index_EN):
    """Tokens to slots."""
    return x_ND.at[index_EN].get(mode="promise_in_bounds")


def combine(y_ND, index_EN, out_END):
    """Adds the slots' (weighted) outputs to their tokens'; an empty slot's is 0."""
    return y_ND.at[index_EN].add(out_END, mode="promise_in_bounds")


# Only what enters -----------------------------------------------------------------------------------------------------


def add_experts(y_ND, x_ND, enters_NE, gate_NE, experts: ExpertWeights | tuple[ExpertWeights, ...]):
    """Adds the outputs of a group's experts for the tokens that enter them, and computes no others. No gradient.

    Args:
      experts: stacked weights, or each expert's two-dimensional ones apart, of which nothing is sliced.
    """
    if isinstance(experts, ExpertWeights):
        each = zip(*(list(weight) for weight in experts[: len(MATRICES)]), strict=True)
        experts = tuple(ExpertWeights(*own) for own in each)
    for e, expert in enumerate(experts):
        y_ND = _add_expert(y_ND, x_ND, enters_NE[:, e], gate_NE[:, e], expert)
    return y_ND


def _add_expert(y_ND, x_ND, enters_N, gate_N, expert: ExpertWeights):
    """Adds one expert's output for the tokens that enter; if there are none its weights are not read.

    Very few tokens are computed together; of more, only those that enter, in blocks of an eighth of all: what one
    expert of 4t4i takes on average.
    """
    tokens, (least, most) = len(x_ND), BLOCK
    size = min(max(least, tokens // 8), max(most, least))
    weights = expert[: len(MATRICES)]
    if tokens <= size:
        gate_N = jnp.where(enters_N, gate_N, 0.0)
        return jax.lax.cond(enters_N.any(), lambda y: y + swiglu_of(x_ND, *weights, gate_N), lambda y: y, y_ND)
    slots = -(-tokens // size) * size
    (index_S,) = jnp.nonzero(enters_N, size=slots, fill_value=0)
    count = enters_N.sum()

    def block(number, y_ND):
        start = number * size
        index_C = jax.lax.dynamic_slice(index_S, (start,), (size,))
        gate_C = jnp.where(start + jnp.arange(size) < count, gate_N[index_C], 0.0)
        return combine(y_ND, index_C, swiglu_of(dispatch(x_ND, index_C), *weights, gate_C))

    return jax.lax.fori_loop(0, -(-count // size), block, y_ND)
