"""PatchGAN: a small network that tells true pictures from drawn ones, patch by patch (Isola et al., 2017)."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

KERNEL, SLOPE, MOST = 4, 0.2, 8
"""Side of its convolutions; slope below 0; its widest layer over the first."""


class Critic(nn.Module):
    """Pixels (B, N, N, 3), as the network has them, to scores (B, h, w), one for each overlapping patch: high where it
    looks true.

    Layers that halve the picture, then two that do not; channels double up to 8 times the first layer's. Norms are over
    groups of one picture's channels, not over the batch, so that a picture's score depends on no other picture, and no
    device on the others.
    """

    channels: int
    layers: int

    @nn.compact
    def __call__(self, x_BHW3):
        x_BHWC = nn.leaky_relu(self._convolution(self.channels, 2)(x_BHW3), SLOPE)
        for layer in range(1, self.layers + 1):
            stride = 2 if layer < self.layers else 1
            x_BHWC = self._convolution(self.channels * min(2**layer, MOST), stride)(x_BHWC)
            x_BHWC = nn.leaky_relu(nn.GroupNorm(num_groups=math.gcd(32, self.channels))(x_BHWC), SLOPE)
        return self._convolution(1, 1)(x_BHWC)[..., 0]

    def _convolution(self, channels: int, stride: int) -> nn.Conv:
        init = nn.initializers.normal(0.02)
        return nn.Conv(channels, (KERNEL, KERNEL), strides=stride, padding=1, kernel_init=init)


def hinge(true_Bhw, drawn_Bhw) -> jax.Array:
    """What the critic minimises: scores above 1 for the true, below -1 for the drawn cost nothing."""
    return (jnp.mean(nn.relu(1 - true_Bhw)) + jnp.mean(nn.relu(1 + drawn_Bhw))) / 2
