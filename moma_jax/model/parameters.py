"""The decoder's parameters, each declared with its shape, logical axes (sharding.RULES) and initial values.

All float32; layers are stacked with a leading axis L, also where there is one (logical axes in brackets):

    embedding/kernel_VD                     [vocab, embed]
    layers/attention_norm/scale_D           [layers, norm]
    layers/attention/query_DHK              [layers, embed, heads, head]
    layers/attention/key_DHK                [layers, embed, heads, head]
    layers/attention/value_DHK              [layers, embed, heads, head]
    layers/attention/query_norm/scale_HK    [layers, heads, head]
    layers/attention/query_norm/bias_HK     [layers, heads, head]
    layers/attention/key_norm/scale_HK      [layers, heads, head]
    layers/attention/key_norm/bias_HK       [layers, heads, head]
                                            scale_K [layers, head] alone, or nothing, by model.qk_norm
    layers/attention/out_HKD                [layers, heads, head, embed]
    layers/ffn_norm/scale_D                 [layers, norm]
    layers/ffn/<group>/gate_EDF             [layers, expert, expert_embed, ffn]
    layers/ffn/<group>/up_EDF               [layers, expert, expert_embed, ffn]
    layers/ffn/<group>/down_EFD             [layers, expert, ffn, expert_embed]
    layers/ffn/<group>/router_DE            [layers, embed, -]     or the score network of another routing
                                                                   rule, where there are several experts
    layers/ffn/<group>_auxiliary/in_DA      [layers, embed, -]     where the rule has auxiliary routers; A = d/2
    layers/ffn/<group>_auxiliary/out_AE     [layers, -, -]
    final_norm/scale_D                      [norm]
    unembedding/kernel_DV                   [embed, vocab]         where it is not the embedding's table

Where modalities have attention weights of their own (model.attention_weights) each has attention, attention_norm and
ffn_norm under its name: layers/attention/text/query_DHK, layers/attention_norm/image/scale_D.

With mixture of depths (mod+4t4i) layers come in pairs, of which only some tokens enter the first: layers/even/... and
layers/odd/... have half of the layers each, and layers/depth/<router>/router_DE [layers, embed, -] decides, with
<router> "depth_<modality>", or "depth_all" (model.depth_by); its auxiliary router is layers/depth/<router>_auxiliary.

Keys and values have model.kv_heads heads, their norm, too.

<group> is a group of experts: a modality's name (1t1i, 4t4i), `all` (dense, 8x), `shared` (+1x, of N times the hidden
width, one expert), `shared_<modality>` (+1t1i).

Initial weights are normal. Embeddings have deviation 1, so that a token's own vector is not drowned by what the first
sub-layers add, which is of that size. The unembedding has 1/sqrt(d), projections 1/sqrt(fan-in), so that a unit-
variance input stays one, routers included: their logits then have unit variance, and experts differ from the start. A
table that is both has 1/sqrt(d). Projections into the residual stream are scaled by a further 1/sqrt(2L) under pre-norm
(`output_scale`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from moma_jax import sharding
from moma_jax.config import ModelConfig
from moma_jax.ffn import ExpertGroup
from moma_jax.geometry import GroupSlots
from moma_jax.model.auxiliary import SUFFIX
from moma_jax.router import Parameter, Router


class ExpertWeights(NamedTuple):
    """Weights of one group of experts, float32.

    Attributes:
      gate_EDF, up_EDF, down_EFD: projections of each expert's SwiGLU; None where the "expert" is a whole layer that a
        router lets some tokens enter (mixture of depths).
      router: the score network by name; {} where the group has one expert and no router.
      auxiliary: the auxiliary router's network by name; {} where there is none.
    """

    gate_EDF: Any = None
    up_EDF: Any = None
    down_EFD: Any = None
    router: dict[str, Any] = {}
    auxiliary: dict[str, Any] = {}


MATRICES = ("gate_EDF", "up_EDF", "down_EFD")

OWNED = ("attention", "attention_norm", "ffn_norm")
"""Parameters of a layer that modalities may have of their own (`model.attention_weights`)."""
ATTENTION_AXES = {
    "query_DHK": ("embed", "heads", "head"),
    "key_DHK": ("embed", "heads", "head"),
    "value_DHK": ("embed", "heads", "head"),
    "out_HKD": ("heads", "head", "embed"),
}
"""Logical axes of the attention's projections."""


