"""Scores the pictures and captions that a trained run makes of held-out scenes: pictures.md and pictures.png.

Command: python docs/results/pictures.py RUN --count 200 --out docs/results

Held-out captions become pictures, held-out pictures become captions, and `moma_jax.evaluation.judge_scenes` reads both.
What stands in pictures.md from the heading "## What it says" on is written by people and kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shlex
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import moma_jax
from moma_jax.config import Config
from moma_jax.data.store import KINDS, Store, open_store
from moma_jax.errors import InputError, RunError
from moma_jax.evaluation.judge_scenes import Reading, Score, read_caption, read_picture, score_caption, score_picture
from moma_jax.generation import Guidance, Sampling
from moma_jax.runs import directory as run_dir

COLUMNS = ("colours", "shapes", "relations", "background", "all")
KEPT = "## What it says"
SHEET = (8, 4)
"""Rows and columns of the contact sheet."""


@dataclass(frozen=True)
class Pair:
    """A held-out caption and its picture, decoded from its codes: uint8 (N, N, 3)."""

    text: str
    pixels_NN3: np.ndarray


@dataclass(frozen=True)
class Result:
    """What one routing made: a picture of each caption (None where none came), a caption of each picture."""

    pictures: list[np.ndarray | None]
    captions: list[str]
    seconds: float


# Held-out pairs -------------------------------------------------------------------------------------------------------


def held_out_pairs(config: Config, kind: str, count: int, seed: int) -> list[Pair]:
    """`held_out_rows`, read."""
    return [read_pair(store, token_N) for store, token_N in held_out_rows(config, kind, count, seed)]


def held_out_rows(config: Config, kind: str, count: int | None, seed: int) -> list[tuple[Store, np.ndarray]]:
    """Draws `count` held-out documents of a kind, "text-first" or "image-first", without putting any back; None: all.

    Raises InputError where the run's stores have no pictures, or too few such documents.
    """
    found = []
    for path in dict.fromkeys(s.path for s in config.data.stores if s.collection in ("all", "pairs")):
        store = open_store(path)
        if store.image_codec() is None:
            continue
        view = store.view("pairs", "validation")
        kind_N = view.index(0, view.documents).kind_N
        found += [(store, view, n) for n in np.flatnonzero(kind_N == KINDS.index(kind)).tolist()]
    if count is not None and len(found) < count:
        raise InputError(f"--count: the run's stores hold out {len(found)} {kind} pairs; give at most that many")
    chosen = np.random.default_rng(seed).permutation(len(found))[:count].tolist()
    rows = []
    for store, view, n in (found[index] for index in chosen):
        length = int(view.index(n, n + 1).length_N[0])
        rows.append((store, view.read([n], [0], [length])[0]))
    return rows


def read_pair(store: Store, token_N: np.ndarray) -> Pair:
    """The text and the picture of a document's tokens."""
    code_N = codes_of(store, token_N)
    (picture,) = store.image_codec().decode(code_N[code_N >= 0][None])
    return Pair(store.text_codec().decode(token_N[code_N < 0]), np.asarray(picture))


def codes_of(store: Store, token_N: np.ndarray) -> np.ndarray:
    """The code of each token (N,); -1 where it is none of a picture."""
    image = next(m for m in store.vocabulary.modalities if m.name == "image")
    code_V = np.full(store.vocabulary.size, -1)
    code_V[image.code_ids] = np.arange(image.size)
    return code_V[token_N]


# Generation -----------------------------------------------------------------------------------------------------------


def generate(
    model: Any, text_first: list[Pair], image_first: list[Pair], routing: str, settings: argparse.Namespace
) -> Result:
    """Draws a picture for each pair of the first list and writes a caption for each of the second, in batches."""

    def outputs(mode: str, prompts: list[list], options: dict[str, Any]) -> list:
        made: list = []
        while len(made) < len(prompts):
            batch = prompts[len(made) : len(made) + settings.batch]
            seed = settings.seed + len(made)  # row i of a call has this seed + i
            made += model.generate(batch, mode=mode, routing=routing, seed=seed, batch=settings.batch, **options)
            print(f"{routing}: {mode} {len(made)}/{len(prompts)}", flush=True)
        return made

    begin = time.perf_counter()
    guidance = {} if settings.guidance is None else {"guidance": Guidance(text=settings.guidance)}
    options = {"image": Sampling(**dict(settings.image)), "text": Sampling(**dict(settings.text))}
    drawn = outputs("image", [[pair.text] for pair in text_first], options | guidance)
    written = outputs("text", [[pair.pixels_NN3] for pair in image_first], options)
    pictures = [np.asarray(o.images[0].convert("RGB")) if o.images else None for o in drawn]
    return Result(pictures, [o.text.strip() for o in written], time.perf_counter() - begin)


