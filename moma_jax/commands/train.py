"""Train a recipe; a run that was interrupted goes on."""

import moma_jax
from moma_jax.errors import RunError
from moma_jax.recipes import RecipeOption


def train(recipe: RecipeOption) -> None:
    """Train a recipe. Any field of the config can be overridden; a run that was interrupted goes on exactly."""
    config = recipe.resolved()
    try:
        moma_jax.train(config)
    except RuntimeError as error:  # JAX's are
        from moma_jax.plan.exhausted import exhausted, is_exhausted  # a run that fits needs no plan

        if not is_exhausted(error):
            raise
        raise RunError(exhausted(config, error)) from error
