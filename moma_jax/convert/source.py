"""What a folder of ChameleonForConditionalGeneration says of itself, and whether its tensors are what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moma_jax.config import ModelConfig
from moma_jax.convert import layout
from moma_jax.convert.weights import DTYPES, Weights, read_json
from moma_jax.data.text import TextCodec
from moma_jax.errors import InputError
from moma_jax.vocab import Vocabulary

FORMAT_VERSION = 1
SOURCE, RECORD, VOCABULARY = "chameleon", "chameleon.json", "vocabulary"
"""In a converted run: the source's describing files and image tokenizer, the types of its tensors, a store without
documents."""
CONFIG, TOKENIZER, VISION_FILE = "config.json", "tokenizer.json", "vqmodel.safetensors"


class CheckpointFiles(NamedTuple):
    """What the files of a folder say that are no weights; tokenizer: content of tokenizer.json, where there is one."""

    folder: Path
    model: ModelConfig
    vocabulary: Vocabulary
    sequence: int
    tokenizer: dict[str, Any] | None


def read_source(folder: Path) -> CheckpointFiles:
    """Reads config.json and tokenizer.json; InputError where they are not those of a Chameleon that we can hold."""
    where, described = f"{folder}/{CONFIG}", read_json(folder / CONFIG)
    tokenizer = read_json(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else None
    model, names = layout.model_of(described, where), layout.names_of(described, tokenizer, where)
    vocabulary, sequence = layout.vocabulary_of(described, names, where), layout.sequence_of(described, where)
    return CheckpointFiles(folder, model, vocabulary, sequence, tokenizer)


def tokenizer_of(source: CheckpointFiles) -> bytes:
    """The tokenizer with every mark and image code a special token, so that no text encodes to one, and without
    truncation and padding, which a store's documents must not have; empty where there is none."""
    tokenizer, vocabulary, path = source.tokenizer, source.vocabulary, source.folder / TOKENIZER
    if tokenizer is None:
        return b""
    image = vocabulary.modalities[1]
    special = {vocabulary.begin_document, vocabulary.pad, vocabulary.end_document, vocabulary.unknown}
    special |= {image.begin, image.end, *image.code_ids.tolist()}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {token["content"]: token for token in tokenizer.get("added_tokens") or ()}
    for name, number in layout.tokens_of(tokenizer, str(path)).items():
        if number in special:
            added[name] = {**plain, **added.get(name, {}), "id": number, "content": name, "special": True}
    tokens = sorted(added.values(), key=lambda token: token["id"])
    content = json.dumps({**tokenizer, "added_tokens": tokens, "truncation": None, "padding": None})
    try:
        codec = TextCodec.from_json(content)
        encoded = [*codec.encode_batch(list(added)), np.zeros(0, np.int32)]
    except Exception as error:  # tokenizers raises bare Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: cannot be used ({reason}); move it away to convert without a tokenizer") from error
    if found := special & set(np.concatenate(encoded).tolist()):
        raise InputError(
            f"{path}: text encodes to id {min(found)}, a mark or a code; move it away to convert without a tokenizer"
        )
    return content.encode()


def require_tensors(weights: Weights, places: dict[str, layout.Place]) -> Weights:
    """The weights; InputError unless they are each tensor of the decoder, in its shape, and else the vision tower's."""
    for name, place in places.items():
        tensor = weights.tensors.get(name)
        if tensor is None:
            raise InputError(f"{weights.folder}: tensor {name} is missing; fetch the folder again")
        if tensor.shape != place.shape:
            shapes = f"{list(tensor.shape)}, by config.json {list(place.shape)}"
            raise InputError(f"{weights.folder}: tensor {name} has shape {shapes}; use weights and config of one model")
    for name, tensor in sorted(weights.tensors.items()):
        if name not in places and not name.startswith(layout.VISION):
            raise InputError(f"{weights.folder}: tensor {name} is no part of a Chameleon that config.json describes")
        if tensor.dtype not in DTYPES:
            raise InputError(f"{weights.folder}: tensor {name} is {tensor.dtype}; give weights in {', '.join(DTYPES)}")
    return weights
