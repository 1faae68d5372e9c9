"""Softmax attention inside documents with its scores written out, a block of queries at a time, for any platform.

A block's scores are those with a window of keys that has all that some query of it sees: keys behind it are left out,
and so are those before its documents' first. The gradient is written by hand (Dao et al., 2022, without the
tiles): of the forward pass it keeps the result and each query's log-partition, no scores.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

HIDDEN = -1e30
"""A score that no softmax sees; finite, so that a row without a visible key gives no NaN."""
AGAIN = "attention_again"
"""Scope of products that a gradient which kept all scores would not need."""
WINDOWS = (3 / 8, 5 / 8, 1)
"""Sizes of windows, as shares of a row of more than MOST_WINDOWS blocks; the first is for quarters of rows."""
MOST_WINDOWS = 4
"""Sizes of windows at most, as each is compiled: a row of so many blocks has one of every number of blocks."""


def scored(q_BHQK, k_BHSK, visible_BQS):
    """Scores of queries with keys, (B, H, Q, S) in float32 or more; HIDDEN where a key is not visible."""
    dtype = jnp.promote_types(q_BHQK.dtype, jnp.float32)
    score_BHQS = jnp.einsum("bhqk,bhsk->bhqs", q_BHQK, k_BHSK, preferred_element_type=dtype)
    return jnp.where(visible_BQS[:, None], score_BHQS / math.sqrt(q_BHQK.shape[-1]), HIDDEN)


def softmaxed(score_BHQS, v_BHSK):
    """(values mixed by the softmax of scores, (B, H, Q, K) in the dtype of v; log-partition (B, H, Q))."""
    most_BHQ = score_BHQS.max(-1)
    weight_BHQS = jnp.exp(score_BHQS - most_BHQ[..., None])
    total_BHQ = weight_BHQS.sum(-1)
    # Divided by its sum after the product with v: a pass fewer over all scores.
    mixed_BHQK = jnp.einsum("bhqs,bhsk->bhqk", weight_BHQS.astype(v_BHSK.dtype), v_BHSK)
    return (mixed_BHQK / total_BHQ[..., None]).astype(v_BHSK.dtype), most_BHQ + jnp.log(total_BHQ)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_blocks(q_BHSK, k_BHSK, v_BHSK, segment_BS, position_BS, queries: int):
    """`attention.attend` in blocks of so many queries, heads in front of positions."""
    return _forward(q_BHSK, k_BHSK, v_BHSK, segment_BS, position_BS, queries)[0]


def _forward(q_BHSK, k_BHSK, v_BHSK, segment_BS, position_BS, queries: int):
    given = segment_BS, position_BS
    # Layers are scanned, and JAX would take what depends on no layer out of the scan: every block's masks, kept whole.
    q_BHSK, segment_BS, position_BS = jax.lax.optimization_barrier((q_BHSK, segment_BS, position_BS))

    def one(block):
        q_BHQK, segment_BQ, position_BQ, number = block
        visible_BQS = visible_to(segment_BQ, position_BQ, segment_BS, position_BS)

        def within(start, size):
            k, v, visible = (_cut(x, start, size) for x in (k_BHSK, v_BHSK, visible_BQS[..., None]))
            return softmaxed(scored(q_BHQK, k, visible[..., 0]), v)

        return _windowed(within, visible_BQS, (number + 1) * queries, queries)

    blocks = (_split(q_BHSK, queries, 0, 2), *_rows_of(segment_BS, position_BS, queries))
    y_NBHQK, partition_NBHQ = jax.lax.map(one, (*blocks, jnp.arange(len(blocks[0]))))
    y_BHSK = _joined(y_NBHQK, q_BHSK.shape[2])
    return y_BHSK, (q_BHSK, k_BHSK, v_BHSK, *given, y_BHSK, partition_NBHQ)


def _backward(queries: int, kept, dy_BHSK):
    q_BHSK, k_BHSK, v_BHSK, segment_BS, position_BS, y_BHSK, partition_NBHQ = kept
    wide = partition_NBHQ.dtype
    with jax.named_scope(AGAIN):  # what a query's softmax takes back from each of its scores' gradients
        back_BHS = jnp.einsum("bhsk,bhsk->bhs", dy_BHSK, y_BHSK, preferred_element_type=wide)
    root = math.sqrt(q_BHSK.shape[-1])

    def one(sums, block):
        q_BHQK, dy_BHQK, back_BHQ, segment_BQ, position_BQ, partition_BHQ, number = block
        visible_BQS = visible_to(segment_BQ, position_BQ, segment_BS, position_BS)

        def within(start, size):
            k, v, visible = (_cut(x, start, size) for x in (k_BHSK, v_BHSK, visible_BQS[..., None]))
            with jax.named_scope(AGAIN):
                weight_BHQS = jnp.exp(scored(q_BHQK, k, visible[..., 0]) - partition_BHQ[..., None])
            product = functools.partial(jnp.einsum, preferred_element_type=wide)
            dweight_BHQS = product("bhqk,bhsk->bhqs", dy_BHQK, v)
            dscore_BHQS = (weight_BHQS * (dweight_BHQS - back_BHQ[..., None]) / root).astype(q_BHQK.dtype)
            parts = (
                product("bhqs,bhqk->bhsk", dscore_BHQS, q_BHQK),
                product("bhqs,bhqk->bhsk", weight_BHQS.astype(dy_BHQK.dtype), dy_BHQK),
            )
            added = (
                jax.lax.dynamic_update_slice_in_dim(total, _cut(total, start, size) + part, start, 2)
                for total, part in zip(sums, parts, strict=True)
            )
            return tuple(added), product("bhqs,bhsk->bhqk", dscore_BHQS, k).astype(q_BHQK.dtype)

        return _windowed(within, visible_BQS, (number + 1) * queries, queries)

    rows = (_split(x, queries, 0, 2) for x in (q_BHSK, dy_BHSK, back_BHS))
    blocks = (*rows, *_rows_of(segment_BS, position_BS, queries), partition_NBHQ, jnp.arange(len(partition_NBHQ)))
    zeros = jnp.zeros(k_BHSK.shape, wide), jnp.zeros(v_BHSK.shape, wide)
    (dk_BHSK, dv_BHSK), dq_NBHQK = jax.lax.scan(one, zeros, blocks)
    dq_BHSK = _joined(dq_NBHQK, q_BHSK.shape[2])
    return dq_BHSK, dk_BHSK.astype(k_BHSK.dtype), dv_BHSK.astype(v_BHSK.dtype), None, None


attend_blocks.defvjp(_forward, _backward)


# Blocks and their keys ------------------------------------------------------------------------------------------------


def visible_to(segment_BQ, position_BQ, segment_BS, position_BS):
    """Whether a query sees a key, (B, Q, S): it is of its document, at its position or before."""
    same_BQS = segment_BQ[:, :, None] == segment_BS[:, None, :]
    return same_BQS & (position_BQ[:, :, None] >= position_BS[:, None, :])


def _windowed(within, visible_BQS, end, queries: int):
    """within(start, size), of a window of keys before `end` that has all visible ones, as small as there is."""
    sequence = visible_BQS.shape[2]
    seen_S = visible_BQS.any((0, 1))
    first, end = jnp.argmax(seen_S), jnp.minimum(end, sequence)
    last = sequence - jnp.argmax(seen_S[::-1])  # positions need not ascend in a row: keys may lie behind
    few = sequence <= MOST_WINDOWS * queries
    shares = (queries * (n + 1) / sequence for n in range(MOST_WINDOWS)) if few else WINDOWS
    sizes = sorted({min(sequence, math.ceil(sequence * share)) for share in shares})
    end = jnp.maximum(end, last)
    needed = jnp.where(seen_S.any(), end - first, 1)
    number = jnp.searchsorted(jnp.array(sizes), needed)

    def of_size(size):
        return lambda: within(jnp.clip(end - size, 0, sequence - size), size)

    return jax.lax.switch(number, [of_size(size) for size in sizes])


def _cut(x, start, size: int):
    return jax.lax.dynamic_slice_in_dim(x, start, size, 2)


def _rows_of(segment_BS, position_BS, queries: int):
    """Segments and positions of blocks; queries beyond the end belong to no segment, and their results are cut off."""
    return _split(segment_BS, queries, -1, 1), _split(position_BS, queries, 0, 1)


def _split(x, queries: int, fill, axis: int):
    """(..., S, ...) to (blocks, ..., queries, ...)."""
    blocks = -(-x.shape[axis] // queries)
    pad = [(0, blocks * queries - x.shape[axis] if n == axis else 0) for n in range(x.ndim)]
    x = jnp.pad(x, pad, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, queries, *x.shape[axis + 1 :]), axis, 0)


def _joined(x_NBHQK, sequence: int):
    """The inverse of `_split`, without what was filled in."""
    x_BHNQK = jnp.moveaxis(x_NBHQK, 0, 2)
    return x_BHNQK.reshape(*x_BHNQK.shape[:2], -1, x_BHNQK.shape[-1])[:, :, :sequence]
