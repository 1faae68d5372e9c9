"""Parameters, FLOPs and bytes of a recipe, in closed form."""

import moma_jax
from moma_jax.commands import print_result
from moma_jax.cost import format_cost
from moma_jax.recipes import RecipeOption


def cost(recipe: RecipeOption, padding: float = 0.0, json: bool = False) -> None:
    """Parameters, FLOPs and bytes of a recipe, in closed form.

    Args:
      padding: Share of positions that are padding, 0 to 1; it enters the executed FLOPs alone.
      json: Print JSON.
    """
    print_result(moma_jax.cost(recipe.resolved(), padding=padding), json, format_cost)
