"""What the training of an image tokenizer is: frozen dataclasses like those of a run (moma_jax/config.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moma_jax import recipes
from moma_jax.checks import require_profile
from moma_jax.codec.network import VqganConfig
from moma_jax.config import SEED, HostsConfig, MeshConfig, OptimizerConfig, RunConfig
from moma_jax.errors import InputError, require
from moma_jax.fields import read, setting

KIND = "codec"
"""What config.json of a run says it is of."""


@dataclass(frozen=True)
class PicturesConfig:
    """Which pictures, in which order."""

    source: str = ""
    """Pictures in folders, tars, Parquet or documents, as `moma prepare` reads them."""
    kind: Literal["auto", "parquet", "tar", "folder", "jsonl"] = "auto"
    """What the source is; auto looks at it."""
    held_out: float = setting(0.05, least=0, below=1)
    """Share of pictures held out, by content hash, where the source has no split of its own."""
    mirror: bool = True
    """Half of the pictures, drawn anew in each pass, are mirrored."""
    window: int = setting(4096, above=0, unit="pictures")
    """Pictures that are shuffled together, about: their files lie in memory."""
    seed: int = setting(0, **SEED)
    """Seed of the order."""
    threads: int = setting(2, above=0, may_change=True)
    """Threads that read and decode."""
    prefetch: int = setting(4, above=0, unit="batches", may_change=True)
    """Batches made ahead."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised (Esser et al., 2021, section 3, and its code)."""

    reconstruction: Literal["absolute", "squared"] = "absolute"
    """Error of a pixel, its mean over a picture being the reconstruction loss; pixels from network.lowest to 1."""
    perceptual: str | None = None
    """A function of your own, file.py:name or package.module:name, (drawn, truth) -> (B,): pixels (B, N, N, 3) from -1
    to 1. No weights of such networks come with moma_jax."""
    perceptual_weight: float = setting(1.0, least=0)
    """Weight of that function."""
    codebook: Literal["gradient", "average"] = "gradient"
    """How rows of the codebook follow the latents that chose them: by gradient, or as their running mean (van den Oord
    et al., 2017, appendix A.1)."""
    codebook_weight: float = setting(1.0, least=0)
    """gradient: weight of the rows' squared distance from their latents."""
    commitment: float = setting(0.25, least=0)
    """Weight of the latents' squared distance from their rows."""
    average_decay: float = setting(0.99, least=0, below=1)
    """Decay of the running use of rows and, of an average codebook, of their means."""
    dead_below: float = setting(0.03, least=0, below=1)
    """A row whose running use is below this share of the mean use is put on a latent of the batch; 0: never."""
    adversarial: float = setting(0.0, least=0)
    """Weight of the PatchGAN (Isola et al., 2017) that tells drawn from true pictures; 0: there is none."""
    adversarial_from: int = setting(0, least=0, unit="steps")
    """Steps before it begins to learn and to count."""
    adaptive: bool = True
    """Its weight is also multiplied by the ratio of the other losses' gradient to its own, at the decoder's last
    layer."""
    critic_channels: int = setting(64, above=0)
    """Channels of its first layer."""
    critic_layers: int = setting(3, above=0)
    """Its layers that halve the picture."""


@dataclass(frozen=True)
class CodecTrainConfig:
    """How long, how much at a time, what is watched."""

    steps: int = setting(100_000, above=0, unit="updates")
    """Optimizer updates."""
    batch: int = setting(64, above=0, unit="pictures")
    """Pictures of one update, over all devices."""
    seed: int = setting(0, **SEED)
    """Seed of the initial weights and of the latents that dead rows are put on."""
    on_nan: Literal["stop", "skip"] = setting("stop", may_change=True)
    """A loss or gradient that is not finite: stop with the last good checkpoint named, or skip the update."""
    log_every: int = setting(10, above=0, unit="steps", may_change=True)
    """Steps between records."""
    eval_every: int = setting(1000, above=0, unit="steps")
    """Steps between evaluations; the last step is always evaluated."""
    eval_pictures: int = setting(256, above=0, unit="pictures")
    """Held-out pictures to evaluate; fewer where there are fewer."""
    sheet_pictures: int = setting(16, least=0, unit="pictures", may_change=True)
    """Held-out pictures of the contact sheet that every evaluation leaves."""
    checkpoint_every: int = setting(1000, above=0, unit="steps", may_change=True)
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = setting(2, above=0, unit="checkpoints", may_change=True)
    """Newest checkpoints that are kept."""
    keep_every: int | None = setting(None, above=0, unit="steps", may_change=True)
    """Besides, keep every checkpoint whose step is a multiple of this."""
    profile_steps: tuple[int, ...] = setting((), above=0, may_change=True)
    """First and last step of a profile, written to RUN/profile; (): none."""


@dataclass(frozen=True)
class CodecConfig:
    """A whole training of an image tokenizer."""

    network: VqganConfig = VqganConfig()
    data: PicturesConfig = PicturesConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig(
        peak_lr=1e-4, end_lr=1e-5, warmup_steps=1000, beta1=0.5, beta2=0.9, epsilon=1e-8, weight_decay=0.0
    )
    train: CodecTrainConfig = CodecTrainConfig()
    mesh: MeshConfig = setting(MeshConfig(), may_change=True)
    hosts: HostsConfig = setting(HostsConfig(), may_change=True)
    run: RunConfig = setting(RunConfig(), may_change=True)


def resolve(config: CodecConfig) -> CodecConfig:
    """The config, checked; InputError for the first field that is wrong, or the first contradiction."""
    config = read(CodecConfig, config)
    config.network.check()
    require(config.network.decoder, "network.decoder: False; a network without a decoder has nothing to learn from")
    require(config.data.source != "", "data.source: name the pictures, a folder of them or of Parquet")
    require(
        config.mesh.tensor == 1,
        f"mesh.tensor: {config.mesh.tensor}; the network is whole on every device, so use 1 and more of mesh.data",
    )
    left = config.network.side >> config.loss.critic_layers
    require(
        config.loss.adversarial == 0 or left > 2,
        f"loss.critic_layers: {config.loss.critic_layers} halve pictures of {config.network.side} pixels to {left}, "
        "and two more layers of 4 x 4 need 3; give fewer",
    )
    require_profile(config.train.profile_steps)
    require(config.run.init_from is None, "run.init_from: an image tokenizer starts from nothing; leave it out")
    return config


def to_json(config: CodecConfig) -> dict[str, Any]:
    """The content of config.json."""
    return {"kind": KIND, **dataclasses.asdict(config)}


def from_json(data: Any) -> CodecConfig:
    """Reads `to_json`'s dictionary; InputError where it is none."""
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise InputError("no config of an image tokenizer's training")
    return read(CodecConfig, {name: value for name, value in data.items() if name != "kind"})


def load(path: str | Path, perceptual: str | None = None) -> CodecConfig:
    """The config of a recipe, `configs/codec/NAME.py`, of a config.json or of a run directory, as it is written there.

    Args:
      perceptual: takes the place of loss.perceptual. A config.json is data: the code that it names is run where whoever
        uses it names it, too.

    Raises:
      InputError: there is none, it is of something else, or a config.json names code that was not named.
    """
    config = recipes.load_as(path, CodecConfig, from_json, lambda config: read(CodecConfig, config))
    if perceptual is not None:
        return dataclasses.replace(config, loss=dataclasses.replace(config.loss, perceptual=perceptual))
    named = config.loss.perceptual
    require(
        named is None or not recipes.is_record(path),
        f"loss.perceptual: {path} names {named}, whose code is not run for that; name it: --loss.perceptual {named}",
    )
    return config
