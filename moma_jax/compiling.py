"""How programs are compiled: what the compiler is asked for on each kind of device, and where what it made is kept.

`moma plan` compiles with the same options, so that what it says is of the program that runs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
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
