"""Sources made up for tests, and settings for tiny stores."""

import dataclasses
import hashlib
import itertools
import json
import os
import random

import numpy as np
from PIL import Image
from tiny import tiny

from moma_jax import checks
from moma_jax.config import DataConfig, Modality, PrepareConfig, StoreConfig

WORDS = ["a", "red", "green", "blue", "circle", "square", "star", "stands", "left", "of", "over", "the", "very", "old"]


def write_rows(folder, rows):
    """A source: `folder`/docs.jsonl."""
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/docs.jsonl", "w") as file:
        for row in rows:
            file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    return str(folder)


def make_source(folder, documents=300, seed=0):
    """Text, pairs and interleaved documents in about equal number, no picture twice; `folder` is made."""
    choice, numbers = random.Random(seed), itertools.count()
    os.makedirs(folder, exist_ok=True)

    def text():
        return {"text": " ".join(choice.choices(WORDS, k=choice.randint(2, 40)))}

    def picture():
        number = next(numbers)
        pixels = np.random.default_rng(number).integers(0, 255, (9, 9, 3), np.uint8)
        Image.fromarray(pixels).save(f"{folder}/{number}.png")
        return {"image": f"{number}.png"}

    kinds = [lambda: [text()], lambda: [text(), picture()], lambda: [text(), picture(), text(), picture(), text()]]
    return write_rows(folder, [{"id": str(n), "segments": kinds[n % 3]()} for n in range(documents)])


def settings(source, **changes):
    """Settings for tiny stores, with many units, shards and chunks."""
    defaults = dict(source=source, text_size=300, image_side=4, colours=16, held_out=0.2, parts=3)  # noqa: C408
    return PrepareConfig(**{**defaults, "shard_bytes": 4096, "chunk_tokens": 128, **changes})


def files_of(folder):
    """SHA-256 of every file below a folder, by relative name."""
    found = {}
    for base, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(base, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, folder)] = hashlib.sha256(file.read()).hexdigest()
    return found


def drawn_config(where, **train):
    """A tiny run on drawn scenes of 16 x 16, two rows an update, with a store of its own; `train` as of `tiny`."""
    data = DataConfig(
        modalities=(Modality("text", "t", size=300, quota=0.5), Modality("image", "i", size=16, span=256, quota=0.9)),
        stores=(StoreConfig("scenes", str(where / "store"), collection="pairs"),),
        prepare=PrepareConfig(source="scenes", documents=60, text_size=300, image_side=16, colours=16, held_out=0.1),
        sequence=320,
        group_rows=2,
        lanes=2,
    )
    base = tiny(where / "run", train_batch_rows=2, train_steps=3)
    train = dataclasses.replace(base.train, **train)
    return checks.resolve(dataclasses.replace(base, data=data, train=train))
