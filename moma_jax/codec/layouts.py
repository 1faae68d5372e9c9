"""Which tensor of a public checkpoint is which parameter of the VQGAN.

Four ways of naming the same network: taming-transformers' (Chameleon's vqgan.ckpt, and transformers' Chameleon, which
lacks the decoder), transformers' Janus (the decoder's levels numbered as they run), LlamaGen's (and Janus' own), and
diffusers' (aMUSEd). Convolutions are stored (out, in, height, width), ours (height, width, in, out).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from moma_jax.codec.network import MOST, Vqgan, VqganConfig
from moma_jax.errors import require


class Naming(NamedTuple):
    """How a family of checkpoints calls the parts of the network; `{n}` level, `{b}` block of it or in the middle,
    the latter also as `{m}`, from 1, or `{e}`, by twos.

    Attributes:
      down, up: block of a level of the encoder, of the decoder. down_attention, up_attention: what follows it.
      halve, double: the convolutions between levels. middle: block in the middle; middle_attention.
      shortcut, query, key, value, out: inside a block, inside attention. norm: inside attention.
      norm_out: the last norm. reversed_up: the decoder's levels are numbered from the smallest.
      linear: attention's projections are matrices (out, in), no convolutions.
    """

    down: str
    down_attention: str
    halve: str
    middle: str
    middle_attention: str
    up: str
    up_attention: str
    double: str
    shortcut: str = "nin_shortcut"
    norm: str = "norm"
    query: str = "q"
    key: str = "k"
    value: str = "v"
    out: str = "proj_out"
    norm_out: str = "norm_out"
    reversed_up: bool = False
    linear: bool = False


TAMING = Naming(
    down="down.{n}.block.{b}",
    down_attention="down.{n}.attn.{b}",
    halve="down.{n}.downsample.conv",
    middle="mid.block_{m}",
    middle_attention="mid.attn_1",
    up="up.{n}.block.{b}",
    up_attention="up.{n}.attn.{b}",
    double="up.{n}.upsample.conv",
)
JANUS = TAMING._replace(reversed_up=True)
DIFFUSERS = Naming(
    down="down_blocks.{n}.resnets.{b}",
    down_attention="down_blocks.{n}.attentions.{b}",
    halve="down_blocks.{n}.downsamplers.0.conv",
    middle="mid_block.resnets.{b}",
    middle_attention="mid_block.attentions.0",
    up="up_blocks.{n}.resnets.{b}",
    up_attention="up_blocks.{n}.attentions.{b}",
    double="up_blocks.{n}.upsamplers.0.conv",
    shortcut="conv_shortcut",
    norm="group_norm",
    query="to_q",
    key="to_k",
    value="to_v",
    out="to_out.0",
    norm_out="conv_norm_out",
    reversed_up=True,
    linear=True,
)
LLAMAGEN = Naming(
    down="conv_blocks.{n}.res.{b}",
    down_attention="conv_blocks.{n}.attn.{b}",
    halve="conv_blocks.{n}.downsample.conv",
    middle="mid.{e}",
    middle_attention="mid.1",
    up="conv_blocks.{n}.res.{b}",
    up_attention="conv_blocks.{n}.attn.{b}",
    double="conv_blocks.{n}.upsample.conv",
    reversed_up=True,
)
NAMINGS = {"taming": TAMING, "janus": JANUS, "llamagen": LLAMAGEN, "diffusers": DIFFUSERS}


class Place(NamedTuple):
    """A tensor's name, and the shape that the parameter at `path` calls for."""

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]

    def to_ours(self, value: np.ndarray) -> np.ndarray:
        """The tensor as the parameter."""
        if self.path[-1] != "kernel":
            return value
        return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T[None, None]


def abstract_parameters(config: VqganConfig) -> dict[str, Any]:
    """Shapes and types of the network's parameters."""
    picture = jax.ShapeDtypeStruct((1, config.side, config.side, 3), "float32")
    return jax.eval_shape(lambda x: Vqgan(config).init(jax.random.key(0), x), picture)["params"]


def places(config: VqganConfig, naming: Naming) -> list[Place]:
    """Every parameter's tensor, in the order of their names."""
    found = []
    for path, leaf in flatten_dict(abstract_parameters(config)).items():
        found.append(Place(_name(path, config, naming), path, _stored(path, leaf.shape, naming)))
    return sorted(found)


def _stored(path: tuple[str, ...], shape: tuple[int, ...], naming: Naming) -> tuple[int, ...]:
    """A tensor's shape from its parameter's."""
    if path[-1] != "kernel":
        return shape
    height, width, inner, outer = shape
    attention = any(part.startswith("attention") for part in path)
    return (outer, inner) if attention and naming.linear else (outer, inner, height, width)


