"""Does a run fit a pod, and how fast is it there."""

import sys

import moma_jax
from moma_jax.commands import print_result
from moma_jax.errors import InputError
from moma_jax.plan import plan_generation, plan_search
from moma_jax.plan.report import format_generation, format_plan, format_search
from moma_jax.recipes import RecipeOption


def plan(
    recipe: RecipeOption,
    topology: str = "",
    target: str | None = None,
    measured: str | None = None,
    generate: int | None = None,
    search: bool = False,
    compiled: int = 6,
    json: bool = False,
) -> None:
    """Whether a run fits a pod and what it costs there: the real training step is compiled, no accelerator is needed.
    With --generate the same of writing with the trained model.

    Where the mesh is the default, data -1 and all else 1, one is chosen. For GPUs memory alone is told.

    Args:
      topology: v5p-128, v5p:4x4x4, v5e-16, v6e-64, 2xv5e-256 (two slices), h100:8, h100:4x8.
      target: Of GPUs: a file that describes them (XLA's GpuTargetConfigProto as text).
      measured: suite.json of `moma bench suite` on such a device: its nearest step is planned too, and put beside.
      generate: Plan for writing so many documents side by side, up to the model's context and
        without guidance, instead of training.
      search: Try meshes, remat policies and microbatches, and rank those that fit.
      compiled: With --search: how many settings are compiled.
      json: Print JSON.
    """
    if not topology:
        raise InputError("--topology: name what to plan for, such as v5p-128, v5e-16 or h100:8")
    if compiled < 1:
        raise InputError(f"--compiled: must be positive, is {compiled}")
    if generate is not None and (search or generate < 1):
        raise InputError("--generate: give a number of documents, 1 or more, and no --search")
    if measured is not None and (search or generate is not None):
        raise InputError("--measured: goes with the plan of one training step, without --search or --generate")
    config = recipe.resolved()
    if generate is not None:
        print_result(plan_generation(config, topology, generate, target), json, format_generation)
        return
    if search:
        found = plan_search(config, topology, compiled, lambda line: print(line, file=sys.stderr, flush=True), target)
    else:
        found = moma_jax.plan(config, topology, target, measured)
    print_result(found, json, format_search if search else format_plan)
