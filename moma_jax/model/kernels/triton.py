"""The GPU's fused attention: scores never leave a processor (a Triton kernel of Pallas that comes with JAX)."""

from __future__ import annotations

BLOCK = 128
"""Queries and keys of a block, forward; it divides a row."""
BACKWARD_BLOCK = 32
WIDEST = 256
"""Channels of a head, at most."""
TOO_OLD = ("Tesla", "Quadro", "NVIDIA TITAN", "NVIDIA GeForce RTX 20", "NVIDIA GeForce GTX")
"""How device kinds begin that have no matrix units for what the kernel does (compute capability below 8.0)."""


def refusal(kind: str, sequence: int, width: int) -> str | None:
    """Why a kind of GPU cannot attend rows of so many positions with heads of so many channels; None where it can."""
    if kind.startswith(TOO_OLD):
        return f"a {kind} is too old for it"
    if width > WIDEST:
        return f"heads of {width} channels are wider than {WIDEST}"
    return f"data.sequence {sequence} is no multiple of {BLOCK}" if sequence % BLOCK else None


def attend_triton(q_BSHK, k_BSHK, v_BSHK, segment_BS, *, interpret: bool = False):
    """`attention.attend` for rows in which the positions of a document ascend, as packed rows' do."""
    # Imported here: it takes a while, and other platforms have no use for it.
    from jax.experimental.pallas.ops.gpu import attention

    blocks = {f"block_{name}": BACKWARD_BLOCK for name in ("q_dkv", "kv_dkv", "q_dq", "kv_dq")}
    return attention.mha(
        q_BSHK,
        k_BSHK,
        v_BSHK,
        segment_ids=segment_BS,
        sm_scale=q_BSHK.shape[-1] ** -0.5,
        causal=True,
        block_sizes=attention.BlockSizes(block_q=BLOCK, block_k=BLOCK, **blocks),
        interpret=interpret,
    )
