"""A device's memory was not enough: one line that says what takes it, by arithmetic, and which settings help."""

from __future__ import annotations

import re

import jax

from moma_jax.checks import resolve
from moma_jax.config import Config
from moma_jax.errors import InputError
from moma_jax.plan.compile import needed_bytes
from moma_jax.plan.memory import arithmetic_bytes, with_mesh

GIB = 2**30
MOST_TOLD = 3
"""Settings that are proposed, for the largest consumers first."""


def exhausted(config: Config, error: BaseException) -> str:
    """The line for a run, by its resolved config, whose memory was not enough on this process's devices."""
    asked, devices, there = _asked(str(error)), jax.device_count(), _device_memory()
    try:
        config = with_mesh(resolve(config), devices, f"the {devices} devices here")
        sizes = arithmetic_bytes(config)
    except InputError:  # the line is of the memory, not of what the arithmetic refuses
        return f"out of memory on a device{asked}; use more devices, or less of train.batch_rows and model"
    order = sorted(sizes, key=sizes.get, reverse=True)
    told = ", ".join(f"{name} {_shown(sizes[name])}" for name in order)
    has = "" if there is None else f", which has {_shown(there)}"
    helps = list(dict.fromkeys(line for name in order for line in _helps(config, name)))[:MOST_TOLD]
    return (
        f"out of memory on a device{asked}{has}; by arithmetic it holds {_shown(sum(sizes.values()))}: {told}; what "
        f"helps: {'; '.join(helps)}; `moma plan` tries it without devices"
    )


def _device_memory() -> int | None:
    """Bytes that a device of this process has for programs; None where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _asked(complaint: str) -> str:
    """What was asked for last, where the complaint names it."""
    if found := re.search(r"(?:allocate|allocating) ([\d.,]+) ?(bytes|[KMGT]i?B)", complaint):
        number, unit = float(found[1].rstrip(".,").replace(",", "")), "BKMGT".index(found[2][0].upper())
        return f" ({_shown(number * 2 ** (10 * unit))} were asked for)"
    needed = needed_bytes(complaint)
    return "" if needed is None else f" (the program needs {_shown(needed)})"


def _shown(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:,.1f} MiB"


def _helps(config: Config, name: str) -> list[str]:
    """Settings that make a category smaller, the cheapest first."""
    train, model, mesh = config.train, config.model, config.mesh
    match name:
        case "activations":
            lines = [] if model.remat == "full" else [f"--model.remat {'full' if model.remat == 'dots' else 'dots'}"]
            rows, parts = config.data.group_rows * train.accumulate * 2, mesh.data * mesh.fsdp * mesh.expert
            if train.batch_rows % rows == 0 and train.batch_rows // (train.accumulate * 2) % parts == 0:
                return [*lines, f"--train.accumulate {train.accumulate * 2}"]
            return [*lines, f"fewer --train.batch-rows than {train.batch_rows}, or more devices of --mesh.fsdp"]
        case "logits":
            return [f"--train.loss-chunk {max(train.loss_chunk // 2, 1)}"]
        case "temporaries":
            return [f"--mesh.tensor {2 * mesh.tensor}, which splits a layer"]
    whole = f"more devices of --mesh.fsdp than {mesh.fsdp}, which split parameters, optimizer and gradients"
    return [whole] if mesh.data == 1 else [f"--mesh.fsdp {mesh.fsdp * mesh.data} --mesh.data 1"]
