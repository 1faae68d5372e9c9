"""Causal attention inside documents, with QK-norm and rotary positions (paper section 2.1, Chameleon)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from moma_jax import sharding
from moma_jax.config import ModelConfig
from moma_jax.geometry import block_queries
from moma_jax.model.blockwise import attend_blocks, scored, softmaxed
from moma_jax.model.by_modality import on_slots
from moma_jax.model.kernels import refusal, warn
from moma_jax.model.kernels.splash import attend_fused
from moma_jax.model.kernels.triton import attend_triton
from moma_jax.model.kernels.turned import Norm, turned
from moma_jax.model.parameters import ATTENTION_AXES as AXES
from moma_jax.model.precision import wide
from moma_jax.sharding import TENSOR

NOWHERE = 2**31 - 1
"""The position of a key that is not there: behind every one."""


def rotary_angles(position_BS, model: ModelConfig):
    """Cosine and sine of the rotary angles, float32 (B, S, K/2) each."""
    width, scaling = model.head_size, model.rope_scaling
    frequency_K = model.rope_theta ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if scaling is not None:
        turns_K = scaling.positions / (2 * jnp.pi) * frequency_K
        kept_K = jnp.clip((turns_K - scaling.low) / (scaling.high - scaling.low), 0, 1)
        frequency_K = frequency_K * (kept_K + (1 - kept_K) / scaling.factor)
    angle_BSK = position_BS[..., None].astype(jnp.float32) * frequency_K
    return jnp.cos(angle_BSK), jnp.sin(angle_BSK)


def rotate(x_BSHK, angles):
    """Rotary position embedding in float32; channel k pairs with k + K/2, as in Llama and HF Chameleon."""
    cos_BSK, sin_BSK = (a[:, :, None] for a in angles)
    first, second = jnp.split(x_BSHK, 2, axis=-1)
    return jnp.concatenate([first * cos_BSK - second * sin_BSK, second * cos_BSK + first * sin_BSK], axis=-1)


def attend(q_BSHK, k_BSHK, v_BSHK, segment_BS, position_BS, *, chunk: int):
    """Softmax attention to earlier positions of the same document, (B, S, H, K) in the dtype of v.

    Keys and values may have fewer heads, of which each is for as many neighbouring heads of queries.
    A query sees the keys of its segment at its own position and before. Padding is a segment of its own (0): its rows
    are finite, and no real token sees them. At most `chunk` queries are scored at a time, the backward pass included.

    Scores are written out where the device has no fused kernel for it; `attend_rows` has more of them for a TPU.
    """
    chex.assert_equal_shape((k_BSHK, v_BSHK))
    chex.assert_shape((segment_BS, position_BS), q_BSHK.shape[:2])
    k_BSHK, v_BSHK = (for_queries(x, q_BSHK.shape[2], 2) for x in (k_BSHK, v_BSHK))
    narrow = q_BSHK.dtype.itemsize == 2  # wider ones would be rounded on the way into a GPU's matrix units
    if sharding.platform() == "gpu" and narrow and _refused(*q_BSHK.shape[1:]) is None:
        return attend_triton(q_BSHK, k_BSHK, v_BSHK, segment_BS)
    if sharding.platform() == "tpu" and _refused(*q_BSHK.shape[1:]) is None:
        return attend_splash(q_BSHK, k_BSHK, v_BSHK, segment_BS)
    return attend_written(q_BSHK, k_BSHK, v_BSHK, segment_BS, position_BS, chunk=chunk)


def for_queries(x, heads: int, axis: int):
    """Keys or values, once for each of so many heads of queries: those that share one lie side by side."""
    return x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis)


def attend_written(q_BSHK, k_BSHK, v_BSHK, segment_BS, position_BS, *, chunk: int):
    """`attend` with its scores written out."""
    qkv_BHSK = (x.swapaxes(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK))
    y_BHSK = attend_blocks(*qkv_BHSK, segment_BS, position_BS, block_queries(q_BSHK.shape[1], chunk))
    return y_BHSK.swapaxes(1, 2)


def attend_splash(q_BSHK, k_BSHK, v_BSHK, segment_BS):
    """`attend` by a TPU's kernel."""
    q_BSHK = (q_BSHK * q_BSHK.shape[-1] ** -0.5).astype(v_BSHK.dtype)
    return attend_fused(*(x.swapaxes(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK)), segment_BS).swapaxes(1, 2)


