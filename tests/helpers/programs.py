"""A config's program, one of its batches, and logits."""

import jax
import numpy as np

from moma_jax import sharding
from moma_jax.data.stream import open_stream
from moma_jax.model.decoder import first_routing_state
from moma_jax.training.step import make_program, run_decoder


def batch_of(config):
    with open_stream(config) as stream:
        return next(stream).batch


def logits(program, params, batch):
    """(B, S, V) in training's routing, without noise."""
    groups, state = np.arange(len(batch.token_BS) // 2), first_routing_state(program.config)
    with sharding.use_mesh(program.mesh):
        run = jax.jit(lambda params: run_decoder(program, params, batch, 0, groups, state, False).hidden_BSD)
        hidden_BSD = run(params)
    return np.asarray(hidden_BSD) @ np.asarray(params["unembedding"]["kernel_DV"])


def program_of(config):
    return make_program(config)
