"""The folder of an image tokenizer: codec.json says what it is, codec.safetensors holds its weights."""

from __future__ import annotations

from functools import partial
from typing import Any

from moma_jax.codec import Codec, codec_of
from moma_jax.codec.interface import description_hash
from moma_jax.errors import InputError, naming
from moma_jax.storage.directory import Directory

DESCRIPTION, WEIGHTS = "codec.json", "codec.safetensors"


def open_codec(path: str) -> Codec:
    """The image tokenizer in a folder: local, gs:// or s3://.

    Raises:
      InputError: there is none, or it is damaged.
    """
    folder = Directory(path)
    description = _description(folder)
    with naming(path):
        return codec_of(description, partial(folder.read, WEIGHTS))


def hash_of(path: str) -> str:
    """The hash of the image tokenizer in a folder, by its description alone; InputError where there is none."""
    return description_hash(_description(Directory(path)))


def _description(folder: Directory) -> dict[str, Any]:
    description = folder.read_json(DESCRIPTION)
    if description is None:
        raise InputError(f"{folder.path}: no {DESCRIPTION} here; give a folder that moma codec import or train made")
    return description


def write_codec(path: str, codec: Codec) -> None:
    """Writes the folder, its description last: a folder without it is unfinished."""
    folder = Directory(path)
    if codec.weights is not None:
        folder.write(WEIGHTS, codec.weights)
    folder.write_json(DESCRIPTION, codec.to_json())
