"""A Chameleon of Hugging Face as a dense decoder: its config and its vocabulary; layout.py has its tensors."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moma_jax.config import IMAGE, TEXT, Modality, ModelConfig
from moma_jax.convert.layout import decoder_described, decoder_fields, object_in, require_count, tokens_of
from moma_jax.convert.weights import CONFIG, TOKENIZER, read_json
from moma_jax.data.text import TextCodec
from moma_jax.errors import InputError
from moma_jax.vocab import SPECIAL_NAMES, ModalityIds, Vocabulary

VISION = "model.vqmodel."
"""Prefix of the tensors of the image tokenizer (VQGAN), which is no part of the decoder."""
CODE, BEGIN_IMAGE, END_IMAGE, PLACEHOLDER = "IMGIMG", "<racm3:break>", "<eoss>", "<image>"
"""Names in a Chameleon's vocabulary: code 305 is IMGIMGDAFZ (A to J are digits)."""
QK_NORM_EPSILON = 1e-5
"""Fixed in Chameleon; its other norms have rms_norm_eps, and ours have one epsilon for all."""
DEFAULTS = {
    "vocab_size": 65536,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "swin_norm": False,
    "vq_config": None,
}
VISION_DEFAULTS = {"num_embeddings": 8192, "resolution": 512, "channel_multiplier": [1, 1, 2, 2, 4]}
"""Values of ChameleonConfig and ChameleonVQVAEConfig: config.json leaves out what is equal to them."""

# Files ----------------------------------------------------------------------------------------------------------------


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
    model, names = model_of(described, where), names_of(described, tokenizer, where)
    vocabulary, sequence = vocabulary_of(described, names, where), sequence_of(described, where)
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
    for name, number in tokens_of(tokenizer, str(path)).items():
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


# Config ---------------------------------------------------------------------------------------------------------------


