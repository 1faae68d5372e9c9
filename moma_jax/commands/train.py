"""Train a recipe; a run that was interrupted goes on."""

import moma_jax
from moma_jax.recipes import RecipeOption


def train(recipe: RecipeOption) -> None:
    """Train a recipe. Any field of the config can be overridden; a run that was interrupted goes on exactly."""
    moma_jax.train(recipe.resolved())
