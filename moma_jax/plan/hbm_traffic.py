"""Bytes that an instruction of a compiled program moves from and to HBM, padding of tiles included."""

from __future__ import annotations

import re

from moma_jax.plan.hlo import Array, Computation, Instruction, Module

_SLICING = {"dynamic-slice", "slice", "gather"}
SEEN_THROUGH = {"bitcast", "copy", "convert", "reshape", "transpose"}
"""What shows the same elements in another way."""


def bytes_moved(module: Module, computation: Computation, instruction: Instruction) -> tuple[int, int]:
    """Bytes (from HBM, to HBM) of an instruction.

    What is sliced counts by the slice, what is updated in place by the update, and what is handed through not at all.
    """
    operands = [computation.by_name[o] for o in instruction.operands if o in computation.by_name]
    first = operands[0].arrays[0] if operands and operands[0].arrays else None
    body = module.computations.get(instruction.called() or "") if instruction.opcode == "fusion" else None
    match instruction.opcode:
        case "dynamic-slice" | "slice":
            read, written = instruction.arrays[0].padded_bytes if first.in_hbm else 0, instruction.arrays
        case "slice-start":
            read, written = instruction.arrays[1].padded_bytes if first.in_hbm else 0, instruction.arrays[1:2]
        case "copy-start":
            read, written = first.hbm_bytes, instruction.arrays[1:2]
        case "dynamic-update-slice":
            read, written = operands[1].arrays[0].hbm_bytes, operands[1].arrays[:1]
        case "custom-call":  # buffers set apart, arrays seen as another
            read, written = 0, ()
        case "fusion" if body is not None:
            handed = {int(n) for n in re.findall(r"\((\d+), \{[\d,]*\}\)", _aliased(instruction))}
            pairs = enumerate(zip(body.parameters, operands, strict=True))
            read = sum(_read(module, body, p, o) for n, (p, o) in pairs if n not in handed)
            return read, _written(module, body, instruction)
        case _:
            read, written = sum(a.hbm_bytes for o in operands for a in o.arrays), instruction.arrays
    return read, sum(a.hbm_bytes for a in written)


def _aliased(instruction: Instruction) -> str:
    found = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", instruction.attributes)
    return found.group(1) if found else ""


def _read(module: Module, body: Computation, parameter: Instruction, operand: Instruction) -> int:
    """HBM bytes that a fusion reads of an operand."""
    whole = sum(a.hbm_bytes for a in operand.arrays)
    touched = _touched(module, body, parameter.name) if whole else 0
    return whole if touched is None else min(whole, touched)


def _touched(module: Module, body: Computation, name: str) -> int | None:
    """Bytes of the slices that are all that is read of a value; None where more of it is."""
    total = 0
    for user in body.users[name]:
        own = [n for n, operand in enumerate(user.operands) if operand == name]
        inner = module.computations.get(user.called() or "") if user.opcode == "fusion" else None
        if user.opcode in _SLICING and own == [0]:
            part = sum(a.padded_bytes for a in user.arrays)
        elif user.opcode == "dynamic-update-slice" and own == [0]:
            part = 0
        elif user.opcode in SEEN_THROUGH or (inner is not None and len(own) == 1 and _is_plain(inner)):
            part = _touched(module, body, user.name) if user.name != body.root else None
        elif inner is not None and len(own) == 1:
            part = _touched(module, inner, inner.parameters[own[0]].name)
        else:
            part = None
        if part is None:
            return None
        total += part
    return total


def _is_plain(body: Computation) -> bool:
    """Whether a fusion only looks at its one operand in another way."""
    return {i.opcode for i in body.instructions} <= {*SEEN_THROUGH, "parameter"} and len(body.parameters) == 1


def _written(module: Module, body: Computation, instruction: Instruction) -> int:
    """HBM bytes that a fusion writes."""
    root = body.by_name[body.root]
    outputs = [body.by_name[o] for o in root.operands] if root.opcode == "tuple" else [root]
    handed = {int(n) for n in re.findall(r"\{(\d+)\}: \(", _aliased(instruction))}
    if "{}: (" in _aliased(instruction):
        return 0
    if len(outputs) != len(instruction.arrays):  # an output that is itself a tuple
        return sum(a.hbm_bytes for a in instruction.arrays)
    pairs = enumerate(zip(outputs, instruction.arrays, strict=True))
    return sum(_updated(module, body, output, array) for n, (output, array) in pairs if n not in handed)


def _updated(module: Module, body: Computation, output: Instruction, array: Array) -> int:
    """HBM bytes of one output: those of the update where it is an array changed in place."""
    while output.opcode in SEEN_THROUGH and output.operands[0] in body.by_name:
        output = body.by_name[output.operands[0]]
    if not array.in_hbm or output.opcode == "parameter":
        return 0
    if output.opcode == "dynamic-update-slice":
        return body.by_name[output.operands[1]].arrays[0].padded_bytes
    inner = module.computations.get(output.called() or "") if output.opcode == "fusion" else None
    if inner is not None and len(output.arrays) == 1:
        return min(array.padded_bytes, _updated(module, inner, inner.by_name[inner.root], array))
    return array.padded_bytes
