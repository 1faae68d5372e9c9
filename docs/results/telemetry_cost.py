"""What it costs an evaluation to count what experts do: with and without, in turns, in one process.

Command: python docs/results/telemetry_cost.py [RECIPE] --repeats 7
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax

import moma_jax
from moma_jax import sharding
from moma_jax.data.stream import vocabulary_of
from moma_jax.evaluation.evaluate import Evaluator, scheduled
from moma_jax.model.decoder import first_routing_state
from moma_jax.runs.directory import commit, processor
from moma_jax.training.pretrain import prepare_missing_stores
from moma_jax.training.step import create_state, make_program, with_dtype


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--repeats", type=int, default=7)
    settings, words = parser.parse_known_args()
    config = with_dtype(moma_jax.recipe(settings.recipe, words))
    prepare_missing_stores(config, progress=False)
    program, state = make_program(config), first_routing_state(config)
    (eval_set, *_), took = config.train.eval_sets, {False: [], True: []}
    with sharding.use_mesh(program.mesh):
        params = create_state(program, state).params
        evaluators = {
            counts: Evaluator(program, vocabulary_of(config), scheduled(program, state), counts) for counts in took
        }
        for number in range(settings.repeats + 1):
            for counts, evaluator in evaluators.items():
                begin = time.perf_counter(), time.process_time()
                jax.block_until_ready(evaluator(params, state, eval_set))
                if number:  # the first compiles
                    took[counts].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    for what, name in enumerate(("wall", "processor")):
        off, on = (statistics.median(each[what] for each in took[counts]) for counts in (False, True))
        ratios = [b[what] / a[what] for a, b in zip(took[False], took[True], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        print(f"{name} seconds: {off:.3f} without, {on:.3f} with; ratio {statistics.median(ratios):.4f}, "
              f"quartiles {low:.4f} to {high:.4f}")  # fmt: skip
    print(f"{settings.recipe}, {eval_set.rows} rows of {config.data.sequence}; {processor()}; commit {commit()}")


if __name__ == "__main__":
    main()