def matrix_axes(experts: int) -> tuple[tuple[str | None, ...], ...]:
    """Logical axes of the three matrices of a group of so many experts.

    Experts live on the mesh axis "expert". A group that it does not divide is stored along it in parts of the width,
    like everything else, and each device computes the slots of its own tokens.
    """
    expert, embed = ("expert", "expert_embed") if sharding.experts_are_split(experts) else (None, "embed")
    return (expert, embed, "ffn"), (expert, embed, "ffn"), (expert, "ffn", embed)


def router_axes(rule: Router, group: ExpertGroup, width: int, auxiliary: bool) -> tuple[dict, dict]:
    """Logical axes of a group's score network and of its auxiliary router's, by name."""
    own = rule.parameters(width, group.experts) if group.routed else {}
    beside = rule.auxiliary_parameters(width, group.experts) if auxiliary else {}
    return tuple({name: parameter.axes for name, parameter in part.items()} for part in (own, beside))


def normal(fan_in: int, scale: float = 1.0):
    """Normal initialiser of standard deviation scale / sqrt(fan_in): keeps a unit-variance input at `scale`."""
    return nn.initializers.normal(scale / math.sqrt(fan_in))


def output_scale(model: ModelConfig) -> float:
    """Initial scale of projections that write into the residual stream.

    Pre-norm adds 2L outputs up, so each starts at 1/sqrt(2L) (GPT-2's rule); under swin the norm behind the sub-layer
    sets the scale.
    """
    return 1.0 / math.sqrt(2 * model.layers) if model.norm == "pre" else 1.0


class _Declares(nn.Module):
    """A module that declares parameters in its scope and returns them."""

    def weight(self, name: str, axes: tuple[str | None, ...], init, shape: tuple[int, ...]):
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)

    def network(self, parameters: dict[str, Parameter]) -> dict[str, Any]:
        """A rule's arrays by name."""
        return {
            name: self.weight(
                name,
                parameter.axes,
                nn.initializers.normal(parameter.deviation) if parameter.deviation else nn.initializers.zeros,
                parameter.shape,
            )
            for name, parameter in parameters.items()
        }


class MatrixParameters(_Declares):
    """A matrix of its own: the embedding table or the unembedding."""

    matrix: str
    axes: tuple[str, str]
    shape: tuple[int, int]
    deviation: float

    @nn.compact
    def __call__(self):
        return self.weight(self.matrix, self.axes, nn.initializers.normal(self.deviation), self.shape)


class NormParameters(_Declares):
    """Scale of one RMSNorm."""

    width: int

    @nn.compact
    def __call__(self):
        return self.weight("scale_D", ("norm",), nn.initializers.ones, (self.width,))


class QkNormParameters(_Declares):
    """What one of the two QK-norms has of its kind."""

    kind: str
    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        axes = ("heads", "head")
        if self.kind == "rms":
            return {"scale_K": self.weight("scale_K", axes[1:], nn.initializers.ones, self.shape[1:])}
        scale_HK = self.weight("scale_HK", axes, nn.initializers.ones, self.shape)
        return {"scale_HK": scale_HK, "bias_HK": self.weight("bias_HK", axes, nn.initializers.zeros, self.shape)}


class ByModality(nn.Module):
    """Parameters that modalities have of their own, by name; `make` gives each module its name."""

    make: Callable[..., nn.Module]
    projections: tuple[GroupSlots, ...]

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        return {own.group.name: self.make(name=own.group.name)() for own in self.projections}


def owned(make: Callable[..., nn.Module], projections: tuple[GroupSlots, ...], name: str):
    """What a module's parameters are under this name: one for all, or a dictionary by modality."""
    return ByModality(make, projections, name=name)() if projections else make(name=name)()


