"""How long a compiled step takes, read from its text. Estimates, not measurements.

The instructions of a core run one after the other in the order of the text. Each takes the larger of the compiler's
own estimate (cycles / clock) and its bytes from and to HBM / bandwidth. The network, the copies between HBM and a
core's memory, and the sparse cores work beside it from where they are started to where their result is asked for; what
is then not ready is waited for. Loops run as often as their conditions say, each turn as long as the one that is read.

Some instructions carry no estimate; they are listed apart ("roofline" in Cost.source):

  sort      a bitonic network: k(k+1)/2 stages for a length of at most 2^k, in each of which every vector register of
            1024 elements takes SORT_CYCLES for each array that is sorted along.
  gather,   rows are moved one by one: ROW_CYCLES for each, or one cycle for each of its 512-byte pieces where that is
  scatter   more, and whole 512-byte pieces of HBM (a scatter reads and writes what it adds to).
  attention the fused kernel's products of the blocks that causality leaves (2 forward, 5 backward), heads narrower than
            the matrix units' 128 as wide as these, at a share of the peak.
  kernels   their bytes, as slowly as the compiler takes its own copies to be: hiding work in one gains nothing.
  others    bytes / bandwidth.

What a step takes is between two of these (`FAST`, `SLOW`): what moves memory as fast as memory allows and attention at
its best, or all of the compiler's cycles and attention at its worst. `MIDDLE` is for comparing programs.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from moma_jax.plan import network
from moma_jax.plan.hbm_traffic import SEEN_THROUGH, bytes_moved
from moma_jax.plan.hlo import Array, Computation, Instruction, Module
from moma_jax.plan.network import MeshLayout
from moma_jax.plan.topology import Kind

SORT_CYCLES = 4
"""Cycles of a stage for a register: exchange with the partner (two), compare, select."""
ROW_CYCLES = 8
"""Cycles between two rows that a core's scalar unit sets moving: read the index, compute the address, start."""
COPY_SLOWDOWN = 2.5
"""Times that the compiler's cycles for a plain copy are what memory's bandwidth allows, on every generation."""
REGISTER = 1024
"""Elements of a vector register, 8 x 128."""
PIECE = 512
"""Bytes of one sublane of 128 elements, the smallest piece of HBM that a row of an array touches."""

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "after-all"),
    *("add-dependency", "opt-barrier", "domain", "iota"),
}


class Assumed(NamedTuple):
    """What nobody but a device could tell.

    Attributes:
      cycles: whether the compiler's own estimate counts for what moves memory, besides its bytes.
      kernel_share: of the peak that the fused attention reaches: its exponentials take as long as its products.
    """

    cycles: bool
    kernel_share: float


FAST, MIDDLE, SLOW = Assumed(False, 0.6), Assumed(True, 0.4), Assumed(True, 0.3)


class Cost(NamedTuple):
    """One instruction, over all its turns in a step.

    Attributes:
      category: "matrix products", "elementwise", "sort", "gather", "scatter", "copies", "attention kernel", "kernel" or
        a kind of collective.
      part: of the model: "attention", "ffn", "loss", "embedding", "layers", "optimizer".
      seconds: in which its unit (core, network, copies, sparse core) is busy. turns: in a step.
      source: "compiler", "bytes", "roofline" or "network".
    """

    name: str
    op_name: str
    category: str
    part: str
    unit: str
    seconds: float
    turns: int
    source: str


