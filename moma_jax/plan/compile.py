"""The training step of a run, compiled for devices that are not here: for TPUs by the compiler that comes with libtpu,
for GPUs by the one in JAX's CUDA plugin, which needs no driver for it."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from moma_jax.config import Config
from moma_jax.errors import InputError
from moma_jax.plan.topology import Topology

ENVIRONMENT = {  # libtpu reads it when it is loaded
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server is asked which TPU this machine is
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at a time
}
GPU_ENVIRONMENT = {  # read when the plugin is loaded
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Compiled(NamedTuple):
    """A compiled step.

    Attributes:
      mesh: `jax.sharding.Mesh` of the topology's devices.
      state: abstract TrainState with shardings.
      text: the program, scheduled. memory: JAX's CompiledMemoryStats of one device.
      error: None, or the compiler's complaint that the program needs more memory than there is; then text is "" and
        memory None.
    """

    mesh: Any
    state: Any
    text: str
    memory: Any
    error: str | None


def compile_step(config: Config, topology: Topology) -> Compiled:
    """Compiles the step that `moma train` would run.

    Args:
      config: resolved, with model.dtype set.

    Raises:
      InputError: libtpu is missing or cannot be used, it does not know the topology, or the mesh does not fit it.
    """
    devices = topology_devices(topology)
    import jax

    from moma_jax.model.decoder import first_routing_state
    from moma_jax.training import step

    program = step.make_program(config, devices=devices)
    # An abstract mesh: with these devices in the context JAX would put the few arrays that it makes on the way there.
    with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
        state = step.abstract_state(program, first_routing_state(config))
        compiled, error = fitting(lambda: step.compile_step(program, state))
    if error is not None:
        return Compiled(program.mesh, state, "", None, error)
    return Compiled(program.mesh, state, compiled.as_text(), compiled.memory_analysis(), None)


def fitting(compile: Callable) -> tuple[Any, str | None]:
    """(What `compile` makes, None), or (None, the compiler's complaint that it needs more memory than there is)."""
    import jax

    try:
        return compile(), None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, str(error)


def first_words(complaint: str) -> str:
    """A compiler's complaint as part of a line."""
    return " ".join(complaint.split())[:300]


def topology_devices(topology: Topology) -> list[Any]:
    """Devices to compile for, as JAX makes them up from a name.

    Raises:
      InputError: libtpu is missing or cannot be used, or does not know the topology.
    """
    if "jax" not in sys.modules:  # this process computes nothing on an accelerator, and must not occupy one
        os.environ["JAX_PLATFORMS"] = "cpu"
    if topology.kind is None:
        return _gpus(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("plan: libtpu is not installed; pip install 'moma_jax[plan]' on Python 3.11")
    os.environ.update(ENVIRONMENT)
    from jax.experimental import topologies

    name = topology.name.removeprefix(f"{topology.slices}x") if topology.slices > 1 else topology.name
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}  # a chip's two cores are one device
    options |= {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as error:  # every kind of it, from a missing library to an unknown name, means the same here
        raise InputError(f"plan: libtpu does not give a topology {name}: {str(error).splitlines()[0]}") from error


def has_gpu_compiler() -> bool:
    """Whether JAX's CUDA plugin is installed."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def _gpus(topology: Topology) -> list[Any]:
    """The same for GPUs, as their description says."""
    os.environ.update(GPU_ENVIRONMENT)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"  # there is none to try on
    from jax.experimental import topologies

    shape = f"1x{topology.shape[0]}x{topology.shape[1]}"
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=topology.target, topology=shape)
    except Exception as error:  # as above
        raise InputError(f"plan: no {topology.name} from its description: {str(error).splitlines()[0]}") from error
    return list(found.devices)


def needed_bytes(error: str) -> int | None:
    """Bytes that the compiler says a program needs, arguments included, from its complaint; None where it names none.

    "HLO temporaries" are all of it too: a program of 10 GiB of arguments and 7 of temporaries is refused with 17.
    """
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds|Used ([\d.]+)([KMGT]?) of|usage >= ([\d.]+)([KMGT]?)", error)
    if found is None:
        return None
    number, unit = [group for group in found.groups() if group is not None][:2]
    return int(float(number) * _UNITS[unit])
