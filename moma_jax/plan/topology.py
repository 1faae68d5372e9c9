"""Accelerators by name: how many there are of them, and what one can do.

All figures are public ones of one JAX device: on v4 and later TPUs a whole chip (its cores work as one), on tpu7x one
of a chip's two cores, and a GPU. "Link" is one ICI link in one direction.

Sources: the system architecture pages of Cloud TPU (v4, v5e, v5p, v6e, TPU7x: peak, memory, its bandwidth; the number
and the bandwidth of ICI links per chip; network cards of a host: 200 Gbit/s for four chips of v5p, and so taken for v4,
or for eight of v5e, 800 Gbit/s for eight of v6e, 400 Gbit/s for four of TPU7x) and, for the links, "How to scale your
model" (jax-ml.github.io/scaling-book, chapter 2); data sheets of NVIDIA (A100 SXM, H100 SXM, H200, B200).

The clock of a TPU is what its peak implies: peak / (2 x cells of its matrix units); the cells are those of four 128 x
128 units per core, and agree with the compiler's own estimate for a large matrix product (90% of peak on v4 to v5p).
For v6e and tpu7x four times as many are taken, of which public pages say different things; it gives v6e v5p's clock.
"""

from __future__ import annotations

import difflib
import math
import re
from typing import NamedTuple

from moma_jax.cost import peak_flops
from moma_jax.errors import InputError
from moma_jax.plan import gpus

GB = 1e9
GIB = 2**30


class Kind(NamedTuple):
    """A kind of TPU.

    Attributes:
      device_kind: what JAX calls it (`cost.peak_flops` knows the peak).
      memory: bytes of HBM. bandwidth: of HBM, bytes/s. clock: cycles/s, those that the compiler counts.
      link: bytes/s of an ICI link in one direction. between: of a chip between slices, in one direction.
      dimensions: of the torus.
      devices: JAX devices of a chip.
      most: chips of a pod, so of a slice.
      counted: what the number in a name counts of a chip: v5p-128 are 128 cores, so 64 chips.
      sizes: names in use, by the number of chips: extent along each dimension.
    """

    device_kind: str
    memory: float
    bandwidth: float
    clock: float
    link: float
    between: float
    dimensions: int
    devices: int
    most: int
    counted: int
    sizes: dict[int, tuple[int, ...]]

    @property
    def peak(self) -> float:
        """bfloat16 FLOP/s of one device."""
        return peak_flops(self.device_kind)

    def closes(self, extents: tuple[int, ...], dimension: int) -> bool:
        """Whether a dimension of a slice is a ring rather than a line.

        Slices of 4 x 4 x 4 cubes are closed by optical switches; in the plane only the 16 chips of a whole pod are.
        """
        return all(e % 4 == 0 for e in extents) if self.dimensions == 3 else extents[dimension] == 16


_FLAT = {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBES = {
    **{4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8)},
    **{512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16)},
}

KINDS = {
    # Four 128 x 128 units in each of two cores: 131,072 cells.
    "v4": Kind("TPU v4", 32 * GIB, 1228 * GB, 275e12 / (2 * 131072), 45 * GB, 25 * GB / 4, 3, 1, 4096, 2, _CUBES),
    "v5p": Kind("TPU v5", 95 * GIB, 2765 * GB, 459e12 / (2 * 131072), 90 * GB, 25 * GB / 4, 3, 1, 8960, 2, _CUBES),
    # Four 128 x 128 units: 65,536 cells. Of 16 GiB the compiler leaves a program 15.75.
    "v5e": Kind("TPU v5 lite", 15.75 * GIB, 819 * GB, 197e12 / (2 * 65536), 45 * GB, 25 * GB / 8, 2, 1, 256, 1, _FLAT),
    # Taken to have four times as many cells in the matrix units of a core: 262,144.
    "v6e": Kind("TPU v6 lite", 32 * GIB, 1640 * GB, 918e12 / (2 * 262144), 90 * GB, 100 * GB / 8, 2, 1, 256, 1, _FLAT),
    # A device is one of a chip's two cores: half of 192 GiB, 7380 GB/s and six links of 100 GB/s.
    "tpu7x": Kind("TPU7x", 96 * GIB, 3690 * GB, 1153.5e12 / (2 * 262144), 50 * GB, 50 * GB / 4, 3, 2, 9216, 2, _CUBES),
}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6lite": "v6e", "v5": "v5p", "v7x": "tpu7x", "tpu7": "tpu7x"}

MOST_SLICES, MOST_GPUS = 64, 2**17
"""More than one run has had; what is above is taken for a slip of the pen."""

GPUS = {  # data-sheet memory, bytes
    "a100": 80 * GIB,
    "h100": 80 * GIB,
    "h200": 141 * GB,
    "b200": 180 * GB,
    "gh200": 96 * GB,
    "l40s": 48 * GB,
    "l4": 24 * GB,
    "t4": 15 * GIB,
}


FLOAT32_PEAKS = {"t4": 8.1e12}
"""FLOP/s of GPUs without bfloat16."""


