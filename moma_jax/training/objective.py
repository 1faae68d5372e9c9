"""The loss: next-token cross-entropy in nats, in chunks, split by kinds of targets (paper section 2.1).

Who calls says which kind a target is of: training its modality, evaluation also what stands before it.

Logits of one chunk of tokens exist at a time, in the forward and in the backward pass. The gradient is a closed form
(softmax minus one-hot), so it is taken while the chunk's logits are at hand: three matrix products per token, as
without chunks, where rematerialising the chunk would cost four.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from moma_jax import sharding
from moma_jax.sharding import BATCH, DATA, EXPERT, FSDP, TENSOR


class Sums(NamedTuple):
    """Sums over tokens, float32; divide by weights for means.

    Attributes:
      cross_entropy_J: weighted nats, by kind of target.
      weight_J: weights, by kind of target.
      square_log_partition: weighted sum of the squared log-partition of the logits, over all tokens.
    """

    cross_entropy_J: jax.Array
    weight_J: jax.Array
    square_log_partition: jax.Array


class _Settings(NamedTuple):
    """What the loss depends on beside arrays; hashable, so that it can be static."""

    kinds: int
    chunk: int
    z_loss: float


def cross_entropy(hidden_BSD, kernel_DV, target_BS, weight_BS, kind_BS, *, kinds, chunk, z_loss=0.0):
    """Sum over tokens of weight * (cross-entropy + z_loss * log-partition^2), and its parts.

    Under a mesh (`jax.set_mesh`) each device handles its own rows, `chunk` tokens at a time.

    Args:
      hidden_BSD: the decoder's output after the final norm, in the compute type.
      kernel_DV: unembedding, float32; it is cast to the compute type, logits are float32.
      target_BS: int ids of what follows.
      weight_BS: float32; tokens of weight 0 count nothing, whatever their hidden state.
      kind_BS: int kind of every target, 0..J-1; any other counts in the total alone.
      kinds: number of kinds J.
      chunk: tokens whose logits exist at once.
      z_loss: weight of the squared log-partition.

    Returns:
      (total, Sums): `total` is a float32 scalar and the only differentiable result, in hidden_BSD and kernel_DV.
    """
    chex.assert_rank((hidden_BSD, kernel_DV), (3, 2))
    chex.assert_shape((target_BS, weight_BS, kind_BS), hidden_BSD.shape[:2])
    chex.assert_axis_dimension(kernel_DV, 0, hidden_BSD.shape[-1])
    settings = _Settings(kinds, chunk, z_loss)
    return _total(settings, hidden_BSD, kernel_DV, target_BS, kind_BS, weight_BS.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(settings, hidden_BSD, kernel_DV, target_BS, kind_BS, weight_BS):
    return _over_devices(settings, False, hidden_BSD, kernel_DV, target_BS, kind_BS, weight_BS)[0]


def _total_forward(settings, hidden_BSD, kernel_DV, target_BS, kind_BS, weight_BS):
    result, grads = _over_devices(settings, True, hidden_BSD, kernel_DV, target_BS, kind_BS, weight_BS)
    return result, grads


def _total_backward(settings, grads, cotangents):
    grad_hidden_BSD, grad_kernel_DV = grads
    scale, _ = cotangents  # the Sums are reports
    hidden = (grad_hidden_BSD * scale).astype(grad_hidden_BSD.dtype)
    return hidden, grad_kernel_DV * scale, None, None, None


_total.defvjp(_total_forward, _total_backward)


def _over_devices(settings, with_grads, *arrays):
    """`_local` on every device's own rows and part of the vocabulary, sums and gradients added up over the mesh."""
    stored = sharding.split_axes(FSDP, EXPERT)

    def on_device(hidden_BSD, kernel_DV, *targets):
        (total, sums), grads = _local(settings, with_grads, hidden_BSD, _gathered(kernel_DV, hidden_BSD), *targets)
        total, sums = sharding.psum((total, sums), *BATCH)
        if with_grads:
            grad_DV = jax.lax.psum_scatter(grads[1], stored, tiled=True) if stored else grads[1]
            grads = (grads[0], sharding.psum(grad_DV, DATA))
        return (total, sums), grads

    row, whole, kernel = sharding.spec("batch"), sharding.spec(), sharding.spec("embed", "vocab")
    out_specs = ((whole, whole), (row, kernel) if with_grads else None)
    return sharding.shard_map(on_device, (row, kernel, row, row, row), out_specs, check=False)(*arrays)


