"""One update of auxiliary routers under a frozen model, and how well they predict (paper section 2.4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moma_jax import sharding
from moma_jax.batch import Batch
from moma_jax.compiling import compiled_for
from moma_jax.config import Config, EvalSet
from moma_jax.evaluation.evaluate import held_out
from moma_jax.model.auxiliary import LOSS
from moma_jax.training.load import auxiliary_params, joined
from moma_jax.training.metrics import Meter, layers_predicted, mean, prediction_figures
from moma_jax.training.optimizer import norm_of
from moma_jax.training.step import (
    Program,
    TrainState,
    abstract_batch,
    abstract_params,
    abstract_state_of,
    init_params,
    over_microbatches,
    put,
    replicate,
    run_decoder,
    tokens_by_modality,
    update,
)

# The update -----------------------------------------------------------------------------------------------------------


class RoutersReport(NamedTuple):
    """What one update says about itself.

    Attributes:
      loss: float32 binary cross-entropy, nats per (token, expert) pair: a mean over layers and groups of experts.
      tokens_M: int32 real tokens by modality.
      predicted_LM4, entered_PM4: (token, expert) pairs (`RoutingReport`).
      grad_norm: float32 global norm before clipping.
      finite: bool; where False the update was skipped.
    """

    loss: Any
    tokens_M: Any
    predicted_LM4: Any
    entered_PM4: Any
    grad_norm: Any
    finite: Any


def first_state(program: Program, routing_state: Any) -> TrainState:
    """Fresh routers from `routers.seed`; of the main model nothing is made."""
    config = program.config
    train = dataclasses.replace(config.train, seed=config.routers.seed)
    seeded = program._replace(config=dataclasses.replace(config, train=train))

    def create():
        params = auxiliary_params(sharding.unboxed(init_params(seeded, routing_state)))
        return TrainState(jnp.int32(0), params, program.optimizer.transformation.init(params), {})

    shardings = jax.tree.map(lambda x: x.sharding, abstract_routers(program, routing_state))
    return jax.jit(create, out_shardings=shardings)()


def abstract_routers(program: Program, routing_state: Any) -> TrainState:
    """Shapes, types and shardings of the stage's state; `routing_state` is the frozen model's."""
    return abstract_state_of(program, auxiliary_params(abstract_params(program, routing_state)), {})


def make_routers_step(program: Program) -> Callable:
    """(state, frozen params, routing_state, batch) -> (state, RoutersReport)."""
    accumulate = program.config.train.accumulate

    def routers_step(state: TrainState, frozen, routing_state, batch: Batch) -> tuple[TrainState, RoutersReport]:
        def objective_of(routers, micro: Batch, group_G):
            params = joined(frozen, routers)
            output = run_decoder(program, params, micro, jnp.int32(0), group_G, routing_state, False)
            loss = output.losses[LOSS] / accumulate
            return loss, (loss, output.report.predicted_LM4, output.report.entered_PM4)

        def differentiate(micro: Batch, group_G):
            return jax.grad(objective_of, has_aux=True)(state.params, micro, group_G)

        grads, (loss, *counts) = over_microbatches(program, differentiate, batch)
        grad_norm = norm_of(grads, "auxiliary")
        finite_ = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
        tokens_M = tokens_by_modality(program, batch)
        report = RoutersReport(loss / cross_entropies(program.config), tokens_M, *counts, grad_norm, finite_)
        return update(program, state, grads, {}, finite_), report

    return routers_step


def compile_routers_step(program: Program, state: TrainState, frozen: Any, routing_state: Any) -> Callable:
    """The stage's step, compiled; it donates the state and leaves the model alone."""
    shardings = (jax.tree.map(lambda x: x.sharding, state), sharding.replicated(program.mesh))
    step = jax.jit(make_routers_step(program), donate_argnums=0, out_shardings=shardings)
    return compiled_for(
        step.lower(state, frozen, routing_state, abstract_batch(program)),
        program.mesh,
        program.config.run.compiler_options,
    )


def cross_entropies(config: Config) -> int:
    """Cross-entropies that the decoder adds up: one of each layer and group of experts with a router, and one of each
    router of mixture of depths."""
    layers = config.model.layers
    return layers * sum(group.routed for group in config.experts.groups) + layers // 2 * len(config.depth)


