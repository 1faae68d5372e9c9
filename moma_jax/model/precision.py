"""What is computed in which type."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moma_jax.config import ModelConfig

EXACT = jax.lax.Precision.HIGHEST
"""Of products that decide who is taken: the same on every platform."""


def wide(x):
    """x in float32: the least that norms, scores and routers are computed in. float64, of tests, stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def compute_dtype(model: ModelConfig):
    """The dtype of activations; auto is bfloat16 where the hardware computes in it, else float32."""
    if model.dtype != "auto":
        return jnp.dtype(model.dtype)
    device = jax.devices()[0]
    match device.platform:
        case "tpu":
            return jnp.dtype("bfloat16")
        case "gpu":  # CUDA names it "8.0"; of the others all that JAX supports have it
            major = device.compute_capability.split(".")[0]
            return jnp.dtype("float32" if major.isdigit() and int(major) < 8 else "bfloat16")
        case _:
            return jnp.dtype("float32")