def ways(platform: str, kind: str, sequence: int, heads: int, width: int) -> dict[str, Callable]:
    """Every attention that a device has, by name: functions of q, k, v, segments and positions, as `attend`."""
    found = {"written": functools.partial(attend_written, chunk=ModelConfig().attention_chunk)}
    kernel = {"tpu": ("splash", attend_splash), "gpu": ("triton", attend_triton)}.get(platform)
    if kernel is not None and refusal(platform, kind, sequence, heads, width) is None:
        found[kernel[0]] = lambda q, k, v, segment_BS, _: kernel[1](q, k, v, segment_BS)
    return found


def _refused(sequence: int, heads: int, width: int) -> str | None:
    """Why the kernels of this platform cannot be used, which is said once; None where they can or there are none."""
    reason = refusal(sharding.platform(), sharding.device_kind(), sequence, heads, width)
    if reason is not None:
        warn(reason)
    return reason


def qk_norm(x_BSHK, norm: dict[str, Any], epsilon: float):
    """Each head's channels normed by what there is for it, in float32: LayerNorm with scale_HK and bias_HK of each head
    (Chameleon), RMSNorm with one scale_K for all (Qwen3), nothing (Llama)."""
    x_BSHK = wide(x_BSHK)
    if not norm:
        return x_BSHK
    if "scale_K" in norm:
        return x_BSHK * jax.lax.rsqrt(jnp.square(x_BSHK).mean(-1, keepdims=True) + epsilon) * norm["scale_K"]
    centred = x_BSHK - x_BSHK.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon) * norm["scale_HK"] + norm["bias_HK"]


def project(x_BSD, weights: dict[str, Any], angles, epsilon: float):
    """Queries, keys and values (B, S, H, K) in the dtype of x, normed and turned; `weights` as the module has them.

    Keys and values have as many heads as their weights.
    """
    dtype = x_BSD.dtype
    q_BSHK, k_BSHK, v_BSHK = (
        jnp.einsum("bsd,dhk->bshk", x_BSD, weights[f"{name}_DHK"].astype(dtype)) for name in ("query", "key", "value")
    )
    q_BSHK, k_BSHK = (
        rotate(qk_norm(x_BSHK, weights.get(f"{name}_norm", {}), epsilon), angles).astype(dtype)
        for name, x_BSHK in (("query", q_BSHK), ("key", k_BSHK))
    )
    return q_BSHK, k_BSHK, v_BSHK


def project_out(y_BSHK, weights: dict[str, Any]):
    """The heads' outputs back to the width."""
    return jnp.einsum("bshk,hkd->bsd", y_BSHK, weights["out_HKD"].astype(y_BSHK.dtype))


def attend_rows(x_BSD, weights: dict[str, Any], segment_BS, position_BS, angles, model: ModelConfig, sort=None):
    """The attention sub-layer on whole rows: projections without bias, QK-norm, rotary positions, `attend`.

    x_BSD in compute dtype; returns the same shape and dtype. Each device has its own rows and heads. A TPU has kernels
    for what lies between the products; where they do not fit, it is written out.

    Args:
      weights: as the module has them; by modality where these have their own.
      sort: (slots of the modalities that have weights of their own, Sorted); None: all tokens share them.
    """
    if sort is not None:
        return _attend_rows_by_modality(x_BSD, weights, segment_BS, position_BS, angles, model, sort)
    local = x_BSD.shape[1], model.key_heads // sharding.size(TENSOR), model.head_size
    if model.qk_norm == "layer" and sharding.platform() == "tpu" and _refused(*local) is None:
        return _attend_rows_fused(x_BSD, weights, segment_BS, angles, model)
    matrices, norms, specs, norm_specs = _parts_of(weights)

    def prepare(x_BSD, matrices, norms, angles):
        return project(x_BSD, gathered(matrices, x_BSD.dtype) | norms, angles, model.norm_epsilon)

    rows, heads = sharding.spec("batch"), sharding.spec("batch", None, "heads", "head")
    qkv = sharding.shard_map(prepare, (rows, specs, norm_specs, rows), (heads,) * 3)
    y_BSHK = _mixed(qkv(x_BSD, matrices, norms, angles), segment_BS, position_BS, model)
    return _finished(y_BSHK, heads, weights["out_HKD"], "bshk,hkd->bsd")


