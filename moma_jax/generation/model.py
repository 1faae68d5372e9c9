"""`moma_jax.load`: a trained model that can also generate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from moma_jax.generation.generating import generate
from moma_jax.generation.output import Output
from moma_jax.training.load import Loaded
from moma_jax.training.load import load as load_model


class GenerativeModel(Loaded):
    """A trained model that generates."""

    def generate(self, prompts: Sequence[Any], **settings: Any) -> list[Output]:
        """Writes on after each prompt; see `moma_jax.generation.generate` for prompts and settings."""
        return generate(self, prompts, **settings)


@functools.wraps(load_model)
def load(run: str, **settings: Any) -> GenerativeModel:
    loaded = load_model(run, **settings)
    return GenerativeModel(**{field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)})
