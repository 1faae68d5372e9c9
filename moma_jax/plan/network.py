"""Collectives in a compiled program: kind, bytes, the mesh axes they cross, and how long the network takes.

The bandwidth table, for the devices of one group of a collective on a torus of links (`topology.KINDS`; b is a link's
bytes/s in one direction, n_d how many different places the group has along dimension d):

    all-gather, reduce-scatter, all-reduce   bytes sent / sum over d of (2b on a ring, b on a line)
    all-to-all                               operand bytes x max over d of (n_d / 8b on a ring, n_d / 4b on a line)
    collective-permute                       operand bytes / b
    between slices                           bytes sent / `between` of the kind of TPU, whatever the collective

Links that several groups share (a mesh axis laid out with gaps along a dimension) give each its part. Every hop adds
LATENCY. Bytes sent by one device, for operands of B bytes and groups of n devices: all-gather B(n-1), reduce-scatter
and all-to-all B(n-1)/n, all-reduce 2B(n-1)/n, collective-permute B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moma_jax.plan.hlo import Computation, Instruction, Module
from moma_jax.plan.topology import Kind

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
)
LATENCY = 1e-6
"""Seconds of one hop ("How to scale your model", chapter 3)."""
_NUMBERS = r"[\d,]+"


class Collective(NamedTuple):
    """What the network is asked for.

    Attributes:
      kind: one of KINDS. phase: "sync", "start" or "done" (of an asynchronous one).
      key: joins the start and the done of a pair.
      operand_bytes: of one device.
      devices: ids of one group, or of the pair that is farthest apart in the mesh.
      axes: mesh axes that the groups cross, in the mesh's order.
    """

    kind: str
    phase: str
    key: str
    operand_bytes: int
    devices: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends."""
        n = len(self.devices)
        match self.kind:
            case "all-gather":
                return self.operand_bytes * (n - 1)
            case "all-reduce":
                return 2 * self.operand_bytes * (n - 1) / n
            case "reduce-scatter" | "all-to-all" | "ragged-all-to-all":
                return self.operand_bytes * (n - 1) / n
            case _:
                return self.operand_bytes


class MeshLayout(NamedTuple):
    """Where the devices of a mesh are.

    Attributes:
      axes: mesh axis -> devices along it, in order.
      places: (devices, dimensions) int coordinates in the torus, by position in the mesh; a last column counts cores
        of a chip, where a chip has several devices.
      extents: chips along each dimension.
      slices: slice of each device.
    """

    axes: dict[str, int]
    places: np.ndarray
    extents: tuple[int, ...]
    slices: np.ndarray


def layout_of(mesh: Any, extents: Sequence[int]) -> MeshLayout:
    """The layout of a `jax.sharding.Mesh` of TPUs whose slices have the given extents."""
    devices = list(mesh.devices.flat)
    places = [(*d.coords[: len(extents)], d.core_on_chip) for d in devices]
    slices = [getattr(d, "slice_index", 0) or 0 for d in devices]
    return MeshLayout(dict(mesh.shape), np.array(places), tuple(extents), np.array(slices))


# Reading --------------------------------------------------------------------------------------------------------------


