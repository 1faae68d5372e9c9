"""A Chameleon of Hugging Face as a dense decoder: its config, its vocabulary, and which tensor is which parameter.

    h = x + attn(norm1(x));  out = h + ffn(norm2(h))      swin_norm false (Chameleon-7B): norm "pre"
    h = x + norm1(attn(x));  out = h + norm2(ffn(h))      swin_norm true (Chameleon-34B): norm "swin"

In both, norm1 is input_layernorm and norm2 post_attention_layernorm. A projection is stored (out, in), ours (in, out)
with heads apart. Queries and keys need no reordering: both sides turn channel k with k + K/2.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from moma_jax.config import IMAGE, TEXT, Modality, ModelConfig
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

# Tensors --------------------------------------------------------------------------------------------------------------

LAYER = {
    "input_layernorm.weight": ("layers/attention_norm/scale_D", "D"),
    "self_attn.q_proj.weight": ("layers/attention/query_DHK", "HK D"),
    "self_attn.k_proj.weight": ("layers/attention/key_DHK", "GK D"),
    "self_attn.v_proj.weight": ("layers/attention/value_DHK", "GK D"),
    "self_attn.q_norm.weight": ("layers/attention/query_norm/scale_HK", "H K"),
    "self_attn.q_norm.bias": ("layers/attention/query_norm/bias_HK", "H K"),
    "self_attn.k_norm.weight": ("layers/attention/key_norm/scale_HK", "G K"),
    "self_attn.k_norm.bias": ("layers/attention/key_norm/bias_HK", "G K"),
    "self_attn.o_proj.weight": ("layers/attention/out_HKD", "D HK"),
    "post_attention_layernorm.weight": ("layers/ffn_norm/scale_D", "D"),
    "mlp.gate_proj.weight": ("layers/ffn/all/gate_EDF", "F D"),
    "mlp.up_proj.weight": ("layers/ffn/all/up_EDF", "F D"),
    "mlp.down_proj.weight": ("layers/ffn/all/down_EFD", "D F"),
}
"""Tensor of a layer -> (parameter, the tensor's axes); E, the experts of the dense group, is 1. G are the heads of
keys, which parameters, too, call H."""
FIRST = {"model.embed_tokens.weight": ("embedding/kernel_VD", "V D")}
LAST = {"model.norm.weight": ("final_norm/scale_D", "D"), "lm_head.weight": ("unembedding/kernel_DV", "V D")}


class Place(NamedTuple):
    """Where a tensor lies among the parameters.

    Attributes:
      parameter: its path; layers are stacked, so `layer` is the index into it, None outside of them.
      shape: the tensor's. ours: shape of the parameter, or of its layer.
      projection: whether it is stored (out, in); norms and the embedding table lie as ours do.
    """

    parameter: str
    layer: int | None
    shape: tuple[int, ...]
    ours: tuple[int, ...]
    projection: bool

    def to_ours(self, value: np.ndarray) -> np.ndarray:
        """A tensor as the parameter's layer."""
        return (value.T if self.projection else value).reshape(self.ours)

    def from_ours(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        return value.reshape(self.shape[::-1]).T if self.projection else value.reshape(self.shape)


def places(model: ModelConfig, ids: int) -> dict[str, Place]:
    """Every tensor of a Chameleon's decoder by name, in the order of its layers; `ids`: size of the vocabulary."""
    size = {"V": ids, "D": model.width, "F": model.hidden, "E": 1}
    size |= {"H": model.heads, "G": model.key_heads, "K": model.head_size}

    def place(parameter: str, axes: str, layer: int | None) -> Place:
        own = parameter.rpartition("_")[2]
        own = own.replace("H", "G") if "G" in axes else own
        shape = tuple(math.prod(size[axis] for axis in letters) for letters in axes.split())
        projection = axes.replace(" ", "") != own.replace("E", "")
        return Place(parameter, layer, shape, tuple(size[axis] for axis in own), projection)

    found = {name: place(*where, None) for name, where in FIRST.items()}
    for layer in range(model.layers):
        found |= {f"model.layers.{layer}.{name}": place(*where, layer) for name, where in LAYER.items()}
    return found | {name: place(*where, None) for name, where in LAST.items()}


def shapes(model: ModelConfig, places: dict[str, Place]) -> dict[str, tuple[int, ...]]:
    """The decoder's parameters by path, layers stacked."""
    layers = (model.layers,)
    return {p.parameter: p.ours if p.layer is None else layers + p.ours for p in places.values()}


# Config ---------------------------------------------------------------------------------------------------------------


def model_of(config: dict[str, Any], where: str) -> ModelConfig:
    """The decoder that config.json describes.

    Raises:
      InputError: it describes another model, or one with parts that the decoder does not have.
    """
    if config.get("model_type") != "chameleon":
        raise InputError(f"{where}: model_type is {config.get('model_type')!r}, not 'chameleon'; give a Chameleon")
    value = {**DEFAULTS, **{k: v for k, v in config.items() if k in DEFAULTS}}
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        _require_count(value[name], f"{where}: {name}")
    heads, shared = value["num_attention_heads"], value["num_key_value_heads"]
    if shared is not None and heads % _require_count(shared, f"{where}: num_key_value_heads"):
        raise InputError(
            f"{where}: num_key_value_heads, {shared}, does not divide num_attention_heads, {heads}; fetch the file "
            "again"
        )
    fixed = {"hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
    for name, right in (fixed | {"rms_norm_eps": QK_NORM_EPSILON}).items():
        if value[name] != right:
            raise InputError(f"{where}: {name} is {value[name]}; the decoder has only {right}")
    hidden = value["intermediate_size"]
    return ModelConfig(
        ffn="dense",
        layers=value["num_hidden_layers"],
        width=value["hidden_size"],
        heads=heads,
        kv_heads=None if shared in (None, heads) else shared,
        ffn_width=-(-3 * hidden // 2),
        hidden=hidden,
        norm="swin" if value["swin_norm"] else "pre",
        rope_theta=_rope_theta(config, where),
        norm_epsilon=QK_NORM_EPSILON,
    )


def _require_count(value: Any, what: str) -> int:
    if type(value) is not int or value < 1:
        raise InputError(f"{what} is {value!r}, not a positive whole number; fetch the file again")
    return value


def _rope_theta(config: dict[str, Any], where: str) -> float:
    """Base of the rotary frequencies: on its own, or, since transformers 5, among rope_parameters."""
    rope = _object(config, "rope_parameters", where) or _object(config, "rope_scaling", where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"{where}: rotary positions are scaled ({kind}); the decoder has only unscaled ones")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if type(theta) not in (int, float) or not theta > 0:
        raise InputError(f"{where}: rope_theta is {theta!r}, not a positive number; fetch the file again")
    return float(theta)


def _object(config: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """An object in config.json; empty where it is left out."""
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: {name} is {str(value)[:40]!r}, not an object; fetch the file again")
    return value


def sequence_of(config: dict[str, Any], where: str) -> int:
    """Positions that the model was trained on."""
    value = config.get("max_position_embeddings", DEFAULTS["max_position_embeddings"])
    return _require_count(value, f"{where}: max_position_embeddings")


# Vocabulary -----------------------------------------------------------------------------------------------------------


def names_of(config: dict[str, Any], tokenizer: dict[str, Any] | None, where: str) -> dict[str, int]:
    """Every id that has a name, by the config's vocabulary_map and the tokenizer's tokens.

    Raises:
      InputError: neither is there, or they disagree.
    """
    names = _object(config, "vocabulary_map", where)
    known = {} if tokenizer is None else tokens_of(tokenizer, where)
    if not names and not known:
        raise InputError(
            f"{where}: has no vocabulary_map, and no tokenizer.json lies beside it, so nothing says which ids are "
            "pictures; add tokenizer.json"
        )
    ids = _require_count(config.get("vocab_size", DEFAULTS["vocab_size"]), f"{where}: vocab_size")
    for name, number in [*names.items(), *known.items()]:
        if type(number) is not int or not 0 <= number < ids:
            raise InputError(f"{where}: token {name!r} has id {number!r}, which is not below vocab_size {ids}")
        if names.get(name, number) != number and name != PLACEHOLDER:  # vocabulary_map has the name of its own
            other = f"{number} in tokenizer.json; take both files from one model"
            raise InputError(f"{where}: token {name!r} is {names[name]} there, {other}")
    return {**known, **names}


def tokens_of(tokenizer: dict[str, Any], where: str) -> dict[str, Any]:
    """Ids by token of a tokenizer.json's content; InputError where it has none."""
    try:
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
        return {**tokenizer["model"]["vocab"], **added}
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: the tokenizer.json beside it has no tokens; fetch it again") from error


def vocabulary_of(config: dict[str, Any], names: dict[str, int], where: str) -> Vocabulary:
    """The id layout: image codes wherever they are among the ids, all else text.

    Raises:
      InputError: a name is missing or codes are not numbered 0 to n-1.
    """
    vision = {**VISION_DEFAULTS, **_object(config, "vq_config", where)}
    side = _require_count(vision["resolution"], f"{where}: vq_config.resolution")
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
        "hidden_size": model.width,
        "intermediate_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_heads,
        "max_position_embeddings": sequence,
        "rms_norm_eps": QK_NORM_EPSILON,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "swin_norm": model.norm == "swin",
        "tie_word_embeddings": False,
        "bos_token_id": vocabulary.begin_document,
        "eos_token_id": vocabulary.end_document,
        "pad_token_id": vocabulary.pad,
        "vq_config": {"num_embeddings": image.size, "resolution": 16 * side},
        "vocabulary_map": names,
    }
