"""What a device reaches: products of square matrices, and a copy through its memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moma_jax.bench.timing import in_turns, random, summarise
from moma_jax.cost import peak_flops


def measure_chip(side: int, elements: int, repeats: int) -> dict[str, Any]:
    """Medians on the first device.

    Args:
      side: of the matrices, float32 on CPUs and bfloat16 elsewhere. elements: float32 numbers that are copied.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    a, b, x = random(0, (side, side), dtype), random(1, (side, side), dtype), jnp.ones(elements, jnp.float32)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    calls = {"product": lambda: product(a, b), "copy": lambda: copy(x)}
    seconds = {name: summarise(times) for name, times in in_turns(calls, repeats).items()}
    flops = 2 * side**3 / seconds["product"][0]
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        "product_flops_per_second": flops,
        "of_peak": None if peak is None else flops / peak,
        "bytes_per_second": 2 * 4 * elements / seconds["copy"][0],
        "spread": {name: spread for name, (_, spread) in seconds.items()},
    }