def _gathered(kernel_DV, hidden_BSD):
    """This device's columns of the unembedding in full, in the compute type where they have to travel."""
    stored = sharding.split_axes(FSDP, EXPERT)
    return jax.lax.all_gather(kernel_DV.astype(hidden_BSD.dtype), stored, axis=0, tiled=True) if stored else kernel_DV


def _local(settings, with_grads, hidden_BSD, kernel_DV, target_BS, kind_BS, weight_BS):
    """((total, Sums), grads or None) of these rows: a scan over chunks of tokens."""
    rows, sequence, width = hidden_BSD.shape
    tokens = rows * sequence
    kernel_compute_DV = kernel_DV.astype(hidden_BSD.dtype)
    inputs = _in_chunks(settings.chunk, hidden_BSD, target_BS, kind_BS, weight_BS)
    chunks, chunk = inputs[1].shape
    zero_J = jnp.zeros(settings.kinds, jnp.float32)
    start = (jnp.float32(0), Sums(zero_J, zero_J, jnp.float32(0)))
    start_grad_DV = jnp.zeros(kernel_DV.shape, jnp.float32) if with_grads else None

    def body(carry, chunk_inputs):
        sums, grad_DV = carry
        more, grad_hidden_ND, more_grad_DV = _chunk(settings, with_grads, kernel_compute_DV, *chunk_inputs)
        sums = jax.tree.map(jnp.add, sums, more)
        return (sums, grad_DV + more_grad_DV if with_grads else None), grad_hidden_ND

    if chunks == 1:  # no loop around a single chunk: XLA then fuses and threads it freely
        (sums, grad_DV), grad_hidden_ND = body((start, start_grad_DV), tuple(x[0] for x in inputs))
    else:
        (sums, grad_DV), grad_hidden_ND = jax.lax.scan(body, (start, start_grad_DV), inputs)
    if not with_grads:
        return sums, None
    grad_hidden_BSD = grad_hidden_ND.reshape(chunks * chunk, width)[:tokens].reshape(rows, sequence, width)
    return sums, (grad_hidden_BSD, grad_DV)