def _mixed(qkv, segment_BS, position_BS, model: ModelConfig):
    """`attend` on each device's own rows and heads."""
    rows, heads = sharding.spec("batch"), sharding.spec("batch", None, "heads", "head")
    mix = functools.partial(attend, chunk=model.attention_chunk)
    return sharding.shard_map(mix, (heads,) * 3 + (rows,) * 2, heads, check=False)(*qkv, segment_BS, position_BS)


def _attend_rows_fused(x_BSD, weights: dict[str, Any], segment_BS, angles, model: ModelConfig):
    """`attend_rows` by kernels, which want heads in front of positions and write them so."""
    matrices, norms, specs, norm_specs = _parts_of(weights)

    def prepare(x_BSD, matrices):
        whole = gathered(matrices, x_BSD.dtype)
        flat = (w.reshape(len(w), -1) for w in (whole["query_DHK"], whole["key_DHK"]))
        x_BSF = (jnp.einsum("bsd,df->bsf", x_BSD, w_DF) for w_DF in flat)
        return *x_BSF, jnp.einsum("bsd,dhk->bhsk", x_BSD, whole["value_DHK"])

    def mix(query_BSF, key_BSF, v_BHSK, norms, angles, segment_BS):
        q_BHSK, k_BHSK = (
            turned(x_BSF, **norms[f"{name}_norm"], angles=angles, norm=Norm(model.norm_epsilon, factor))
            for name, x_BSF, factor in (("query", query_BSF, v_BHSK.shape[-1] ** -0.5), ("key", key_BSF, 1.0))
        )
        k_BHSK, v_BHSK = (for_queries(x, q_BHSK.shape[1], 1) for x in (k_BHSK, v_BHSK))
        return attend_fused(q_BHSK, k_BHSK, v_BHSK, segment_BS)

    rows, flat = sharding.spec("batch"), sharding.spec("batch", None, "heads")
    heads = sharding.spec("batch", "heads", None, "head")
    qkv = sharding.shard_map(prepare, (rows, specs), (flat, flat, heads))(x_BSD, matrices)
    # A kernel does not say which of its results differ between devices; all do.
    mixed = sharding.shard_map(mix, (flat, flat, heads, norm_specs, rows, rows), heads, check=False)
    return _finished(mixed(*qkv, norms, angles, segment_BS), heads, weights["out_HKD"], "bhsk,hkd->bsd")


def _attend_rows_by_modality(x_BSD, weights, segment_BS, position_BS, angles, model: ModelConfig, sort):
    """`attend_rows` where modalities have weights of their own (Mixture-of-Transformers, arXiv 2411.04996): tokens are
    projected, normed and turned sorted by modality, and attend to all in their rows. Padding has queries, keys and
    values of 0."""
    projections, where = sort

    def grouped(x_BSX, where):
        return x_BSX.reshape(*where.slot_GT.shape, *x_BSX.shape[2:])

    def prepare(x_BSD, weights, where, angles):
        def project_slots(name, x_GCD, *turns):
            return project(x_GCD, _whole(weights[name], x_GCD.dtype), turns, model.norm_epsilon)

        turns = [grouped(a_BSK, where) for a_BSK in angles]
        qkv_GTHK = on_slots(project_slots, grouped(x_BSD, where), where, projections, turns)
        return tuple(y_GTHK.reshape(*x_BSD.shape[:2], *y_GTHK.shape[2:]) for y_GTHK in qkv_GTHK)

    def finish(y_BSHK, weights, where):
        def project_slots(name, y_GCHK):
            return (project_out(y_GCHK, _whole(weights[name], y_GCHK.dtype)),)

        (out_GTD,) = on_slots(project_slots, grouped(y_BSHK, where), where, projections)
        return sharding.psum(out_GTD.reshape(*y_BSHK.shape[:2], -1), TENSOR)

    rows, heads = sharding.spec("batch"), sharding.spec("batch", None, "heads", "head")
    outward = {name: {"out_HKD": own["out_HKD"]} for name, own in weights.items()}
    inward = {name: {key: w for key, w in own.items() if key != "out_HKD"} for name, own in weights.items()}
    qkv = sharding.shard_map(prepare, (rows, _specs(inward), rows, rows), (heads,) * 3)
    y_BSHK = _mixed(qkv(x_BSD, inward, where, angles), segment_BS, position_BS, model)
    return sharding.shard_map(finish, (heads, _specs(outward), rows), rows)(y_BSHK, outward, where)


def _whole(weights: dict[str, Any], dtype) -> dict[str, Any]:
    """Weights as a device computes with them; norms stay float32."""
    return weights | gathered({name: w for name, w in weights.items() if name in AXES}, dtype)


