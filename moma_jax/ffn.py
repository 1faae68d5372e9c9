"""The FFN notation of the paper, `dense`, `8x`, `4t4i`, `4t4i+1x`, `mod+4t4i`, read into groups of experts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moma_jax.errors import InputError

DEPTH = "mod+"
"""Before the notation of an FFN: mixture of depths in front of it."""
SHARED = "shared"
"""How the names of groups of shared experts begin."""


@dataclass(frozen=True)
class ExpertGroup:
    """Experts that share a router: the modalities they serve (indices) and how many they are.

    A single expert takes everything and has no router, unless it is `gated`: the body of a layer under mixture of
    depths, which a router lets some tokens enter. `shared` ones stand beside the routed experts, always on; N of them
    are one expert of `width` = N times the hidden size.
    """

    name: str
    modalities: tuple[int, ...]
    experts: int
    gated: bool = False
    shared: bool = False
    width: int = 1

    @property
    def routed(self) -> bool:
        """Whether a router decides who enters."""
        return self.experts > 1 or self.gated


@dataclass(frozen=True)
class FfnLayout:
    """What an FFN layer is made of: groups of experts, and always-on shared ones beside them.

    `dense` is one group of one expert that serves every modality. A group of one expert has no router and gate 1.
    With `depth` every second layer is entered by some tokens only (mixture of depths, paper section 2.3).
    """

    groups: tuple[ExpertGroup, ...]
    shared: tuple[ExpertGroup, ...] = ()
    depth: bool = False

    @property
    def dense(self) -> bool:
        """True where every token simply passes one expert."""
        return len(self.groups) == 1 and self.groups[0].experts == 1


def parse_ffn(notation: str, modalities) -> FfnLayout:
    """Reads `dense`, `8x`, `4t4i`, `4t4i+1x`, `4t4i+1t1i`, `mod+4t4i`, ...; raises InputError naming what is wrong."""
    ffn = notation.removeprefix(DEPTH)
    routed, plus, shared = ffn.partition("+")
    everything = tuple(range(len(modalities)))
    groups = (ExpertGroup("all", everything, 1),) if routed == "dense" else _groups(notation, routed, modalities)
    beside = _groups(notation, shared, modalities) if plus else ()
    if not groups or (plus and not beside):
        raise InputError(
            f"model.ffn: {notation!r} is not an FFN; write dense, 8x, 1t1i, 4t4i, 4t4i+1x, 4t4i+1t1i or mod+4t4i"
        )
    return FfnLayout(groups, tuple(map(_always_on, beside)), depth=ffn != notation)


def _groups(notation: str, part: str, modalities) -> tuple[ExpertGroup, ...]:
    """The groups of `8x` or `4t4i`; () where it is neither."""
    mixed, counts = re.fullmatch(r"([1-9]\d*)x", part), re.findall(r"(\d+)([a-z])", part)
    if mixed:
        return (ExpertGroup("all", tuple(range(len(modalities))), int(mixed[1])),)
    if not counts or "".join(n + letter for n, letter in counts) != part:
        return ()
    return _modality_groups(notation, counts, modalities)


def _always_on(group: ExpertGroup) -> ExpertGroup:
    """The shared expert that stands for a group of the notation."""
    name = SHARED if group.name == "all" else f"{SHARED}_{group.name}"
    return ExpertGroup(name, group.modalities, 1, shared=True, width=group.experts)


def depth_groups(by: str, modalities) -> tuple[ExpertGroup, ...]:
    """The routers of mixture of depths, each letting tokens enter one body: one for each modality, or one for all."""
    if by == "modality":
        return tuple(ExpertGroup(f"depth_{m.name}", (index,), 1, gated=True) for index, m in enumerate(modalities))
    return (ExpertGroup("depth_all", tuple(range(len(modalities))), 1, gated=True),)


def projection_groups(weights: str, modalities) -> tuple[ExpertGroup, ...]:
    """Who has attention weights of its own (`model.attention_weights`): each modality, or () where all share them."""
    if weights == "shared":
        return ()
    return tuple(ExpertGroup(m.name, (index,), 1) for index, m in enumerate(modalities))


def _modality_groups(notation, counts, modalities) -> tuple[ExpertGroup, ...]:
    letters = {m.letter: index for index, m in enumerate(modalities)}
    by_letter = {letter: int(n) for n, letter in counts}
    unknown = set(by_letter) - set(letters)
    if unknown:
        raise InputError(
            f"model.ffn: {notation!r} has experts of modality {min(unknown)!r}, which has no quota: add it to "
            f"data.modalities or use the letters {', '.join(letters)}"
        )
    missing = [m.letter for m in modalities if not by_letter.get(m.letter)]
    if missing or len(counts) != len(by_letter):
        raise InputError(f"model.ffn: {notation!r} must name each of {', '.join(letters)} once, at least 1 expert each")
    return tuple(ExpertGroup(m.name, (index,), by_letter[m.letter]) for index, m in enumerate(modalities))