# Scores ---------------------------------------------------------------------------------------------------------------


def scores_of_pictures(text_first: list[Pair], pictures: list[np.ndarray | None]) -> list[Score]:
    """One score for each caption and the picture made of it; a picture that did not come has all wrong."""
    nothing = Reading(background=None, objects=())
    return [
        score_picture(read_caption(pair.text), nothing if picture is None else read_picture(picture))
        for pair, picture in zip(text_first, pictures, strict=True)
    ]


def scores_of_captions(image_first: list[Pair], captions: list[str]) -> list[Score]:
    """One score for each picture and the caption made of it."""
    return [
        score_caption(read_caption(caption), read_picture(pair.pixels_NN3))
        for pair, caption in zip(image_first, captions, strict=True)
    ]


def others(count: int, seed: int) -> list[int]:
    """For every index another one, each once."""
    order = np.random.default_rng(seed).permutation(count)
    partner = np.empty(count, np.int64)
    partner[order] = np.roll(order, 1)
    return partner.tolist()


def rows(text_first: list[Pair], image_first: list[Pair], results: dict[str, Result], seed: int) -> tuple[dict, dict]:
    """Summed scores by row of the two tables: pictures of captions, captions of pictures."""
    drawn = {f"drawn, {name}": result.pictures for name, result in results.items()}
    drawn["the true picture, through the codec"] = [pair.pixels_NN3 for pair in text_first]
    drawn["chance: the picture of another caption"] = [
        text_first[other].pixels_NN3 for other in others(len(text_first), seed)
    ]
    written = {f"written, {name}": result.captions for name, result in results.items()}
    written["the true caption"] = [pair.text for pair in image_first]
    written["chance: the caption of another picture"] = [
        image_first[other].text for other in others(len(image_first), seed)
    ]
    pictures = {name: sum(scores_of_pictures(text_first, made), Score()) for name, made in drawn.items()}
    captions = {name: sum(scores_of_captions(image_first, made), Score()) for name, made in written.items()}
    return pictures, captions


# Report ---------------------------------------------------------------------------------------------------------------


