"""A plan beside a clock: what `moma bench suite` measured of a step on a kind of device, beside what is predicted."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moma_jax.checks import resolve
from moma_jax.config import Config, MeshConfig
from moma_jax.errors import InputError
from moma_jax.plan.shapes import SHAPES, recipe_of
from moma_jax.plan.topology import KINDS, MOST_GPUS, Topology, topology_of


def measured_step(file: str, config: Config, target: Topology) -> dict[str, Any]:
    """The step of a suite.json with the config's FFN whose model is nearest to it in size.

    Returns:
      {"file", "device", "devices", "part": its name, "shape", "rows", "seconds", "bytes": of one device}.

    Raises:
      InputError: the file is no suite's, is of another kind of device, or has no step of this FFN.
    """
    try:
        found = json.loads(Path(file).read_text())
        device, parts, ffn = found["device"], found["parts"], config.model.ffn
        steps = {shape: parts.get(f"step {shape} {ffn}", {}) for shape in SHAPES}
        done = {shape: part for shape, part in steps.items() if "step_seconds" in part}
        sizes = {
            shape: {
                "file": file, "device": str(device), "devices": int(found["devices"]), "part": f"step {shape} {ffn}",
                "shape": shape, "rows": int(part["rows"]), "seconds": float(part["step_seconds"]),
                "bytes": int(part["bytes"]["arguments"]) + int(part["bytes"]["temporary"]),
            }
            for shape, part in done.items()
        }  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"--measured: {file}: is no suite.json of moma bench suite: {error}") from error
    if target.device_kind not in ("", device):
        raise InputError(f"--measured: {file}: was measured on {device}, and {target.name} are {target.device_kind}")
    if not sizes:
        raise InputError(f"--measured: {file}: has no step of {ffn}; run moma bench suite until it has")
    most = max(target.kind.sizes) * target.kind.devices if target.kind else MOST_GPUS
    for part in sizes.values():
        whole = part["rows"] >= 1 and part["rows"] % SHAPES[part["shape"]].group_rows == 0
        if not (whole and part["bytes"] >= 1 and 1 <= part["devices"] <= most and 0 < part["seconds"] < math.inf):
            raise InputError(f"--measured: {file}: {part['part']} has figures that no suite writes; measure it again")
    size = lambda layers, width: layers * width**2  # noqa: E731
    own = size(config.model.layers, config.model.width)
    return sizes[min(sizes, key=lambda shape: abs(math.log(size(*SHAPES[shape][:2]) / own)))]


def beside(step: dict[str, Any], config: Config, target: Topology, planned: Callable) -> dict[str, Any]:
    """A measured step with what is predicted of it, and their ratios.

    Args:
      step: of `measured_step`. config: the plan's, for its FFN, dtype and compiler options.
      planned: plans a config on a topology.

    Returns:
      `step` with "predicted_seconds", "predicted_range" and "predicted_over_measured" (None for GPUs), and
      "predicted_bytes" and "bytes_over_measured".
    """
    own, rows = recipe_of(SHAPES[step["shape"]], config.model.ffn), step["rows"]
    copies = max(n for n in range(1, step["devices"] + 1) if rows // own.data.group_rows % n == 0)
    train = dataclasses.replace(own.train, batch_rows=rows, accumulate=1)
    model = dataclasses.replace(own.model, dtype=config.model.dtype)
    own = dataclasses.replace(own, train=train, model=model, mesh=MeshConfig(copies), run=config.run)
    found = planned(resolve(own), _smallest(target, step["devices"]))
    seconds, total = found["step_seconds_estimate"], found["bytes_per_device"]["total"]
    return step | {
        "predicted_seconds": seconds,
        "predicted_range": found["step_seconds_range"],
        "predicted_over_measured": seconds and seconds / step["seconds"],
        "predicted_bytes": total,
        "bytes_over_measured": total and total / step["bytes"],
    }


def _smallest(target: Topology, devices: int) -> Topology:
    """The smallest slice, or node, of the same kind with so many devices."""
    if target.kind is None:
        return target._replace(name=f"{target.name.partition(':')[0]}:1x{devices}", shape=(1, devices))
    chips = next(n for n in sorted(target.kind.sizes) if n * target.kind.devices >= devices)
    name = next(name for name, kind in KINDS.items() if kind is target.kind)
    return topology_of(f"{name}:{'x'.join(map(str, target.kind.sizes[chips]))}")
