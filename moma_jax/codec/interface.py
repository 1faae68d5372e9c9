"""What image tokenizers have in common: their methods, and how a description is hashed. Imports no JAX."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image


class Codec(Protocol):
    """What every image tokenizer offers. `crop`: how it reads pictures, see pictures.load_picture."""

    kind: str
    crop: str
    side: int
    codes_per_image: int
    codebook: int
    draws: bool
    hash: str
    weights: bytes | None

    def read(self, image: bytes | np.ndarray) -> np.ndarray: ...

    def encode(self, images: Sequence[bytes | np.ndarray]) -> np.ndarray: ...

    def decode(self, codes_NC: np.ndarray) -> list[Image.Image]: ...

    def to_json(self) -> dict[str, Any]: ...


def description_hash(description: Mapping[str, Any]) -> str:
    """SHA-256, as hex, of what `Codec.to_json` gives: equal where codes mean the same."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
