"""Tests make the same few programs over and over, and tracing one takes far longer than all its steps: once is enough.

What the package makes of a `Program` depends on the program, not on the run that asks for it, so within a process equal
programs share it. tests/conftest.py calls `share` before anybody else imports these functions.
"""

import dataclasses
import functools
import gc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moma_jax.training import step

MAPS = 15_000
"""Memory maps a process may hold when a test module ends. Each compiled program takes some 24 of them; where Linux has
no more to give (vm.max_map_count, 65,530), the compiler does not say so, it crashes."""

_shared = []
"""What `_once` keeps, of every function."""

HOST_ONLY = {
    "run": None,
    "hosts": None,
    "data": {"stores", "prepare", "lanes", "seed"},
    "train": {"log_every", "eval_every", "eval_sets", "eval_routings", "checkpoint_every", "keep_last", "keep_every"},
}
"""Fields of a config that no compiled function depends on, by section; None: all of it."""


def share():
    """Lets equal programs share traced and compiled functions, and first states."""
    step.create_state = _copied(_once(step.create_state))
    step.abstract_params = _once(step.abstract_params)
    step.compile_step = _once(step.compile_step)
    from moma_jax.evaluation import evaluate
    from moma_jax.training import router_step

    evaluate.make_eval_step = _once(evaluate.make_eval_step)
    router_step.compile_routers_step = _once(router_step.compile_routers_step)


def forget_excess():
    """Forgets what was traced and compiled, where that has become too much; what is needed again is read from disk."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        for made in _shared:
            made.clear()
        jax.clear_caches()
        gc.collect()


def _once(function):
    """The function, called once for equal arguments."""
    made = {}
    _shared.append(made)

    @functools.wraps(function)
    def once(*arguments):
        key = tuple(map(_key, arguments))
        if key in made:
            return made[key]
        result = function(*arguments)
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(result)):
            made[key] = result
        return result

    return once


def _copied(function):
    """The function with copies of its arrays, since a training step consumes its state."""
    return functools.wraps(function)(lambda *arguments: jax.tree.map(jnp.copy, function(*arguments)))


def _key(argument):
    """What a program is known by, or a tree of arrays: their shapes, types and shardings, and what host arrays hold."""
    if isinstance(argument, step.Program):
        sections = dataclasses.fields(argument.config)
        config = tuple(_section(section.name, getattr(argument.config, section.name)) for section in sections)
        return config, argument.decoder, argument.mesh
    leaves, structure = jax.tree.flatten(argument)
    leaves = [x if hasattr(x, "sharding") else np.asarray(x) for x in leaves]
    about = ((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
    return structure, *about, *(x.tobytes() for x in leaves if isinstance(x, np.ndarray))


def _section(name, section):
    ignored = HOST_ONLY.get(name, ())
    fields = () if ignored is None else dataclasses.fields(section)
    return name, *(getattr(section, field.name) for field in fields if field.name not in ignored)