@dataclass
class Estimate:
    """A step.

    Attributes:
      seconds: all of it. exposed: in which the core waits for, by unit.
      costs: every instruction that takes time.
      collective_bytes: kind -> axes ("fsdp x expert") -> bytes that one device sends.
      unknown_loops: loops whose turns the text does not say; they are counted once.
      unknown_kernels: kernels without a model here; they are counted by their bytes.
    """

    seconds: float = 0.0
    exposed: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    costs: list[Cost] = field(default_factory=list)
    collective_bytes: dict[str, dict[str, float]] = field(default_factory=dict)
    unknown_loops: list[str] = field(default_factory=list)
    unknown_kernels: set[str] = field(default_factory=set)

    def add(self, other: Estimate) -> None:
        """Takes in the costs of a part of the step, all but its seconds."""
        for unit, seconds in other.exposed.items():
            self.exposed[unit] += seconds
        self.costs += other.costs
        for kind, axes in other.collective_bytes.items():
            crossed = self.collective_bytes.setdefault(kind, {})
            for axis, size in axes.items():
                crossed[axis] = crossed.get(axis, 0.0) + size
        self.unknown_loops += other.unknown_loops
        self.unknown_kernels |= other.unknown_kernels

    def by(self, name: str, unit: str = "core") -> dict[str, float]:
        """Seconds of a unit by an attribute of Cost, largest first."""
        total = defaultdict(float)
        for cost in self.costs:
            if cost.unit == unit:
                total[getattr(cost, name)] += cost.seconds
        return dict(sorted(total.items(), key=lambda item: -item[1]))


def estimate(module: Module, layout: MeshLayout, kind: Kind, assumed: Assumed = MIDDLE) -> Estimate:
    """The estimate of a step on devices of a kind, laid out as `layout` says."""
    result = Estimate()
    result.seconds = _run(_Reader(module, layout, kind, result, assumed), module.computations[module.entry], 1)
    return result


class _Reader(NamedTuple):
    """What reading a computation needs."""

    module: Module
    layout: MeshLayout
    kind: Kind
    result: Estimate
    assumed: Assumed
    where: str = ""  # op_name of the loop that is read, for what has none of its own

    def note(self, instruction: Instruction, category: str, unit: str, seconds: float, turns: int, source: str) -> None:
        """Writes down what an instruction costs."""
        op_name = instruction.op_name or self.where
        part = part_of(op_name)
        self.result.costs.append(Cost(instruction.name, op_name, category, part, unit, seconds * turns, turns, source))


class _Clock:
    """The time of a computation: the core's own, and when each other unit is free and each started piece is ready."""

    def __init__(self):
        self.now, self.free, self.ready, self.waited = 0.0, defaultdict(float), {}, defaultdict(float)

    def start(self, unit: str, key: str, seconds: float) -> None:
        self.free[unit] = max(self.now, self.free[unit]) + seconds
        self.ready[key] = (unit, self.free[unit])

    def wait(self, key: str) -> None:
        unit, end = self.ready.pop(key, ("", 0.0))
        if end > self.now:
            self.waited[unit] += end - self.now
            self.now = end


def _run(reader: _Reader, computation: Computation, turns: int) -> float:
    """Seconds of one turn of a computation that has `turns` in a step; waiting and costs go into the result."""
    clock = _Clock()
    for instruction in computation.instructions:
        _step(reader, computation, instruction, turns, clock)
    for key in list(clock.ready):  # what a loop starts and another turn asks for
        clock.wait(key)
    for unit, waited in clock.waited.items():
        reader.result.exposed[unit] += waited * turns
    return clock.now


