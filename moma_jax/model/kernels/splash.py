"""The TPU's fused attention: scores never leave the core (splash attention, a Pallas kernel that comes with JAX)."""

from __future__ import annotations

import jax

KEPT = "attention"
"""Name, for remat policies, of what the kernel's backward pass needs of its forward pass."""

BLOCKS = (1024, 512, 256, 128)
"""Queries and keys of one block, the first that divides the row; the kernel's least is 128. The backward pass adds a
partial gradient of all queries for every block of keys, so these are large."""
COMPUTED = 512
"""Keys of a block that are scored at once, at most."""


def refusal(sequence: int) -> str | None:
    """Why rows of so many positions cannot be attended by the kernel; None where they can."""
    return f"data.sequence {sequence} is no multiple of {BLOCKS[-1]}" if sequence % BLOCKS[-1] else None


def attend_fused(q_BHSK, k_BHSK, v_BHSK, segment_BS, *, interpret: bool = False):
    """`attention.attend` for rows in which the positions of a document ascend, as packed rows' do; heads in front, and
    queries over the root of a head's width already."""
    # Imported here: it takes a while, and other platforms have no use for it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, sequence = q_BHSK.shape[1:3]
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
    return jax.vmap(kernel)(q_BHSK, k_BHSK, v_BHSK, splash.SegmentIds(segment_BS, segment_BS))
