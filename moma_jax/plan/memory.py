"""Bytes of one device in closed form: what `moma cost` knows, divided by a mesh. No JAX.

Every weight, its gradient and its two moments are stored in equal parts over fsdp x expert x tensor. Activations are
those of `cost.activation_bytes`, with remat none those of TPU programs (`kept_beyond_cost`), split over data x fsdp x
expert; what is D wide is whole on every device of `tensor`.
Meshes here have no -1 (`with_mesh`).
"""

from __future__ import annotations

import dataclasses
import math

from moma_jax.config import Config, MeshConfig
from moma_jax.cost import FLOAT32, activation_bytes, parameter_count
from moma_jax.errors import InputError
from moma_jax.ffn import ExpertGroup
from moma_jax.geometry import layer_of

USABLE = 0.92
"""Share of a device's memory that the sum here may take: the rest is for what it does not know."""


def stored_parts(config: Config) -> int:
    """Devices that the weights are split over."""
    mesh = config.mesh
    return mesh.fsdp * mesh.expert * mesh.tensor


def row_parts(config: Config) -> int:
    """Devices that the rows of a batch are split over."""
    return config.mesh.data * config.mesh.fsdp * config.mesh.expert


def state_bytes(config: Config) -> dict[str, int]:
    """Bytes per device of "parameters" and "optimizer"."""
    counts = parameter_count(config)
    parameters = math.ceil(FLOAT32 * (counts["total"] + counts["auxiliary"]) / stored_parts(config))
    return {"parameters": parameters, "optimizer": 2 * parameters}


def arithmetic_bytes(config: Config) -> dict[str, int]:
    """Bytes per device by category, as `plan` reports them for a compiled program, from arithmetic alone.

    "gradients" are float32, twice where microbatches add up; "temporaries" are one layer's gathered weights in compute
    type and their gradients, with those of the vocabulary; "logits" one chunk's, with their gradient.
    """
    state, train = state_bytes(config), config.train
    parameters = state["parameters"]
    width = FLOAT32 if config.model.dtype == "float32" else 2
    tokens = config.batch_tokens // train.accumulate
    vocabulary = config.vocabulary_size // config.mesh.tensor
    all_logits = 2 * FLOAT32 * min(train.loss_chunk, tokens) * config.vocabulary_size
    activations = (activation_bytes(config) + kept_beyond_cost(config) - all_logits) / row_parts(config)
    chunk = min(train.loss_chunk, tokens // row_parts(config))
    layer = gathered_parameters(config)
    return {
        **state,
        "gradients": (2 if train.accumulate > 1 else 1) * parameters,
        "activations": math.ceil(activations),
        "temporaries": math.ceil(2 * width * layer + (width + FLOAT32) * vocabulary * config.model.width),
        "logits": 2 * FLOAT32 * chunk * vocabulary,
    }


def kept_beyond_cost(config: Config) -> float:
    """Bytes over all devices that TPU programs keep beyond `cost.activation_bytes` with remat none; 0 otherwise.

    Per position and layer: three float32 operands of each of the four norms, those of q and k with their rotations; in
    compute type q, k, v and the attention's output, three arrays D wide, and of every slot two D and four F wide (two
    to six: compilers for different TPUs differ). Heads are padded to 128 lanes. Read from compiled programs.
    """
    model = config.model
    if model.remat != "none":
        return 0.0
    width, lanes = FLOAT32 if model.dtype == "float32" else 2, 128
    padded = model.heads * -(-model.head_size // lanes) * lanes
    shape = layer_of(config)
    slots = sum(own.group.experts * own.group.width * own.slots for own in shape.groups) / shape.tokens
    compute = 4 * padded + 3 * model.width + slots * (2 * model.width + 4 * model.hidden)
    counted = 15 * model.width + slots * (model.width + 2 * model.hidden)  # by cost.activation_bytes
    per_position = FLOAT32 * 6 * (padded + model.width) + width * (compute - counted)
    return config.batch_tokens / config.train.accumulate * model.layers * per_position


def gathered_parameters(config: Config) -> float:
    """Parameters of one layer that a device computes with: its part over tensor, and its own experts."""
    model, mesh = config.model, config.mesh
    expert = 3 * model.width * model.hidden
    groups = config.experts.groups + config.experts.shared
    own = sum(g.experts * g.width / (mesh.expert if splits_experts(g, mesh.expert) else 1) for g in groups)
    return (4 * model.width**2 + own * expert) / mesh.tensor


def splits_experts(group: ExpertGroup, devices: int) -> bool:
    """Whether the experts of a group live apart on an expert axis of so many devices (`sharding.experts_are_split`)."""
    return group.experts % devices == 0


def with_mesh(config: Config, devices: int, name: str) -> Config:
    """The config with the -1 of its mesh replaced by what is left of the devices of a topology called `name`.

    Raises:
      InputError: the mesh is not of so many devices.
    """
    sizes = dataclasses.asdict(config.mesh)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and devices % fixed == 0:
        sizes[open_axes[0]], fixed = devices // fixed, devices
    if fixed != devices or len(open_axes) > 1:
        asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1)
        raise InputError(f"mesh: {asked} is no mesh of the {devices} devices of {name}; their product is {devices}")
    return dataclasses.replace(config, mesh=MeshConfig(**sizes))
