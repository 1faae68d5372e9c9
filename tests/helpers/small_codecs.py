"""A tiny VQGAN with random weights, whose codes occur."""

import dataclasses

import jax
import numpy as np

from moma_jax.codec.network import Vqgan, VqganConfig
from moma_jax.codec.vqgan import VqganCodec

SMALL = VqganConfig(
    side=16, channels=8, multipliers=(1, 2), blocks=1, attention_levels=(1,), latent=6, codebook=32, code_width=4,
    norm_groups=4,
)  # fmt: skip


def small_codec(seed: int = 0, **fields) -> VqganCodec:
    """16 x 16 pixels become 8 x 8 codes of 32."""
    config = dataclasses.replace(SMALL, **fields).check()
    pixels = np.zeros((1, config.side, config.side, 3), np.float32)
    params = jax.device_get(Vqgan(config).init(jax.random.key(seed), pixels)["params"])
    shape = params["codebook_VC"].shape
    params["codebook_VC"] = np.random.default_rng(seed + 1).normal(size=shape).astype(np.float32)
    return VqganCodec(config, params)
