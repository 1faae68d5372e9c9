"""MoMa, mixture of modality-aware experts (arXiv 2407.21770), in JAX and Flax.

The functions behind the `moma` command. Those that need JAX are loaded when first used, so that `import moma_jax` stays
light; `cost` and `plan` need none, and are bound here because modules of their names would take their places.

  recipe(path, overrides)    a recipe or config.json with overrides -> resolved Config
  prepare(config, out)       a source -> a token store
  train(config)              a run directory with checkpoints and metrics
  calibrate(run)             thresholds of a trained run by its final weights
  fit_routers(run)           auxiliary routers for a trained run, so that it can be used causally
  evaluate(run)              held-out losses of a run
  load(run)                  a trained model: config, vocabulary, decoder, parameters
  cost(config)               parameters, FLOPs and bytes in closed form
  upcycle(seed_run, config)  a run with more experts that goes on from its seed
  from_chameleon, to_chameleon   Chameleon checkpoints to runs, and dense runs back
  from_language_model, to_language_model   the same of Llama and Qwen3, which get room for pictures
  to_folder(run, out)        a run for others: safetensors, a model card, a reference in PyTorch
  study(file)                trains the runs of a study that are not complete
  plan(config, topology)     what a run needs on a pod: memory, communication, an estimate of the step
  read_metrics(run)          the records of a run
"""

from moma_jax.cost import cost
from moma_jax.late import attributes
from moma_jax.plan import plan

_HOME = {
    "recipe": "moma_jax.recipes",
    "prepare": "moma_jax.data.prepare",
    "train": "moma_jax.training.pretrain",
    "calibrate": "moma_jax.training.calibrate",
    "fit_routers": "moma_jax.training.fit_routers",
    "evaluate": "moma_jax.evaluation.evaluate",
    "load": "moma_jax.generation.model",
    "read_metrics": "moma_jax.runs.journal",
    "upcycle": "moma_jax.upcycling.upcycle",
    "from_chameleon": "moma_jax.convert",
    "from_language_model": "moma_jax.convert",
    "to_folder": "moma_jax.convert",
    "to_language_model": "moma_jax.convert",
    "to_chameleon": "moma_jax.convert",
    "study": "moma_jax.studies.running",
}
__all__ = ["cost", "plan", *sorted(_HOME)]
__getattr__ = attributes(__name__, _HOME)


def __dir__():
    return __all__