class Topology(NamedTuple):
    """Devices to plan for.

    Attributes:
      name: canonical, such as v5p:4x4x4 or h100:4x8.
      kind: a TPU's; None for GPUs.
      shape: chips along each dimension of a slice; (nodes, GPUs of a node).
      slices: TPU slices joined by the data centre's network; 1 for GPUs.
      memory: bytes of one device. peak: its bfloat16 FLOP/s, float32 where it has no bfloat16.
      target: a GPU as XLA wants it described (`gpus`); "" where there is no description.
    """

    name: str
    kind: Kind | None
    shape: tuple[int, ...]
    slices: int
    memory: float
    peak: float
    target: str = ""

    @property
    def narrow(self) -> bool:
        """Whether it computes in bfloat16."""
        major = gpus.capability(self.target)
        return major is None or major >= 8

    @property
    def device_kind(self) -> str:
        """What JAX calls a device; "" where that is not known."""
        if self.kind is not None:
            return self.kind.device_kind
        known = gpus.GPUS.get(self.name.partition(":")[0])
        return "" if known is None else known.name

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.slices * math.prod(self.shape) * (self.kind.devices if self.kind else 1)

    @property
    def hosts(self) -> int:
        """Machines: four chips of a TPU make one, as libtpu counts."""
        return max(1, self.slices * math.prod(self.shape) // 4) if self.kind else self.shape[0]


def topology_of(name: str) -> Topology:
    """The devices that a name stands for.

    Args:
      name: `v5p-128` (as Cloud TPU names slices: v4 and v5p count cores, two of a chip; v5litepod, v5e and v6e count
        chips), `v5p:4x4x4` (chips along the torus), either with `2x` before it for two slices (`2xv5e-256`); for
        GPUs `h100` (one), `h100:8` (one node), `h100:4x8` (four nodes of eight).

    Raises:
      InputError: there is no such thing.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z][a-z0-9]*?)(?:-(\d+)|:([0-9]+(?:x[0-9]+)*))?", name.strip().lower())
    if match is None:
        raise InputError(f"--topology: {name!r} is not a name such as v5p-128, v5p:4x4x4, v5e-16, 2xv5e-256, h100:8")
    slices, kind, number, extents = match.groups()
    kind = ALIASES.get(kind, kind)
    extents = tuple(map(int, extents.split("x"))) if extents else None
    if kind in GPUS:
        return _gpus(name, kind, extents, number or slices)
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, [*KINDS, *GPUS], n=1)
        meant = f"; did you mean {near[0]}" if near else ""
        raise InputError(f"--topology: {kind!r} is none of {', '.join([*KINDS, *GPUS])}{meant}")
    return _tpus(name, kind, int(number) if number else None, extents, int(slices or 1))


def _tpus(name: str, kind: str, number: int | None, extents: tuple[int, ...] | None, slices: int) -> Topology:
    figures = KINDS[kind]
    if number is not None:
        extents = figures.sizes.get(number // figures.counted) if number % figures.counted == 0 else None
        if extents is None:
            names = ", ".join(f"{kind}-{chips * figures.counted}" for chips in figures.sizes)
            raise InputError(f"--topology: {name!r} is no slice in use; give one of {names}, or {_example(kind)}")
    if extents is None:
        raise InputError(f"--topology: {name!r} has no size; give {kind}-{4 * figures.counted} or {_example(kind)}")
    if len(extents) != figures.dimensions or slices < 1 or 0 in extents:
        raise InputError(f"--topology: {name!r}: {kind} has {figures.dimensions} dimensions, {_example(kind)}")
    if math.prod(extents) > figures.most or slices > MOST_SLICES:
        most = f"a {kind} slice has at most {figures.most} chips, and a plan {MOST_SLICES} slices"
        raise InputError(f"--topology: {name!r}: {most}, {_example(kind)}")
    if any(extent % 2 for extent in extents[:2]):
        raise InputError(f"--topology: {name!r}: a host is 2x2 chips, so the first two are even, {_example(kind)}")
    canonical = f"{f'{slices}x' if slices > 1 else ''}{kind}:{'x'.join(map(str, extents))}"
    return Topology(canonical, figures, extents, slices, figures.memory, figures.peak)


def _example(kind: str) -> str:
    return f"such as {kind}:{'x'.join(map(str, KINDS[kind].sizes[16]))} for 16 chips"


def _gpus(name: str, kind: str, extents: tuple[int, ...] | None, other: str | None) -> Topology:
    extents = extents or (1,)
    if other or len(extents) > 2 or 0 in extents:
        raise InputError(f"--topology: {name!r}: GPUs are {kind}:8 (one node) or {kind}:4x8 (four nodes of eight)")
    if math.prod(extents) > MOST_GPUS:
        raise InputError(f"--topology: {name!r}: a plan has at most {MOST_GPUS} GPUs, such as {kind}:4x8")
    nodes, each = extents if len(extents) == 2 else (1, extents[0])
    figures = GPUS[kind], peak_flops(kind) or FLOAT32_PEAKS[kind], gpus.described(kind)
    return Topology(f"{kind}:{nodes}x{each}", None, (nodes, each), 1, *figures)