def _specs(weights: dict[str, Any]) -> dict[str, Any]:
    """Where the attention's weights lie, by name, whatever is around them."""
    norm = dict.fromkeys(("scale_HK", "bias_HK"), ("heads", "head"))
    axes = AXES | norm | {"scale_K": ("head",)}
    return {name: sharding.spec(*axes[name]) if name in axes else _specs(own) for name, own in weights.items()}


def _parts_of(weights: dict[str, Any]):
    """(matrices before the attention, norms, and the specs of both)."""
    matrices = {name: weights[name] for name in AXES if name != "out_HKD"}
    norms = {name: own for name, own in weights.items() if name not in AXES}
    return matrices, norms, _specs(matrices), _specs(norms)


def gathered(matrices: dict[str, Any], dtype) -> dict[str, Any]:
    """Matrices as a device computes with them."""
    return {name: sharding.gather_weight(w, AXES[name], dtype) for name, w in matrices.items()}


def _finished(y, heads, out_HKD, product: str):
    """The heads' outputs, whose spec is `heads`, back to the width."""

    def finish(y, out_HKD):
        return sharding.psum(jnp.einsum(product, y, gathered({"out_HKD": out_HKD}, y.dtype)["out_HKD"]), TENSOR)

    specs = heads, sharding.spec(*AXES["out_HKD"])
    return sharding.shard_map(finish, specs, sharding.spec("batch"))(y, out_HKD)


class Memory(NamedTuple):
    """Keys and values that rows of one layer have been told so far.

    Attributes:
      key_BPHK, value_BPHK: in compute dtype; P positions are allocated, H heads of keys.
      position_BP: int32 position in the row of each key, NOWHERE where there is none, in layers that only some tokens
        enter (mixture of depths): a token that passed by left none. None elsewhere: a key's number is its position.
    """

    key_BPHK: Any
    value_BPHK: Any
    position_BP: Any = None


def attend_cached(
    x_BQD, weights: dict[str, Any], memory: Memory, position_BQ, enters_BQ, angles, epsilon: float, of=None
):
    """The attention sub-layer on new tokens and all that their rows hold; (its output, the memory with them).

    Args:
      position_BQ: of the new tokens, in their rows. enters_BQ: bool; the others leave no key.
      of: where modalities have weights of their own, (their names and numbers, modality_BQ).
    """
    into = functools.partial(project, angles=angles, epsilon=epsilon)
    q_BQHK, k_BQHK, v_BQHK = into(x_BQD, weights) if of is None else _each(into, x_BQD, weights, *of)
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
    visible_BQP = position_BQ[:, :, None] >= key_position_BP[:, None, :]
    q_BHQK, k_BHPK, v_BHPK = (x.swapaxes(1, 2) for x in (q_BQHK, key_BPHK, value_BPHK))
    # Queries whose heads share keys are so many more queries of them, for which these are read once.
    share = q_BHQK.shape[1] // k_BHPK.shape[1]
    grouped = q_BHQK.reshape(rows, -1, share * q_BHQK.shape[2], q_BHQK.shape[3])
    y_BHQK, _ = softmaxed(scored(grouped, k_BHPK, jnp.tile(visible_BQP, (1, share, 1))), v_BHPK)
    y_BQHK = y_BHQK.reshape(q_BHQK.shape).swapaxes(1, 2)
    out_BQD = project_out(y_BQHK, weights) if of is None else _each(project_out, y_BQHK, weights, *of)
    return out_BQD, Memory(key_BPHK, value_BPHK, place_BP)


def _each(run: Callable, x_BQX, weights: dict[str, Any], modalities: dict[str, int], modality_BQ):
    """What `run(x, weights)` gives each token under the weights of its modality, computed for those that are there."""
    found = jax.tree.map(
        lambda out: jnp.zeros(out.shape, out.dtype), jax.eval_shape(run, x_BQX, next(iter(weights.values())))
    )
    for name, number in modalities.items():
        here_BQ = modality_BQ == number

        def add(found, name=name, here_BQ=here_BQ):
            def chosen(new, old):
                return jnp.where(here_BQ.reshape(*here_BQ.shape, *[1] * (new.ndim - 2)), new, old)

            return jax.tree.map(chosen, run(x_BQX, weights[name]), found)

        found = jax.lax.cond(here_BQ.any(), add, lambda same: same, found)
    return found
