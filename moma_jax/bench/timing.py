"""How everything here is timed: compiled, warmed up, in turns, until the device is done."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moma_jax.errors import InputError


def require_some(least: int = 1, **counts: int) -> None:
    """InputError where an option's number, of calls or of what they work on, would measure nothing."""
    for name, count in counts.items():
        if count < least:
            raise InputError(f"--{name.replace('_', '-')}: {count}; give {least} or more")


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each, round robin; two calls of each come before and are not timed."""
    for _ in range(2):
        for call in calls.values():
            jax.block_until_ready(call())
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(timed(call)[0])
    return seconds


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(Seconds, result) of one call, until the device is done."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def summarise(seconds: list[float]) -> tuple[float, float]:
    """(Median, interquartile range over the median)."""
    median = statistics.median(seconds)
    if len(seconds) < 2:
        return median, 0.0
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return median, (high - low) / median


def differentiated(function: Callable, inputs: tuple, around: Any = (), *, times: int = 1) -> Callable[[], Any]:
    """A compiled call, without arguments, of `function(*inputs, around)` and of its gradient in `inputs`.

    Everything is an argument of the compiled program, so that nothing can be folded away. The first cotangent is
    random. With `times` > 1 that many passes run in one loop on the device, as a model scans its layers: memory is then
    allocated once, which a call of its own would pay for anew each time. A barrier ties a pass to the one before (whose
    value is its cotangent), so that no part of it can be moved out of the loop.
    """
    leaves, tree = jax.tree.flatten(jax.eval_shape(function, *inputs, around))
    cotangents = tree.unflatten([random(number, leaf.shape, leaf.dtype) for number, leaf in enumerate(leaves)])

    def both(inputs, around, cotangents):
        value, pull = jax.vjp(lambda *inputs: function(*inputs, around), *inputs)
        return value, pull(cotangents)

    @jax.jit
    def passes(inputs, around, cotangents):
        def one(carry, _):
            return both(*jax.lax.optimization_barrier((inputs, around, carry[0]))), None

        first = both(inputs, around, cotangents)
        return first if times == 1 else jax.lax.scan(one, first, length=times - 1)[0]

    return lambda: passes(inputs, around, cotangents)


def random(seed: int, shape, dtype):
    """Standard normal numbers."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def say(text: str) -> None:
    """A line of progress, on stderr: stdout is for results."""
    print(f"bench: {text}", file=sys.stderr, flush=True)
