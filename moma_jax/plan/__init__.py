"""Does a run fit a pod, and what will it cost: `plan(config, topology)`, before any machine is rented.

For TPUs the real training step is compiled, by the compiler that would compile it there (`compile`), and its text is
read (`hlo`, `network`, `estimate`, `memory_use`). For GPUs the real step is compiled too, and its memory is known;
without their compiler there is arithmetic alone (`memory`). Nothing here is imported by any other part of the package
but commands, and compilers only when they are needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moma_jax.checks import resolve
from moma_jax.config import Config, MeshConfig
from moma_jax.cost import flops_per_token
from moma_jax.errors import InputError
from moma_jax.geometry import require_split
from moma_jax.plan import gpus, measured, memory, search
from moma_jax.plan.topology import Topology, topology_of

FROM_PROGRAM = (
    *("collective_bytes", "step_seconds_estimate", "step_seconds_range", "mfu_estimate", "mfu_range"),
    "tokens_per_second_estimate",
    *("exposed_communication_share", "expert_stacks_gathered", "replicated_logits"),
)
"""Parts of a plan that are None where there is no program."""


def plan(config: Config, name: str, target_file: str | None = None, measured_file: str | None = None) -> dict[str, Any]:
    """What a run needs on a topology, per step and device.

    Args:
      config: the run. Where its mesh is the default (data -1, all else 1), one is chosen (`search.choose`), with as
        many microbatches as it takes to fit, and a remat policy that keeps less where they are not enough.
      name: as `topology.topology_of` reads it: v5p-128, v5p:4x4x4, v5e-16, h100:8.
      target_file: of GPUs, a description that goes before our own (`gpus`).
      measured_file: suite.json of `moma bench suite` on this kind of device, to put beside (`measured`).

    Returns:
      "fits", "devices", "bytes_per_device" (bytes by category, with "total"), "flops_per_device" (of a step, by
      `moma cost`'s convention), "collective_bytes" (kind -> mesh axes -> bytes that a device sends in a step),
      "step_seconds_estimate", "mfu_estimate", the [least, most] of both ("step_seconds_range", "mfu_range"),
      "tokens_per_second_estimate", "exposed_communication_share" and the settings that were planned.
      "expert_stacks_gathered" and "replicated_logits" are what a step must not do (`placement`). "method" is "compiled"
      or "arithmetic". What a program says is None where there is no program. "measured", where a file was given.

    Raises:
      InputError: no such topology, the config contradicts itself or the topology, libtpu is missing, or the file has
        nothing to put beside.
    """
    target = described(topology_of(name), target_file)
    config = with_dtype(resolve(config), target)
    if measured_file is None:
        return _planned_or_chosen(config, target)
    step = measured.measured_step(measured_file, config, target)
    beside = measured.beside(step, config, target, planned)
    return _planned_or_chosen(config, target) | {"measured": beside}


def _planned_or_chosen(config: Config, target: Topology) -> dict[str, Any]:
    """`plan` on a topology."""
    if config.mesh != MeshConfig():
        return {**planned(memory.with_mesh(config, target.devices, target.name), target), "mesh_chosen": False}
    chosen = search.choose(config, target)
    result = planned(chosen, target)
    for smaller in search.smaller(config, chosen, target):  # where the compiler needs more than arithmetic says
        if result["fits"]:
            break
        result = planned(smaller, target)
    return {**result, "mesh_chosen": True}


def described(target: Topology, file: str | None) -> Topology:
    """GPUs with a file's description and memory; raises InputError where it cannot be read, or `target` are TPUs."""
    if file is None:
        return target
    if target.kind is not None:
        raise InputError(f"--target: describes GPUs, and {target.name} are TPUs; leave it out")
    try:
        description = gpus.checked(Path(file).read_text())
        return target._replace(target=description, memory=gpus.figure(description, "device_memory_size"))
    except (OSError, ValueError) as error:
        raise InputError(f"--target: {file}: {error}") from error


def plan_search(
    config: Config,
    name: str,
    compiled: int = 6,
    report: Callable[[str], None] = print,
    target_file: str | None = None,
) -> dict[str, Any]:
    """Plans the most promising meshes, remat policies and microbatches.

    Args:
      compiled: how many of them are compiled.
      report: is told each as it is done. target_file: as in `plan`.

    Returns:
      "plans": dictionaries of `plan`, those that fit first, the fastest first; "considered", "fit_by_arithmetic": how
      many settings there were; "refused": why some could not be planned; "interrupted": whether it ended early.

    Raises:
      InputError: as `plan`; or nothing fits even by arithmetic, or no setting could be planned.
    """
    target = described(topology_of(name), target_file)
    config = with_dtype(resolve(config), target)
    return search.search(config, target, compiled, lambda setting: planned(setting, target), report)


def plan_generation(config: Config, name: str, rows: int, target_file: str | None = None) -> dict[str, Any]:
    """What a device needs to write `rows` documents with the trained model, as `generation.generation_plan` tells it.

    Raises:
      InputError: as `plan`; or the devices do not divide the heads or the hidden width.
    """
    from moma_jax.plan import compile as compiler

    target = described(topology_of(name), target_file)
    if not target.kind and (lacks := _gpu_lacks(target, compiler)):
        raise InputError(f"--generate: its programs are compiled, and for {target.name} that needs {lacks}")
    devices = compiler.topology_devices(target)  # before anything imports JAX
    from moma_jax.plan.generation import generation_plan

    return generation_plan(with_dtype(resolve(config), target), target, devices, rows)


def with_dtype(config: Config, target: Topology) -> Config:
    """The config with `model.dtype` auto replaced by what the topology computes in."""
    if config.model.dtype != "auto":
        return config
    dtype = "bfloat16" if target.narrow else "float32"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


def planned(config: Config, target: Topology) -> dict[str, Any]:
    """`plan` of a config whose mesh and dtype are settled."""
    mesh = dataclasses.asdict(config.mesh)
    require_split(config, mesh)
    flops = flops_per_token(config) * config.batch_tokens
    shape = {
        "topology": target.name,
        "devices": target.devices,
        "hosts": target.hosts,
        "memory_per_device": int(target.memory),
        "ffn": config.model.ffn,
        "mesh": mesh,
        "accumulate": config.train.accumulate,
        "remat": config.model.remat,
        "batch_tokens": config.batch_tokens,
        "flops_per_device": flops / target.devices,
    }
    result = (compiled_plan if target.kind else gpu_plan)(config, target)
    return {**result, **shape, "warnings": result["warnings"] + _warnings(config, target)}


def arithmetic_plan(config: Config, target: Topology) -> dict[str, Any]:
    """The part of a plan that comes from closed forms: memory."""
    sizes = memory.arithmetic_bytes(config)
    total = sum(sizes.values())
    return {
        "method": "arithmetic",
        "fits": total <= memory.USABLE * target.memory,
        "bytes_per_device": {**sizes, "total": total},
        **dict.fromkeys(FROM_PROGRAM),
        "host_checkpoint_bytes": _host_bytes(sizes, target),
        "warnings": ["memory by arithmetic alone: no program was compiled for GPUs"],
    }


def gpu_plan(config: Config, target: Topology) -> dict[str, Any]:
    """The part of a plan that the program for GPUs says: its memory; `arithmetic_plan` where none can be compiled."""
    from moma_jax.plan import compile as compiler
    from moma_jax.plan import memory_use

    if lacks := _gpu_lacks(target, compiler):
        found = arithmetic_plan(config, target)
        return {**found, "warnings": [f"{found['warnings'][0]}, for want of {lacks}"]}
    compiled = compiler.compile_step(config, target)
    sizes = memory_use.gpu_bytes(compiled)
    return {
        "method": "compiled",
        "fits": sizes["total"] is not None and sizes["total"] <= memory.USABLE * target.memory,
        "bytes_per_device": sizes,
        **dict.fromkeys(FROM_PROGRAM),
        "host_checkpoint_bytes": _host_bytes(sizes, target),
        "warnings": [
            "seconds and communication: not estimated, as XLA gives no cycles for GPUs; kernels were not tuned"
        ],
    }


def _gpu_lacks(target: Topology, compiler) -> str:
    """What there has to be to compile for GPUs; "" where it is here."""
    if not target.target:
        return "a description (--target FILE)"
    return "" if compiler.has_gpu_compiler() else "pip install 'moma_jax[plan-gpu]'"


def compiled_plan(config: Config, target: Topology) -> dict[str, Any]:
    """The part of a plan that is read from the compiled step."""
    from moma_jax.plan import compile as compiler
    from moma_jax.plan import estimate, hlo, memory_use, network, placement

    compiled = compiler.compile_step(config, target)
    module = hlo.parse(compiled.text) if compiled.error is None else None
    sizes = memory_use.bytes_by_category(config, compiled, module)
    result = {
        "method": "compiled",
        "fits": compiled.error is None,
        "bytes_per_device": sizes,
        **dict.fromkeys(FROM_PROGRAM),
        "host_checkpoint_bytes": _host_bytes(sizes, target),
        "warnings": [],
    }
    if module is None:
        result["warnings"].append(f"the compiler: {compiler.first_words(compiled.error)}")
        return result
    layout = network.layout_of(compiled.mesh, target.shape)
    step = estimate.estimate(module, layout, target.kind)
    bounds = [estimate.estimate(module, layout, target.kind, a).seconds for a in (estimate.FAST, estimate.SLOW)]
    flops = flops_per_token(config) * config.batch_tokens
    mfu = lambda seconds: flops / (seconds * target.devices * target.peak)  # noqa: E731
    units = ["network", "network between slices"][: 1 + (target.slices > 1)]
    result |= {
        "expert_stacks_gathered": placement.expert_stacks_gathered(module, config),
        "replicated_logits": placement.replicated_logits(module, config),
        "collective_bytes": {kind: dict(axes) for kind, axes in step.collective_bytes.items()},
        "step_seconds_estimate": step.seconds,
        "step_seconds_range": bounds,
        "mfu_estimate": mfu(step.seconds),
        "mfu_range": [mfu(seconds) for seconds in reversed(bounds)],
        "tokens_per_second_estimate": config.batch_tokens / step.seconds,
        "exposed_communication_share": sum(step.exposed[unit] for unit in units) / step.seconds,
        "seconds_by_category": step.by("category"),
        "seconds_by_part": step.by("part"),
        "network_seconds": {unit: step.by("category", unit) for unit in units},
        "unestimated": _unestimated(step),
        "slowest": [cost._asdict() for cost in sorted(step.costs, key=lambda c: -c.seconds)[:20]],
    }
    result["warnings"] += _program_warnings(result, step)
    return result


def _program_warnings(result: dict[str, Any], step) -> list[str]:
    """What a compiled step should not do, and what is not known of it."""
    moved = result["expert_stacks_gathered"]
    lines = [f"the weights of experts that live apart are moved over expert: {', '.join(moved)}"] if moved else []
    if result["replicated_logits"]:
        lines.append("a device holds logits beyond one chunk of its own tokens and its own part of the vocabulary")
    lines += [f"the turns of the loop {loop} are unknown; it is counted once" for loop in step.unknown_loops]
    kernels = sorted(step.unknown_kernels)
    return lines + [f"the kernel {kernel} has no model here; it is counted by its bytes" for kernel in kernels]


def _unestimated(step) -> dict[str, float]:
    """Seconds of what the compiler gives no estimate for, by category."""
    total = {}
    for cost in step.costs:
        if cost.source == "roofline":
            total[cost.category] = total.get(cost.category, 0.0) + cost.seconds
    return total


def _host_bytes(sizes: dict[str, Any], target: Topology) -> int:
    """Host memory that an asynchronous save takes at most: a copy of the state's shards on one host's devices."""
    return (sizes["parameters"] + sizes["optimizer"]) * target.devices // target.hosts


def _warnings(config: Config, target: Topology) -> list[str]:
    """What would run without its kernel there."""
    from moma_jax.model.kernels import refusal

    heads, width = config.model.heads // config.mesh.tensor, config.model.head_size
    reason = refusal("tpu" if target.kind else "gpu", target.device_kind, config.data.sequence, heads, width)
    return [] if reason is None else [f"attention: without a fused kernel, because {reason}; it will be slower"]