def _step(reader: _Reader, computation: Computation, instruction: Instruction, turns: int, clock: _Clock) -> None:
    """Lets one instruction run."""
    module, layout, kind, result, assumed, where = reader
    match instruction.opcode:
        case opcode if opcode in _FREE:
            return
        case "while":
            trips = module.trips(computation, instruction)
            if trips is None:
                result.unknown_loops.append(instruction.op_name or instruction.name)
            trips = 1 if trips is None else trips
            inner = reader._replace(where=instruction.op_name or where)
            clock.now += trips * _run(inner, module.computations[instruction.called("body")], turns * trips)
            return
        case "call":
            clock.now += _run(reader, module.computations[instruction.called("to_apply")], turns)
            return
        case "conditional":
            clock.now += _slowest(reader, _branches(instruction), turns)
            return
    asked = network.between_slices(computation, instruction, layout)
    if asked is None and instruction.opcode in ("send", "recv"):
        return
    if asked is None:
        asked = network.collective_of(module, computation, instruction, layout.axes)
    if asked is not None:
        _communicate(reader, instruction, asked, turns, clock)
        return
    if instruction.opcode.endswith("-done"):
        clock.wait(instruction.operands[0])
        return
    if "tpu_custom_call" in instruction.attributes:
        category, seconds, source = _kernel_seconds(computation, instruction, kind, assumed)
        if category == "kernel":
            result.unknown_kernels.add(instruction.name)
    else:
        category, seconds, source = _core_seconds(module, computation, instruction, kind, assumed)
    if instruction.opcode.endswith("-start"):
        unit = "sparse core" if "sparsecore" in instruction.attributes else "copies"
        clock.start(unit, instruction.name, seconds)
    else:
        unit = "core"
        clock.now += seconds
    if seconds:
        reader.note(instruction, category, unit, seconds, turns, source)


def _communicate(reader: _Reader, instruction: Instruction, asked, turns: int, clock: _Clock) -> None:
    """Lets a collective start, end, or do both."""
    if asked.phase == "done":
        clock.wait(asked.key)
        return
    seconds = network.seconds(asked, reader.layout, reader.kind)
    unit = "network between slices" if instruction.opcode == "send" else "network"
    clock.start(unit, asked.key, seconds)
    if asked.phase == "sync":
        clock.wait(asked.key)
    crossed, axes = reader.result.collective_bytes.setdefault(asked.kind, {}), " x ".join(asked.axes) or "none"
    crossed[axes] = crossed.get(axes, 0.0) + asked.sent_bytes * turns
    reader.note(instruction, asked.kind, unit, seconds, turns, "network")


def _slowest(reader: _Reader, names: list[str], turns: int) -> float:
    """Seconds of one turn of the slowest of several computations, one of which runs; only its costs count."""
    branches = [Estimate() for _ in names]
    for name, branch in zip(names, branches, strict=True):
        branch.seconds = _run(reader._replace(result=branch), reader.module.computations[name], turns)
    slowest = max(branches, key=lambda branch: branch.seconds)
    reader.result.add(slowest)
    return slowest.seconds