def _name(path: tuple[str, ...], config: VqganConfig, naming: Naming) -> str:
    """The tensor of a parameter."""
    match path:
        case ("codebook_VC",):
            return "quantize.embedding.weight"
        case ("before" | "after" as which, leaf):
            return f"{'quant_conv' if which == 'before' else 'post_quant_conv'}.{_leaf(leaf)}"
    half, *inside, leaf = path
    parts = [part for part in inside if part != "norm"]  # flax's group norm inside our module of another name
    return ".".join([half, *_parts(half, parts, config, naming), _leaf(leaf)])


def _leaf(leaf: str) -> str:
    return "bias" if leaf == "bias" else "weight"


def _parts(half: str, parts: list[str], config: VqganConfig, naming: Naming) -> Iterator[str]:
    """The names of the modules on the way to a parameter."""
    first, *rest = parts
    kind, _, number = first.partition("_")
    match kind:
        case "level":
            inner, block = rest[0].split("_")
            template = f"{'down' if half == 'encoder' else 'up'}{'_attention' if inner == 'attention' else ''}"
            yield getattr(naming, template).format(n=_level(half, int(number), config, naming), b=block)
            yield from _inside(inner, rest[1:], naming)
        case "down" | "up":
            template = naming.halve if kind == "down" else naming.double
            yield template.format(n=_level(half, int(number), config, naming))
        case "middle":
            inner, _, block = rest[0].partition("_")
            if inner == "attention":
                yield naming.middle_attention
            else:
                yield naming.middle.format(b=block, m=int(block) + 1, e=2 * int(block))
            yield from _inside(inner, rest[1:], naming)
        case "norm":
            yield naming.norm_out
        case _:
            yield first


def _level(half: str, number: int, config: VqganConfig, naming: Naming) -> int:
    return len(config.multipliers) - 1 - number if half == "decoder" and naming.reversed_up else number


def _inside(block: str, rest: list[str], naming: Naming) -> Iterator[str]:
    """The names inside a block or attention."""
    if block == "attention":
        yield getattr(naming, rest[0]) if rest else naming.norm
    else:
        yield naming.shortcut if rest[0] == "shortcut" else rest[0]


# What a checkpoint holds ----------------------------------------------------------------------------------------------


def naming_of(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """How a checkpoint calls its tensors, a key of NAMINGS; None where it is no VQGAN."""
    for name, naming in NAMINGS.items():
        if f"encoder.{naming.down.format(n=0, b=0)}.conv1.weight" in shapes:
            # taming's first level of the decoder is the full picture, behind which nothing is doubled; Janus' the last.
            return "janus" if name == "taming" and "decoder.up.0.upsample.conv.weight" in shapes else name
    return None


def inferred(shapes: Mapping[str, tuple[int, ...]], naming: Naming, side: int, **known: Any) -> VqganConfig:
    """The network that tensors of these names and shapes are of.

    Args:
      side: pixels of its pictures, which no tensor tells. known: other fields that none does.

    Raises:
      InputError: a tensor that says how large the network is is missing.
    """

    def shape(name: str, rank: int = 4) -> tuple[int, ...]:
        require(name in shapes, f"tensor {name} is missing; fetch the file again")
        found = shapes[name]
        require(len(found) == rank and min(found) > 0, f"tensor {name} has shape {found}; it is of no VQGAN")
        return found

    def numbers(template: str) -> list[tuple[int, int]]:
        """(level, block) of all tensors below a template."""
        pattern = re.escape(f"encoder.{template}.").replace(r"\{n\}", "([0-9]+)").replace(r"\{b\}", "([0-9]+)")
        return [tuple(map(int, found.groups())) for name in shapes if (found := re.match(pattern, name))]

    blocks, attention = numbers(naming.down), numbers(naming.down_attention)
    most = max(map(max, [*blocks, *attention]))
    require(most < MOST, f"it has tensors of level or block {most}, and a VQGAN fewer than {MOST}")
    channels = shape("encoder.conv_in.weight")[0]
    first = [f"encoder.{naming.down.format(n=n, b=0)}.conv1.weight" for n in range(1 + max(n for n, _ in blocks))]
    codebook, width = shape("quantize.embedding.weight", 2)
    return VqganConfig(
        side=side,
        channels=channels,
        multipliers=tuple(max(1, shape(name)[0] // channels) for name in first),
        blocks=1 + max(block for _, block in blocks),
        attention_levels=tuple(sorted({level for level, _ in attention})),
        middle_attention=any(name.startswith(f"encoder.{naming.middle_attention}.") for name in shapes),
        latent=shape("encoder.conv_out.weight")[0],
        codebook=codebook,
        code_width=width,
        decoder=any(name.startswith("decoder.") for name in shapes),
        **known,
    )
