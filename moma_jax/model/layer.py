"""One Chameleon layer: attention and feed-forward, each with its norm, and what the backward pass keeps of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moma_jax import sharding
from moma_jax.config import ModelConfig
from moma_jax.model import experts, fused_attention
from moma_jax.model.attention import Attention
from moma_jax.model.experts import Drawn, Ffn, Place, Rules
from moma_jax.model.precision import wide
from moma_jax.sharding import EXPERT, FSDP


def rms_norm(x_BSD, scale_D, epsilon: float):
    """Root-mean-square norm over the width, in float32, back in the dtype of x."""
    wide_BSD = wide(x_BSD)
    square_BS1 = jnp.square(wide_BSD).mean(-1, keepdims=True)
    return (wide_BSD * jax.lax.rsqrt(square_BS1 + epsilon) * scale_D).astype(x_BSD.dtype)


def sub_layer(x_BSD, body: Callable, norm: Callable, pre: bool, dropout: Callable = lambda y: y):
    """x plus a sub-layer with its norm before it (pre: Chameleon-7B) or behind it (swin: Chameleon-34B, MoMa).

    `body` maps activations to (activations, whatever else it has to say); returns the same.
    """
    y_BSD, said = body(norm(x_BSD) if pre else x_BSD)
    return x_BSD + dropout(y_BSD if pre else norm(y_BSD)), said


class RmsNorm(nn.Module):
    """`rms_norm` with its parameter."""

    epsilon: float

    @nn.compact
    def __call__(self, x_BSD):
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        return rms_norm(x_BSD, self.param("scale_D", ones, x_BSD.shape[-1:], jnp.float32), self.epsilon)


class Common(NamedTuple):
    """What every layer sees alike."""

    segment_BS: Any
    position_BS: Any
    angles: Any
    place: Place
    jitter_key: Any
    step_key: Any


class Layer(nn.Module):
    """One Chameleon layer. Norms behind the sub-layers (swin: Chameleon-34B, MoMa) or before them (pre)."""

    model: ModelConfig
    rules: Rules
    shared: int
    group_rows: int
    train: bool
    return_selections: bool

    @nn.compact
    def __call__(self, x_BSD, scanned, common: Common):
        number, state = scanned
        model, pre = self.model, self.model.norm == "pre"
        key = jax.random.fold_in(common.step_key, number)

        def through(x_BSD, body, norm, which):
            norm = RmsNorm(model.norm_epsilon, name=norm)
            dropout_key = jax.random.fold_in(key, which)
            return sub_layer(x_BSD, body, norm, pre, lambda y: self.dropout(y, common.place.group_G, dropout_key))

        def attend(y_BSD):
            attention = Attention(model, name="attention")
            return attention(y_BSD, common.segment_BS, common.position_BS, common.angles), None

        def feed_forward(y_BSD):
            y_GTD = y_BSD.reshape(-1, self.group_rows * y_BSD.shape[1], model.width)
            ffn = Ffn(model, self.rules, self.shared, self.train, name="ffn")(y_GTD, common.place, drawn, state)
            return ffn.y_GTD.reshape(y_BSD.shape), ffn

        drawn = Drawn(jax.random.bits(jax.random.fold_in(common.jitter_key, number)), jax.random.fold_in(key, 0))
        x_BSD, _ = through(x_BSD, attend, "attention_norm", 1)
        x_BSD, ffn = through(x_BSD, feed_forward, "ffn_norm", 2)
        selections = ffn.selections if self.return_selections else None
        return x_BSD, (ffn.state, ffn.losses, (ffn.taken_M3, ffn.predicted_M4), selections)

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
    """The layer, with the named remat policy.

    Who was taken is never decided anew. Weights that are stored in parts are always gathered anew: kept, the model
    would lie whole on every device.
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


def _choices(primitive, *_, **__) -> bool:
    return primitive.name == "top_k"


def _weight_products(primitive, *_, **parameters) -> bool:
    """True for products with weights, the experts' batch included, and for slots that travelled; attention's scores, a
    product for each row and head, are made anew: kept, they would outweigh everything else."""
    if primitive.name == "dot_general":
        return len(parameters["dimension_numbers"][1][0]) <= 1
    return primitive.name in ("top_k", "all_to_all") or parameters.get("name") in (fused_attention.KEPT, experts.KEPT)
