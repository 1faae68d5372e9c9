"""Two things that a compiled step must not do, looked for by the sizes of its arrays: axes change places, sizes stay.

Sizes may agree by chance: a vocabulary of as many ids as the experts of a group have hidden units in all, say. Then
what is allowed is not taken for what is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from moma_jax.config import Config
from moma_jax.plan import network
from moma_jax.plan.hlo import Array, Module
from moma_jax.plan.memory import row_parts, splits_experts

_FLOATS = ("bf16", "f32", "f16")


def expert_stacks_gathered(module: Module, config: Config) -> list[str]:
    """Collectives over the mesh axis "expert" that move the weights of experts which live apart; none should.

    Of all kinds but all-to-all, which moves tokens, those with an operand or a result at least as large as the part of
    a stack of experts (E x D x F, split over fsdp and tensor; for one hop of a collective-permute over expert, too)
    and not of the size of a weight that is stored in parts along the axis, or of such a part.

    Returns:
      Such as "all-gather bf16 4x512x1408".
    """
    mesh, layout, model = config.mesh, config.experts, config.model
    split = [g.experts for g in layout.groups if g.experts > 1 and splits_experts(g, mesh.expert)]
    if mesh.expert == 1 or not split:
        return []
    matrix = model.width * model.hidden // mesh.tensor
    others = {g.experts for g in layout.groups if not splits_experts(g, mesh.expert)}
    others |= {1} | {g.width for g in layout.shared} if layout.shared else set()
    whole = {model.width * size // mesh.tensor for size in (model.width, config.vocabulary_size)}
    whole |= {matrix * number for number in others} - {matrix * number for number in split}
    stored = {size // n for size in whole for n in (1, mesh.fsdp, mesh.expert, mesh.fsdp * mesh.expert)}
    least = min(split) * matrix // mesh.fsdp
    found = {}
    for kind, arrays in _crossing(module, vars(mesh), "expert"):
        bound = least // (mesh.expert if kind == "collective-permute" else 1)
        for array in arrays:
            if array.dtype in _FLOATS and array.elements >= bound and array.elements not in stored:
                found[f"{kind} {array.dtype} {'x'.join(map(str, array.shape))}"] = None
    return list(found)


def _crossing(module: Module, axes: Mapping[str, int], axis: str):
    """(kind, operands and results) of every collective but all-to-all whose groups cross a mesh axis."""
    devices = math.prod(axes.values())
    for computation in module.computations.values():
        for instruction in computation.instructions:
            kind, phase = network.kind_and_phase(instruction.opcode)
            if kind is None or phase == "done" or kind.endswith("all-to-all"):
                continue
            crossed, _ = network.crossed(network.device_groups(instruction.attributes, devices), axes)
            if axis in crossed:
                operands = [computation.by_name[o] for o in instruction.operands if o in computation.by_name]
                yield kind, [a for i in (instruction, *operands) for a in i.arrays]


def replicated_logits(module: Module, config: Config) -> bool:
    """Whether a device holds logits of more than a chunk of its own tokens and its own part of the vocabulary."""
    tokens = config.batch_tokens // config.train.accumulate
    own = tokens // row_parts(config)
    chunk, ids = min(config.train.loss_chunk, own), config.vocabulary_size
    part = ids // config.mesh.tensor
    too_many = {rows * columns for rows in (chunk, own, tokens) for columns in (part, ids)} - {chunk * part}
    arrays = {a for c in module.computations.values() for i in c.instructions for a in i.arrays}
    return any(array.elements in too_many and _may_be_logits(array, config) for array in arrays)


def _may_be_logits(array: Array, config: Config) -> bool:
    """Activations are D wide or have axes for heads, layers or experts; logits are (rows,) tokens and ids."""
    return array.dtype in _FLOATS and len(array.shape) <= 3 and config.model.width not in array.shape
