"""`moma upcycle SEED_RUN --model.ffn 4t4i --run.dir NEW`: the command line of `upcycle`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from moma_jax import recipes
from moma_jax.checks import resolve
from moma_jax.config import Config
from moma_jax.errors import InputError
from moma_jax.router import Router
from moma_jax.rules import options_of
from moma_jax.training.load import config_of
from moma_jax.upcycling.upcycle import upcycle

PROGRAM = "moma upcycle"


@dataclass(frozen=True)
class Upcycle(recipes.ConfigOptions):
    """More experts from a trained run: a new run that goes on from its weights and its position in the data.

    The config is the seed run's, any field of which can be overridden; --model.ffn and --run.dir must be. Routers have
    Gumbel noise (paper Eq. 5) unless --model.router.gumbel False is given.
    """

    seed_run: tyro.conf.Positional[str] = ""
    """Run directory of the seed."""
    moments: Literal["reset", "tile"] = "reset"
    """Optimizer moments: anew, or those of the seed, copied with the experts."""
    perturb: float = 0.0
    """Standard deviation of noise on copied experts, over that of each of their matrices."""
    perturb_seed: int = 0
    """Seed of that noise."""


def run(words: list[str]) -> dict[str, Any] | None:
    """`moma upcycle WORDS`; returns what ancestry.json holds.

    Raises:
      InputError: an option is missing or wrong, or `upcycle` refuses.
    """
    options = _options(words)
    asked = {name: getattr(options, name) for name in ("moments", "perturb", "perturb_seed")}
    return upcycle(options.seed_run, resolve(recipes.one_length(options.config, words)), **asked)


def _options(words: list[str]) -> Upcycle:
    """The seed run comes first, so that its config is the default."""
    seed_run = words[0] if words and not words[0].startswith("-") else ""
    if {"--help", "-h"} & set(words):
        return recipes.parse(Upcycle, Upcycle(config=Config()), words, PROGRAM)
    if not seed_run:
        raise InputError(
            f"{PROGRAM}: name a run first, such as: {PROGRAM} runs/seed --model.ffn 4t4i --run.dir runs/new"
        )
    for option, example in (("--model.ffn", "4t4i"), ("--run.dir", "runs/upcycled")):
        if not any(word.split("=")[0] == option for word in words):
            raise InputError(f"{option}: say it, such as {option} {example}")
    config = config_of(seed_run)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, router=_with_noise(config.model.router)),
        run=dataclasses.replace(config.run, init_from=None),
    )
    return recipes.parse(Upcycle, Upcycle(config=config, seed_run=seed_run), words, PROGRAM)


def _with_noise(router: Router) -> Router:
    """The rule with Gumbel noise, where it has that option."""
    return dataclasses.replace(router, gumbel=True) if "gumbel" in options_of(router) else router
