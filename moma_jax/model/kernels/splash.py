"""The TPU's fused attention: scores never leave the core (splash attention, a Pallas kernel that comes with JAX)."""

from __future__ import annotations

import functools
import logging
import math

import jax

KEPT = "attention"
"""Name, for remat policies, of what the kernel's backward pass needs of its forward pass."""

BLOCKS = (1024, 512, 256, 128)
"""Queries and keys of one block, the first that divides the row; the kernel's least is 128. The backward pass adds a
partial gradient of all queries for every block of keys, so these are large."""
COMPUTED = 512
"""Keys of a block that are scored at once, at most."""


def refusal(platform: str, sequence: int) -> str | None:
    """Why rows of so many positions cannot be attended by the fused kernel; None where they can."""
    match platform:
        case "tpu" if sequence % BLOCKS[-1]:
            return f"data.sequence {sequence} is no multiple of {BLOCKS[-1]}"
        case "gpu":
            return "none is wired in for GPUs"
    return None


@functools.cache
def warn(reason: str) -> None:
    """Says once that the plain attention is used where a fused one is expected."""
    logging.getLogger(__name__).warning("attention: without the fused kernel, because %s; it will be slower", reason)


def attend_fused(q_BSHK, k_BSHK, v_BSHK, segment_BS, *, interpret: bool = False):
    """`attention.attend` for rows in which the positions of a document ascend, as packed rows' do."""
    # Imported here: it takes a while, and other platforms have no use for it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    sequence, heads, width = q_BSHK.shape[1:]
    block = next(size for size in BLOCKS if sequence % size == 0)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((sequence, sequence))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=min(block, COMPUTED),
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=min(block, COMPUTED),
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    q_BHSK, k_BHSK, v_BHSK = (x.swapaxes(1, 2) for x in (q_BSHK / math.sqrt(width), k_BSHK, v_BSHK))
    y_BHSK = jax.vmap(kernel)(q_BHSK.astype(v_BSHK.dtype), k_BHSK, v_BHSK, splash.SegmentIds(segment_BS, segment_BS))
    return y_BHSK.swapaxes(1, 2)
