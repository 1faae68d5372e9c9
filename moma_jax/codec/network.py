"""The VQGAN of Chameleon, taming-transformers, LlamaGen, Janus and aMUSEd: one network, a config for each.

    pixels -> encoder -> 1x1 convolution -> nearest row of the codebook -> 1x1 convolution -> decoder -> pixels

Every level of the encoder has residual blocks and halves the picture, the last one excepted; the decoder goes back,
with one block more in each. Levels count from the full picture. Axes: B pictures, H W pixels, h w places, K = h * w
codes of one picture, Z channels of a latent, C its width in the codebook, V rows of the codebook.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moma_jax.errors import require
from moma_jax.fields import setting

MOST = 64
"""Levels, and blocks of a level, at most."""
NORM_EPSILON = 1e-6
"""Of every group norm, in all of these networks."""


@dataclass(frozen=True)
class VqganConfig:
    """An image tokenizer; the defaults are Chameleon's (Gafni et al., 2022, at 512 pixels)."""

    side: int = setting(512, above=0, unit="pixels")
    """Side N of the N x N picture."""
    patch: int = setting(1, above=0, unit="pixels")
    """Side of the squares of pixels that are one place of the first level, side by side in its channels; the public
    networks have 1. Small pictures need no levels then, and the work is done where a CPU is as fast at convolutions as
    at matrix products."""
    channels: int = setting(128, above=0)
    """Channels of the first level."""
    multipliers: tuple[int, ...] = setting((1, 1, 2, 2, 4), above=0)
    """Channels of each level over those of the first; a level less halvings of the side."""
    blocks: int = setting(2, least=0, most=MOST)
    """Residual blocks of a level of the encoder; the decoder has one more."""
    attention_levels: tuple[int, ...] = setting((), least=0)
    """Levels, from 0, in which attention follows every block."""
    middle_attention: bool = True
    """Attention between the two blocks in the middle."""
    latent: int = setting(256, above=0)
    """Channels Z of the latent that the encoder ends with."""
    codebook: int = setting(8192, above=0, unit="codes")
    """Rows V of the codebook."""
    code_width: int = setting(256, above=0)
    """Width C of a row."""
    unit_length: Literal["neither", "codes", "both"] = "neither"
    """What has its length divided out. both: latents and codes, before they are compared and after (LlamaGen, Janus);
    codes: codes alone, once they are chosen (transformers' Janus)."""
    lowest: float = setting(-1.0, below=1)
    """What a black pixel is to the network; a white one is 1. aMUSEd has 0."""
    norm_groups: int = setting(32, above=0)
    """Groups of channels of a group norm."""
    decoder: bool = True
    """There is a decoder: codes can be drawn."""

    @property
    def places(self) -> int:
        """Codes along a side of a picture."""
        return self.side // self.patch >> (len(self.multipliers) - 1)

    def check(self) -> VqganConfig:
        """The config itself; InputError where it contradicts itself."""
        levels = len(self.multipliers)
        halved = self.patch << max(levels - 1, 0)
        require(0 < levels <= MOST, f"codec.multipliers: {levels} levels; give one for each level, {MOST} at most")
        require(self.side % halved == 0, f"codec.side: {self.side} pixels cannot be halved {levels - 1} times"
                f"{f' in squares of {self.patch}' if self.patch > 1 else ''}; use a multiple of {halved}")  # fmt: skip
        wrong = [level for level in self.attention_levels if level >= levels]
        require(
            not wrong, f"codec.attention_levels: there is no level {wrong and wrong[0]}; they are 0 to {levels - 1}"
        )
        for factor in self.multipliers:
            require(
                self.channels * factor % self.norm_groups == 0,
                f"codec.channels: {self.channels} x {factor} do not split into {self.norm_groups} groups; use a "
                "multiple",
            )
        return self


