"""Train a recipe; a run that was interrupted goes on."""

import moma_jax
from moma_jax.errors import RunError
from moma_jax.process import is_exhausted
from moma_jax.recipes import RecipeOption


def train(recipe: RecipeOption) -> None:
    """Train a recipe. Any field of the config can be overridden; a run that was interrupted goes on exactly."""
    config = recipe.resolved()
    try:
        moma_jax.train(config)
    except RuntimeError as error:  # JAX's are
        if not is_exhausted(error):
            raise
        from moma_jax.plan.exhausted import exhausted  # a run that fits needs no plan

        raise RunError(exhausted(config, error)) from error
