"""The text of a compiled TPU program, read: computations, their instructions in the order they run, arrays, loops.

Nothing here knows what an instruction costs (`estimate`) or what devices are (`network`). No JAX.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "f8e4m3fn": 8, "f8e5m2": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")


class Array(NamedTuple):
    """A type: dtype, shape, layout (axes from the fastest), rows and columns of a tile, whether it lies in HBM."""

    dtype: str
    shape: tuple[int, ...]
    layout: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    in_hbm: bool = True

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> float:
        """Bytes of an element."""
        bits = _BITS.get(self.dtype)
        return (int(re.sub(r"\D.*", "", self.dtype.lstrip("bfsu")) or 32) if bits is None else bits) / 8

    @property
    def nbytes(self) -> int:
        """Bytes, without the padding of tiles."""
        return int(self.elements * self.itemsize)

    @property
    def padded_bytes(self) -> int:
        """Bytes of memory that it takes: the fastest axes are rounded up to whole tiles."""
        sizes = list(self.shape)
        for axis, multiple in zip(self.layout, reversed(self.tile), strict=False):
            sizes[axis] = -(-sizes[axis] // multiple) * multiple
        return int(math.prod(sizes) * self.itemsize)

    @property
    def hbm_bytes(self) -> int:
        """Bytes that come from or go to HBM, padding included; 0 where it lies in a core's own memory."""
        return self.padded_bytes if self.in_hbm else 0


class Instruction(NamedTuple):
    """One line.

    Attributes:
      name, opcode: as written. arrays: its results, a tuple's flattened. operands: names.
      inside: text between the parentheses (a constant's value). attributes: what follows them.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str

    def called(self, attribute: str = "calls") -> str | None:
        """Name of the computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found and found.group(1)

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced program."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found.group(1)) if found else None


@dataclass
class Computation:
    """Instructions in the order in which they run, the root last in meaning if not in place."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    root: str = ""

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read a name."""
        found = defaultdict(list)
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """By number."""
        return sorted((i for i in self.instructions if i.opcode == "parameter"), key=lambda i: int(i.inside))


@dataclass
class Module:
    """A program: its computations by name, and the one that runs first."""

    computations: dict[str, Computation]
    entry: str

    def loops(self) -> list[tuple[Computation, Instruction]]:
        """Every while instruction and the computation that it stands in."""
        return [(c, i) for c in self.computations.values() for i in c.instructions if i.opcode == "while"]

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a while instruction of `computation` runs its body; None where the text does not say."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known.group(1))
        condition = self.computations[loop.called("condition")]
        test = condition.by_name[condition.root]
        if test.opcode == "fusion":  # the comparison alone, in a computation of its own
            inner = self.computations[test.called()]
            arguments, test = test.operands, inner.by_name[inner.root]
            numbers = {p.name: arguments[int(p.inside)] for p in inner.parameters}
            sides = [inner.by_name[o] if o not in numbers else condition.by_name[numbers[o]] for o in test.operands]
        else:
            sides = [condition.by_name[o] for o in test.operands]
        direction = re.search(r"direction=(\w+)", test.attributes)
        if test.opcode != "compare" or direction is None or direction.group(1) not in ("LT", "LE"):
            return None
        if sides[0].opcode != "get-tuple-element":
            return None
        start, step = self._carried(computation, loop, sides[0]), self._step(loop, sides[0])
        limit = _integer(sides[1])
        if limit is None and sides[1].opcode == "get-tuple-element":
            limit = self._carried(computation, loop, sides[1])
        if start is None or limit is None or step is None or step < 1:
            return None
        return max(0, -(-(limit - start + (direction.group(1) == "LE")) // step))

    def _step(self, loop: Instruction, element: Instruction) -> int | None:
        """The constant that every turn adds to a place of the loop's tuple; None where it does something else."""
        body, place = self.computations[loop.called("body")], _place(element)
        leaving = body.by_name[body.root]
        if leaving.opcode != "tuple" or place is None:
            return None
        added = _source(body, leaving.operands[place])
        if added is None or added.opcode != "add":
            return None
        sources = [_source(body, operand) for operand in added.operands]
        counter = [s for s in sources if s is not None and s.opcode == "get-tuple-element" and _place(s) == place]
        return next((n for n in map(_integer, sources) if n is not None), None) if counter else None

    def _carried(self, computation: Computation, loop: Instruction, element: Instruction) -> int | None:
        """The constant that enters the loop at a place of its tuple; None where it is none."""
        entering = computation.by_name.get(loop.operands[0])
        place = _place(element)
        if entering is None or entering.opcode != "tuple" or place is None:
            return None
        return _integer(_source(computation, entering.operands[place]))


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
      ValueError: there is no entry.
    """
    computations, entry, lines = {}, None, []
    for line in text.splitlines():
        header = _HEADER.match(line) if line and not line[0].isspace() else None
        if header:
            current = computations[header.group(2)] = Computation(header.group(2))
            entry, lines = header.group(2) if header.group(1) else entry, []
        elif line == "}" and lines:
            for is_root, instruction in map(_instruction, lines):
                current.instructions.append(instruction)
                current.root = instruction.name if is_root else current.root
            lines = []
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:  # what a kernel says of itself has lines of its own
            lines[-1] += line
    if entry is None:
        raise ValueError("no ENTRY computation in the text of the compiled program")
    return Module(computations, entry)


def _instruction(line: str) -> tuple[bool, Instruction]:
    root, name, rest = _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line)).groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    written, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return bool(root), Instruction(
        name, rest[:opening], arrays(written), tuple(_NAME.findall(inside)), inside.strip(), rest[closing + 1 :]
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens at `opening` closes."""
    depth = 0
    for match in re.finditer(r"[()]", text[opening:]):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return opening + match.start()
    raise ValueError(f"unbalanced: {text[:120]}")


def arrays(text: str) -> tuple[Array, ...]:
    """The array types in a piece of text: `(f32[2,8]{1,0:T(8,128)S(1)}, s32[])` gives two."""
    return tuple(_array(*found) for found in _ARRAY.findall(text))


@functools.lru_cache(maxsize=8192)
def _array(dtype: str, sizes: str, layout: str) -> Array:
    axes, _, memory = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", memory)
    return Array(
        dtype,
        tuple(int(s.lstrip("<=")) for s in sizes.split(",") if s),
        tuple(int(a) for a in axes.split(",") if a.isdigit()),
        tuple(map(int, tile.group(1).split(","))) if tile else (),
        "S(" not in memory,
    )


_SAME = ("copy", "copy-done", "bitcast", "convert", "reshape", "copy-start")


def _source(computation: Computation, name: str) -> Instruction | None:
    """The instruction whose value a name has, seen through copies."""
    instruction = computation.by_name.get(name)
    while instruction is not None and instruction.opcode in _SAME:
        instruction = computation.by_name.get(instruction.operands[0])
    return instruction


def _place(element: Instruction) -> int | None:
    """Which part of a tuple a get-tuple-element is."""
    found = re.search(r"index=(\d+)", element.attributes)
    return int(found.group(1)) if found else None


def _integer(instruction: Instruction | None) -> int | None:
    """The value of an integer constant."""
    if instruction is None or instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.inside):
        return None
    return int(instruction.inside)
