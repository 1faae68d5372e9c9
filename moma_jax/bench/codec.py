"""Image tokenizers: pictures per second, to codes and back."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from moma_jax.bench.timing import in_turns, require_some, say, summarise
from moma_jax.codec import Codec


def bench_codec(codec: Codec, *, pictures: int = 16, repeats: int = 5) -> dict[str, Any]:
    """Speed of encoding and decoding random pictures of the codec's size, from and to host memory.

    Args:
      pictures: of one call; those of whole batches are measured at their best. repeats: timed calls of each.

    Returns:
      {"shape", "encode": {"pictures_per_second", "spread"}, "decode": the same, or None without a decoder, ...}.

    Raises:
      InputError: numbers that measure nothing.
    """
    require_some(pictures=pictures, repeats=repeats)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (pictures, codec.side, codec.side, 3), np.uint8)
    codes = random.integers(0, codec.codebook, (pictures, codec.codes_per_image))
    say(f"{pictures} pictures of {codec.side} x {codec.side}")
    calls = {"encode": lambda: codec.encode(images)}
    if codec.draws:
        calls["decode"] = lambda: codec.decode(codes)
    figures: dict[str, Any] = {"encode": None, "decode": None}
    for name, seconds in in_turns(calls, repeats).items():
        median, spread = summarise(seconds)
        figures[name] = {"pictures_per_second": pictures / median, "spread": spread}
    shape = {name: getattr(codec, name) for name in ("kind", "side", "codes_per_image", "codebook")}
    device = {"device": jax.local_devices()[0].device_kind, "devices": jax.local_device_count()}
    return {"bench": "codec", "shape": shape | {"pictures": pictures}, **figures, **device}
