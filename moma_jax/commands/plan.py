"""Does a run fit a pod, and how fast is it there."""

import sys

import moma_jax
from moma_jax.commands import print_result
from moma_jax.errors import InputError
from moma_jax.plan import plan_search
from moma_jax.plan.report import format_plan, format_search
from moma_jax.recipes import RecipeOption


def plan(
    recipe: RecipeOption,
    topology: str = "",
    target: str | None = None,
    search: bool = False,
    compiled: int = 6,
    json: bool = False,
) -> None:
    """Whether a run fits a pod and what it costs there: the real training step is compiled, no accelerator is needed.

    Where the mesh is the default, data -1 and all else 1, one is chosen. For GPUs memory alone is told.

    Args:
      topology: v5p-128, v5p:4x4x4, v5e-16, v6e-64, 2xv5e-256 (two slices), h100:8, h100:4x8.
      target: Of GPUs: a file that describes them (XLA's GpuTargetConfigProto as text).
      search: Try meshes, remat policies and microbatches, and rank those that fit.
      compiled: With --search: how many settings are compiled.
      json: Print JSON.
    """
    if not topology:
        raise InputError("--topology: name what to plan for, such as v5p-128, v5e-16 or h100:8")
    if compiled < 1:
        raise InputError(f"--compiled: must be positive, is {compiled}")
    config = recipe.resolved()
    if search:
        found = plan_search(config, topology, compiled, lambda line: print(line, file=sys.stderr, flush=True), target)
    else:
        found = moma_jax.plan(config, topology, target)
    print_result(found, json, format_search if search else format_plan)
