"""Where the time of a training step goes: its pieces, each compiled and timed alone."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moma_jax import sharding
from moma_jax.batch import Batch
from moma_jax.bench.ffn import FfnCase
from moma_jax.bench.timing import differentiated, in_turns, random, summarise
from moma_jax.geometry import layer_of
from moma_jax.model.attention import attend_rows, rotary_angles
from moma_jax.model.parameters import unembedding_of
from moma_jax.training import objective
from moma_jax.training import step as step_lib

PARTS = ("router", "dispatch", "experts", "combine", "attention", "loss", "optimizer")


def measure_parts(
    program: step_lib.Program, state: step_lib.TrainState, batch: Batch, *, repeats: int = 5
) -> dict[str, float]:
    """Seconds per update of the step's pieces on one device, forward and backward.

    Pieces have the shapes of one microbatch on one device; those of a layer run once per layer in one loop, the
    optimizer once, and all but it are multiplied by the microbatches. This is a piecewise measurement: in the whole
    step XLA fuses across pieces and remat runs some of them twice, so their sum need not be the step's time. What is
    left, which also holds embedding, norms and residuals, is "other" in `bench_step`, and may be negative. Weights are
    those of the state's first layer; the state is used up.
    """
    config = program.config
    rows = config.train.batch_rows // (config.train.accumulate * sharding.shards(program.mesh))
    batch = Batch(*(jnp.asarray(np.asarray(x)[:rows]) for x in batch))
    x_BSD = random(0, (rows, config.data.sequence, config.model.width), config.model.dtype)
    layer = jax.tree.map(lambda x: x[0], state.params["layers"])
    known = batch.token_BS, batch.segment_BS, batch.position_BS, batch.modality_BS
    ffn = FfnCase.of(program.decoder, known, layer["ffn"])
    attention = _attention(program, layer["attention"], batch, ffn.tokens.by_modality, x_BSD)
    seconds = in_turns({**ffn.pieces(x_BSD, config.model.layers), "attention": attention}, repeats)
    seconds |= in_turns({"loss": _loss(program, unembedding_of(state.params), batch, x_BSD)}, repeats)
    seconds |= in_turns({"optimizer": _optimizer(program, state)}, repeats)
    median = {name: summarise(values)[0] for name, values in seconds.items()}
    times = {name: 1 if name == "optimizer" else config.train.accumulate for name in PARTS}
    return {name: times[name] * median.get(name, 0.0) for name in PARTS}


def _attention(program: step_lib.Program, params, batch: Batch, by_modality, x_BSD) -> Callable:
    """Projections, norms and rotations of q and k, scores, output projection."""
    model = program.config.model
    rotate = jax.jit(lambda position_BS: rotary_angles(position_BS, model))

    def attend(params, x_BSD, around):
        *rows, by_modality = around
        sort = None if by_modality is None else (layer_of(program.config).projections, by_modality)
        return attend_rows(x_BSD, params, *rows, model, sort)

    around = (batch.segment_BS, batch.position_BS, rotate(batch.position_BS), by_modality)
    return differentiated(attend, (params, x_BSD), around, times=model.layers)


def _loss(program: step_lib.Program, kernel_DV, batch: Batch, x_BSD) -> Callable:
    """Unembedding and cross-entropy; its gradient is taken in the forward pass."""
    config = program.config
    around = (batch.target_BS, batch.weight_BS, batch.target_modality_BS)
    settings = {
        "kinds": len(config.data.modalities),
        "chunk": config.train.loss_chunk,
        "z_loss": config.train.z_loss,
    }

    def total(hidden_BSD, kernel_DV, around):
        return objective.cross_entropy(hidden_BSD, kernel_DV, *around, **settings)[0]

    return differentiated(total, (x_BSD, kernel_DV), around)


def _optimizer(program: step_lib.Program, state: step_lib.TrainState) -> Callable:
    """Norm and clip of the gradient, moments, decay, the new parameters."""
    held = {"state": state}
    grads = jax.jit(lambda params: jax.tree.map(jnp.ones_like, params))(state.params)

    def update(state, grads):
        return step_lib.update(program, state, grads, state.routing_state, jnp.bool_(True))

    compiled = jax.jit(update, donate_argnums=0)

    def call():
        held["state"] = compiled(held["state"], grads)
        return held["state"]

    return call
