"""Settings of `moma prepare` that contradict each other, or mean nothing where they stand, and would go unheard."""

from __future__ import annotations

import math

from moma_jax.config import IMAGE, PrepareConfig
from moma_jax.data.encode import Pictures
from moma_jax.errors import InputError
from moma_jax.vocab import Vocabulary

OF_KINDS = {
    "caption_column": ("parquet", "tar", "jsonl", "folder", "codes"),
    "image_column": ("parquet", "tar", "jsonl", "folder"),
    "image_codes_column": ("codes",),
    "images": ("parquet", "jsonl"),
    "codebook": ("codes",),
    "codes_per_image": ("codes",),
}
"""Which kinds of sources some settings are for."""
DEFAULTS = PrepareConfig()


def require_consistent(prepare: PrepareConfig) -> None:
    """Raises InputError naming two settings of which one makes the other mean nothing, or one that lets nothing in."""
    for name in ("codec", "tokenizer"):
        if prepare.vocabulary is not None and getattr(prepare, name) is not None:
            raise InputError(f"prepare.{name}: the store of prepare.vocabulary has its own; give one of the two")
    if prepare.image_map is not None and prepare.images is None:
        raise InputError("prepare.image_map: maps addresses to pictures of prepare.images, which is not given")
    if 0 < prepare.max_caption < prepare.min_caption:
        raise InputError(f"prepare.max_caption: {prepare.max_caption} is below min_caption, so no pair is left")
    if 0 < prepare.max_aspect < 1:
        raise InputError(
            f"prepare.max_aspect: {prepare.max_aspect:g}, but the longer side is at least 1 times the shorter; 0: any"
        )
    Pictures.of(prepare, "whole")  # the colour of its ground


def require_sizes(prepare: PrepareConfig, vocabulary: Vocabulary) -> None:
    """Raises InputError where a size was asked for that a given tokenizer, codec or vocabulary has not."""
    sizes = {m.name: (m.size, m.span) for m in vocabulary.modalities}
    text, (colours, codes) = next(iter(sizes.values()))[0], sizes.get(IMAGE.name, (None, None))
    side = None if codes is None else math.isqrt(codes)
    of_pictures = ("image_side", side, ("codec", "vocabulary")), ("colours", colours, ("codec", "vocabulary"))
    for name, found, givers in (("text_size", text, ("tokenizer", "vocabulary")), *of_pictures):
        giver = next((giver for giver in givers if getattr(prepare, giver) is not None), None)
        asked = getattr(prepare, name)
        if None not in (giver, found) and asked not in (found, getattr(DEFAULTS, name)):
            raise InputError(f"prepare.{name}: {asked}, but prepare.{giver} brings {found}; leave {name} out")


def require_heard(prepare: PrepareConfig, kind: str) -> None:
    """Raises InputError where a setting is given that means nothing for a source of this kind."""
    for name, kinds in OF_KINDS.items():
        if getattr(prepare, name) is None or kind in kinds:
            continue
        if prepare.codec is not None and name in ("codebook", "codes_per_image"):
            continue  # compared with the codec's own
        wanted = " or ".join(kinds)
        raise InputError(
            f"prepare.{name}: is for sources of kind {wanted}, not {kind} as {prepare.source}; leave it out"
        )
