"""One Chameleon layer: attention and feed-forward, each with its norm (paper sections 2.1 and 2.2).

`block` is the only forward pass of a layer. The caller says how tokens attend (whole rows, or new tokens and a cache)
and how experts compute (all slots, or what tokens enter): `Layer` for training and evaluation, model/decode.py for
cached decoding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moma_jax import sharding
from moma_jax.config import ModelConfig
from moma_jax.geometry import GroupSlots, LayerShape
from moma_jax.model import moe
from moma_jax.model.attention import attend_rows
from moma_jax.model.kernels import splash
from moma_jax.model.moe import RoutingKeys, RoutingTokens, layer_routing
from moma_jax.model.parameters import AttentionParameters, FfnParameters, NormParameters, owned
from moma_jax.model.precision import wide
from moma_jax.sharding import EXPERT, FSDP


def block(x_BSD, weights: dict[str, Any], attend: Callable, experts: Callable, model: ModelConfig, dropout=None):
    """One layer.

    Args:
      weights: "attention_norm" and "ffn_norm", scales (D,) or each token's own (B, S, D); what else the callables need
        they know.
      attend: activations -> (activations, memory). experts: activations -> (activations, result of routing).
      dropout: (activations, number of the sub-layer) -> activations; None: none.

    Returns:
      (x_BSD, memory, result).
    """
    drop = dropout or (lambda y_BSD, _: y_BSD)

    def sub_layer(x_BSD, body, scale, number):
        if model.norm == "pre":  # Chameleon-7B
            y_BSD, result = body(rms_norm(x_BSD, scale, model.norm_epsilon))
        else:  # swin: Chameleon-34B, MoMa
            y_BSD, result = body(x_BSD)
            y_BSD = rms_norm(y_BSD, scale, model.norm_epsilon)
        return x_BSD + drop(y_BSD, number), result

    with jax.named_scope("attention"):
        x_BSD, memory = sub_layer(x_BSD, attend, weights["attention_norm"], 1)
    with jax.named_scope("moe"):
        x_BSD, result = sub_layer(x_BSD, experts, weights["ffn_norm"], 2)
    return x_BSD, memory, result


def rms_norm(x_BSD, scale, epsilon: float):
    """Root-mean-square norm over the width, in float32, back in the dtype of x; `scale` is (D,) or (B, S, D)."""
    wide_BSD = wide(x_BSD)
    square_BS1 = jnp.square(wide_BSD).mean(-1, keepdims=True)
    return (wide_BSD * jax.lax.rsqrt(square_BS1 + epsilon) * scale).astype(x_BSD.dtype)


def scale_of(scales: Any, projections: tuple[GroupSlots, ...], modality_BS):
    """A norm's scale (D,), or, where modalities have their own, that of each token (B, S, D); padding has 0."""
    if not projections:
        return scales
    own_BSD = (
        jnp.where((modality_BS == own.group.modalities[0])[..., None], scales[own.group.name], 0.0)
        for own in projections
    )
    return sum(own_BSD)


class Context(NamedTuple):
    """What every layer sees alike: the rows, rotary angles, what routing knows of tokens, PRNG keys of the fixed jitter
    and of this step, the size of routers' noise."""

    segment_BS: Any
    position_BS: Any
    angles: Any
    tokens: RoutingTokens
    jitter_key: Any
    step_key: Any
    noise: Any


class Layer(nn.Module):
    """`block` on whole rows, in training and evaluation.

    Attributes:
      shape: quotas and slots of its experts. causal: name of a causal routing; None: the rule's of training.
    """

    model: ModelConfig
    shape: LayerShape
    group_rows: int
    causal: str | None
    train: bool
    return_selections: bool

    @nn.compact
    def __call__(self, x_BSD, scanned, context: Context):
        number, state = scanned
        model, key = self.model, jax.random.fold_in(context.step_key, number)
        projections, modality_BS = self.shape.projections, context.tokens.modality_GT.reshape(x_BSD.shape[:2])
        norm = functools.partial(NormParameters, model.width)
        weights = {
            "attention": owned(functools.partial(AttentionParameters, model), projections, "attention"),
            "ffn": FfnParameters(model, self.shape.groups, name="ffn")(),
        }
        for name in ("attention_norm", "ffn_norm"):
            weights[name] = scale_of(owned(norm, projections, name), projections, modality_BS)
        jitter = jax.random.bits(jax.random.fold_in(context.jitter_key, number))
        keys = RoutingKeys(jitter, jax.random.fold_in(key, 0), context.noise)
        routing = layer_routing(model, self.shape, self.group_rows, self.causal, self.train)

        def attend(y_BSD):
            rows = context.segment_BS, context.position_BS, context.angles
            sort = (projections, context.tokens.by_modality) if projections else None
            return attend_rows(y_BSD, weights["attention"], *rows, model, sort), None

        def experts(y_BSD):
            y_GTD = y_BSD.reshape(-1, self.group_rows * y_BSD.shape[1], model.width)
            arguments = (y_GTD, context.tokens, keys, state, weights["ffn"])
            y_GTD, result = moe.moe(*arguments, routing=routing, model=model)
            return y_GTD.reshape(y_BSD.shape), result

        def dropout(y_BSD, which):
            return self.dropout(y_BSD, context.tokens.group_G, jax.random.fold_in(key, which))

        x_BSD, _, result = block(x_BSD, weights, attend, experts, model, dropout)
        return x_BSD, result if self.return_selections else result._replace(selections=None)

    def dropout(self, y_BSD, group_G, key):
        """Dropout on a sub-layer's output, drawn per routing group so that microbatches draw the same."""
        rate = self.model.dropout
        if not self.train or rate == 0.0:
            return y_BSD
        y_GX = y_BSD.reshape(group_G.shape[0], -1)
        keep_GX = jax.vmap(lambda g: jax.random.bernoulli(jax.random.fold_in(key, g), 1 - rate, y_GX.shape[1:]))(
            group_G
        )
        return jnp.where(keep_GX, y_GX / (1 - rate), 0).astype(y_BSD.dtype).reshape(y_BSD.shape)


def rematerialised(policy: str):
    """The layer, with the named remat policy: what the backward pass keeps of it.

    Who was taken is never decided anew, or by the same logits. Weights that are stored in parts are always gathered
    anew: kept, the model would lie whole on every device.
    """
    match policy:
        case "none" if sharding.size(FSDP, EXPERT) == 1:
            return Layer
        case "none":
            return nn.remat(Layer, prevent_cse=False, policy=_all_but_gathered)
        case "dots":
            return nn.remat(Layer, prevent_cse=False, policy=_weight_products)
        case "full":
            return nn.remat(Layer, prevent_cse=False, policy=_choices)


def _all_but_gathered(primitive, *_, **__) -> bool:
    return primitive.name != "all_gather"


def _choices(primitive, *_, **parameters) -> bool:
    return primitive.name == "top_k" or parameters.get("name") == moe.LOGITS


def _weight_products(primitive, *_, **parameters) -> bool:
    """True for products with weights, the experts' batch included, and for slots that travelled; attention's scores, a
    product for each row and head, are made anew: kept, they would outweigh everything else."""
    if primitive.name == "dot_general":
        return len(parameters["dimension_numbers"][1][0]) <= 1
    kept = (splash.KEPT, moe.KEPT, moe.LOGITS)
    return primitive.name in ("top_k", "all_to_all") or parameters.get("name") in kept
