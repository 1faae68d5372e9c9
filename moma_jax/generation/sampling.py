"""From logits to a token: temperature, top-k, top-p, and classifier-free guidance as Chameleon has it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moma_jax.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The order is temperature, then top-k, then top-p of what is left."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable token."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach this probability, over 0 to 1."""
    top_k: int | None = None
    """Only this many most probable tokens; None: all."""

    def check(self, name: str) -> None:
        """Raises InputError where a value cannot be meant; `name` says whose it is."""
        for field in ("temperature", "top_p"):
            if not isinstance(value := getattr(self, field), Real):
                raise InputError(f"{name}.{field}: {value!r} is not a number")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"{name}.temperature: {self.temperature} is not 0 or more; 0 takes the best token")
        if not 0 < self.top_p <= 1:
            raise InputError(f"{name}.top_p: {self.top_p} is not over 0 and at most 1; 1 keeps every token")
        if self.top_k is not None and not isinstance(self.top_k, Integral):
            raise InputError(f"{name}.top_k: {self.top_k!r} is not a whole number; give 1 or more, or leave it out")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"{name}.top_k: {self.top_k} tokens leave none; give 1 or more, or leave it out")


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance while codes are drawn (Chameleon): with the logits of three contexts,

        none + image * (pictures - none) + text * (all - pictures),

    where `all` is the whole context, `pictures` the context without its text, and `none` nothing but `<s>` and the
    picture being drawn. Both 1: the whole context as it is. Every other choice runs the model on three rows instead
    of one while a picture is drawn, and needs three times the cache.
    """

    text: float = 3.0
    """Weight of what the text adds."""
    image: float = 1.2
    """Weight of what the earlier pictures add."""

    def check(self) -> None:
        """Raises InputError where a scale is not a number."""
        for name in ("text", "image"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not math.isfinite(value):
                raise InputError(f"guidance.{name}: {value!r} is not a number; 1 means no guidance")


class Filters(NamedTuple):
    """top_p and top_k outside [0] and inside [1] a span of codes; float32 (2,), int32 (2,); k = V keeps all."""

    top_p_2: Any
    top_k_2: Any


class Draw(NamedTuple):
    """How to draw outside [0] and inside [1] a span of codes.

    Attributes:
      temperature_2: float32 (2,).
      filters: None where neither state has any: then nothing is sorted.
      scale_2: weights of text and pictures in guidance, float32 (2,); None without guidance.
    """

    temperature_2: Any
    filters: Filters | None
    scale_2: Any


def draw_of(text: Sampling, image: Sampling, guidance: Guidance | None, vocabulary: int) -> Draw:
    """The settings as arrays, so that other values need no other program."""
    both = (text, image)
    filters = Filters(
        np.array([np.inf if s.top_p == 1 else s.top_p for s in both], np.float32),
        np.array([min(s.top_k or vocabulary, vocabulary) for s in both], np.int32),
    )
    used = any(s.top_p < 1 or s.top_k is not None for s in both)
    guided = guidance is not None and guidance != Guidance(1.0, 1.0)
    scale_2 = np.array([guidance.text, guidance.image], np.float32) if guided else None
    return Draw(np.array([s.temperature for s in both], np.float32), filters if used else None, scale_2)


def guided(all_BV, pictures_BV, none_BV, scale_2):
    """Guided logits of the logits of three contexts; see `Guidance`."""
    return none_BV + scale_2[1] * (pictures_BV - none_BV) + scale_2[0] * (all_BV - pictures_BV)


def sample(key_B, logit_BV, state_B, draw: Draw):
    """One token for each row, int32 (B,); what is forbidden has logit -inf.

    A row's token depends on its own key and logits alone.

    Args:
      key_B: a key for each row. logit_BV: float32. state_B: int32, 0 outside and 1 inside a span of codes.
    """
    temperature_B1 = draw.temperature_2[state_B][:, None]
    if draw.filters is not None:
        top_p_B, top_k_B = draw.filters.top_p_2[state_B], draw.filters.top_k_2[state_B]
        scaled_BV = logit_BV / jnp.where(temperature_B1 > 0, temperature_B1, 1)  # at 0 the best token, always kept
        logit_BV = jnp.where(kept(scaled_BV, top_k_B, top_p_B), logit_BV, -jnp.inf)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logit_BV.shape[1:]))(key_B)
    # argmax(logit / t + noise) draws from the softmax; multiplied by t, the limit t = 0 needs no case of its own.
    return jnp.argmax(logit_BV + temperature_B1 * noise_BV, axis=-1).astype(jnp.int32)


def kept(logit_BV, top_k_B, top_p_B):
    """Which tokens top-k, then top-p of what it left, keep: bool (B, V). Equal logits are kept or dropped together.

    top_p_B is inf where it is off: rounded sums reach 1 before the last token.
    """
    ordered_BV = -jnp.sort(-logit_BV, axis=-1)
    least_k_B1 = jnp.take_along_axis(ordered_BV, top_k_B[:, None] - 1, axis=-1)
    share_BV = jax.nn.softmax(jnp.where(ordered_BV >= least_k_B1, ordered_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
    count_B1 = jnp.sum(before_BV < top_p_B[:, None], axis=-1, keepdims=True)
    least_p_B1 = jnp.take_along_axis(ordered_BV, jnp.maximum(count_B1, 1) - 1, axis=-1)
    return (logit_BV >= least_k_B1) & (logit_BV >= least_p_B1)
