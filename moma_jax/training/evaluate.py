"""Held-out losses of a run, overall and by modality, beside those of a unigram model.

Evaluation is under the training routing ("choice"), which sees the future (paper section 2.4): its loss is comparable
between runs, but it is not a perplexity.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np

from moma_jax import sharding
from moma_jax.batch import Batch
from moma_jax.config import Config, EvalSet
from moma_jax.cost import total_steps
from moma_jax.data.stream import open_stream, vocabulary_of
from moma_jax.errors import InputError, RunError
from moma_jax.training import objective
from moma_jax.training.load import load
from moma_jax.training.meter import means
from moma_jax.training.step import Program, make_eval_step, put, replicate

UNIGRAM_POSITIONS = 1_000_000
"""Training positions that the unigram model is counted on, at most."""


def evaluate(
    run: str | Config,
    *,
    routing: tuple[str, ...] = ("choice",),
    select: Callable | None = None,
    step: int | None = None,
    eval_set: str | None = None,
) -> dict[str, dict[str, float | None]]:
    """Held-out losses of a run's checkpoint.

    Args:
      run: run directory, or a config whose `run.dir` is one.
      routing: routings to evaluate under; "choice" is the only one today.
      select: the run's own select function, where it was trained with one.
      step: which checkpoint; None: the newest.
      eval_set: name of one of the run's evaluation sets; None: the first.

    Returns:
      {"choice": {"loss", "loss_<modality>", "tokens"}, "unigram": the same}: nats per target, and targets. The loss of
      a modality that has no held-out targets is None.

    Raises:
      InputError: no such run, checkpoint, routing or evaluation set; or the store's vocabulary is not the run's.
    """
    unknown = [name for name in routing if name != "choice"]
    if unknown or not routing:
        raise InputError(f"--routing: {', '.join(unknown) or 'nothing'} is not a routing; use choice")
    loaded = load(run.run.dir if isinstance(run, Config) else run, step=step, select=select)
    chosen = _named(loaded.config, eval_set)
    if vocabulary_of(loaded.config).hash != loaded.vocabulary.hash:
        raise InputError(f"{run}: its stores have another vocabulary now; restore the stores it was trained on")
    with sharding.use_mesh(loaded.program.mesh):
        evaluator = Evaluator(loaded.program)
        result = evaluator(loaded.params, loaded.routing_state, chosen)
    return {"choice": result, "unigram": unigram(loaded.config, loaded.program.modality_V, chosen)}


def _named(config: Config, name: str | None) -> EvalSet:
    sets = {s.name: s for s in config.train.eval_sets}
    if not sets:
        raise InputError("train.eval_sets: the run has none; name at least one")
    if name is None:
        return config.train.eval_sets[0]
    if name not in sets:
        raise InputError(f"eval_set: {name!r} is not one of {', '.join(sets)}")
    return sets[name]


class Evaluator:
    """Evaluates parameters on held-out sets; compiles once for each batch size."""

    def __init__(self, program: Program):
        self._program, self._step = program, make_eval_step(program)

    def __call__(self, params, routing_state, eval_set: EvalSet) -> dict[str, float | None]:
        """{"loss", "loss_<modality>", "tokens"} of one held-out set; call it under `sharding.use_mesh`."""
        program, sums, group = self._program, [], 0
        for batch in held_out(program.config, eval_set, program.mesh.size):
            sums.append(self._step(params, routing_state, put(batch, program.mesh), replicate(group, program.mesh)))
            group += batch.token_BS.shape[0] // program.config.data.group_rows
        total = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), axis=0), *jax.device_get(sums))
        return _result(total, program.config)


def held_out(config: Config, eval_set: EvalSet, devices: int = 1) -> Iterator[Batch]:
    """Batches of a held-out set, in its own order; whole routing groups, at most `eval_set.rows` of them weighed.

    Raises:
      RunError: the held-out split is empty.
    """
    unit = devices * config.data.group_rows
    micro_rows = config.train.batch_rows // config.train.accumulate
    rows = max(min(micro_rows, -(-eval_set.rows // unit) * unit), unit)
    left = eval_set.rows
    stores = eval_set.stores or None
    stream = open_stream(config, split="validation", seed=eval_set.seed, stores=stores, rows=rows, epochs=1)
    with contextlib.closing(stream):
        for packed in stream:
            weight_BS = np.array(packed.batch.weight_BS, np.float32)
            weight_BS[left:] = 0
            yield packed.batch._replace(weight_BS=weight_BS)
            left -= rows
            if left <= 0:
                return
    if left == eval_set.rows:
        raise RunError(f"evaluation set {eval_set.name}: its stores hold no held-out documents; prepare more of them")


def unigram(config: Config, modality_V: np.ndarray, eval_set: EvalSet) -> dict[str, float | None]:
    """Losses on a held-out set of the token frequencies of the run's first training batches, add-one smoothed."""
    batches = min(total_steps(config), -(-UNIGRAM_POSITIONS // config.batch_tokens))
    count_V = np.ones(config.vocabulary_size, np.float64)
    with contextlib.closing(open_stream(config)) as stream:
        for _, packed in zip(range(batches), stream, strict=False):
            targets = packed.batch.target_BS[packed.batch.weight_BS > 0]
            count_V += np.bincount(targets, minlength=config.vocabulary_size)
    nats_V = np.log(count_V.sum()) - np.log(count_V)
    nats_M = np.zeros(len(config.data.modalities))
    weight_M = np.zeros(len(config.data.modalities))
    for batch in held_out(config, eval_set):
        modality_BS = modality_V[batch.target_BS]
        for m in range(len(nats_M)):
            weight_BS = batch.weight_BS * (modality_BS == m)
            nats_M[m] += np.sum(weight_BS * nats_V[batch.target_BS], dtype=np.float64)
            weight_M[m] += np.sum(weight_BS, dtype=np.float64)
    return _result(objective.Sums(nats_M, weight_M, 0.0), config)


def _result(sums: objective.Sums, config: Config) -> dict[str, float | None]:
    return means(sums, [m.name for m in config.data.modalities]) | {"tokens": int(np.sum(sums.weight_M))}
