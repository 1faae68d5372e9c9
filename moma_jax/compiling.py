"""How programs are compiled: what the compiler is asked for on each kind of device, and where what it made is kept.

`moma plan` compiles with the same options, so that what it says is of the program that runs.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from moma_jax import sharding

VMEM = "xla_tpu_scoped_vmem_limit_kib"
"""How much of a core's memory one operation may have: with more, products of matrices are cut into fewer pieces."""
OPTIONS: dict[str, dict[str, str]] = {
    "TPU v5": {VMEM: "49152"},
    "TPU v5 lite": {VMEM: "49152"},
    "TPU v6 lite": {VMEM: "49152"},
}
"""Compiler options of the training step, by `jax.Device.device_kind` (docs/results/speed.md has each one's effect)."""
APART = {"xla_tpu_enable_async_all_to_all": "true"}
"""With experts that live apart, on any TPU: tokens travel while the experts of other groups compute."""

ONCE = {"cpu": {"xla_backend_optimization_level": "1"}}
"""By platform, of programs that run once and take longer to compile than to run. Level 0 changes the values drawn."""
CACHE_BYTES = 4 << 30
"""Of compiled programs that are kept; what was not used for longest goes first."""


# What is asked for ----------------------------------------------------------------------------------------------------


def options_for(mesh: Mesh, asked: Mapping[str, str] | None = None) -> dict[str, str]:
    """The compiler options of a training step on a mesh.

    Args:
      asked: a config's own; one of them with "" takes that option out.
    """
    device = mesh.devices.flat[0]
    options = dict(OPTIONS.get(device.device_kind, {}))
    if device.platform == "tpu" and mesh.shape[sharding.EXPERT] > 1:
        options |= APART
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
            unknown = [name for name in options if re.search(rf"\b{name}\b", str(error))] or list(options)
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
    if path is None and jax.config.jax_compilation_cache_dir is not None:
        return
    if path is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = str(Path(home) / "moma_jax" / "compiled")
    remote = "://" in path
    found = None if path == "off" else path if remote else os.path.abspath(path)
    if found == jax.config.jax_compilation_cache_dir:
        return
    if found is not None and not remote:
        try:
            os.makedirs(found, exist_ok=True)
        except OSError as error:
            logging.getLogger(__name__).warning("compiled programs are not kept: %s: %s", found, error.strerror)
            found = None
    jax.config.update("jax_compilation_cache_dir", found)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_compilation_cache_max_size", -1 if found is None or remote else CACHE_BYTES)
    compilation_cache.reset_cache()  # it may have been set up, or found missing, before
