"""Causal attention inside documents, with QK-norm and rotary positions (paper section 2.1, Chameleon)."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from moma_jax import sharding
from moma_jax.config import ModelConfig
from moma_jax.model.kernels.splash import attend_fused, refusal, warn
from moma_jax.model.parameters import ATTENTION_AXES as AXES
from moma_jax.model.precision import wide
from moma_jax.sharding import TENSOR

NOWHERE = 2**31 - 1
"""The position of a key that is not there: behind every one."""

# A score that no softmax sees; finite, so that a row without a visible key gives no NaN.
HIDDEN = -1e30


def rotary_angles(position_BS, head_width: int, theta: float):
    """Cosine and sine of the rotary angles, float32 (B, S, K/2) each."""
    frequency_K = theta ** -(jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angle_BSK = position_BS[..., None].astype(jnp.float32) * frequency_K
    return jnp.cos(angle_BSK), jnp.sin(angle_BSK)


def rotate(x_BSHK, angles):
    """Rotary position embedding in float32; channel k pairs with k + K/2, as in Llama and HF Chameleon."""
    cos_BSK, sin_BSK = (a[:, :, None] for a in angles)
    first, second = jnp.split(x_BSHK, 2, axis=-1)
    return jnp.concatenate([first * cos_BSK - second * sin_BSK, second * cos_BSK + first * sin_BSK], axis=-1)


def attend(q_BSHK, k_BSHK, v_BSHK, segment_BS, position_BS, *, chunk: int):
    """Softmax attention to earlier positions of the same document, (B, S, H, K) in the dtype of v.

    A query sees the keys of its segment at its own position and before. Padding is a segment of its own (0): its rows
    are finite, and no real token sees them. At most `chunk` queries are scored at a time, the backward pass included.

    A TPU has a fused kernel for it; elsewhere, and where that does not fit, scores are written out.
    """
    chex.assert_equal_shape((q_BSHK, k_BSHK, v_BSHK))
    chex.assert_shape((segment_BS, position_BS), q_BSHK.shape[:2])
    sequence, platform = q_BSHK.shape[1], sharding.platform()
    if (reason := refusal(platform, sequence)) is not None:
        warn(reason)
    elif platform == "tpu":
        return attend_fused(q_BSHK, k_BSHK, v_BSHK, segment_BS)
    if sequence <= chunk:
        return attend_block((q_BSHK, segment_BS, position_BS), k_BSHK, v_BSHK, segment_BS, position_BS)
    chunks = -(-sequence // chunk)

    def split(x_BS, fill):
        pad = [(0, 0), (0, chunks * chunk - sequence)] + [(0, 0)] * (x_BS.ndim - 2)
        x_BS = jnp.pad(x_BS, pad, constant_values=fill)
        return jnp.moveaxis(x_BS.reshape(x_BS.shape[0], chunks, chunk, *x_BS.shape[2:]), 1, 0)

    # Queries beyond the end belong to no segment; their rows are cut off.
    queries = (split(q_BSHK, 0), split(segment_BS, -1), split(position_BS, 0))
    block = jax.checkpoint(lambda query: attend_block(query, k_BSHK, v_BSHK, segment_BS, position_BS))
    out_BSHK = jnp.moveaxis(jax.lax.map(block, queries), 0, 1)
    return out_BSHK.reshape(out_BSHK.shape[0], chunks * chunk, *out_BSHK.shape[3:])[:, :sequence]


def attend_block(query, k_BSHK, v_BSHK, segment_BS, position_BS):
    """Attention of some queries (their q, segments, positions) to all keys; softmax in float32."""
    q_BQHK, segment_BQ, position_BQ = query
    dtype = jnp.promote_types(q_BQHK.dtype, jnp.float32)
    score_BHQS = jnp.einsum("bqhk,bshk->bhqs", q_BQHK, k_BSHK, preferred_element_type=dtype)
    score_BHQS = score_BHQS / math.sqrt(q_BQHK.shape[-1])
    same_BQS = segment_BQ[:, :, None] == segment_BS[:, None, :]
    visible_BQS = same_BQS & (position_BQ[:, :, None] >= position_BS[:, None, :])
    score_BHQS = jnp.where(visible_BQS[:, None], score_BHQS, HIDDEN)
    # The softmax, divided by its sum after the product with v: two passes fewer over all scores.
    weight_BHQS = jnp.exp(score_BHQS - jax.lax.stop_gradient(score_BHQS.max(-1, keepdims=True)))
    mixed_BQHK = jnp.einsum("bhqs,bshk->bqhk", weight_BHQS.astype(v_BSHK.dtype), v_BSHK)
    return (mixed_BQHK / jnp.swapaxes(weight_BHQS.sum(-1), 1, 2)[..., None]).astype(v_BSHK.dtype)


def qk_norm(x_BSHK, scale_HK, bias_HK, epsilon: float):
    """LayerNorm over each head's channels with scale and bias of its own per head (Chameleon); float32."""
    x_BSHK = wide(x_BSHK)
    centred = x_BSHK - x_BSHK.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon) * scale_HK + bias_HK


