"""The FFN notation of the paper, `dense`, `8x`, `4t4i`, `4t4i+1x`, read into groups of experts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from moma_jax.errors import InputError


@dataclass(frozen=True)
class ExpertGroup:
    """Experts that share a router: the modalities they serve (indices) and how many they are."""

    name: str
    modalities: tuple[int, ...]
    experts: int

    def capacity(self, capacity: float | None) -> Fraction:
        """Share of eligible tokens that each expert takes, exact (paper: c_e = 1/|E|)."""
        if self.experts == 1:
            return Fraction(1)
        return Fraction(1, self.experts) if capacity is None else Fraction(capacity).limit_denominator(10000)


@dataclass(frozen=True)
class FfnLayout:
    """What an FFN layer is made of: groups of routed experts and always-on shared experts.

    `dense` is one group of one expert that serves every modality. A group of one expert has no router and gate 1.
    """

    groups: tuple[ExpertGroup, ...]
    shared: int = 0

    @property
    def dense(self) -> bool:
        """True where every token simply passes one expert."""
        return len(self.groups) == 1 and self.groups[0].experts == 1


def parse_ffn(notation: str, modalities) -> FfnLayout:
    """Reads `dense`, `8x`, `4t4i`, `4t4i+1x`, ...; raises InputError naming what is wrong."""
    everything = tuple(range(len(modalities)))
    routed, _, shared_text = notation.partition("+")
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
    if not groups or ("+" in notation and not shared):
        raise InputError(f"model.ffn: {notation!r} is not an FFN; write dense, 8x, 1t1i, 4t4i or 4t4i+1x")
    return FfnLayout(groups, int(shared[1]) if shared else 0)


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
