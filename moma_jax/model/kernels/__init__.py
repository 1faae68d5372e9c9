"""Fused kernels, and where they are used."""

from __future__ import annotations

import functools
import logging

from moma_jax.model.kernels import splash, triton, turned


def refusal(platform: str, kind: str, sequence: int, heads: int, width: int) -> str | None:
    """Why the kernels of a platform, on a kind of device, cannot attend rows of so many positions where a device has
    so many heads of so many channels; None where they can, or where the platform has none."""
    match platform:
        case "tpu":
            return splash.refusal(sequence) or turned.refusal(sequence, heads, width)
        case "gpu":
            return triton.refusal(kind, sequence, width)
    return None


@functools.cache
def warn(reason: str) -> None:
    """Says once that attention is written out where a kernel is expected."""
    logging.getLogger(__name__).warning("attention: without the fused kernel, because %s; it will be slower", reason)
