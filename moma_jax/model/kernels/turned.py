"""QK-norm, rotation and the heads' way in front, (B, S, H K) to (B, H, S, K), in one pass: a Pallas kernel for TPUs.

Written out, the three are several passes of float32 over queries and keys, forward, recomputed and backward: 18% of a
step at paper_1b4. The floor is their bytes: one reading and one writing of each in the compute dtype.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LANES = 128
"""Elements side by side in a register; heads narrower than that are read together."""
SUBLANES = 8
"""Rows of a register, and of the partial sums of the norm's gradients."""
BLOCK_BYTES = 1 << 20
"""Of one block of rows, at most: some six are in a core's memory at a time."""


class Norm(NamedTuple):
    """What is done to a head: LayerNorm with this epsilon, then times `factor`; `interpret`: run it without a TPU."""

    epsilon: float
    factor: float
    interpret: bool = False


def refusal(sequence: int, heads: int, width: int) -> str | None:
    """Why the kernel cannot take rows of so many positions with heads of so many channels; None where it can."""
    if width % LANES and (LANES % width or width % 2 or heads * width % LANES):
        return f"heads of {width} channels do not fill {LANES} lanes"
    return None if sequence % (2 * SUBLANES) == 0 else f"data.sequence {sequence} is no multiple of {2 * SUBLANES}"


def turned(x_BSF, scale_HK, bias_HK, angles, norm: Norm):
    """`attention.rotate(attention.qk_norm(x))` times norm.factor, heads in front: (B, H, S, K) in the dtype of x.

    Args:
      x_BSF: heads side by side, F = H K. scale_HK, bias_HK: float32. angles: of `attention.rotary_angles`.
    """
    cos_BSK, sin_BSK = angles
    both = jnp.concatenate([cos_BSK, cos_BSK], -1), jnp.concatenate([-sin_BSK, sin_BSK], -1)
    return _turned(x_BSF, scale_HK, bias_HK, *both, norm)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _turned(x_BSF, scale_HK, bias_HK, cos_BSK, sin_BSK, norm: Norm):
    return _forward(x_BSF, scale_HK, bias_HK, cos_BSK, sin_BSK, norm)[0]


def _forward(x_BSF, scale_HK, bias_HK, cos_BSK, sin_BSK, norm: Norm):
    rows, sequence, _ = x_BSF.shape
    heads, width = scale_HK.shape
    out = jax.ShapeDtypeStruct((rows, heads, sequence, width), x_BSF.dtype)
    arguments = (x_BSF, _wide(scale_HK), _wide(bias_HK), cos_BSK, sin_BSK)
    kinds = ("side by side", "weight", "weight", "angle", "angle")
    (y_BHSK,) = _call(_forward_kernel, norm, scale_HK.shape, arguments, kinds, [out], ["in front"])
    return y_BHSK, (x_BSF, scale_HK, cos_BSK, sin_BSK)


def _backward(norm: Norm, kept, grad_BHSK):
    x_BSF, scale_HK, cos_BSK, sin_BSK = kept
    sums = jax.ShapeDtypeStruct((scale_HK.shape[0], SUBLANES, scale_HK.shape[1]), jnp.float32)
    arguments = (x_BSF, _wide(scale_HK), cos_BSK, sin_BSK, grad_BHSK)
    kinds = ("side by side", "weight", "angle", "angle", "in front")
    outs = [jax.ShapeDtypeStruct(x_BSF.shape, x_BSF.dtype), sums, sums]
    grad_BSF, scale_H8K, bias_H8K = _call(
        _backward_kernel, norm, scale_HK.shape, arguments, kinds, outs, ["side by side", "weight", "weight"]
    )
    return grad_BSF, scale_H8K.sum(1), bias_H8K.sum(1), None, None


_turned.defvjp(_forward, _backward)


def _wide(weight_HK):
    """A weight as registers hold it: rows all alike."""
    return jnp.broadcast_to(weight_HK[:, None], (weight_HK.shape[0], SUBLANES, weight_HK.shape[1]))


