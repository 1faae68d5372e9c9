"""`moma_jax.load`: a trained model that can also generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from moma_jax.config import MeshConfig
from moma_jax.generation.generate import generate
from moma_jax.generation.output import Output
from moma_jax.training.load import Loaded
from moma_jax.training.load import load as load_model


class GenerativeModel(Loaded):
    """A trained model that generates."""

    def generate(self, prompts: Sequence[Any], **settings: Any) -> list[Output]:
        """Writes on after each prompt; see `moma_jax.generation.generate` for prompts and settings."""
        return generate(self, prompts, **settings)


def load(
    run: str,
    *,
    step: int | None = None,
    router: Any = None,
    fitted: bool = True,
    mesh: MeshConfig | None = None,
) -> GenerativeModel:
    """The model of a run; arguments and errors are those of `moma_jax.training.load.load`."""
    loaded = load_model(run, step=step, router=router, fitted=fitted, mesh=mesh)
    return GenerativeModel(**{field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)})