def collective_of(
    module: Module, computation: Computation, instruction: Instruction, axes: Mapping[str, int]
) -> Collective | None:
    """What an instruction asks of the network; None where nothing, or where it only goes on with what has started.

    Asynchronous collectives come as -start and -done, or as fusions around the custom calls AsyncCollectiveStart and
    AsyncCollectiveDone, between which ordinary fusions carry them forward. A fusion of an all-reduce and a slice is a
    reduce-scatter.
    """
    kind, phase = kind_and_phase(instruction.opcode)
    if kind:
        return _collective(computation, instruction, kind, phase, axes)
    body = module.computations.get(instruction.called() or "")
    if instruction.opcode not in ("fusion", "async-start", "async-done") or body is None:
        return None
    inner = next((i for i in body.instructions if kind_and_phase(i.opcode)[0]), None)
    if inner is None:
        return None
    kind, _ = kind_and_phase(inner.opcode)
    if instruction.opcode != "fusion":
        phase = instruction.opcode.removeprefix("async-")
        found = _collective(body, inner, kind, phase, axes)
        return found._replace(key=instruction.name if phase == "start" else instruction.operands[0])
    targets = "".join(i.attributes for i in body.instructions if i.opcode == "custom-call")
    if "AsyncCollective" in targets:
        phase = "start" if "AsyncCollectiveStart" in targets else "done"
        channel = re.search(r"channel_id=(\d+)", inner.attributes)
        found = _collective(body, inner, kind, phase, axes)
        return found._replace(key=f"channel {channel.group(1)}" if channel else inner.name)
    if "chain_id=" in inner.attributes:
        return None
    if kind == "all-reduce" and any(i.opcode == "dynamic-slice" for i in body.users[inner.name]):
        kind = "reduce-scatter"
    return _collective(body, inner, kind, "sync", axes)


def between_slices(computation: Computation, instruction: Instruction, layout: MeshLayout) -> Collective | None:
    """The collective over several slices that a `send` of the Megascale runtime starts; None where it is none.

    Its key is the name of the `recv` that belongs to it, whose `recv-done` waits for it. What happens inside the slices
    before and after it is in the program as ordinary collectives.
    """
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    if instruction.opcode != "send" or found is None:
        return None
    meeting = re.search(r'_xla_host_transfer_rendezvous="[^"]*"', instruction.attributes).group()
    received = (i for i in computation.instructions if i.opcode == "recv" and meeting in i.attributes)
    end = next(received, instruction)
    kind = found.group(1).lower().replace("_", "-")
    by_place = layout.slices.reshape(tuple(layout.axes.values()))
    axes = tuple(axis for n, axis in enumerate(layout.axes) if (np.diff(by_place, axis=n) != 0).any())
    one_of_each = np.unique(layout.slices, return_index=True)[1]
    places = tuple(int(d) for d in one_of_each)
    return Collective(kind, "start", end.name, end.arrays[0].nbytes, places, axes)


def kind_and_phase(opcode: str) -> tuple[str | None, str]:
    """("all-gather", "start") of all-gather-start; (None, "sync") of what is no collective."""
    base, _, phase = opcode.rpartition("-")
    if phase in ("start", "done") and base in KINDS:
        return base, phase
    return (opcode if opcode in KINDS else None), "sync"


def _collective(computation: Computation, instruction: Instruction, kind: str, phase: str, axes) -> Collective:
    if phase == "done":
        return Collective(kind, phase, instruction.operands[0], 0, (0,), ())
    operands = [computation.by_name[o] for o in instruction.operands]
    size = sum(a.nbytes for o in operands for a in o.arrays)
    axes_crossed, farthest = crossed(device_groups(instruction.attributes, math.prod(axes.values())), axes)
    return Collective(kind, phase, instruction.name, size, farthest, axes_crossed)


