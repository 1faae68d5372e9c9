"""Public image tokenizers to a codec's folder: safetensors of Hugging Face, or a checkpoint of torch.

Chameleon's own vqgan.ckpt and other .ckpt and .pt files are pickles in a zip archive. They alone are opened with torch,
and only with `weights_only=True`, which builds tensors and plain values and runs nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from moma_jax.codec.folder import write_codec
from moma_jax.codec.layouts import NAMINGS, Naming, inferred, naming_of, places
from moma_jax.codec.network import VqganConfig
from moma_jax.codec.vqgan import VqganCodec
from moma_jax.convert.weights import DTYPES, Weights, new_directory, open_file, open_weights, read_json
from moma_jax.errors import InputError
from moma_jax.fields import read

DIFFUSERS = "diffusion_pytorch_model.safetensors"
"""What diffusers calls a model's file."""
PREFIXES = ("model.vqmodel.", "gen_vision_model.", "vqmodel.", "first_stage_model.", "")
"""What stands before the tensors of a tokenizer inside a larger model's."""
IGNORED = ("loss.", "quantize.embedding_ema", "quantize.cluster", "quantize.codebook_used")
"""Tensors that training alone needs."""
WITHOUT_DECODER = ("post_quant_conv.",)
"""What stays behind of a decoder that was left out."""
BY_NAMING = {"taming": "neither", "janus": "both", "llamagen": "both", "diffusers": "neither"}
"""`VqganConfig.unit_length`, which no tensor tells, by naming."""


