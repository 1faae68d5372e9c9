"""Pictures of held-out captions and captions of held-out pictures by a run of configs/corpus_vq.py: figures and sheets.

Command: python docs/results/corpus_vq.py RUN --out docs/results

Two sheets, of 32 held-out pairs each: corpus_vq_drawn.png (caption; the true picture, its reconstruction from the true
codes, the drawn one) and corpus_vq_written.png (a picture, its true caption, the written one). And a figure: how often
the true caption of a held-out picture is the one, of 8, under which the picture's codes are the likeliest.
"""

from __future__ import annotations

import argparse
import io
import json
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from pictures import codes_of, held_out_rows
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import binomtest

import moma_jax
from moma_jax.config import Config
from moma_jax.data.store import open_store
from moma_jax.evaluation.scoring import Scorer
from moma_jax.generation import Guidance, Sampling

SHOWN, CHOICES, ROUTING = 32, 8, "causal"
SIDE, LINE, GAP = 128, 12, 6
"""Pixels: of a picture, of a line of text, between things."""


class Pairs:
    """Held-out pairs of a run, of one order: "text-first" or "image-first"."""

    def __init__(self, config: Config, kind: str, count: int | None, seed: int):
        """Draws `count` pairs; None: all."""
        found = held_out_rows(config, kind, count, seed)
        code_of = [codes_of(store, row) for store, row in found]
        self.rows = [row for _, row in found]
        self.is_code = [code_N >= 0 for code_N in code_of]
        self.captions = [store.text_codec().decode(row[code_N < 0])
                         for (store, row), code_N in zip(found, code_of, strict=True)]  # fmt: skip
        self.codes = np.stack([code_N[code_N >= 0] for code_N in code_of])


def ranked_first(model, pairs: Pairs, seed: int) -> tuple[int, int]:
    """(pictures whose own caption makes their codes likelier than each of 7 other captions does, pictures)."""
    random, scorer = np.random.default_rng(seed), Scorer(model, ROUTING, batch_rows=16)
    right = 0
    for number, (row, is_code) in enumerate(zip(pairs.rows, pairs.is_code, strict=True)):
        differ = [i for i, caption in enumerate(pairs.captions) if caption != pairs.captions[number]]
        candidates = [number, *random.choice(differ, CHOICES - 1, replace=False).tolist()]
        documents = []
        for candidate in candidates:  # another's caption, this picture
            begin = int(np.argmax(pairs.is_code[candidate]))
            documents.append(np.concatenate([pairs.rows[candidate][:begin], row[int(np.argmax(is_code)) :]]))
        nats = []
        for document, scored in zip(documents, scorer(documents), strict=True):
            first = len(document) - len(row) + int(np.argmax(is_code))
            nats.append(float(scored.nats_N[first - 1 : first - 1 + int(is_code.sum())].sum()))
        right += int(np.argmin(nats) == 0)
    return right, len(pairs.rows)


def true_pictures(source: str) -> dict[str, list[np.ndarray]]:
    """The pictures of the validation files, by caption."""
    found: dict[str, list[np.ndarray]] = {}
    for file in sorted(Path(source).glob("validation-*.parquet")):
        for row in pq.read_table(file, columns=["caption", "image"]).to_pylist():
            pixels = np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB"))
            found.setdefault(row["caption"].strip(), []).append(pixels)
    return found


def nearest_truth(truth: dict[str, list[np.ndarray]], caption: str, reconstruction: Image.Image) -> np.ndarray:
    """Of the pictures of a caption (rarely more than one) the one that was reconstructed."""
    own = np.asarray(reconstruction, np.float64)
    return min(truth[caption.strip()], key=lambda pixels: float(np.square(pixels - own).mean()))


def sheet(cells: list[tuple[list[Image.Image], list[str]]], columns: int) -> Image.Image:
    """Cells of pictures side by side, with lines of text below."""
    lines = max(len(text) for _, text in cells)
    width = max(len(pictures) for pictures, _ in cells) * (SIDE + 2) + GAP
    height = SIDE + lines * LINE + 2 * GAP
    whole = Image.new("RGB", (columns * width + GAP, -(-len(cells) // columns) * height + GAP), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(10)
    for i, (pictures, text) in enumerate(cells):
        left, top = GAP + i % columns * width, GAP + i // columns * height
        for n, picture in enumerate(pictures):
            whole.paste(picture, (left + n * (SIDE + 2), top))
            draw.rectangle((left + n * (SIDE + 2), top, left + n * (SIDE + 2) + SIDE, top + SIDE), outline=(200,) * 3)
        plain = "\n".join(text).replace("\u2014", "-")  # Pillow's own font has no dashes
        draw.text((left, top + SIDE + 2), plain, "black", font)
    return whole


def main() -> None:
    """Ranks, draws, writes, and prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="directory of a finished run of configs/corpus_vq.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of the caption while pictures are drawn")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    settings = parser.parse_args()
    begin, config, model = time.perf_counter(), moma_jax.recipe(settings.run), moma_jax.load(settings.run)
    store = open_store(config.data.stores[0].path)
    codec, truth = store.image_codec(), true_pictures(config.data.prepare.source)
    right, asked = ranked_first(model, Pairs(config, "text-first", None, settings.seed), settings.seed)
    interval = binomtest(right, asked).proportion_ci(0.95, "wilson")

    asked_for = Pairs(config, "text-first", SHOWN, settings.seed)
    drawn = model.generate(
        [[caption] for caption in asked_for.captions], mode="image", routing=ROUTING, seed=settings.seed, batch=SHOWN,
        guidance=Guidance(text=settings.guidance), image=Sampling(temperature=0.9, top_k=200),
    )  # fmt: skip
    cells = []
    for caption, own, output in zip(asked_for.captions, codec.decode(asked_for.codes), drawn, strict=True):
        true = Image.fromarray(nearest_truth(truth, caption, own))
        cells.append(([true, own, *output.images[:1]], textwrap.wrap(caption, 62)[:2]))
    sheet(cells, 3).save(settings.out / "corpus_vq_drawn.png", optimize=True)

    shown = Pairs(config, "image-first", SHOWN, settings.seed)
    pictures = codec.decode(shown.codes)
    prompts = [[nearest_truth(truth, c, own)] for c, own in zip(shown.captions, pictures, strict=True)]
    written = model.generate(
        prompts, mode="text", routing=ROUTING, seed=settings.seed, batch=SHOWN, text=Sampling(temperature=0.0)
    )
    cells = [
        ([own], [*textwrap.wrap(caption, 34)[:2], *textwrap.wrap(f"> {output.text.strip()}", 34)[:2]])
        for caption, own, output in zip(shown.captions, pictures, written, strict=True)
    ]
    sheet([([p[0].resize((SIDE, SIDE))], t) for p, t in cells], 6).save(
        settings.out / "corpus_vq_written.png", optimize=True
    )
    print(json.dumps({
        "pictures": asked, "own caption first of 8": right, "share": right / asked, "chance": 1 / CHOICES,
        "95% interval (Wilson)": [interval.low, interval.high], "guidance": settings.guidance, "seed": settings.seed,
        "captions written": [[t, o.text.strip()] for t, o in zip(shown.captions, written, strict=True)],
        "seconds": time.perf_counter() - begin,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
