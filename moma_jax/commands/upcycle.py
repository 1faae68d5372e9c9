"""Start a run with more experts from a trained run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import tyro

from moma_jax.checks import resolve
from moma_jax.config import Config, with_router
from moma_jax.recipes import ConfigOptions
from moma_jax.rules import with_gumbel
from moma_jax.training.load import config_of
from moma_jax.upcycling.upcycle import upcycle as grow


@dataclass(frozen=True)
class SeedOptions(ConfigOptions):
    """A trained run, whose config has the defaults of the options."""

    run: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SEED_RUN")]] = ""
    """Run directory of the seed."""
    EXAMPLE: ClassVar[str | None] = "runs/seed --model.ffn 4t4i --run.dir runs/new"

    @classmethod
    def named(cls, run: str | None) -> SeedOptions:
        """The seed run's config with Gumbel noise, for a directory that is yet to be named."""
        config = config_of(run) if run else Config()
        home = dataclasses.replace(config.run, dir=None, init_from=None)
        router = with_gumbel(config.model.router)
        return cls(with_router(dataclasses.replace(config, run=home), router), run=run or "")


def upcycle(
    run: Annotated[SeedOptions, tyro.conf.arg(name="", help="")],
    moments: Literal["reset", "tile"] = "reset",
    perturb: float = 0.0,
    perturb_seed: int = 0,
    fresh: tuple[str, ...] = (),
) -> dict[str, Any]:
    """More experts from a trained run: a new run that goes on from its weights and its position in the data.

    The config is the seed run's, any field of which can be overridden; --model.ffn and --run.dir must be. Routers have
    Gumbel noise (paper Eq. 5) unless --model.router.gumbel False is given.

    Args:
      moments: Optimizer moments: anew, or those of the seed, copied with the experts.
      perturb: Standard deviation of noise on copied experts, over that of each of their matrices.
      perturb_seed: Seed of that noise.
      fresh: Modalities whose experts are drawn as in a new run instead of copied, such as image where the seed is a
        language model.
    """
    asked = {"moments": moments, "perturb": perturb, "perturb_seed": perturb_seed, "fresh": fresh}
    return grow(run.run, resolve(run.config), **asked)
