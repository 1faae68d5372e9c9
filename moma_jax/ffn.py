"""The FFN notation of the paper, `dense`, `8x`, `4t4i`, `4t4i+1x`, `mod+4t4i`, read into groups of experts.

And what enters a layer of mixture of depths, in numbers, from the `model` section of a config.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from moma_jax.errors import InputError

DEPTH = "mod+"
"""Before the notation of an FFN: mixture of depths in front of it."""


@dataclass(frozen=True)
class ExpertGroup:
    """Experts that share a router: the modalities they serve (indices) and how many they are.

    A single expert takes everything and has no router, unless it is `gated`: the body of a layer under mixture of
    depths, which a router lets some tokens enter.
    """

    name: str
    modalities: tuple[int, ...]
    experts: int
    gated: bool = False

    @property
    def routed(self) -> bool:
        """Whether a router decides who enters."""
        return self.experts > 1 or self.gated

    def capacity(self, capacity: float | None) -> Fraction:
        """Share of eligible tokens that each expert takes, exact (paper: c_e = 1/|E|)."""
        if self.experts == 1:
            return Fraction(1)
        return Fraction(1, self.experts) if capacity is None else Fraction(capacity).limit_denominator(10000)


@dataclass(frozen=True)
class FfnLayout:
    """What an FFN layer is made of: groups of routed experts and always-on shared experts.

    `dense` is one group of one expert that serves every modality. A group of one expert has no router and gate 1.
    With `depth` every second layer is entered by some tokens only (mixture of depths, paper section 2.3).
    """

    groups: tuple[ExpertGroup, ...]
    shared: int = 0
    depth: bool = False

    @property
    def dense(self) -> bool:
        """True where every token simply passes one expert."""
        return len(self.groups) == 1 and self.groups[0].experts == 1


def parse_ffn(notation: str, modalities) -> FfnLayout:
    """Reads `dense`, `8x`, `4t4i`, `4t4i+1x`, `mod+4t4i`, ...; raises InputError naming what is wrong."""
    everything = tuple(range(len(modalities)))
    ffn = notation.removeprefix(DEPTH)
    routed, _, shared_text = ffn.partition("+")
    shared = re.fullmatch(r"([1-9]\d*)x", shared_text) if shared_text else None
    mixed = re.fullmatch(r"([1-9]\d*)x", routed)
    counts = re.findall(r"(\d+)([a-z])", routed)
    if routed == "dense":
        groups = (ExpertGroup("all", everything, 1),)
    elif mixed:
        groups = (ExpertGroup("all", everything, int(mixed[1])),)
    elif counts and "".join(n + letter for n, letter in counts) == routed:
        groups = _modality_groups(notation, counts, modalities)
    else:
        groups = ()
    if not groups or ("+" in ffn and not shared):
        raise InputError(f"model.ffn: {notation!r} is not an FFN; write dense, 8x, 1t1i, 4t4i, 4t4i+1x or mod+4t4i")
    return FfnLayout(groups, int(shared[1]) if shared else 0, depth=ffn != notation)


def depth_groups(by: str, modalities) -> tuple[ExpertGroup, ...]:
    """The routers of mixture of depths, each letting tokens enter one body: one for each modality, or one for all."""
    if by == "modality":
        return tuple(ExpertGroup(f"depth_{m.name}", (index,), 1, gated=True) for index, m in enumerate(modalities))
    return (ExpertGroup("depth_all", tuple(range(len(modalities))), 1, gated=True),)


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


def depth_share(model: Any) -> Fraction:
    """`model.depth_capacity`, exact."""
    return Fraction(model.depth_capacity).limit_denominator(10000)


def depth_slots(model: Any, sequence: int) -> int:
    """Tokens of a row that can enter a layer of mixture of depths: floor(share * S); more under threshold routing."""
    slots = math.floor(depth_share(model) * sequence)
    return slots if model.routing == "choice" else min(sequence, math.ceil(slots * model.routing_slack))


def depth_quotas(model: Any, quotas: tuple[int, ...], rows: int, sequence: int) -> tuple[int, ...]:
    """Hard bounds on what enters such a layer of a routing group of `rows` rows, by modality: that share of the quotas.

    Where tokens of all modalities are ranked together, or thresholds let them in, all that enter may be of one.
    """
    slots = rows * depth_slots(model, sequence)
    if model.depth_by == "modality" and model.routing == "choice":
        return tuple(min(slots, math.floor(depth_share(model) * quota)) for quota in quotas)
    return tuple(min(slots, quota) for quota in quotas)
