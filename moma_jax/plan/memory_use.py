"""What a compiled step holds in the memory of one device, by category."""

from __future__ import annotations

import math
import re
from typing import Any

from moma_jax.config import Config
from moma_jax.cost import FLOAT32
from moma_jax.plan.compile import Compiled, needed_bytes
from moma_jax.plan.hlo import Module

LAYERS = re.compile(r"/jvp\(Decoder\)/(?:\w+\.in_(?:layers|pairs)/)?while$")
"""How the loop of the forward pass over the layers, or pairs of them, is called: by the decoder and its method."""


def state_bytes(state: Any) -> dict[str, int]:
    """Bytes of one device of "parameters" and "optimizer", from an abstract TrainState with shardings."""
    from moma_jax.sharding import shard_bytes

    return {"parameters": shard_bytes(state.params), "optimizer": shard_bytes(state.opt_state)}


def bytes_by_category(config: Config, compiled: Compiled, module: Module | None) -> dict[str, int | None]:
    """Bytes of one device by category, and "total", their sum where temporaries are not 0 and all are known.

    parameters and optimizer are the state's shards, gradients one float32 copy of the parameters', activations what
    the forward pass over the layers keeps for the backward pass (read from the program), logits one chunk's with its
    gradient, temporaries everything else that the program needs beside its arguments, code the program itself. Where
    the program has no loop over the layers, what it keeps is unknown (None) and among the temporaries. Where it does
    not fit, the total is what the compiler says and activations and temporaries are unknown.
    """
    state = state_bytes(compiled.state)
    width = FLOAT32 if config.model.dtype == "float32" else 2
    mesh = compiled.mesh.shape
    tokens = config.batch_tokens // config.train.accumulate // math.prod(mesh[a] for a in ("data", "fsdp", "expert"))
    chunk = min(config.train.loss_chunk, tokens)
    logits = (FLOAT32 + width) * chunk * config.vocabulary_size // mesh["tensor"]
    result = {**state, "gradients": state["parameters"], "logits": logits}
    if module is None:
        total = needed_bytes(compiled.error)
        return {**result, "activations": None, "temporaries": None, "total": total}
    memory = compiled.memory
    result |= {
        "activations": kept_bytes(module, config.model.layers // 2 if config.depth else config.model.layers),
        "batch": memory.argument_size_in_bytes - sum(state.values()),
        "code": memory.generated_code_size_in_bytes,
    }
    # The peak, arguments included: the sum of the parts can exceed the memory of a chip that it was compiled for.
    total = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    # Gradients and logits may take the place of what is kept: they are not needed at the same time.
    return {**result, "temporaries": max(0, total - sum(size or 0 for size in result.values())), "total": total}


def gpu_bytes(compiled: Compiled) -> dict[str, int | None]:
    """The same of a program for GPUs, of which less is known: what is neither state nor batch are temporaries."""
    state = state_bytes(compiled.state)
    if compiled.memory is None:
        return {**state, "temporaries": None, "total": needed_bytes(compiled.error)}
    memory = compiled.memory
    batch, total = memory.argument_size_in_bytes - sum(state.values()), memory.peak_memory_in_bytes
    return {**state, "batch": batch, "temporaries": total - batch - sum(state.values()), "total": total}


def kept_bytes(module: Module, trips: int) -> int | None:
    """Bytes of HBM that the forward pass over the layers keeps: what its loop writes and stacks, turn by turn.

    A turn is a layer, or two of them with mixture of depths. None where there is no loop of so many turns.
    """
    total = None
    for computation, loop in module.loops():
        if not LAYERS.search(loop.op_name) or module.trips(computation, loop) != trips:
            continue
        total = total or 0
        body = module.computations[loop.called("body")]
        carried = body.parameters[0].name
        for name, array in zip(body.by_name[body.root].operands, loop.arrays, strict=True):
            element = body.by_name[name]
            handed_on = element.opcode == "get-tuple-element" and element.operands[0] == carried
            if array.in_hbm and array.shape[:1] == (trips,) and not handed_on:
                total += array.padded_bytes
    return total
