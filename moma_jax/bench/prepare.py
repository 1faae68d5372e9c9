"""Preparing a store: pictures per processor second, beside decoding and resizing alone."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from moma_jax.bench.timing import require_some, say, summarise
from moma_jax.config import PrepareConfig
from moma_jax.data.fit import ordered_map
from moma_jax.data.prepare import BLOCK, prepare

QUALITY = 95
"""JPEG quality of img2dataset's pictures."""


def bench_prepare(*, pictures: int = 2000, side: int = 256, codes_side: int = 16, repeats: int = 3) -> dict[str, Any]:
    """Processor seconds from WebDataset tars of JPEGs to a palette store, and of Pillow on the same files.

    The vocabulary is there before, as in every part but the first of an array job. Pillow is measured twice: decoding
    all of each JPEG, and decoding it at the least size that suffices (`draft`), as `prepare` does.

    Args:
      pictures: so many, in tars of 1,000. side: of a JPEG, in pixels. codes_side: of the palette picture.
      repeats: turns of each.

    Returns:
      {"shape", "prepare" | "pillow" | "pillow_draft": {"pictures_per_processor_second", "spread"}, "share_of_pillow",
      "share_of_draft", "jpeg_bytes"}.

    Raises:
      InputError: numbers that measure nothing.
    """
    require_some(pictures=pictures, side=side, codes_side=codes_side, repeats=repeats)
    with tempfile.TemporaryDirectory() as folder:
        files = _jpegs(pictures, side)
        _write_tars(f"{folder}/tars", files)
        config = PrepareConfig(source=f"{folder}/tars", image_side=codes_side, colours=512, text_size=512, parts=1)
        prepare(config, f"{folder}/first", progress=False)
        again = PrepareConfig(source=config.source, vocabulary=f"{folder}/first", parts=1)
        turns = iter(range(repeats + 1))
        calls = {
            "prepare": lambda: prepare(again, f"{folder}/store{next(turns)}", progress=False),
            "pillow": lambda: _all_reduced(files, codes_side, False),
            "pillow_draft": lambda: _all_reduced(files, codes_side, True),
        }
        say(f"{pictures} JPEGs of {side} x {side} to {codes_side} x {codes_side} codes")
        seconds = _processor_seconds(calls, repeats)
    figures: dict[str, Any] = {}
    for name, of in seconds.items():
        median, spread = summarise(of)
        figures[name] = {"pictures_per_processor_second": pictures / median, "spread": spread}
    rates = {name: figure["pictures_per_processor_second"] for name, figure in figures.items()}
    shares = {f"share_of_{name.split('_')[-1]}": rates["prepare"] / rates[name] for name in ("pillow", "pillow_draft")}
    shape = {"pictures": pictures, "side": side, "codes_side": codes_side}
    return {"bench": "prepare", "shape": shape, **figures, **shares, "jpeg_bytes": sum(map(len, files)) // pictures}


def _jpegs(count: int, side: int) -> list[bytes]:
    """Pictures with edges, gradients and grain, as JPEG files."""
    random, files = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).resize((side, side), Image.BICUBIC)
        grain = random.normal(0, 6, (side, side, 1))
        buffer = io.BytesIO()
        pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
        files.append(buffer.getvalue())
    return files


def _write_tars(folder: str, files: list[bytes]) -> None:
    os.makedirs(folder)
    for start in range(0, len(files), 1000):
        with tarfile.open(f"{folder}/{start // 1000:05}.tar", "w") as tar:
            for number, content in enumerate(files[start : start + 1000], start):
                for suffix, member in (("jpg", content), ("txt", f"a picture, number {number}".encode())):
                    header = tarfile.TarInfo(f"{number:09}.{suffix}")
                    header.size = len(member)
                    tar.addfile(header, io.BytesIO(member))


def _all_reduced(files: list[bytes], side: int, draft: bool) -> None:
    """In as many threads as `prepare` has, which share the same cores."""
    blocks = (files[start : start + BLOCK] for start in range(0, len(files), BLOCK))
    for _ in ordered_map(lambda block: [_reduced(file, side, draft) for file in block], blocks):
        pass


def _reduced(file: bytes, side: int, draft: bool) -> Image.Image:
    picture = Image.open(io.BytesIO(file))
    if draft:
        picture.draft("RGB", (4 * side, 4 * side))
    return picture.convert("RGB").resize((side, side), Image.Resampling.BOX)


def _processor_seconds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Processor seconds, of all threads, of calls in turns; the first of each is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if turn:
                seconds[name].append(time.process_time() - began)
    return seconds