def _branches(instruction: Instruction) -> list[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if found:
        return re.findall(r"%?([\w.\-]+)", found.group(1))
    return [instruction.called("true_computation"), instruction.called("false_computation")]


def part_of(op_name: str) -> str:
    """The part of the model that an instruction serves, from its name in the traced program."""
    for text, part in (("/attention/", "attention"), ("/ffn/", "ffn"), ("/layers/", "layers"), ("jvp()", "loss")):
        if text in op_name:
            return part
    if "Decoder" in op_name:
        return "layers" if re.search(r"Decoder\)+/(Decoder\.in_\w+/)?while", op_name) else "embedding"
    return "optimizer"


# The core -------------------------------------------------------------------------------------------------------------


def _core_seconds(
    module: Module, computation: Computation, instruction: Instruction, kind: Kind, assumed: Assumed
) -> tuple[str, float, str]:
    """(category, seconds of one turn, source) of an instruction of a core."""
    inside = list(_inside(module, instruction))
    opcodes = {i.opcode for _, i in inside} | {instruction.opcode}
    moved = sum(bytes_moved(module, computation, instruction))
    if "sort" in opcodes or "gather" in opcodes or "scatter" in opcodes:
        pairs = inside or [(computation, instruction)]
        rows = [_roofline(c, i, kind) for c, i in pairs if i.opcode in ("sort", "gather", "scatter")]
        category = next(c for c in ("sort", "scatter", "gather") if c in opcodes)
        if instruction.cycles is None:
            return category, max(sum(rows), moved / kind.bandwidth if category == "sort" else 0.0), "roofline"
    elif "convolution" in opcodes or "dot" in opcodes:
        category = "matrix products"
    elif opcodes <= {*SEEN_THROUGH, *_FREE, "fusion", "copy-start", "slice-start", "slice", "dynamic-slice"}:
        category = "copies"
    else:
        category = "elementwise"
    by_bytes = moved / kind.bandwidth
    if instruction.cycles is None or (category in ("copies", "elementwise") and not assumed.cycles):
        return category, by_bytes, "bytes"
    by_cycles = instruction.cycles / kind.clock
    return category, max(by_cycles, by_bytes), "compiler" if by_cycles >= by_bytes else "bytes"


def _kernel_seconds(
    computation: Computation, instruction: Instruction, kind: Kind, assumed: Assumed
) -> tuple[str, float, str]:
    """(category, seconds of one turn, source) of a Pallas kernel."""
    operands = [a for o in instruction.operands for a in computation.by_name[o].arrays]
    moved = sum(a.hbm_bytes for a in (*operands, *instruction.arrays)) / kind.bandwidth
    moved *= COPY_SLOWDOWN if assumed.cycles else 1
    heads = [a for a in operands if len(a.shape) == 4 and a.dtype == "bf16"]
    block = re.search(r"block_q(?:_dkv)?\W+(\d+)", instruction.attributes)
    if "splash" not in instruction.name or not heads or block is None:
        return "kernel", moved, "roofline"
    rows, number, sequence, width = heads[0].shape
    blocks = max(1, sequence // int(block.group(1)))
    products = 5 if "dkv" in instruction.name else 2
    flops = products * 2 * rows * number * sequence**2 * max(width, 128) * (blocks + 1) / (2 * blocks)
    return "attention kernel", max(moved, flops / (assumed.kernel_share * kind.peak)), "roofline"


def _inside(module: Module, instruction: Instruction):
    """(computation, instruction) of everything that an instruction calls, to any depth."""
    name = instruction.called() or (instruction.called("to_apply") if instruction.opcode == "call-start" else None)
    for inner in module.computations[name].instructions if name in module.computations else ():
        yield module.computations[name], inner
        yield from _inside(module, inner)


def _roofline(computation: Computation, instruction: Instruction, kind: Kind) -> float:
    """Seconds of a sort, gather or scatter by the models at the top of this module."""
    operands = [computation.by_name[o].arrays[0] for o in instruction.operands if o in computation.by_name]
    match instruction.opcode:
        case "sort":
            along = int(re.search(r"dimensions=\{(\d+)\}", instruction.attributes).group(1))
            return sort_cycles(operands[0].shape, along, len(instruction.arrays)) / kind.clock
        case "gather":
            sizes = re.search(r"slice_sizes=\{([\d,]*)\}", instruction.attributes).group(1)
            row = math.prod(int(n) for n in sizes.split(",") if n)
            return _rows_seconds(instruction.arrays[0].elements // row, row, [operands[0], instruction.arrays[0]], kind)
        case _:
            updates = operands[len(operands) // 2 + 1]
            window = re.search(r"update_window_dims=\{([\d,]*)\}", instruction.attributes).group(1)
            row = math.prod(updates.shape[int(n)] for n in window.split(",") if n)
            target = instruction.arrays[0]
            return _rows_seconds(updates.elements // row, row, [target, target, updates], kind)


def sort_cycles(shape: tuple[int, ...], along: int, arrays: int) -> float:
    """Cycles of a bitonic sort of arrays of a shape along an axis."""
    steps = math.ceil(math.log2(max(2, shape[along])))
    return steps * (steps + 1) / 2 * math.ceil(math.prod(shape) / REGISTER) * arrays * SORT_CYCLES


def _rows_seconds(rows: int, elements: int, touched: list[Array], kind: Kind) -> float:
    """Seconds to move rows of so many elements; `touched` says of each array that a row is read from or written to."""
    pieces = math.ceil(elements / 128)
    bandwidth = sum(rows * pieces * PIECE for array in touched if array.in_hbm) / kind.bandwidth
    return max(rows * max(ROW_CYCLES, pieces) / kind.clock, bandwidth)