def table(scores: dict[str, Score]) -> str:
    """Shares as Markdown, with counts."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, score in scores.items():
        counts = [getattr(score, column) for column in COLUMNS]
        cells = [f"{c.share:.1%} ({c.right}/{c.asked})" if c.asked else "-" for c in counts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(tables: tuple[dict, dict], examples: list[tuple[str, str]], facts: list[str]) -> str:
    """pictures.md down to the part that people write. Examples are (true caption, written caption)."""
    listed = [f"- true: {true}<br>written: {written or '(nothing)'}" for true, written in examples]
    return "\n".join(
        [
            "# Pictures of held-out captions, captions of held-out pictures",
            "",
            "```",
            shlex.join(["python", *sys.argv]),
            "```",
            "",
            *facts,
            "",
            "## A caption in, a picture out",
            "",
            table(tables[0]),
            "",
            "Of what a caption asks for, the share that the picture shows: its colours; the things of that colour and",
            "shape; the relations between them; the background, where named; all of this and nothing else.",
            "",
            "![Captions with the true picture on the left and the drawn one on the right](pictures.png)",
            "",
            "## A picture in, a caption out",
            "",
            table(tables[1]),
            "",
            "Of what the picture shows, the share that the caption says, and whether the relations it states hold; one",
            "relation fewer than there are objects is asked for, and the background only where the caption names one.",
            "",
            *listed,
            "",
        ]
    )


def summary_of(run: str) -> dict[str, Any]:
    """summary.json of a run; raises InputError where it is not finished."""
    summary = run_dir.RunDir(run).read_json("summary.json")
    if summary is None:
        raise InputError(f"{run}: no summary.json here; train the run to its end first")
    return summary


def facts_of(
    settings: argparse.Namespace, config: Config, summary: dict[str, Any], results: dict[str, Result], device: str
) -> list[str]:
    """Lines on the run, the settings and the machine."""
    guidance = "off" if settings.guidance is None else settings.guidance
    seconds = ", ".join(f"{result.seconds:.0f} s ({name})" for name, result in results.items())
    options = {mode: dict(getattr(settings, mode)) or "defaults" for mode in ("image", "text")}
    versions = ", ".join(f"{name} {version}" for name, version in run_dir.versions().items())
    return [
        f"- Run: {config.model.ffn}, width {config.model.width}, {config.model.layers} layers; "
        f"{summary['steps']:,} steps, {summary['final']['tokens']:,} tokens,",
        f"  {summary['wall_seconds']:,.0f} s of training; commit {summary['commit']}.",
        f"- {settings.count} held-out captions and {settings.count} held-out pictures, seed {settings.seed}, "
        f"batches of {settings.batch};",
        f"  sampling of pictures: {options['image']}, guidance {guidance}; of captions: "
        f"{options['text']}. Generation took {seconds}.",
        f"- Machine: {device}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()};",
        f"  {versions}; commit {run_dir.commit()}.",
    ]


def contact_sheet(text_first: list[Pair], pictures: list[np.ndarray | None], path: Path, name: str) -> None:
    """Captions with the true picture on the left, and on the right the drawn one, framed green where all is right."""
    scores = scores_of_pictures(text_first, pictures)
    figure, cells = plt.subplots(SHEET[0], 2 * SHEET[1], figsize=(3.2 * SHEET[1], 2.1 * SHEET[0]))
    for axes in cells.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("lightgray")
    for pair, picture, score, (left, right) in zip(text_first, pictures, scores, cells.reshape(-1, 2), strict=False):
        left.imshow(pair.pixels_NN3, interpolation="nearest")
        left.set_title(textwrap.fill(pair.text, 46), fontsize=6.5, loc="left")
        if picture is not None:
            right.imshow(picture, interpolation="nearest")
        right.spines[:].set(color="tab:green" if score.all.full else "tab:red", linewidth=2)
    figure.suptitle(f"Held-out captions: true picture, drawn picture ({name} routing; green: all right)", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(out: Path, text: str) -> None:
    """Writes pictures.md; keeps what people wrote under KEPT."""
    path = out / "pictures.md"
    before = path.read_text() if path.exists() else ""
    kept = before[before.index(f"\n{KEPT}") :] if f"\n{KEPT}" in before else ""
    path.write_text(text + kept)


# Command --------------------------------------------------------------------------------------------------------------


def option(words: str) -> tuple[str, Any]:
    """KEY=NUMBER, a field of `Sampling`, such as temperature=0.8."""
    key, _, value = words.partition("=")
    names = [field.name for field in dataclasses.fields(Sampling)]
    try:
        if key in names:
            return key, json.loads(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{words!r} is not KEY=NUMBER with one of {', '.join(names)}")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="directory of a finished run on scenes")
    parser.add_argument("--count", type=int, default=200, help="captions, and as many pictures; at least 2")
    parser.add_argument("--routing", nargs="+", default=["causal"], choices=["causal", "threshold"])
    parser.add_argument("--batch", type=int, default=50, help="prompts generated at once")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pairs, of sampling and of chance")
    parser.add_argument(
        "--image", nargs="+", type=option, default=[], metavar="KEY=NUMBER", help="sampling of pictures"
    )
    parser.add_argument(
        "--guidance", type=float, help="scale of the caption in classifier-free guidance; off if left out"
    )
    parser.add_argument("--text", nargs="+", type=option, default=[], metavar="KEY=NUMBER", help="sampling of captions")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    settings = parser.parse_args(words)
    if settings.count < 2 or settings.batch < 1:
        parser.error("--count is at least 2 and --batch at least 1")
    return settings


def evaluate(model: Any, config: Config, settings: argparse.Namespace, device: str) -> str:
    """Generates, scores, draws and writes; returns pictures.md's text."""
    summary = summary_of(settings.run)
    for name in settings.routing:
        model.under(name)  # refuses a routing that the run does not have, before hours of the other
    text_first = held_out_pairs(config, "text-first", settings.count, settings.seed)
    image_first = held_out_pairs(config, "image-first", settings.count, settings.seed)
    if not all(read_caption(pair.text).named for pair in text_first + image_first):
        raise InputError(f"{settings.run}: its held-out captions name no coloured shapes; give a run on scenes")
    results = {name: generate(model, text_first, image_first, name, settings) for name in settings.routing}
    tables = rows(text_first, image_first, results, settings.seed)
    first = settings.routing[0]
    examples = [(pair.text, written) for pair, written in zip(image_first, results[first].captions, strict=True)][:8]
    text = report(tables, examples, facts_of(settings, config, summary, results, device))
    settings.out.mkdir(parents=True, exist_ok=True)
    contact_sheet(text_first, results[first].pictures, settings.out / "pictures.png", first)
    write(settings.out, text)
    return text


def main(words: list[str] | None = None) -> int:
    """The command; 2 on bad input, 1 where the run fails."""
    settings = parse(words)
    try:
        import jax

        config, model = moma_jax.recipe(settings.run), moma_jax.load(settings.run)
        print(evaluate(model, config, settings, jax.devices()[0].device_kind))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