def project(x_BSD, weights: dict[str, Any], angles, epsilon: float):
    """Queries, keys and values (B, S, H, K) in the dtype of x, normed and turned; `weights` as the module has them."""
    dtype = x_BSD.dtype
    q_BSHK, k_BSHK, v_BSHK = (
        jnp.einsum("bsd,dhk->bshk", x_BSD, weights[f"{name}_DHK"].astype(dtype)) for name in ("query", "key", "value")
    )
    q_BSHK, k_BSHK = (
        rotate(qk_norm(x_BSHK, **weights[f"{name}_norm"], epsilon=epsilon), angles).astype(dtype)
        for name, x_BSHK in (("query", q_BSHK), ("key", k_BSHK))
    )
    return q_BSHK, k_BSHK, v_BSHK


def project_out(y_BSHK, weights: dict[str, Any]):
    """The heads' outputs back to the width."""
    return jnp.einsum("bshk,hkd->bsd", y_BSHK, weights["out_HKD"].astype(y_BSHK.dtype))


def attend_rows(x_BSD, weights: dict[str, Any], segment_BS, position_BS, angles, model: ModelConfig):
    """The attention sub-layer on whole rows: projections without bias, QK-norm, rotary positions, `attend`.

    x_BSD in compute dtype; returns the same shape and dtype. Each device has its own rows and heads.
    """
    dtype = x_BSD.dtype
    matrices = {name: weights[name] for name in AXES}
    norms = {name: own for name, own in weights.items() if name not in AXES}

    def prepare(x_BSD, matrices, norms, angles):
        matrices = {name: sharding.gather_weight(w, AXES[name], dtype) for name, w in matrices.items()}
        return project(x_BSD, matrices | norms, angles, model.norm_epsilon)

    def finish(y_BSHK, out_HKD):
        return sharding.psum(
            project_out(y_BSHK, {"out_HKD": sharding.gather_weight(out_HKD, AXES["out_HKD"], dtype)}), TENSOR
        )

    rows, heads = sharding.spec("batch"), sharding.spec("batch", None, "heads", "head")
    norm = dict.fromkeys(("scale_HK", "bias_HK"), sharding.spec("heads", "head"))
    specs = {name: sharding.spec(*axes) for name, axes in AXES.items()}
    out_HKD, out_spec = matrices.pop("out_HKD"), specs.pop("out_HKD")
    qkv = sharding.shard_map(prepare, (rows, specs, dict.fromkeys(norms, norm), rows), (heads,) * 3)
    # A kernel does not say which of its results differ between devices; all do.
    attention = functools.partial(attend, chunk=model.attention_chunk)
    mix = sharding.shard_map(attention, (heads,) * 3 + (rows,) * 2, heads, check=False)
    y_BSHK = mix(*qkv(x_BSD, matrices, norms, angles), segment_BS, position_BS)
    return sharding.shard_map(finish, (heads, out_spec), rows)(y_BSHK, out_HKD)


class Memory(NamedTuple):
    """Keys and values that rows of one layer have been told so far.

    Attributes:
      key_BPHK, value_BPHK: in compute dtype; P positions are allocated.
      position_BP: int32 position in the row of each key, NOWHERE where there is none, in layers that only some tokens
        enter (mixture of depths): a token that passed by left none. None elsewhere: a key's number is its position.
    """

    key_BPHK: Any
    value_BPHK: Any
    position_BP: Any = None


def attend_cached(x_BQD, weights: dict[str, Any], memory: Memory, position_BQ, enters_BQ, angles, epsilon: float):
    """The attention sub-layer on new tokens and all that their rows hold; (its output, the memory with them).

    Args:
      position_BQ: of the new tokens, in their rows. enters_BQ: bool; the others leave no key.
    """
    q_BQHK, k_BQHK, v_BQHK = project(x_BQD, weights, angles, epsilon)
    key_BPHK, value_BPHK, place_BP = memory
    rows, positions = key_BPHK.shape[:2]
    row_B1 = jnp.arange(rows)[:, None]
    if place_BP is None:
        slot_BQ, key_position_BP = position_BQ, jnp.broadcast_to(jnp.arange(positions), (rows, positions))
    else:  # keys lie one after the other, and their positions tell who sees them
        filled_B1 = (place_BP != NOWHERE).sum(axis=1, dtype=jnp.int32)[:, None]
        slot_BQ = filled_B1 + jnp.cumsum(enters_BQ, axis=1, dtype=jnp.int32) - 1
    slot_BQ = jnp.where(enters_BQ, slot_BQ, positions)  # beyond the end: dropped
    key_BPHK, value_BPHK = (
        old.at[row_B1, slot_BQ].set(new, mode="drop") for old, new in ((key_BPHK, k_BQHK), (value_BPHK, v_BQHK))
    )
    if place_BP is not None:
        key_position_BP = place_BP = place_BP.at[row_B1, slot_BQ].set(position_BQ, mode="drop")
    one_BQ, one_BP = jnp.ones_like(position_BQ), jnp.ones((rows, positions), jnp.int32)
    y_BQHK = attend_block((q_BQHK, one_BQ, position_BQ), key_BPHK, value_BPHK, one_BP, key_position_BP)
    return project_out(y_BQHK, weights), Memory(key_BPHK, value_BPHK, place_BP)