class AttentionParameters(_Declares):
    """Projections without bias, and QK-norms where it has them."""

    model: ModelConfig

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        model = self.model
        d, query, key = model.width, (model.heads, model.head_size), (model.key_heads, model.head_size)
        inits = {
            "query_DHK": (normal(d), (d, *query)),
            **dict.fromkeys(("key_DHK", "value_DHK"), (normal(d), (d, *key))),
            "out_HKD": (normal(math.prod(query), output_scale(model)), (*query, d)),
        }
        weights = {name: self.weight(name, ATTENTION_AXES[name], *init) for name, init in inits.items()}
        norms = {} if model.qk_norm == "none" else {"query_norm": query, "key_norm": key}
        return weights | {name: QkNormParameters(model.qk_norm, shape, name=name)() for name, shape in norms.items()}


class ExpertParameters(_Declares):
    """SwiGLU experts of one group, every expert drawn independently, and their score network."""

    model: ModelConfig
    group: ExpertGroup

    @nn.compact
    def __call__(self) -> ExpertWeights:
        e, d, f = self.group.experts, self.model.width, self.group.width * self.model.hidden
        gate, up, down = matrix_axes(e)
        return ExpertWeights(
            self.weight("gate_EDF", gate, normal(d), (e, d, f)),
            self.weight("up_EDF", up, normal(d), (e, d, f)),
            self.weight("down_EFD", down, normal(f, output_scale(self.model)), (e, f, d)),
            self.network(self.model.router.parameters(d, e) if self.group.routed else {}),
        )


class NetworkParameters(_Declares):
    """A rule's network by itself: an auxiliary router, or a router of mixture of depths."""

    parameters: Any

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        return self.network(dict(self.parameters))


class FfnParameters(nn.Module):
    """The feed-forward sub-layer: ExpertWeights by the name of their group."""

    model: ModelConfig
    groups: tuple[GroupSlots, ...]

    @nn.compact
    def __call__(self) -> dict[str, ExpertWeights]:
        model, groups = self.model, [own.group for own in self.groups]
        weights = {group.name: ExpertParameters(model, group, name=group.name)() for group in groups}
        if model.router.auxiliary:
            for group in (group for group in groups if group.routed):
                own = model.router.auxiliary_parameters(model.width, group.experts)
                predictor = NetworkParameters(tuple(own.items()), name=group.name + SUFFIX)()
                weights[group.name] = weights[group.name]._replace(auxiliary=predictor)
        return weights


class DepthParameters(nn.Module):
    """The routers in front of a layer that some tokens enter, by name."""

    rule: Router
    groups: tuple[GroupSlots, ...]
    width: int

    @nn.compact
    def __call__(self) -> dict[str, ExpertWeights]:
        return {own.group.name: self._router(own.group) for own in self.groups}

    def _router(self, group: ExpertGroup) -> ExpertWeights:
        auxiliary = {}
        if self.rule.auxiliary:
            own = self.rule.auxiliary_parameters(self.width, group.experts)
            auxiliary = NetworkParameters(tuple(own.items()), name=group.name + SUFFIX)()
        own = self.rule.parameters(self.width, group.experts)
        return ExpertWeights(router=NetworkParameters(tuple(own.items()), name=group.name)(), auxiliary=auxiliary)


def unembedding_of(params: Any):
    """The unembedding (D, V): its own, or the table of embeddings (`model.tied_embeddings`)."""
    return params["unembedding"]["kernel_DV"] if "unembedding" in params else params["embedding"]["kernel_VD"].T


def weights_of(params: Any) -> dict[str, ExpertWeights]:
    """The parameters of `FfnParameters` or `DepthParameters` as those return them."""
    return {
        name: ExpertWeights(
            *(own.get(matrix) for matrix in MATRICES),
            {key: value for key, value in own.items() if key not in MATRICES},
            params.get(name + SUFFIX, {}),
        )
        for name, own in params.items()
        if not name.endswith(SUFFIX)
    }
