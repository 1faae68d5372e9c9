"""Generated scenes as a source."""

from __future__ import annotations

import math
from collections.abc import Iterator

from moma_jax.data import scenes
from moma_jax.data.documents import Document
from moma_jax.data.sources.files import fingerprint
from moma_jax.errors import InputError


class ScenesSource:
    """Generated scenes: `documents` training documents, then a tenth as many (at least one) held-out ones.

    About 80% are pairs, 20% stories of two or three pictures. No training picture shows a scene that is held out.
    """

    name = "scenes"

    def __init__(self, documents: int, seed: int, side: int):
        if documents <= 0:
            raise InputError(f"prepare.documents: {documents} scenes; give at least 1")
        self.documents, self.seed = documents, seed
        # Shapes need a grid of 16 to be told apart; the codec reduces by a whole factor.
        self.side = side * math.ceil(scenes.GRID / side)
        self.total = documents + max(documents // 10, 1)
        self.block = max(1, min(512, math.ceil(self.total / 64)))

    def units(self) -> int:
        """Blocks of documents."""
        return math.ceil(self.total / self.block)

    def describe(self) -> list[str]:
        """What is generated."""
        return [f"{self.documents} scenes to train on, {self.total - self.documents} held out"]

    def read(self, unit: int) -> Iterator[Document]:
        """The documents of one block."""
        for index in range(unit * self.block, min((unit + 1) * self.block, self.total)):
            if index < self.documents:
                yield scenes.document(self.seed, "train", index, self.side)
            else:
                yield scenes.document(self.seed, "validation", index - self.documents, self.side)

    def fingerprint(self) -> str:
        """Changes with the generator's version and settings."""
        return fingerprint("scenes", [], scenes.VERSION, self.documents, self.seed, self.side)
