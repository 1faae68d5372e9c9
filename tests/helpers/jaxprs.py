"""The matrix products of a training step, counted in its jaxpr."""

import math

import jax
import jax.numpy as jnp

from moma_jax import sharding
from moma_jax.batch import Batch
from moma_jax.checks import resolve
from moma_jax.config import Config, DataConfig, Modality, ModelConfig, TrainConfig
from moma_jax.model.blockwise import AGAIN
from moma_jax.model.decoder import first_routing_state
from moma_jax.training import step as step_lib


def tiny(ffn="4t4i", *, width=32, layers=2, sequence=64, group_rows=2, quotas=(0.5, 0.5), accumulate=1, **model):
    """A small resolved config with two modalities, remat off, attention and loss in one chunk."""
    modalities = (
        Modality("text", "t", size=96, quota=quotas[0]),
        Modality("image", "i", size=64, span=16, quota=quotas[1]),
    )
    model = {"ffn_width": 4 * width, "heads": 4, "attention_chunk": sequence, **model}
    return resolve(
        Config(
            model=ModelConfig(ffn=ffn, layers=layers, width=width, **model),
            data=DataConfig(kind="synthetic", modalities=modalities, sequence=sequence, group_rows=group_rows),
            train=TrainConfig(
                steps=10, batch_rows=4, accumulate=accumulate, eval_sets=(), loss_chunk=4 * sequence // accumulate
            ),
        )
    )


def program_of(config):
    """What training compiles its step from."""
    return step_lib.make_program(config)


def step_jaxpr(config):
    """The jaxpr of one whole update: forward, objective, backward, optimizer."""
    program = program_of(config)
    shape = (config.train.batch_rows, config.data.sequence)
    types = Batch(*(jnp.int32,) * 4, jnp.float32, jnp.int8, jnp.int8)
    batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in types))
    state = step_lib.abstract_state(program, first_routing_state(config))
    with sharding.use_mesh(program.mesh):
        return jax.make_jaxpr(jax.jit(step_lib.make_train_step(program)))(state, batch).jaxpr


def product_flops(jaxpr) -> int:
    """FLOPs of every matrix product that a jaxpr runs: loop bodies times their length, the dearest branch of a cond.

    What the attention's backward pass computes anew counts as little as what remat does.
    """
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


UNCOUNTED = ("ragged_dot", "ragged_dot_general", "conv_general_dilated", "pallas_call")


def _equation_flops(equation) -> int:
    name, params = equation.primitive.name, equation.params
    assert name not in UNCOUNTED, f"cannot count {name}"
    if AGAIN in str(equation.source_info.name_stack):
        return 0
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
    inner = [product_flops(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    match name:
        case "scan":
            return params["length"] * sum(inner)
        case "while":
            assert not any(inner), "a product in a while loop of unknown length"
            return 0
        case "cond":
            return max(inner)
        case "shard_map":
            return params["mesh"].size * sum(inner)
        case _:  # jit, remat, custom derivatives: their bodies run once
            return sum(inner)


def _jaxprs(value):
    """The jaxprs in one parameter of an equation."""
    for item in value if isinstance(value, (tuple, list)) else (value,):
        item = getattr(item, "jaxpr", item)
        if hasattr(item, "eqns"):
            yield item
