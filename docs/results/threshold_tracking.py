"""Running thresholds two ways beside the same training: moved by their load, or averages of cut-offs.

    python docs/results/threshold_tracking.py configs/corpus_study.py --ffn 4t4i --steps 600

Prints, for every group of routers and stretch of the run, the load (tokens that thresholds let pass over those that
expert choice takes) as a mean, how far the means of single experts lie from 1 (root mean square), and the share of
(update, expert) pairs outside 0.8 to 1.25. Both leave training as it is.
"""

import argparse
import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moma_jax import recipes, sharding
from moma_jax.checks import resolve
from moma_jax.config import with_router
from moma_jax.data.stream import open_stream
from moma_jax.model.decoder import first_routing_state
from moma_jax.router import Routed
from moma_jax.routers.choice import Choice
from moma_jax.training.pretrain import prepare_missing_stores
from moma_jax.training.step import compile_step, create_state, make_program, put, with_dtype

DECAY = 0.98


@dataclasses.dataclass(frozen=True)
class Both(Choice):
    """Expert choice that keeps, beside its thresholds, averages of every routing group's lowest taken logit."""

    def state(self, experts):
        zero_E = np.zeros(experts, np.float32)
        return super().state(experts) | {"average_E": zero_E, "seen_E": zero_E, "average_passed_E": zero_E}

    def select(self, score, eligible_T, quota, state, key):
        selection, after, *_ = super().select(score, eligible_T, quota, state, key)
        plain_ET = jax.lax.stop_gradient(score.plain_TE.T)
        taken_EC = jnp.where(selection.filled_EC, jnp.take_along_axis(plain_ET, selection.index_EC, 1), jnp.inf)
        lowest_E, average_E = taken_EC.min(1), state["average_E"]
        weight_E = jnp.where(jnp.isfinite(lowest_E), jnp.maximum(1 / (state["updates"] + 1), 1 - DECAY), 0.0)
        cut_E1 = (average_E / jnp.maximum(state["seen_E"], 1e-9))[:, None]
        moved_E = weight_E * (jnp.where(weight_E > 0, lowest_E, 0.0) - average_E)
        own = {"average_E": average_E + moved_E, "seen_E": state["seen_E"] + weight_E * (1 - state["seen_E"])}
        passed_E = jnp.sum(eligible_T & (plain_ET >= cut_E1), 1, dtype=jnp.float32)
        return Routed(selection, after | own | {"average_passed_E": passed_E})


def loads_of(config, steps):
    """By group and way: loads (updates, layers x experts)."""
    program, found = make_program(config), {}
    with sharding.use_mesh(program.mesh), contextlib.closing(open_stream(config)) as stream:
        state = create_state(program, first_routing_state(config))
        step = compile_step(program, state)
        for _ in range(steps):
            state, _ = step(state, put(next(stream).batch, program.mesh))
            for name, own in jax.device_get(state.routing_state).items():
                taken_N = np.maximum(own["taken_E"].ravel(), 1e-6)
                for way, passed in (("moved by load", "passed_E"), ("averages", "average_passed_E")):
                    found.setdefault((name, way), []).append(own[passed].ravel() / taken_N)
    return {key: np.array(values) for key, values in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--ffn", default="4t4i")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    config = recipes.load(options.recipe)
    model = dataclasses.replace(config.model, ffn=options.ffn, layers=options.layers or config.model.layers)
    train = dataclasses.replace(config.train, steps=options.steps, tokens=None, flops=None)
    config = with_router(dataclasses.replace(config, model=model, train=train), Both())
    prepare_missing_stores(config, progress=True)
    found = loads_of(with_dtype(resolve(config)), options.steps)
    print("| routers | thresholds | updates | load | single experts off 1 | outside 0.8 to 1.25 |")
    print("|---|---|---|---|---|---|")
    for (name, way), load_SN in found.items():
        for first, last in ((options.steps // 10, options.steps // 3), (options.steps // 2, options.steps)):
            part_SN = load_SN[first:last]
            off = np.sqrt(np.mean((part_SN.mean(0) - 1) ** 2))
            outside = np.mean((part_SN < 0.8) | (part_SN > 1.25))
            print(f"| {name} | {way} | {first} to {last} | {part_SN.mean():.2f} | {off:.2f} | {outside:.0%} |")


if __name__ == "__main__":
    main()
