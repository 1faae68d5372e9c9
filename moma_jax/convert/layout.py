"""Checkpoints of Hugging Face as dense decoders: which tensor is which parameter, and what their config.json share.

    h = x + attn(norm1(x));  out = h + ffn(norm2(h))      norm "pre": Llama, Qwen3, Chameleon-7B
    h = x + norm1(attn(x));  out = h + norm2(ffn(h))      norm "swin": Chameleon-34B

In all, norm1 is input_layernorm and norm2 post_attention_layernorm. A projection is stored (out, in), ours (in, out)
with heads apart. Queries and keys need no reordering: both sides turn channel k with k + K/2.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from moma_jax.config import ModelConfig, RopeScaling
from moma_jax.convert.weights import DTYPES, Weights
from moma_jax.errors import InputError

# Tensors --------------------------------------------------------------------------------------------------------------

LAYER = {
    "input_layernorm.weight": ("layers/attention_norm/scale_D", "D"),
    "self_attn.q_proj.weight": ("layers/attention/query_DHK", "HK D"),
    "self_attn.k_proj.weight": ("layers/attention/key_DHK", "GK D"),
    "self_attn.v_proj.weight": ("layers/attention/value_DHK", "GK D"),
    "self_attn.o_proj.weight": ("layers/attention/out_HKD", "D HK"),
    "post_attention_layernorm.weight": ("layers/ffn_norm/scale_D", "D"),
    "mlp.gate_proj.weight": ("layers/ffn/all/gate_EDF", "F D"),
    "mlp.up_proj.weight": ("layers/ffn/all/up_EDF", "F D"),
    "mlp.down_proj.weight": ("layers/ffn/all/down_EFD", "D F"),
}
"""Tensor of a layer -> (parameter, the tensor's axes); E, the experts of the dense group, is 1. G are the heads of
keys, which parameters, too, call H."""
QK_NORM = {
    "layer": {
        "self_attn.q_norm.weight": ("layers/attention/query_norm/scale_HK", "H K"),
        "self_attn.q_norm.bias": ("layers/attention/query_norm/bias_HK", "H K"),
        "self_attn.k_norm.weight": ("layers/attention/key_norm/scale_HK", "G K"),
        "self_attn.k_norm.bias": ("layers/attention/key_norm/bias_HK", "G K"),
    },
    "rms": {
        "self_attn.q_norm.weight": ("layers/attention/query_norm/scale_K", "K"),
        "self_attn.k_norm.weight": ("layers/attention/key_norm/scale_K", "K"),
    },
    "none": {},
}
"""The same by `model.qk_norm`."""
FIRST = {"model.embed_tokens.weight": ("embedding/kernel_VD", "V D"), "model.norm.weight": ("final_norm/scale_D", "D")}
LAST = {"lm_head.weight": ("unembedding/kernel_DV", "V D")}
"""Where the embeddings are not tied."""


class Place(NamedTuple):
    """Where a tensor lies among the parameters.

    Attributes:
      parameter: its path; layers are stacked, so `layer` is the index into it, None outside of them.
      shape: the tensor's. ours: shape of the parameter, or of its layer.
      projection: whether it is stored (out, in); norms and the embedding table lie as ours do.
      first: of a table of ids, which one of ours the tensor's first is.
    """

    parameter: str
    layer: int | None
    shape: tuple[int, ...]
    ours: tuple[int, ...]
    projection: bool
    first: int | None = None

    @property
    def index(self) -> Any:
        """The tensor's part of the parameter."""
        if self.first is None:
            return ... if self.layer is None else self.layer
        ids = slice(self.first, self.first + self.shape[0])
        return (slice(None), ids) if self.projection else ids

    def to_ours(self, value: np.ndarray) -> np.ndarray:
        """A tensor as its part of the parameter."""
        value = value.T if self.projection else value
        return value if self.first is not None else value.reshape(self.ours)

    def from_ours(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        return value.reshape(self.shape[::-1]).T if self.projection else value.reshape(self.shape)


def places(model: ModelConfig, ids: int, first: int = 0, own_ids: int | None = None) -> dict[str, Place]:
    """Every tensor of a decoder by name, in the order of its layers.

    Args:
      ids: of its vocabulary. first, own_ids: which one of ours its first is, and how many we have; None: the same.
    """
    size = {"V": ids, "D": model.width, "F": model.hidden, "E": 1}
    size |= {"H": model.heads, "G": model.key_heads, "K": model.head_size}

    def place(parameter: str, axes: str, layer: int | None) -> Place:
        own = parameter.rpartition("_")[2]
        own = own.replace("H", "G") if "G" in axes else own
        shape = tuple(math.prod(size[axis] for axis in letters) for letters in axes.split())
        projection = axes.replace(" ", "") != own.replace("E", "")
        ours = tuple(size[axis] if axis != "V" else own_ids or ids for axis in own)
        return Place(parameter, layer, shape, ours, projection, first if "V" in axes else None)

    found = {name: place(*where, None) for name, where in FIRST.items()}
    for layer in range(model.layers):
        own = LAYER | QK_NORM[model.qk_norm]
        found |= {f"model.layers.{layer}.{name}": place(*where, layer) for name, where in own.items()}
    last = {} if model.tied_embeddings else LAST
    return found | {name: place(*where, None) for name, where in last.items()}


def shapes(model: ModelConfig, places: dict[str, Place]) -> dict[str, tuple[int, ...]]:
    """The decoder's parameters by path, layers stacked."""
    layers = (model.layers,)
    return {p.parameter: p.ours if p.layer is None else layers + p.ours for p in places.values()}


def require_tensors(weights: Weights, places: dict[str, Place], others: tuple[str, ...] = ()) -> Weights:
    """The weights; InputError unless they are each tensor of the decoder, in its shape, and else only such whose names
    begin or end as one of `others`."""
    for name, place in places.items():
        tensor = weights.tensors.get(name)
        if tensor is None:
            raise InputError(f"{weights.folder}: tensor {name} is missing; fetch the folder again")
        if tensor.shape != place.shape:
            shapes = f"{list(tensor.shape)}, by config.json {list(place.shape)}"
            raise InputError(f"{weights.folder}: tensor {name} has shape {shapes}; use weights and config of one model")
    for name, tensor in sorted(weights.tensors.items()):
        if name not in places and not name.startswith(others) and not name.endswith(others):
            raise InputError(f"{weights.folder}: tensor {name} is no part of the model that config.json describes")
        if tensor.dtype not in DTYPES:
            raise InputError(f"{weights.folder}: tensor {name} is {tensor.dtype}; give weights in {', '.join(DTYPES)}")
    return weights


# What config.json says ------------------------------------------------------------------------------------------------

LLAMA3 = {"factor": "factor", "low_freq_factor": "low", "high_freq_factor": "high"}
"""Names of Llama 3's scaling of rotary positions, by ours."""
MOST_LAYERS = 1000
"""Of a decoder; all its tensors are listed before the first is read."""
POSITIONS = "original_max_position_embeddings"


def decoder_fields(value: dict[str, Any], where: str) -> dict[str, Any]:
    """Fields of ModelConfig that every family of decoders states alike; `value`: config.json with its defaults.

    Raises:
      InputError: one that no decoder has.
    """
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        require_count(value[name], f"{where}: {name}")
    if value["num_hidden_layers"] > MOST_LAYERS:
        raise InputError(f"{where}: num_hidden_layers is {value['num_hidden_layers']}, more than {MOST_LAYERS}")
    heads, shared = value["num_attention_heads"], value["num_key_value_heads"]
    if shared is not None and heads % require_count(shared, f"{where}: num_key_value_heads"):
        raise InputError(
            f"{where}: num_key_value_heads, {shared}, does not divide num_attention_heads, {heads}; fetch the file "
            "again"
        )
    theta, scaling = _rope(value, where)
    hidden = value["intermediate_size"]
    return {
        "ffn": "dense",
        "layers": value["num_hidden_layers"],
        "width": value["hidden_size"],
        "heads": heads,
        "kv_heads": None if shared in (None, heads) else shared,
        "ffn_width": -(-3 * hidden // 2),
        "hidden": hidden,
        "rope_theta": theta,
        "rope_scaling": scaling,
    }


def decoder_described(model: ModelConfig) -> dict[str, Any]:
    """What `decoder_fields` reads."""
    rope, scaling = {"rope_type": "default", "rope_theta": model.rope_theta}, model.rope_scaling
    if scaling is not None:
        named = {theirs: float(getattr(scaling, ours)) for theirs, ours in LLAMA3.items()}
        rope |= {"rope_type": "llama3", **named, POSITIONS: scaling.positions}
    return {
        "hidden_act": "silu",
        "hidden_size": model.width,
        "intermediate_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_heads,
        "rope_theta": model.rope_theta,
        "rope_parameters": rope,
    }


def require_count(value: Any, what: str) -> int:
    """The value; InputError where it is no positive whole number."""
    if type(value) is not int or not 0 < value < 1 << 31:
        raise InputError(f"{what} is {value!r}, not a positive whole number; fetch the file again")
    return value


def _rope(config: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base of the rotary frequencies, on its own or, since transformers 5, among rope_parameters; and their scaling."""
    both = [object_in(config, name, where) for name in ("rope_parameters", "rope_scaling")]
    kinds = {own.get("rope_type", own.get("type", "default")) for own in both if own}
    if len(kinds) > 1:
        raise InputError(f"{where}: rope_parameters and rope_scaling disagree; keep the one that is right")
    rope = both[0] or both[1]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise InputError(f"{where}: rotary positions are scaled ({kind}); the decoder has only those of Llama 3")
    theta = require_positive(rope.get("rope_theta", config.get("rope_theta", 10000.0)), f"{where}: rope_theta")
    if kind == "default":
        return theta, None
    named = {ours: require_positive(rope.get(theirs), f"{where}: {theirs}") for theirs, ours in LLAMA3.items()}
    return theta, RopeScaling(positions=require_count(rope.get(POSITIONS), f"{where}: {POSITIONS}"), **named)


def require_positive(value: Any, what: str) -> float:
    """The value as a float; InputError where it is no positive number."""
    if type(value) not in (int, float) or not 0 < value < 1e300:
        raise InputError(f"{what} is {value!r}, not a positive number; fetch the file again")
    return float(value)


def object_in(config: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """An object in config.json; empty where it is left out."""
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: {name} is {str(value)[:40]!r}, not an object; fetch the file again")
    return value


def tokens_of(tokenizer: dict[str, Any], where: str) -> dict[str, Any]:
    """Ids by token of a tokenizer.json's content; InputError where it has none."""
    try:
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
        return {**tokenizer["model"]["vocab"], **added}
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: the tokenizer.json beside it has no tokens; fetch it again") from error
