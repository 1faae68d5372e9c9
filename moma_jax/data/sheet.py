"""Contact sheets: documents of a store as the model sees them, and a packed batch in colours."""

from __future__ import annotations

import textwrap
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from moma_jax.batch import Batch
from moma_jax.codec import Codec
from moma_jax.data.store import KINDS, SPLITS, Store, View
from moma_jax.vocab import ModalityIds

WIDTH, MARGIN, THUMB, LINE = 1000, 12, 112, 15
"""Pixels: of a sheet, around things, of a picture's side, of a line of text."""
COLUMNS, MOST_LINES = 140, 6
"""Characters of a line of text, lines of one text that are shown."""
COLOURS = ((70, 110, 190), (220, 130, 50), (90, 160, 80), (160, 90, 170), (120, 120, 120))
"""Of modalities, in their order; documents alternate between this and a lighter shade."""


class Shown(NamedTuple):
    """One document of a sheet: its heading, then texts and pictures in their order."""

    heading: str
    pieces: list[str | Image.Image]


def shown_documents(store: Store, count: int, seed: int = 0) -> list[Shown]:
    """`count` documents of all splits, drawn at random; all where there are fewer."""
    views = [(split, store.view("all", split)) for split in SPLITS]
    total = sum(view.documents for _, view in views)
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False, shuffle=False))
    vocabulary, text, image = store.vocabulary, store.text_codec(), store.image_codec()
    shown = []
    for split, view in views:
        here, chosen = chosen[chosen < view.documents], chosen[chosen >= view.documents] - view.documents
        shown += [_shown(split, view, int(number), vocabulary, text, image) for number in here]
    return shown


def _shown(split: str, view: View, number: int, vocabulary, text, image) -> Shown:
    index = view.index(number, number + 1)
    (token_N,) = view.read([number], [0], [int(index.length_N[0])])
    spans = list(zip(index.span_modality_K.tolist(), index.span_length_K.tolist(), strict=True))
    names = [m.name for m in vocabulary.modalities]
    counts = np.bincount(index.span_modality_K, index.span_length_K, len(names)).astype(int)
    tokens = ", ".join(f"{count:,} {name}" for name, count in zip(names, counts, strict=True) if count)
    heading = f"{split} {number:,}  {KINDS[int(index.kind_N[0])]}  {tokens}  {len(spans)} spans"
    tokens_of = np.split(token_N, np.cumsum([length for _, length in spans])[:-1])
    pieces = [
        text.decode(own_N.tolist()) if modality == 0 else _codes(own_N, vocabulary.modalities[modality], image)
        for (modality, _), own_N in zip(spans, tokens_of, strict=True)
    ]
    codes = [piece for piece in pieces if isinstance(piece, np.ndarray)]
    pictures = iter(image.decode(np.stack(codes)) if codes else ())
    drawn = [next(pictures) if isinstance(piece, np.ndarray) else piece for piece in pieces]
    return Shown(heading, [piece for piece in drawn if piece])


def _codes(token_N: np.ndarray, own: ModalityIds, image: Codec | None) -> np.ndarray | str:
    """A span's codes, to be drawn; their number where they cannot be."""
    if own.name != "image" or image is None or not image.draws or len(token_N) != image.codes_per_image:
        return f"<{len(token_N)} codes of {own.name}>"
    order_V = np.argsort(own.code_ids)
    return order_V[np.searchsorted(own.code_ids, token_N, sorter=order_V)]


def document_sheet(title: str, documents: list[Shown]) -> Image.Image:
    """The documents below each other: heading, texts, pictures side by side."""
    heading = Image.new("RGB", (WIDTH, MARGIN + LINE), "white")
    ImageDraw.Draw(heading).text((MARGIN, MARGIN), title, "black", _font())
    return below_each_other([heading, *map(_block, documents)], MARGIN)


def _block(document: Shown) -> Image.Image:
    """One document."""
    drawn, left, top, row = [], MARGIN, LINE + 4, 0
    for piece in document.pieces:
        if isinstance(piece, str):
            top, left, row = top + row, MARGIN, 0
            lines = textwrap.wrap(" ".join(piece.split()), COLUMNS) or [""]
            more = len(lines) - MOST_LINES
            lines = [*lines[:MOST_LINES], f"({more} more lines)"] if more > 0 else lines
            drawn.append(("\n".join(lines), MARGIN, top))
            top += LINE * len(lines) + 2
            continue
        if left + THUMB > WIDTH - MARGIN:
            top, left, row = top + row, MARGIN, 0
        drawn.append((piece.resize((THUMB, THUMB), Image.Resampling.NEAREST), left, top))
        left, row = left + THUMB + 4, THUMB + 4
    block = Image.new("RGB", (WIDTH, top + row), "white")
    draw = ImageDraw.Draw(block)
    draw.rectangle((0, 0, WIDTH, LINE + 1), (235, 238, 245))
    draw.text((MARGIN, 1), document.heading, (60, 60, 60), _font())
    for piece, x, y in drawn:
        draw.text((x, y), piece, "black", _font()) if isinstance(piece, str) else block.paste(piece, (x, y))
    return block


def batch_sheet(title: str, batch: Batch, names: list[str], group_rows: int) -> Image.Image:
    """Packed rows as bands: a colour for each modality, documents in turns lighter, padding white; a line between
    routing groups."""
    pixels_BS3 = _colours(np.asarray(batch.segment_BS), np.asarray(batch.modality_BS))
    rows, sequence = pixels_BS3.shape[:2]
    width, thickness = WIDTH - 2 * MARGIN, max(4, min(16, 640 // rows))
    bands = Image.fromarray(pixels_BS3).resize((width, rows * thickness), Image.Resampling.NEAREST)
    top = 3 * MARGIN + 2 * LINE
    sheet = Image.new("RGB", (WIDTH, top + bands.height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    filled = float((np.asarray(batch.segment_BS) > 0).mean())
    draw.text((MARGIN, MARGIN), f"{title}: {rows} rows of {sequence:,}, {filled:.1%} filled", "black", _font())
    left = MARGIN
    for name, colour in zip(names, COLOURS, strict=False):
        draw.rectangle((left, 2 * MARGIN + LINE, left + 12, 2 * MARGIN + LINE + 12), colour)
        draw.text((left + 18, 2 * MARGIN + LINE), name, "black", _font())
        left += 40 + 8 * len(name)
    sheet.paste(bands, (MARGIN, top))
    for row in range(0, rows + 1, group_rows):
        y = top + row * thickness
        draw.line((MARGIN, y, WIDTH - MARGIN, y), "black")
    return sheet


def _colours(segment_BS: np.ndarray, modality_BS: np.ndarray) -> np.ndarray:
    """uint8 (B, S, 3)."""
    full_M3 = np.array(COLOURS)
    light_M3 = (full_M3 + 2 * 255) // 3
    modality_BS = np.minimum(modality_BS.astype(int), len(COLOURS) - 1)
    chosen_BS3 = np.where((segment_BS % 2)[..., None] == 1, full_M3[modality_BS], light_M3[modality_BS])
    return np.where((segment_BS > 0)[..., None], chosen_BS3, 255).astype(np.uint8)


def below_each_other(sheets: list[Image.Image], gap: int = 0) -> Image.Image:
    """One picture of several, each with so many pixels of white below it."""
    whole = Image.new("RGB", (WIDTH, sum(sheet.height + gap for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height + gap
    return whole


def _font() -> ImageFont.ImageFont:
    return ImageFont.load_default(12)