def _in_chunks(chunk: int, *arrays):
    """Arrays (B, S, ...) as (chunks, chunk, ...), padded with zeros, so with weight 0."""
    tokens = arrays[0].shape[0] * arrays[0].shape[1]
    chunk = min(chunk, tokens)
    chunks = -(-tokens // chunk)

    def split(x_BS):
        x_N = x_BS.reshape(tokens, *x_BS.shape[2:])
        x_N = jnp.pad(x_N, ((0, chunks * chunk - tokens), *((0, 0),) * (x_N.ndim - 1)))
        return x_N.reshape(chunks, chunk, *x_N.shape[1:])

    return tuple(map(split, arrays))


def token_nats(hidden_BSD, kernel_DV, target_BS, weight_BS, *, chunk):
    """Cross-entropy of every target times its weight, float32 (B, S) nats, 0 where the weight is; no gradients.

    Args: as `cross_entropy`; under a mesh each device handles its own rows in the same way.
    """

    def on_device(hidden_BSD, kernel_DV, target_BS, weight_BS):
        kernel_DV = _gathered(kernel_DV, hidden_BSD).astype(hidden_BSD.dtype)
        chunks = _in_chunks(chunk, hidden_BSD, target_BS, weight_BS)
        nats_N = jax.lax.map(lambda each: _nats(kernel_DV, *each).nats_N, chunks).reshape(-1)
        return nats_N[: target_BS.size].reshape(target_BS.shape)

    row, kernel = sharding.spec("batch"), sharding.spec("embed", "vocab")
    arrays = (hidden_BSD, kernel_DV, target_BS, weight_BS.astype(jnp.float32))
    return sharding.shard_map(on_device, (row, kernel, row, row), row, check=False)(*arrays)


class _Nats(NamedTuple):
    """Of one chunk: logits, their log-partition, which of them are targets, tokens that count, and weighted nats."""

    logit_NV: jax.Array
    log_partition_N: jax.Array
    is_target_NV: jax.Array
    counted_N: jax.Array
    nats_N: jax.Array


def _nats(kernel_DV, hidden_ND, target_N, weight_N) -> _Nats:
    logit_NV = jnp.dot(hidden_ND, kernel_DV, preferred_element_type=jnp.float32)
    log_partition_N = _log_partition(logit_NV)
    if sharding.size(TENSOR) > 1:  # this device has some of the ids
        target_N = target_N - jax.lax.axis_index(TENSOR) * logit_NV.shape[-1]
    is_target_NV = jnp.arange(logit_NV.shape[-1]) == target_N[:, None]
    target_logit_N = sharding.psum(jnp.sum(jnp.where(is_target_NV, logit_NV, 0), axis=-1), TENSOR)
    counted_N = weight_N != 0  # not a product: what padding's hidden state holds must not matter, even if it is NaN
    nats_N = jnp.where(counted_N, weight_N * (log_partition_N - target_logit_N), 0)
    return _Nats(logit_NV, log_partition_N, is_target_NV, counted_N, nats_N)


def _chunk(settings, with_grads, kernel_DV, hidden_ND, target_N, kind_N, weight_N):
    """((total, Sums), gradient of hidden_ND, gradient of kernel_DV) of one chunk; gradients None where not asked."""
    logit_NV, log_partition_N, is_target_NV, counted_N, nats_N = _nats(kernel_DV, hidden_ND, target_N, weight_N)
    square_N = jnp.where(counted_N, weight_N * log_partition_N**2, 0)
    is_kind_NJ = kind_N[:, None] == jnp.arange(settings.kinds)
    sums = Sums(
        jnp.sum(jnp.where(is_kind_NJ, nats_N[:, None], 0), axis=0),
        jnp.sum(jnp.where(is_kind_NJ, weight_N[:, None], 0), axis=0),
        jnp.sum(square_N),
    )
    total = jnp.sum(nats_N) + settings.z_loss * sums.square_log_partition
    if not with_grads:
        return (total, sums), None, None
    softmax_NV = jnp.exp(logit_NV - log_partition_N[:, None])
    pull_N = 1 + 2 * settings.z_loss * log_partition_N
    grad_NV = weight_N[:, None] * (pull_N[:, None] * softmax_NV - is_target_NV)
    grad_NV = jnp.where(counted_N[:, None], grad_NV, 0).astype(hidden_ND.dtype)
    grad_hidden_ND = jnp.dot(grad_NV, kernel_DV.T, preferred_element_type=jnp.float32)
    grad_hidden_ND = sharding.psum(grad_hidden_ND, TENSOR).astype(hidden_ND.dtype)
    hidden_ND = jnp.where(counted_N[:, None], hidden_ND, 0)  # 0 * NaN again
    grad_kernel_DV = jnp.dot(hidden_ND.T, grad_NV, preferred_element_type=jnp.float32)
    return (total, sums), grad_hidden_ND, grad_kernel_DV


def _log_partition(logit_NV):
    """Log of the sum of exponentials over the whole vocabulary."""
    if sharding.size(TENSOR) == 1:
        return jax.nn.logsumexp(logit_NV, axis=-1)
    highest_N = jax.lax.pmax(logit_NV.max(axis=-1), TENSOR)
    return highest_N + jnp.log(sharding.psum(jnp.exp(logit_NV - highest_N[:, None]).sum(axis=-1), TENSOR))