def device_groups(attributes: str, devices: int) -> np.ndarray:
    """Groups of positions in the mesh, int (groups, devices of a group); pairs for a collective-permute.

    Understands `{{0,1},{2,3}}`, `[2,2]<=[4]`, `[2,2]<=[2,2]T(1,0)`, meshes (`mesh['a'=2,'b'=2] {'b'}`, with
    `device_ids=([2,2]T(1,0))` where they are not in order) and `source_target_pairs`.

    Raises:
      ValueError: the text has none of them.
    """
    pairs = re.search(r"source_target_pairs=\{((?:\{[\d,]+\},?)*)\}", attributes)
    listed = re.search(r"replica_groups=\{((?:\{[\d,]+\},?)*)\}", attributes)
    counted = re.search(rf"replica_groups=\[({_NUMBERS})\]<=(\[{_NUMBERS}\](?:T\({_NUMBERS}\))?)", attributes)
    meshed = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?(?:T\([\d,]+\))?)\))? \{(.*?)\}", attributes)
    if pairs or (listed and listed.group(1)):
        found = re.findall(r"\{([\d,]+)\}", (pairs or listed).group(1))
        return np.array([_ints(group) for group in found])
    if listed:
        return np.arange(devices)[None]
    if counted:
        return _counted(counted.group(2)).reshape(_ints(counted.group(1)))
    if meshed:
        return _meshed(*meshed.groups())
    raise ValueError(f"no groups of devices in: {attributes[:200]}")


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _counted(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: counting up in that shape, transposed, flat."""
    shape, _, order = text.partition("T")
    shape = _ints(shape.strip("[]"))
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose(_ints(order.strip("()"))) if order else ids).reshape(-1)


def _meshed(axes: str, ids: str | None, named: str) -> np.ndarray:
    """Groups along the named axes of a mesh; `'a':(2)4` names the part of size 4 of axis a that follows one of 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    wanted = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named)
    shape, chosen = [], []
    for name, size in sizes.items():
        cuts = sorted({1, size} | {int(n) for own, a, b in wanted if own == name and a for n in (a, int(a) * int(b))})
        for before, after in zip(cuts, cuts[1:] or [size], strict=False):
            inside = any(
                own == name and (not a or int(a) <= before and after <= int(a) * int(b)) for own, a, b in wanted
            )
            chosen += [len(shape)] if inside else []
            shape.append(after // before)
    if ids is None:
        flat = np.arange(math.prod(sizes.values()))
    else:
        flat = _counted(ids) if ids.startswith("[") else np.array(_ints(ids))
    others = [i for i in range(len(shape)) if i not in chosen]
    members = math.prod(shape[i] for i in chosen)
    return flat.reshape(shape).transpose(others + chosen).reshape(-1, members)


def crossed(groups: np.ndarray, axes: Mapping[str, int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(mesh axes along which the members of a group differ, the group that crosses most)."""
    places = np.stack(np.unravel_index(groups, tuple(axes.values())), -1)
    differs = (places != places[:, :1]).any(1)
    most = int(differs.sum(-1).argmax())
    return tuple(a for a, d in zip(axes, differs.any(0), strict=True) if d), tuple(int(i) for i in groups[most])


# Time -----------------------------------------------------------------------------------------------------------------


def seconds(collective: Collective, layout: MeshLayout, kind: Kind) -> float:
    """How long the network takes, by the table at the top of this module."""
    devices = np.array(collective.devices)
    if len(devices) == 1:
        return 0.0
    if len(set(layout.slices[devices])) > 1:
        return collective.sent_bytes / (kind.between / kind.devices) + LATENCY
    dimensions = list(_dimensions(layout.places[devices], layout.extents, kind))
    hops = sum(number / 2 if ring else number - 1 for number, ring, _ in dimensions)
    match collective.kind:
        case "all-to-all" | "ragged-all-to-all":
            slowest = max(number / ((8 if ring else 4) * link) for number, ring, link in dimensions)
            transfer = collective.operand_bytes * slowest
        case "collective-permute":
            transfer = collective.operand_bytes / min(link for *_, link in dimensions)
        case _:
            transfer = collective.sent_bytes / sum((2 if ring else 1) * link for _, ring, link in dimensions)
    return transfer + hops * LATENCY


def _dimensions(places: np.ndarray, extents: tuple[int, ...], kind: Kind):
    """(places of the group, whether they are a ring, bytes/s of a link that is left for it) of every dimension crossed.

    The cores of a chip, the last column, are joined by as much as all of the chip's links.
    """
    for d, extent in enumerate(extents):
        at = np.unique(places[:, d])
        if len(at) > 1:
            closed, span = kind.closes(extents, d), at[-1] - at[0]
            if closed and len(at) == 2:
                span = min(span, extent - span)  # the shorter way round
            shared = max(1, round(span / (len(at) - 1)))
            yield len(at), closed and len(at) == extent, kind.link / shared
    cores = np.unique(places[:, -1])
    if len(cores) > 1:
        yield len(cores), False, kind.link * 2 * len(extents)