def model_of(config: dict[str, Any], where: str) -> ModelConfig:
    """The decoder that config.json describes.

    Raises:
      InputError: it describes another model, or one with parts that the decoder does not have.
    """
    if config.get("model_type") != "chameleon":
        raise InputError(f"{where}: model_type is {config.get('model_type')!r}, not 'chameleon'; give a Chameleon")
    value = {**DEFAULTS, **config}
    fixed = {"hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
    for name, right in (fixed | {"rms_norm_eps": QK_NORM_EPSILON}).items():
        if value[name] != right:
            raise InputError(f"{where}: {name} is {value[name]}; the decoder has only {right}")
    norm = "swin" if value["swin_norm"] else "pre"
    return ModelConfig(**decoder_fields(value, where), norm=norm, norm_epsilon=QK_NORM_EPSILON)


def sequence_of(config: dict[str, Any], where: str) -> int:
    """Positions that the model was trained on."""
    value = config.get("max_position_embeddings", DEFAULTS["max_position_embeddings"])
    return require_count(value, f"{where}: max_position_embeddings")


# Vocabulary -----------------------------------------------------------------------------------------------------------


def names_of(config: dict[str, Any], tokenizer: dict[str, Any] | None, where: str) -> dict[str, int]:
    """Every id that has a name, by the config's vocabulary_map and the tokenizer's tokens.

    Raises:
      InputError: neither is there, or they disagree.
    """
    names = object_in(config, "vocabulary_map", where)
    known = {} if tokenizer is None else tokens_of(tokenizer, where)
    if not names and not known:
        raise InputError(
            f"{where}: has no vocabulary_map, and no tokenizer.json lies beside it, so nothing says which ids are "
            "pictures; add tokenizer.json"
        )
    ids = require_count(config.get("vocab_size", DEFAULTS["vocab_size"]), f"{where}: vocab_size")
    for name, number in [*names.items(), *known.items()]:
        if type(number) is not int or not 0 <= number < ids:
            raise InputError(f"{where}: token {name!r} has id {number!r}, which is not below vocab_size {ids}")
        if names.get(name, number) != number and name != PLACEHOLDER:  # vocabulary_map has the name of its own
            other = f"{number} in tokenizer.json; take both files from one model"
            raise InputError(f"{where}: token {name!r} is {names[name]} there, {other}")
    return {**known, **names}


def vocabulary_of(config: dict[str, Any], names: dict[str, int], where: str) -> Vocabulary:
    """The id layout: image codes wherever they are among the ids, all else text.

    Raises:
      InputError: a name is missing or codes are not numbered 0 to n-1.
    """
    vision = {**VISION_DEFAULTS, **object_in(config, "vq_config", where)}
    side = require_count(vision["resolution"], f"{where}: vq_config.resolution")
    if not isinstance(levels := vision["channel_multiplier"], list) or not levels:
        raise InputError(f"{where}: vq_config.channel_multiplier is {levels!r}, not a list; fetch the file again")
    side >>= len(levels) - 1
    codes = {_code(name, where): number for name, number in names.items() if name.startswith(CODE)}
    wanted = vision["num_embeddings"]
    if sorted(codes) != list(range(len(codes))) or len(set(codes.values())) != len(codes) or len(codes) != wanted:
        raise InputError(
            f"{where}: the vocabulary names {len(codes)} image codes, vq_config.num_embeddings is {wanted}; they have "
            "to be 0 to that number less 1, each with an id of its own"
        )
    code_ids = np.array([codes[code] for code in range(len(codes))])
    text_ids = np.setdiff1d(np.arange(config.get("vocab_size", DEFAULTS["vocab_size"])), code_ids)
    marks = {}
    for name in (*SPECIAL_NAMES, BEGIN_IMAGE, END_IMAGE):
        marks[name] = names.get(name)
        if marks[name] is None or marks[name] in code_ids:
            raise InputError(f"{where}: the vocabulary has no token {name}; add tokenizer.json, or fetch it again")
    begin, end = marks[BEGIN_IMAGE], marks[END_IMAGE]
    text = ModalityIds(TEXT.name, TEXT.letter, _ranges(text_ids))
    image = ModalityIds(IMAGE.name, IMAGE.letter, _ranges(code_ids), span=side * side, begin=begin, end=end)
    begin_document, pad, end_document, unknown = (marks[name] for name in SPECIAL_NAMES)
    return Vocabulary((text, image), begin_document, end_document, pad, unknown)


def _code(name: str, where: str) -> int:
    """The number of an image code from its name."""
    digits = [ord(letter) - ord("A") for letter in name[len(CODE) : -1]]
    if not digits or name[-1] != "Z" or not all(0 <= digit <= 9 for digit in digits):
        raise InputError(f"{where}: token {name!r} names no image code; fetch the file again")
    return int("".join(map(str, digits)))


def _ranges(id_N: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Half-open runs of consecutive ids, in their order."""
    starts_N = np.flatnonzero(np.diff(id_N, prepend=id_N[0] - 2) != 1)
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(id_N, starts_N[1:]))


def modalities_of(vocabulary: Vocabulary) -> tuple[Modality, ...]:
    """What data.modalities says of a Chameleon's ids; half of a routing group each."""
    sizes = [(m.size, m.span) for m in vocabulary.modalities]
    return tuple(
        dataclasses.replace(of, size=size, span=span) for of, (size, span) in zip((TEXT, IMAGE), sizes, strict=True)
    )


def config_of(model: ModelConfig, vocabulary: Vocabulary, sequence: int) -> dict[str, Any]:
    """The config.json of a dense run that was no Chameleon before.

    Raises:
      InputError: its vocabulary has not text and one kind of square picture, or its norms have another epsilon than
        Chameleon's.
    """
    if [m.span > 0 for m in vocabulary.modalities] != [False, True]:
        raise InputError("to-chameleon: a Chameleon has text and one kind of picture; this run has other modalities")
    if model.head_size * model.heads != model.width:
        raise InputError(
            f"to-chameleon: model.head_width is {model.head_width}; a Chameleon's heads are its width over their number"
        )
    if model.qk_norm != "layer" or model.tied_embeddings:
        raise InputError(
            f"to-chameleon: model.qk_norm is {model.qk_norm}, model.tied_embeddings {model.tied_embeddings}; a "
            "Chameleon has qk_norm layer and embeddings that are not tied"
        )
    if model.norm_epsilon != QK_NORM_EPSILON:
        raise InputError(f"to-chameleon: model.norm_epsilon is {model.norm_epsilon}; Chameleon has {QK_NORM_EPSILON}")
    image = vocabulary.modalities[1]
    side = math.isqrt(image.span)
    if side * side != image.span:
        raise InputError(f"to-chameleon: a Chameleon's pictures are square; {image.span} codes of {image.name} are not")
    special = (vocabulary.begin_document, vocabulary.pad, vocabulary.end_document, vocabulary.unknown)
    names = dict(zip(SPECIAL_NAMES, special, strict=True)) | {BEGIN_IMAGE: image.begin, END_IMAGE: image.end}
    names[PLACEHOLDER] = vocabulary.unknown  # stands where a picture will; no text has it
    digits = {code: "".join(chr(ord("A") + int(digit)) for digit in str(code)) for code in range(image.size)}
    names |= {f"{CODE}{digits[code]}Z": int(number) for code, number in enumerate(image.code_ids)}
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "vocab_size": vocabulary.size,
        **decoder_described(model),
        "max_position_embeddings": sequence,
        "rms_norm_eps": QK_NORM_EPSILON,
        "swin_norm": model.norm == "swin",
        "tie_word_embeddings": False,
        "bos_token_id": vocabulary.begin_document,
        "eos_token_id": vocabulary.end_document,
        "pad_token_id": vocabulary.pad,
        "vq_config": {"num_embeddings": image.size, "resolution": 16 * side},
        "vocabulary_map": names,
    }
