"""A folder of tiny pictures, and the training of a tiny image tokenizer on it."""

import dataclasses

import numpy as np
from PIL import Image

from moma_jax.codec.network import VqganConfig
from moma_jax.config import OptimizerConfig, RunConfig
from moma_jax.training.codec.config import CodecConfig, CodecTrainConfig, LossConfig, PicturesConfig

NETWORK = VqganConfig(
    side=16, patch=2, channels=8, multipliers=(1, 1), blocks=1, middle_attention=False, latent=8, codebook=16,
    code_width=4, norm_groups=4,
)  # fmt: skip


def write_pictures(folder, train=24, validation=6):
    """PNG files of two colours each, without captions."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((16, 16, 3), random.integers(0, 256, 3), np.uint8)
            top, left = random.integers(0, 8, 2)
            pixels[top : top + 8, left : left + 8] = random.integers(0, 256, 3)
            Image.fromarray(pixels).save(folder / split / f"{i:03d}.png")
    return folder


def small_training(pictures, run=None, loss=None, network=None, train=None, **sections):
    """A config; `loss`, `network` and `train` are fields to replace."""
    return CodecConfig(
        network=dataclasses.replace(NETWORK, **network or {}),
        data=PicturesConfig(source=str(pictures), seed=3),
        loss=dataclasses.replace(LossConfig(critic_channels=4, critic_layers=1), **loss or {}),
        optimizer=OptimizerConfig(peak_lr=1e-2, end_lr=1e-3, warmup_steps=2, weight_decay=0.0),
        train=dataclasses.replace(
            CodecTrainConfig(steps=12, batch=8, log_every=2, eval_every=6, checkpoint_every=3, sheet_pictures=3),
            **train or {},
        ),
        run=RunConfig(dir=None if run is None else str(run), tensorboard=False),
        **sections,
    )