def convolution(channels: int, name: str, size: int = 3, **options: Any) -> nn.Conv:
    """A convolution that keeps the picture's size."""
    return nn.Conv(channels, (size, size), padding=size // 2, name=name, **options)


def to_places(x_BHWC, patch: int):
    """Squares of pixels as one place each, their channels side by side."""
    batch, height, width, channels = x_BHWC.shape
    x_BhpwqC = x_BHWC.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x_BhpwqC.swapaxes(2, 3).reshape(batch, height // patch, width // patch, patch * patch * channels)


def to_pixels(x_BhwX, patch: int):
    """The inverse of `to_places`."""
    batch, height, width, _ = x_BhwX.shape
    x_BhwpqC = x_BhwX.reshape(batch, height, width, patch, patch, -1)
    return x_BhwpqC.swapaxes(2, 3).reshape(batch, height * patch, width * patch, -1)


class Normalised(nn.Module):
    """Group norm, in float32, then swish where asked for."""

    groups: int
    swish: bool = True

    @nn.compact
    def __call__(self, x_BHWC):
        y_BHWC = nn.GroupNorm(self.groups, epsilon=NORM_EPSILON, use_fast_variance=False, name="norm")(x_BHWC)
        return nn.swish(y_BHWC) if self.swish else y_BHWC


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    channels: int
    groups: int

    @nn.compact
    def __call__(self, x_BHWC):
        y_BHWC = convolution(self.channels, "conv1")(Normalised(self.groups, name="norm1")(x_BHWC))
        y_BHWC = convolution(self.channels, "conv2")(Normalised(self.groups, name="norm2")(y_BHWC))
        if x_BHWC.shape[-1] != self.channels:
            x_BHWC = convolution(self.channels, "shortcut", size=1)(x_BHWC)
        return x_BHWC + y_BHWC


class Attention(nn.Module):
    """Every place of a picture attends to all of its places, with one head."""

    groups: int

    @nn.compact
    def __call__(self, x_BHWC):
        batch, height, width, channels = x_BHWC.shape
        y_BHWC = Normalised(self.groups, swish=False, name="norm")(x_BHWC)
        query, key, value = (
            convolution(channels, name, size=1)(y_BHWC).reshape(batch, height * width, 1, channels)
            for name in ("query", "key", "value")
        )
        y_BHWC = jax.nn.dot_product_attention(query, key, value).reshape(x_BHWC.shape)
        return x_BHWC + convolution(channels, "out", size=1)(y_BHWC)


class Middle(nn.Module):
    """A block, attention, a block."""

    config: VqganConfig

    @nn.compact
    def __call__(self, x_BHWC):
        channels, groups = x_BHWC.shape[-1], self.config.norm_groups
        x_BHWC = Residual(channels, groups, name="block_0")(x_BHWC)
        if self.config.middle_attention:
            x_BHWC = Attention(groups, name="attention")(x_BHWC)
        return Residual(channels, groups, name="block_1")(x_BHWC)


class Level(nn.Module):
    """The blocks of one level of the encoder or decoder."""

    config: VqganConfig
    number: int
    blocks: int

    @nn.compact
    def __call__(self, x_BHWC):
        channels = self.config.channels * self.config.multipliers[self.number]
        for block in range(self.blocks):
            x_BHWC = Residual(channels, self.config.norm_groups, name=f"block_{block}")(x_BHWC)
            if self.number in self.config.attention_levels:
                x_BHWC = Attention(self.config.norm_groups, name=f"attention_{block}")(x_BHWC)
        return x_BHWC


class Encoder(nn.Module):
    """Pixels (B, N, N, 3) to latents (B, h, w, Z)."""

    config: VqganConfig

    @nn.compact
    def __call__(self, x_BHWC):
        config, last = self.config, len(self.config.multipliers) - 1
        x_BHWC = convolution(config.channels, "conv_in")(to_places(x_BHWC, config.patch))
        for number in range(last + 1):
            x_BHWC = Level(config, number, config.blocks, name=f"level_{number}")(x_BHWC)
            if number < last:
                # A row and a column of zeros at the far sides alone, as taming-transformers has it.
                x_BHWC = jnp.pad(x_BHWC, ((0, 0), (0, 1), (0, 1), (0, 0)))
                down = nn.Conv(x_BHWC.shape[-1], (3, 3), strides=2, padding="VALID", name=f"down_{number}")
                x_BHWC = down(x_BHWC)
        x_BHWC = Middle(config, name="middle")(x_BHWC)
        return convolution(config.latent, "conv_out")(Normalised(config.norm_groups, name="norm_out")(x_BHWC))


class Decoder(nn.Module):
    """Latents (B, h, w, Z) to pixels (B, N, N, 3), not yet within bounds."""

    config: VqganConfig

    @nn.compact
    def __call__(self, z_BhwZ):
        config, last = self.config, len(self.config.multipliers) - 1
        x_BHWC = convolution(config.channels * config.multipliers[-1], "conv_in")(z_BhwZ)
        x_BHWC = Middle(config, name="middle")(x_BHWC)
        for number in range(last, -1, -1):
            x_BHWC = Level(config, number, config.blocks + 1, name=f"level_{number}")(x_BHWC)
            if number:
                x_BHWC = x_BHWC.repeat(2, axis=1).repeat(2, axis=2)
                x_BHWC = convolution(x_BHWC.shape[-1], f"up_{number}")(x_BHWC)
        x_BHWC = Normalised(config.norm_groups, name="norm_out")(x_BHWC)
        self.sow("intermediates", "last", x_BHWC)  # what an adversarial loss is weighed by (training/codec/step.py)
        return to_pixels(convolution(3 * config.patch**2, "conv_out")(x_BHWC), config.patch)


class Reconstruction(NamedTuple):
    """What learning needs to know of pictures that went through the network.

    Attributes:
      pixels_BHW3: drawn from the chosen rows; its gradient reaches the latents as if they were the rows.
      code_BK: the chosen rows' numbers. latent_BKC, row_BKC: latents, and the rows, as they were compared.
    """

    pixels_BHW3: Any
    code_BK: Any
    latent_BKC: Any
    row_BKC: Any


class Vqgan(nn.Module):
    """The whole network; call its methods by `apply(..., method="codes")`."""

    config: VqganConfig

    def setup(self):
        config = self.config
        self.encoder = Encoder(config)
        self.before = nn.Conv(config.code_width, (1, 1))
        self.codebook_VC = self.param("codebook_VC", codebook_init, (config.codebook, config.code_width))
        if config.decoder:
            self.after = nn.Conv(config.latent, (1, 1))
            self.decoder = Decoder(config)

    def __call__(self, x_BHW3):
        """Everything once, to make the parameters: (codes, pixels or None)."""
        code_BK = self.codes(x_BHW3)
        return code_BK, self.pixels(code_BK) if self.config.decoder else None

    def latents(self, x_BHW3):
        """(B, h, w, C) as they are compared with the codebook's rows; pixels from `lowest` to 1."""
        z_BhwC = self.before(self.encoder(x_BHW3))
        return unit(z_BhwC) if self.config.unit_length == "both" else z_BhwC

    def codes(self, x_BHW3):
        """int32 (B, K), row by row: the codebook's nearest row; the first of several."""
        z_BhwC = self.latents(x_BHW3)
        return nearest(z_BhwC.reshape(len(z_BhwC), -1, z_BhwC.shape[-1]), self.rows(compared=True))

    def rows(self, compared: bool):
        """The codebook as latents are compared with it, or as the decoder reads it, (V, C)."""
        wanted = ("both",) if compared else ("both", "codes")
        return unit(self.codebook_VC) if self.config.unit_length in wanted else self.codebook_VC

    def pixels(self, code_BK):
        """Pictures (B, N, N, 3) of codes, from `lowest` to 1 but for what the decoder oversteps."""
        return self._drawn(self.rows(compared=False)[code_BK])

    def reconstruct(self, x_BHW3) -> Reconstruction:
        """Pictures to codes and back, differentiable."""
        z_BhwC = self.latents(x_BHW3)
        latent_BKC = z_BhwC.reshape(len(z_BhwC), -1, z_BhwC.shape[-1])
        code_BK = nearest(*jax.lax.stop_gradient((latent_BKC, self.rows(compared=True))))
        chosen_BKC = jax.lax.stop_gradient(self.rows(compared=False)[code_BK] - latent_BKC)
        pixels_BHW3 = self._drawn(latent_BKC + chosen_BKC)
        return Reconstruction(pixels_BHW3, code_BK, latent_BKC, self.rows(compared=True)[code_BK])

    def _drawn(self, row_BKC):
        places = self.config.places
        return self.decoder(self.after(row_BKC.reshape(len(row_BKC), places, places, -1)))


def codebook_init(key, shape, dtype=jnp.float32):
    """Uniform within 1/V, as in taming-transformers."""
    return jax.random.uniform(key, shape, dtype, -1 / shape[0], 1 / shape[0])


def unit(x_NC):
    """Vectors of length 1."""
    return x_NC / jnp.maximum(jnp.linalg.norm(x_NC, axis=-1, keepdims=True), 1e-12)


def nearest(z_BKC, row_VC):
    """int32 (B, K): the row at the least Euclidean distance. One picture after the other: K x V distances are many."""
    length_V = jnp.square(row_VC).sum(-1)  # the latents' own is the same for every row

    def of_one(z_KC):
        product_KV = jnp.matmul(z_KC, row_VC.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmin(length_V - 2 * product_KV, axis=-1).astype(jnp.int32)

    return jax.lax.map(of_one, z_BKC)