# Figures --------------------------------------------------------------------------------------------------------------


def router_sums(report: RoutersReport) -> dict[str, Any]:
    """What is added up of an update of the stage."""
    sums = {name: getattr(report, name) for name in ("loss", "grad_norm", "predicted_LM4")}
    # Saved as lists, which keep no shape without layers.
    return sums | ({"entered_PM4": report.entered_PM4} if len(report.entered_PM4) else {})


def routers_record(
    config: Config, meter: Meter, step: int, learning_rate: float, epochs: dict[str, float]
) -> dict[str, Any]:
    """The record of `step`, means over the steps since the last one; begins a new interval.

    Loss, norm and figures are those of the updates that were made, None where every one was skipped.
    """
    seen = meter.interval()
    updates = seen.get("finite_steps", 0.0)
    record = {
        "kind": "routers",
        "step": step,
        "loss": mean(seen.get("loss", 0.0), updates),
        "grad_norm": mean(seen.get("grad_norm", 0.0), updates),
        "learning_rate": learning_rate,
        **meter.cumulative(),
        "wall_seconds": meter.wall_seconds(),
        **{f"epoch_{name}": float(value) for name, value in epochs.items()},
        **meter.speed(seen),
    }
    return record | layer_figures(config, seen.get("predicted_LM4"), seen.get("entered_PM4"))


def layer_figures(
    config: Config, predicted_LM4: np.ndarray | None, entered_PM4: np.ndarray | None
) -> dict[str, float | None]:
    """`prediction_figures` over all layers, precision_text, and of each, precision_text_layer_03 (from 00).

    With mixture of depths also of who enters its layers: precision_depth_text, precision_depth_text_layer_02. None:
    nothing was counted.
    """
    names = [m.name for m in config.data.modalities]
    layers, pairs = config.model.layers, config.model.layers // 2 if config.depth else 0
    predicted_LM4 = np.zeros((layers, len(names), 4)) if predicted_LM4 is None else predicted_LM4
    entered_PM4 = np.zeros((pairs, len(names), 4)) if entered_PM4 is None else entered_PM4
    figures = layers_predicted(config, predicted_LM4.sum(0), entered_PM4.sum(0))
    for layer, predicted_M4 in enumerate(predicted_LM4):
        figures |= prediction_figures(predicted_M4, [f"{name}_layer_{layer:02d}" for name in names])
    for pair, entered_M4 in enumerate(entered_PM4):
        figures |= prediction_figures(entered_M4, [f"depth_{name}_layer_{2 * pair:02d}" for name in names])
    return figures


class HeldOut:
    """Judges routers on held-out sets; compiles once for each batch size."""

    def __init__(self, program: Program):
        self._program, config = program, program.config

        def judge(routers, frozen, routing_state, batch: Batch, first_group):
            groups = batch.token_BS.shape[0] // config.data.group_rows
            output = run_decoder(
                program, joined(frozen, routers), batch, jnp.int32(0), first_group + jnp.arange(groups), routing_state,
                False,
            )  # fmt: skip
            loss = output.losses[LOSS] * groups / cross_entropies(config)
            return loss, output.report.predicted_LM4, output.report.entered_PM4

        self._judge = jax.jit(judge, out_shardings=sharding.replicated(program.mesh))

    def __call__(self, routers, frozen, routing_state, eval_set: EvalSet) -> dict[str, float | None]:
        """{"loss"} and the figures of one set, over whole routing groups; call it under `sharding.use_mesh`."""
        program, parts, group, judged = self._program, [], 0, 0
        rows = program.config.data.group_rows
        for packed in held_out(program.config, eval_set, sharding.shards(program.mesh)):
            batch, number = packed.batch, replicate(group, program.mesh)
            parts.append(self._judge(routers, frozen, routing_state, put(batch, program.mesh, whole=True), number))
            group += len(batch.token_BS) // rows
            judged += int((batch.segment_BS.reshape(-1, rows * batch.segment_BS.shape[1]) > 0).any(axis=1).sum())
        loss, *counts = (sum(np.asarray(x, np.float64) for x in part) for part in zip(*parts, strict=True))
        return {"loss": float(loss / judged)} | layer_figures(program.config, *counts)
