"""Samples of a model that is being trained: what it writes and draws after some prompts, as a picture and as values."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from moma_jax.codec.pictures import FORMATS
from moma_jax.config import Config, SampleConfig
from moma_jax.data.store import open_store
from moma_jax.errors import InputError
from moma_jax.generation.generating import causal_routing, generate
from moma_jax.generation.output import Output
from moma_jax.generation.prompts import Language, arranged, encode_prompt
from moma_jax.generation.sampling import Guidance, Sampling
from moma_jax.training.load import Loaded
from moma_jax.vocab import Vocabulary

CELL, SIDE, COLUMNS, LINE, MARGIN = 232, 208, 4, 14, 10
"""Pixels: of a cell's width and a picture's side; cells of a row; pixels of a line of text and around things."""
CHARACTERS = 36
"""Of a line of text."""
MOST_LINES = 8
"""Of one text."""


def draw_samples(loaded: Loaded, asked: SampleConfig) -> tuple[Image.Image, dict[str, Any]]:
    """The sheet of what the model makes of the prompts, and the same as plain values (pictures are in the sheet).

    Raises:
      InputError: a picture cannot be read, or the model lacks the routing.
    """
    prompts = arranged(asked.prompts, asked.images)
    routing = asked.routing or causal_routing(loaded)
    sampling = Sampling(temperature=asked.temperature)
    guided = {} if asked.guidance == 1 else {"guidance": Guidance(text=asked.guidance)}
    settings = {"mode": asked.mode, "routing": routing, "seed": asked.seed, "max_tokens": asked.max_tokens}
    outputs = generate(loaded, prompts, text=sampling, image=sampling, batch=len(prompts), **settings, **guided)
    written = [
        {"prompt": prompt, "text": output.text, "pictures": len(output.images), "stopped": output.stopped}
        for prompt, output in zip(asked.prompts, outputs, strict=True)
    ]
    cells = [_cell(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
    return _sheet(cells), {"step": loaded.step, **settings, "samples": written}


def require_drawable(config: Config, vocabulary: Vocabulary) -> None:
    """Raises InputError where a prompt of `train.samples` cannot be read: a run should not end with that news."""
    store = open_store(config.data.stores[0].path)
    language = Language(vocabulary, store.text_codec(), store.image_codec())
    for asked in config.train.samples:
        try:
            for number, prompt in enumerate(arranged(asked.prompts, asked.images)):
                encode_prompt(prompt, language, f"prompt {number}")
        except InputError as error:
            raise InputError(f"train.samples: {asked.name}: {error}") from error


def _cell(prompt: list[str | Path], output: Output) -> Image.Image:
    """One prompt, in blue, above what the model made of it."""
    parts: list[tuple[str | Image.Image, str]] = [(part, "navy") for part in map(_shown, prompt)]
    for part in output.segments:
        parts.append((part if isinstance(part, str | Image.Image) else f"<{part.modality}>", "black"))
    drawn, top = [], 0
    for part, colour in parts:
        if isinstance(part, str):
            part = "\n".join(textwrap.wrap(part, CHARACTERS, max_lines=MOST_LINES, placeholder=" ..."))
            height = LINE * (part.count("\n") + 1) if part else 0
        else:
            part = part.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
            height = SIDE
        drawn.append((part, colour, top))
        top += height + 4 if height else 0
    cell = Image.new("RGB", (CELL, max(top, LINE)), "white")
    draw = ImageDraw.Draw(cell)
    for part, colour, y in drawn:
        if isinstance(part, str):
            draw.text((0, y), part, colour, ImageFont.load_default(11), spacing=2)
        else:
            cell.paste(part, (0, y))
    return cell


def _shown(part: str | Path) -> str | Image.Image:
    return part if isinstance(part, str) else Image.open(part, formats=FORMATS)


def _sheet(cells: list[Image.Image]) -> Image.Image:
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    heights = [max(cell.height for cell in row) + MARGIN for row in rows]
    sheet = Image.new("RGB", (min(len(cells), COLUMNS) * CELL + MARGIN, sum(heights) + MARGIN), "white")
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (MARGIN + column * CELL, top))
        top += height
    return sheet
