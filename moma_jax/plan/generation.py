"""Does a model that writes fit devices that are not here: `moma generate`'s programs, compiled for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moma_jax import sharding, vocab
from moma_jax.checks import round_up
from moma_jax.config import Config, MeshConfig
from moma_jax.errors import InputError
from moma_jax.generation import grammar
from moma_jax.generation.decoding import PIECES, POSITIONS, Rows, Writer, Writing, filled_up, model_of
from moma_jax.generation.sampling import Sampling, draw_of
from moma_jax.model import decode
from moma_jax.model.decoder import first_routing_state
from moma_jax.plan.compile import first_words, fitting, needed_bytes
from moma_jax.plan.memory import USABLE
from moma_jax.plan.topology import Topology
from moma_jax.router import CAUSAL_ROUTINGS
from moma_jax.training import step


def generation_plan(config: Config, target: Topology, devices: Sequence[Any], rows: int) -> dict[str, Any]:
    """What a device holds while `rows` documents are read and written, up to the model's context, without guidance.

    Args:
      config: resolved, with model.dtype set. Where its mesh is the default, all devices share one model (tensor).
      target, devices: the topology, and its devices (`compile.topology_devices`).

    Returns:
      "fits", "bytes_per_device" ("parameters" as they are loaded, float32, "weights" made of them in compute dtype,
      "cache" of keys and values, "temporaries" of the program that needs most, "total"), "programs" (read, a piece of
      the prompts; write: the bytes of a device while each runs; None where the compiler does not say), "mesh", "rows",
      "positions", "devices", "topology", "memory_per_device" and "warnings".

    Raises:
      InputError: the devices do not divide the model's sizes, or it has no causal routing.
    """
    if config.mesh == MeshConfig():
        config = dataclasses.replace(config, mesh=MeshConfig(1, 1, 1, len(devices)))
    program, state = step.make_program(config, devices), first_routing_state(config)
    mesh, params = program.mesh, step.abstract_params(program, state)
    weights = jax.eval_shape(lambda params, state: decode.unstack(params, config, state), params, state)
    rows, positions = filled_up(rows), round_up(config.data.sequence, POSITIONS)
    cache = jax.eval_shape(lambda: decode.new_cache(config, rows, positions))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        decode.require_parts(config)
        weights, cache = (_placed(tree, decode.specs_of(tree), mesh) for tree in (weights, cache))
        held = {"parameters": params, "weights": weights, "cache": cache}
        held = {name: sharding.shard_bytes(tree) for name, tree in held.items()}
        needs, complaints = {}, []
        for name, function, arguments in _programs(config, rows, weights, cache, mesh):
            compiled, error = fitting(function.lower(*arguments).compile)
            if error is None:
                memory = compiled.memory_analysis()
                needed = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
            else:
                needed = needed_bytes(error)
                complaints.append(f"the compiler, of {name}: {first_words(error)}")
            needs[name] = None if needed is None else held["parameters"] + needed
    total = None if None in needs.values() else max(needs.values())
    temporaries = None if total is None else total - sum(held.values())
    return {
        "fits": not complaints and total <= (1 if target.kind else USABLE) * target.memory,
        "bytes_per_device": {**held, "temporaries": temporaries, "total": total},
        "programs": needs,
        "topology": target.name,
        "devices": mesh.size,
        "memory_per_device": int(target.memory),
        "ffn": config.model.ffn,
        "mesh": dict(mesh.shape),
        "rows": rows,
        "positions": positions,
        "warnings": complaints,
    }


def _placed(tree: Any, specs: Any, mesh) -> Any:
    """Abstract arrays with shardings."""
    struct = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    return jax.tree.map(struct, tree, specs)


def _programs(config: Config, rows: int, weights, cache, mesh):
    """(name, jitted function, abstract arguments) of what reads a piece of the prompts, and what writes."""

    def everywhere(tree):
        tree = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree))
        return _placed(tree, jax.tree.map(lambda _: PartitionSpec(), tree), mesh)

    vocabulary = vocab.contiguous(config.data.modalities)
    rule = config.model.router
    routing = next((name for name in reversed(CAUSAL_ROUTINGS) if not config.routed or name in rule.causal), None)
    if routing is None:
        raise InputError("model.router: its rule has no causal routing, without which nothing can be written")
    model = model_of(weights, config, vocabulary.modality_V, routing)
    tokens = everywhere((np.zeros((rows, PIECES[-1]), np.int32), np.zeros(rows, np.int32)))
    yield "read", jax.jit(model.extend, donate_argnums=1), (weights, cache, *tokens)
    rules = grammar.make_rules(vocabulary, range(vocabulary.modalities[0].size), "free", 1)
    state = grammar.first_state(vocabulary, [np.zeros(0, np.int32)] * rows, [1] * rows)
    logit_BV = everywhere(np.zeros((rows, vocabulary.size), np.float32))
    writing = Writing(Rows(cache, logit_BV), None, everywhere(state), everywhere(np.bool_(True)))
    draw = draw_of(Sampling(), Sampling(), None, vocabulary.size)
    rest = everywhere((rules, draw, np.zeros(rows, np.uint32)))
    yield "write", Writer(model).write_whole, (weights, writing, *rest)
