"""Measure steps, generation, data, the FFN, codecs, stores."""

from typing import Annotated, Any

import tyro

from moma_jax import bench as benches
from moma_jax.bench.suite import told
from moma_jax.codec.folder import open_codec
from moma_jax.commands import print_result
from moma_jax.recipes import RecipeOption
from moma_jax.studies import load_study


def step(
    recipe: RecipeOption,
    ffn: tuple[str, ...] = ("dense", "8x", "1t1i", "4t4i"),
    repeats: int = 9,
    json: bool = False,
) -> None:
    """Training-step speed of FFN variants at equal active FLOPs, interleaved in one process.

    Args:
      ffn: Variants to compare; with dense among them, the others' speed is also given relative to it.
      repeats: Timed steps of each variant.
      json: Print JSON.
    """
    _print(benches.bench_step(recipe.resolved(), ffn=ffn, repeats=repeats), json)


def study(
    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="STUDY")]], repeats: int = 9, json: bool = False
) -> None:
    """Training-step speed of a study's variants at equal FLOPs, interleaved in one process.

    Args:
      path: A .py file with `def study() -> Study`, or a name that `moma recipes` lists.
      repeats: Timed steps of each variant.
      json: Print JSON.
    """
    _print(benches.bench_study(load_study(path), repeats=repeats), json)


def generate(
    recipe: RecipeOption,
    ffn: tuple[str, ...] = ("dense", "4t4i"),
    batch: tuple[int, ...] = (1, 8, 32),
    prompt: int = 64,
    tokens: int = 64,
    repeats: int = 5,
    json: bool = False,
) -> None:
    """Speed of prefill and cached decoding of FFN variants at equal active FLOPs, random weights, causal routing.

    Args:
      ffn: Variants to compare; with dense among them, the others' speed is also given relative to it.
      batch: Numbers of rows.
      prompt: Tokens of a prompt.
      tokens: Tokens written to each row.
      repeats: Timed turns of all variants.
      json: Print JSON.
    """
    measured = {"ffn": ffn, "batch": batch, "prompt": prompt, "tokens": tokens, "repeats": repeats}
    _print(benches.bench_generate(recipe.resolved(), **measured), json)


def data(recipe: RecipeOption, seconds: float = 10.0, json: bool = False) -> None:
    """Speed of the data pipeline: planning, reading, packing.

    Args:
      seconds: How long to measure.
      json: Print JSON.
    """
    _print(benches.bench_data(recipe.resolved(), seconds=seconds), json)


def ffn(
    ffn: str = "4t4i", width: int = 256, hidden: int = 704, tokens: int = 4096, repeats: int = 40, json: bool = False
) -> None:
    """The FFN alone, forward and backward in float32, against a dense one of equal active FLOPs.

    Args:
      ffn: Variant.
      width: Model width d.
      hidden: Hidden size F.
      tokens: Tokens of the batch.
      repeats: Timed repetitions of each.
      json: Print JSON.
    """
    _print(benches.bench_ffn(ffn=ffn, width=width, hidden=hidden, tokens=tokens, repeats=repeats), json)


def codec(
    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CODEC")]],
    pictures: int = 16,
    repeats: int = 5,
    json: bool = False,
) -> None:
    """Pictures per second of an image tokenizer, to codes and back, on all devices of this machine.

    Args:
      path: Folder of a codec (moma codec import).
      pictures: Pictures of one call.
      repeats: Timed calls of each.
      json: Print JSON.
    """
    _print(benches.bench_codec(open_codec(path), pictures=pictures, repeats=repeats), json)


def prepare(pictures: int = 2000, side: int = 256, codes_side: int = 16, repeats: int = 3, json: bool = False) -> None:
    """From tars of JPEGs to a palette store, beside Pillow's decoding and resizing alone, in processor seconds.

    Args:
      pictures: JPEGs, in tars of 1,000.
      side: Pixels of a JPEG's side.
      codes_side: Pixels of the palette picture's side.
      repeats: Turns of each.
      json: Print JSON.
    """
    measured = {"pictures": pictures, "side": side, "codes_side": codes_side, "repeats": repeats}
    _print(benches.bench_prepare(**measured), json)


def suite(out: str, minutes: float = 9.0, toy: bool = False) -> None:
    """All that one accelerator can tell: its limits, steps at three sizes, attention, the FFN, decoding, data.

    Needs no data. Run it again to do what is left; `python -m moma_jax.bench.suite` does the same without tyro.

    Args:
      out: Directory of suite.json and suite.md, which are written after each part.
      minutes: No part is begun after so long, and one that runs is ended.
      toy: Shapes for a CPU in a minute.
    """
    print(told(out, benches.bench_suite(out, minutes, toy)))


def _print(result: dict[str, Any], as_json: bool) -> None:
    print_result(result, as_json, benches.format_bench)


SUBCOMMANDS = {
    "step": step,
    "study": study,
    "generate": generate,
    "data": data,
    "ffn": ffn,
    "codec": codec,
    "prepare": prepare,
    "suite": suite,
}
