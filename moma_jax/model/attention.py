"""Causal attention inside documents, with QK-norm and rotary positions (paper section 2.1, Chameleon)."""

from __future__ import annotations

import functools
import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from moma_jax import sharding
from moma_jax.config import ModelConfig
from moma_jax.model.experts import normal, output_scale
from moma_jax.model.fused_attention import attend_fused, refusal, warn
from moma_jax.model.precision import wide
from moma_jax.sharding import TENSOR

AXES = {
    "query_DHK": ("embed", "heads", "head"),
    "key_DHK": ("embed", "heads", "head"),
    "value_DHK": ("embed", "heads", "head"),
    "out_HKD": ("heads", "head", "embed"),
}
"""Logical axes of the projections."""

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


class QkNormWeights(nn.Module):
    """Declares scale and bias of one of the two QK-norms."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        def weight(name, init):
            return self.param(name, nn.with_logical_partitioning(init, ("heads", "head")), self.shape, jnp.float32)

        return {
            "scale_HK": weight("scale_HK", nn.initializers.ones),
            "bias_HK": weight("bias_HK", nn.initializers.zeros),
        }


class Attention(nn.Module):
    """The attention sub-layer: projections without bias, QK-norm, rotary positions, `attend`."""

    model: ModelConfig

    @nn.compact
    def __call__(self, x_BSD, segment_BS, position_BS, angles):
        """x_BSD in compute dtype; returns the same shape and dtype."""
        model, d, h = self.model, self.model.width, self.model.heads

        def weight(name, init, shape):
            return self.param(name, nn.with_logical_partitioning(init, AXES[name]), shape, jnp.float32)

        weights = {name: weight(name, normal(d), (d, h, d // h)) for name in ("query_DHK", "key_DHK", "value_DHK")}
        weights["out_HKD"] = weight("out_HKD", normal(d, output_scale(model)), (h, d // h, d))
        weights |= {name: QkNormWeights((h, d // h), name=name)() for name in ("query_norm", "key_norm")}

        matrices = {name: weights.pop(name) for name in AXES}
        return _over_shards(model, x_BSD, matrices, weights, segment_BS, position_BS, angles)


def _over_shards(model: ModelConfig, x_BSD, matrices, norms, segment_BS, position_BS, angles):
    """The sub-layer on each device's own rows and heads."""
    dtype = x_BSD.dtype

    def prepare(x_BSD, matrices, norms, angles):
        matrices = {name: sharding.whole(w, AXES[name], dtype) for name, w in matrices.items()}
        return project(x_BSD, matrices | norms, angles, model.norm_epsilon)

    def finish(y_BSHK, out_HKD):
        return sharding.summed(
            project_out(y_BSHK, {"out_HKD": sharding.whole(out_HKD, AXES["out_HKD"], dtype)}), TENSOR
        )

    rows, heads = sharding.spec("batch"), sharding.spec("batch", None, "heads", "head")
    norm = dict.fromkeys(("scale_HK", "bias_HK"), sharding.spec("heads", "head"))
    specs = {name: sharding.spec(*axes) for name, axes in AXES.items()}
    out_HKD, out_spec = matrices.pop("out_HKD"), specs.pop("out_HKD")
    qkv = sharding.on_shards(prepare, (rows, specs, dict.fromkeys(norms, norm), rows), (heads,) * 3)
    # A kernel does not say which of its results differ between devices; all do.
    attention = functools.partial(attend, chunk=model.attention_chunk)
    mix = sharding.on_shards(attention, (heads,) * 3 + (rows,) * 2, heads, check=False)
    y_BSHK = mix(*qkv(x_BSD, matrices, norms, angles), segment_BS, position_BS)
    return sharding.on_shards(finish, (heads, out_spec), rows)(y_BSHK, out_HKD)
