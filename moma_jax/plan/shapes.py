"""Sizes of models that are measured (`moma bench suite`) and planned beside what was measured, and their configs."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from moma_jax.checks import resolve
from moma_jax.config import IMAGE, TEXT, Config, DataConfig, ModelConfig, TrainConfig


class Shape(NamedTuple):
    """A model: layers, width, heads, ffn_width, and the same of its mixture of depths (paper, Table 1); rows' length;
    rows of a routing group; ids of text and image, codes of one image; rows of an update at most, enough to fill a
    device and few enough to be quick."""

    layers: int
    width: int
    heads: int
    ffn_width: int
    depth: tuple[int, int, int, int]
    sequence: int = 4096
    group_rows: int = 6
    sizes: tuple[int, int, int] = (57_344, 8192, 1024)
    rows: int = 48


SHAPES = {
    "90m": Shape(8, 512, 8, 2048, (14, 512, 8, 2048)),
    "435m": Shape(24, 1024, 16, 4096, (40, 1024, 16, 4096)),
    "1b4": Shape(24, 2048, 16, 8192, (32, 2304, 18, 9216)),
    "toy": Shape(2, 32, 2, 64, (2, 32, 2, 64), 64, 2, (300, 64, 16), 4),
}


def recipe_of(shape: Shape, ffn: str) -> Config:
    """A config of a shape on random tokens, resolved."""
    layers, width, heads, ffn_width = shape.depth if ffn.startswith("mod") else shape[:4]
    text, image, span = shape.sizes
    modalities = dataclasses.replace(TEXT, size=text), dataclasses.replace(IMAGE, size=image, span=span)
    model = ModelConfig(ffn=ffn, layers=layers, width=width, heads=heads, ffn_width=ffn_width, remat="dots")
    group = {"sequence": shape.sequence, "group_rows": shape.group_rows, "modalities": modalities}
    train = TrainConfig(steps=100, batch_rows=shape.rows // shape.group_rows * shape.group_rows, eval_sets=())
    return resolve(Config(model=model, data=DataConfig(kind="synthetic", **group), train=train))
