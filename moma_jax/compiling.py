"""How programs are compiled: what the compiler is asked for on each kind of device, and where what it made is kept.

`moma plan` compiles with the same options, so that what it says is of the program that runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from moma_jax import sharding
from moma_jax.errors import InputError

VMEM = "xla_tpu_scoped_vmem_limit_kib"
"""How much of a core's memory one operation may have: with more, products of matrices are cut into fewer pieces."""
OPTIONS: dict[str, dict[str, str]] = {
    "TPU v5": {VMEM: "49152"},
    "TPU v5 lite": {VMEM: "49152"},
    "TPU v6 lite": {VMEM: "49152"},
}
"""Compiler options of the training step, by `jax.Device.device_kind` (docs/results/speed.md has each one's effect)."""
APART = {"xla_tpu_enable_async_all_to_all": "true"}
"""With experts that live apart: tokens travel while the experts of other groups compute."""
SEVERAL_GPUS = {
    "xla_gpu_enable_latency_hiding_scheduler": "True",
    "xla_gpu_enable_pipelined_all_gather": "True",
    "xla_gpu_enable_pipelined_reduce_scatter": "True",
    "xla_gpu_enable_pipelined_all_reduce": "True",
}
"""Where there are several GPUs: weights are gathered, and gradients scattered, while the layer before computes. As
trainers for GPUs publish them; we timed nothing of it. The memory it takes is in docs/results/speed.md."""
NOT_APART = ("TPU v5 lite",)
"""Kinds of TPU whose links do not allow it; asked for it, their compiler refuses the program."""

ONCE = {"cpu": {"xla_backend_optimization_level": "1"}}
"""By platform, of programs that run once and take longer to compile than to run. Level 0 changes the values drawn."""
REMOTE = ("gs://", "s3://")
CACHE_BYTES = 4 << 30
"""Of compiled programs that a process finds; the oldest beyond it are deleted when the process begins."""


# What is asked for ----------------------------------------------------------------------------------------------------


def options_for(mesh: Mesh, asked: Mapping[str, str] | None = None) -> dict[str, str]:
    """The compiler options of a training step on a mesh.

    Args:
      asked: a config's own; one of them with "" takes that option out.
    """
    device = mesh.devices.flat[0]
    options = dict(OPTIONS.get(device.device_kind, {}))
    if device.platform == "tpu" and device.device_kind not in NOT_APART and mesh.shape[sharding.EXPERT] > 1:
        options |= APART
    if device.platform == "gpu" and mesh.size > 1:
        options |= SEVERAL_GPUS
    return {name: value for name, value in (options | dict(asked or {})).items() if value != ""}


def compiled_for(lowered: Any, mesh: Mesh, asked: Mapping[str, str] | None = None) -> Callable:
    """Compiles a lowered training step for a mesh, without the options that this compiler does not know; it says so."""
    options = options_for(mesh, asked)
    while True:
        try:
            return lowered.compile(compiler_options=options or None)
        except jax.errors.JaxRuntimeError as error:
            if not options or not str(error).startswith(("UNIMPLEMENTED", "INVALID_ARGUMENT")):
                raise
            unknown = [name for name in options if re.search(rf"\b{re.escape(name)}\b", str(error))] or list(options)
            reason = str(error).splitlines()[0]
            logging.getLogger(__name__).warning("compiled without %s: %s", ", ".join(unknown), reason)
            options = {name: value for name, value in options.items() if name not in unknown}


def compiled_once(function: Callable, mesh: Mesh, **jitted: Any) -> Callable:
    """`jax.jit` of a function without arguments that runs once on a mesh, compiled with little effort."""
    return jax.jit(function, **jitted).lower().compile(compiler_options=ONCE.get(mesh.devices.flat[0].platform))


# What is kept ---------------------------------------------------------------------------------------------------------


def use_cache(path: str | None) -> None:
    """Keeps compiled programs in a directory, for later processes and those beside this one.

    Args:
      path: None: as JAX is set up (JAX_COMPILATION_CACHE_DIR), else moma_jax/compiled in the cache folder; "off": none.
    """
    if path == "":
        raise InputError("run.compilation_cache: is empty; give a folder, or off")
    if path is None and jax.config.jax_compilation_cache_dir is not None:
        return
    if path is None:
        path = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "moma_jax", "compiled")
    remote = "://" in path
    if remote and not path.startswith(REMOTE):
        raise InputError(f"run.compilation_cache: {path}: give a folder, {' or '.join(REMOTE)}..., or off")
    found = None if path == "off" else path if remote else os.path.abspath(os.path.expanduser(path))
    if found == jax.config.jax_compilation_cache_dir:
        return
    written = True
    if found is not None and not remote:
        found, written = _local(found)
    jax.config.update("jax_compilation_cache_dir", found)
    # JAX's own bound takes a lock and reads every entry's age for each program, and a write that was cut short ends it.
    jax.config.update("jax_compilation_cache_max_size", -1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0 if written else float(1 << 30))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # it may have been set up, or found missing, before


def cache_folder() -> str | None:
    """Where compiled programs are kept since `use_cache`; None where they are not."""
    return jax.config.jax_compilation_cache_dir


def _local(folder: str) -> tuple[str | None, bool]:
    """(The folder, made and swept; None where it cannot be, whether it can be written); what cannot be is said."""
    warn = logging.getLogger(__name__).warning
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            warn("compiled programs are read, and new ones not kept: %s: cannot be written", folder)
            return folder, False
        _sweep(folder)
    except OSError as error:
        warn("compiled programs are not kept: %s: %s", folder, error.strerror)
        return None, False
    return folder, True


def _sweep(folder: str) -> None:
    """Deletes the oldest programs beyond CACHE_BYTES, and those of which nothing was written; other processes may do
    so at the same time, or write."""
    entries = []
    with os.scandir(folder) as every:
        for entry in every:
            with contextlib.suppress(FileNotFoundError):
                if entry.name.endswith("-cache") and entry.is_file():
                    entries.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
    excess = sum(size for _, size, _ in entries) - CACHE_BYTES
    for _, size, path in sorted(entries):
        if excess > 0 or size == 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            excess -= size