class Tensors(NamedTuple):
    """Tensors of a checkpoint: their shapes by name, prefix cut off, and how one is read."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def import_codec(
    path: str,
    out: str,
    *,
    side: int | None = None,
    unit_length: str | None = None,
    lowest: float | None = None,
) -> VqganCodec:
    """Makes the folder `out` of a public image tokenizer; all or nothing of it is written.

    Args:
      path: a folder of Hugging Face (Chameleon, Janus, aMUSEd's vqvae), a safetensors file, or a .ckpt or .pt of torch.
      side: pixels of a side of its pictures; None: what the config.json beside it says.
      unit_length, lowest: as of `VqganConfig`; None: as its family has them.

    Raises:
      InputError: it is no such tokenizer; the first tensor that is missing, misshapen or unknown is named.
    """
    tensors = _of_checkpoint(Path(path)) if path.endswith((".ckpt", ".pt", ".pth")) else _of_safetensors(Path(path))
    described, side_beside = _described(Path(path))
    asked = {name: value for name, value in (("unit_length", unit_length), ("lowest", lowest)) if value is not None}
    side_of = side_beside if side is None else lambda levels: side
    try:
        codec = codec_of_tensors(tensors, side_of, **{**described, **asked})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    with new_directory(out) as folder:
        write_codec(str(folder), codec)
    return codec


def codec_of_tensors(tensors: Tensors, side_of: Callable[[int], Any], **known: Any) -> VqganCodec:
    """The codec that tensors make.

    Args:
      side_of: pixels of a side of its pictures in a network of so many levels; None where nobody knows.
      known: fields of `VqganConfig` that no tensor tells.

    Raises:
      InputError: they are of no VQGAN, or a tensor is missing, misshapen or unknown.
    """
    named = naming_of(tensors.shapes)
    if named is None:
        raise InputError("no tensor encoder.*.conv1.weight of a VQGAN; give an image tokenizer of a kind that is known")
    naming = NAMINGS[named]
    config = inferred(tensors.shapes, naming, 1, **{"unit_length": BY_NAMING[named], **known})
    if (side := side_of(len(config.multipliers))) is None:
        raise InputError("nothing beside it says how large its pictures are; give --side (Chameleon: 512)")
    config = read(VqganConfig, dataclasses.asdict(config) | {"side": side}, "codec").check()
    return VqganCodec(config, _parameters(config, naming, tensors))


def _parameters(config: VqganConfig, naming: Naming, tensors: Tensors) -> dict[str, Any]:
    """Every parameter of the network from its tensor, float32; InputError names the first that does not fit."""
    wanted = places(config, naming)
    for place in wanted:
        found = tensors.shapes.get(place.name)
        if found is None:
            raise InputError(f"tensor {place.name} is missing; fetch the file again")
        if found != place.shape:
            raise InputError(f"tensor {place.name} has shape {found}, not {place.shape}; it is of another architecture")
    ignored = IGNORED if config.decoder else (*IGNORED, *WITHOUT_DECODER)
    unknown = sorted(name for name in tensors.shapes.keys() - {p.name for p in wanted} if not name.startswith(ignored))
    if unknown:
        raise InputError(f"tensor {unknown[0]} has no place in the network; it is of another architecture")
    return unflatten_dict({p.path: p.to_ours(_value(p.name, tensors)) for p in wanted})


def _value(name: str, tensors: Tensors) -> np.ndarray:
    """A tensor in float32; InputError where it is no weight."""
    value = tensors.read(name)
    if value.dtype not in DTYPES.values():
        raise InputError(f"tensor {name} is {value.dtype}; give weights in {', '.join(map(str, DTYPES.values()))}")
    value = value.astype(np.float32)
    if not np.isfinite(value).all():
        raise InputError(f"tensor {name} has values that are no numbers; fetch the file again")
    return value


def _described(path: Path) -> tuple[dict[str, Any], Callable[[int], Any]]:
    """What the config.json of Hugging Face beside it tells and no tensor does: fields of VqganConfig, and the pixels of
    a side in a network of so many levels, None where it does not say."""
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    vision = config.get("vq_config") if isinstance(config.get("vq_config"), dict) else {}
    match config.get("model_type"), config.get("_class_name"):
        case "chameleon", _:
            return {}, lambda levels: vision.get("resolution", 512)
        case "janus", _:
            patches = vision.get("num_patches", 32)
            return {}, lambda levels: patches << (levels - 1) if type(patches) is int else None
        case _, "VQModel":  # its sample_size is not the picture's
            lowest = 0.0 if config.get("lookup_from_codebook") else -1.0  # aMUSEd's pictures are from 0 to 1
            return {"lowest": lowest, "norm_groups": config.get("norm_num_groups", 32)}, lambda levels: None
    return {}, lambda levels: None


def _of_safetensors(path: Path) -> Tensors:
    """The tokenizer's tensors of a folder, or of one file."""
    if path.is_file():
        weights = open_file(path)
    else:
        weights = open_file(path / DIFFUSERS) if (path / DIFFUSERS).is_file() else open_weights(path)
    return tensors_of(weights, _prefix(weights.tensors))


def tensors_of(weights: Weights, prefix: str) -> Tensors:
    """The tensors whose names begin so."""
    shapes = {name.removeprefix(prefix): t.shape for name, t in weights.tensors.items() if name.startswith(prefix)}
    return Tensors(shapes, lambda name: weights.read(prefix + name))


def _of_checkpoint(path: Path) -> Tensors:
    """The tensors of a torch checkpoint, on their own or under `state_dict` or `model`."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f'{path}: reading it needs torch; install it with: pip install "moma_jax[reference]"'
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # of zip archives, of pickles that want more than weights
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError(f"{path}: no checkpoint of weights alone: {reason}") from error
    for name in ("state_dict", "model"):
        content = content[name] if isinstance(content, Mapping) and isinstance(content.get(name), Mapping) else content
    content = content if isinstance(content, Mapping) else {}
    found = {n: t for n, t in content.items() if isinstance(n, str) and isinstance(t, torch.Tensor)}
    prefix = _prefix(found)
    shapes = {name.removeprefix(prefix): tuple(t.shape) for name, t in found.items() if name.startswith(prefix)}
    return Tensors(shapes, lambda name: _numpy(found[prefix + name]))


def _numpy(tensor: Any) -> np.ndarray:
    """A tensor of torch, which has bfloat16 and NumPy has not."""
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _prefix(tensors: Mapping[str, Any]) -> str:
    """What stands before the tokenizer's tensors."""
    return next((prefix for prefix in PREFIXES if f"{prefix}encoder.conv_in.weight" in tensors), "")