def _call(kernel, norm: Norm, weight_shape, arguments, kinds, outs, out_kinds) -> Any:
    """Runs a kernel over blocks of rows, all heads of a block at a time, so that angles are read once."""
    from jax.experimental import pallas as pl  # it takes a while, and other platforms have no use for it

    rows, sequence, flat = arguments[0].shape
    heads, width = weight_shape
    block = sequence
    while block % (4 * SUBLANES) == 0 and block * flat * arguments[0].dtype.itemsize > BLOCK_BYTES:
        block //= 2
    specs = {
        "side by side": pl.BlockSpec((1, block, flat), lambda b, s: (b, s, 0)),
        "in front": pl.BlockSpec((1, heads, block, width), lambda b, s: (b, 0, s, 0)),
        "weight": pl.BlockSpec((heads, SUBLANES, width), lambda b, s: (0, 0, 0)),
        "angle": pl.BlockSpec((1, block, width), lambda b, s: (b, s, 0)),
    }
    return pl.pallas_call(
        functools.partial(kernel, norm=norm),
        grid=(rows, sequence // block),
        in_specs=[specs[kind] for kind in kinds],
        out_specs=[specs[kind] for kind in out_kinds],
        out_shape=outs,
        interpret=norm.interpret,
        name=kernel.__name__.strip("_").replace("kernel", "turned"),
    )(*arguments)


# Kernels: refs hold one block; each head's channels are one slice of lanes --------------------------------------------


def _forward_kernel(x_ref, scale_ref, bias_ref, cos_ref, sin_ref, y_ref, *, norm: Norm):
    cos_SK, sin_SK = cos_ref[0], sin_ref[0]

    def one(head, x_SK):
        normed_SK, _ = _normed(x_SK, norm.epsilon)
        y_SK = normed_SK * scale_ref[head, :1] + bias_ref[head, :1]
        y_ref[0, head] = ((y_SK * cos_SK + _swapped(y_SK) * sin_SK) * norm.factor).astype(y_ref.dtype)

    _each_head(one, x_ref, scale_ref.shape)


def _backward_kernel(x_ref, scale_ref, cos_ref, sin_ref, grad_ref, dx_ref, dscale_ref, dbias_ref, *, norm: Norm):
    from jax.experimental import pallas as pl

    cos_SK, sin_SK = cos_ref[0], sin_ref[0]

    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
    def _():
        dscale_ref[...] = jnp.zeros_like(dscale_ref)
        dbias_ref[...] = jnp.zeros_like(dbias_ref)

    def one(head, x_SK):
        normed_SK, inverse_S1 = _normed(x_SK, norm.epsilon)
        turned_SK = grad_ref[0, head].astype(jnp.float32) * norm.factor
        grad_SK = turned_SK * cos_SK + _swapped(turned_SK * sin_SK)
        dscale_ref[head] += _partial(grad_SK * normed_SK)
        dbias_ref[head] += _partial(grad_SK)
        grad_SK = grad_SK * scale_ref[head, :1]
        along_S1 = (grad_SK * normed_SK).mean(-1, keepdims=True)
        return (grad_SK - grad_SK.mean(-1, keepdims=True) - normed_SK * along_S1) * inverse_S1

    _each_head(one, x_ref, scale_ref.shape, dx_ref)


def _each_head(one, x_ref, shape: tuple[int, ...], out_ref=None) -> None:
    """Calls one(head, its x), whose results lie side by side in out_ref; whole registers are read and written."""
    from jax.experimental import pallas as pl

    heads, _, width = shape
    together = max(1, LANES // width)

    def some(number, _):
        lanes = pl.ds(pl.multiple_of(number * together * width, together * width), together * width)
        x_SF = x_ref[0, :, lanes]
        found = [one(number * together + i, x_SF[:, i * width : (i + 1) * width]) for i in range(together)]
        if out_ref is not None:
            out_ref[0, :, lanes] = jnp.concatenate(found, axis=-1).astype(out_ref.dtype)
        return 0

    jax.lax.fori_loop(0, heads // together, some, 0)


def _normed(x_SK, epsilon: float):
    """(LayerNorm without its weights, the inverse deviation), float32."""
    x_SK = x_SK.astype(jnp.float32)
    x_SK = x_SK - x_SK.mean(-1, keepdims=True)
    inverse_S1 = jax.lax.rsqrt(jnp.square(x_SK).mean(-1, keepdims=True) + epsilon)
    return x_SK * inverse_S1, inverse_S1


def _swapped(x_SK):
    """Both halves of the channels in each other's place."""
    half = x_SK.shape[-1] // 2
    return jnp.concatenate([x_SK[:, half:], x_SK[:, :half]], axis=-1)


def _partial(x_SK):
    """Sums over rows, as many partial ones as a register has rows."""
    return x_SK.reshape(-1, SUBLANES, x_SK.shape[-1]).sum(0)
