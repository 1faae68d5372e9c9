"""What `moma prepare` would read, without reading it all: files, kinds, columns, splits, and the first documents."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator

from PIL import Image

from moma_jax.codec.folder import open_codec
from moma_jax.codec.pictures import FORMATS
from moma_jax.config import PrepareConfig
from moma_jax.data.documents import Broken, Document, Picture, Text, is_held_out
from moma_jax.data.sources import open_with_rest
from moma_jax.data.store import open_store
from moma_jax.data.text import load_tokenizer
from moma_jax.errors import InputError
from moma_jax.vocab import special_tokens

MOST_FILES, MOST_DOCUMENTS, MOST_CHARACTERS = 50, 5, 60
"""Files, documents, and characters of each text that are shown."""


def preview(config: PrepareConfig, modalities: tuple = ()) -> Iterator[str]:
    """Lines about the source that a config names; raises InputError where it cannot be used."""
    if config.codec is not None:
        open_codec(config.codec)
    if config.tokenizer is not None:
        load_tokenizer(config.tokenizer, special_tokens([]))
    if config.vocabulary is not None:
        modalities = modalities or tuple(open_store(config.vocabulary).vocabulary.modalities)
    opened = open_with_rest(config, modalities)
    lines = opened.source.describe()
    yield f"{config.source}: {opened.source.units():,} units of work in {config.parts} parts"
    yield from (f"  {line}" for line in lines[:MOST_FILES])
    if len(lines) > MOST_FILES:
        yield f"  and {len(lines) - MOST_FILES:,} more"
    yield from opened.notes
    items = (item for unit in range(opened.source.units()) for item in opened.source.read(unit))
    first = list(itertools.islice(items, MOST_DOCUMENTS))
    if not first:
        raise InputError(f"prepare.source: {config.source} has no documents")
    yield f"the first {MOST_DOCUMENTS} documents:"
    yield from (f"  {_line(item, config.held_out)}" for item in first)


def _line(item: Document | Broken, held_out: float) -> str:
    if isinstance(item, Broken):
        return f"{item.id}: broken, {item.reason}"
    split = "held out" if is_held_out(item, held_out) else "to train on"
    return f"{item.id} ({item.collection}, {split}): {' '.join(_segment(segment) for segment in item.segments)}"


def _segment(segment) -> str:
    weight = "" if segment.weight == 1 else f" x {segment.weight:g}"
    match segment:
        case Text(text):
            short = text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 3] + "..."
            return repr(short) + weight
        case Picture(bytes() as content):
            return f"[{_size(content)}]{weight}"
        case Picture(pixels):
            return f"[picture of {pixels.shape[1]} x {pixels.shape[0]}]{weight}"
    return f"[{len(segment.codes)} codes of {segment.modality}]{weight}"


def _size(content: bytes) -> str:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            return f"{picture.format} of {picture.width} x {picture.height}"
    except Exception:  # whatever a decoder says of a damaged file; preparing names it
        return "no readable picture"
