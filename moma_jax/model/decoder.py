"""The Chameleon decoder with a mixture of modality-aware experts (paper sections 2.1 and 2.2).

Parameters, all float32; layers are stacked with a leading axis L, also where there is one (logical axes in brackets):

    embedding/kernel_VD                     [vocab, embed]
    layers/attention_norm/scale_D           [layers, norm]
    layers/attention/query_DHK              [layers, embed, heads, head]
    layers/attention/key_DHK                [layers, embed, heads, head]
    layers/attention/value_DHK              [layers, embed, heads, head]
    layers/attention/query_norm/scale_HK    [layers, heads, head]
    layers/attention/query_norm/bias_HK     [layers, heads, head]
    layers/attention/key_norm/scale_HK      [layers, heads, head]
    layers/attention/key_norm/bias_HK       [layers, heads, head]
    layers/attention/out_HKD                [layers, heads, head, embed]
    layers/ffn_norm/scale_D                 [layers, norm]
    layers/ffn/<group>/router_DE            [layers, embed, -]                where the group has several experts
    layers/ffn/<group>/gate_EDF             [layers, expert, expert_embed, ffn]
    layers/ffn/<group>/up_EDF               [layers, expert, expert_embed, ffn]
    layers/ffn/<group>/down_EFD             [layers, expert, ffn, expert_embed]
    layers/ffn/<group>_auxiliary/in_DA      [layers, embed, -]                where model.auxiliary; A = d/2
    layers/ffn/<group>_auxiliary/out_AE     [layers, -, -]
    final_norm/scale_D                      [norm]
    unembedding/kernel_DV                   [embed, vocab]

<group> is a group of experts: a modality's name (1t1i, 4t4i), `all` (dense, 8x), and `shared` (+1x, of N times the
hidden width, one expert).

Initial weights are normal. Embeddings have deviation 1, so that a token's own vector is not drowned by what the first
sub-layers add, which is of that size. The unembedding has 1/sqrt(d), projections 1/sqrt(fan-in), so that a
unit-variance input stays one, routers included: their logits then have unit variance, and experts differ from the
start. Projections into the residual stream are scaled by a further 1/sqrt(2L) under pre-norm (`experts.output_scale`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from moma_jax import sharding
from moma_jax.config import Config, Modality, ModelConfig
from moma_jax.errors import InputError
from moma_jax.ffn import parse_ffn
from moma_jax.model import causal, experts, fused_attention
from moma_jax.model.attention import Attention, rotary_angles
from moma_jax.model.experts import Drawn, Ffn, Place, Rules, is_dense, normal
from moma_jax.model.routing import Quota, RoutingReport, Selection, expert_choice, place_hash, take_all
from moma_jax.sharding import BATCH, DATA, EXPERT, FSDP, TENSOR


class DecoderOutput(NamedTuple):
    """What a forward pass has to say.

    Attributes:
      hidden_BSD: after the final norm, in compute dtype.
      routing_state: the state after this step, stacked over layers, by group of experts.
      losses: float32 scalars of the select function, averaged over routing groups, summed over layers.
      report: tokens taken, layer by layer.
      selections: by group of experts, stacked (L, G, E, C), where asked for; else None.
    """

    hidden_BSD: Any
    routing_state: Any
    losses: dict[str, Any]
    report: RoutingReport
    selections: dict[str, Selection] | None


def rms_norm(x_BSD, scale_D, epsilon: float):
    """Root-mean-square norm over the width, in float32, back in the dtype of x."""
    x32_BSD = x_BSD.astype(jnp.float32)
    square_BS1 = jnp.square(x32_BSD).mean(-1, keepdims=True)
    return (x32_BSD * jax.lax.rsqrt(square_BS1 + epsilon) * scale_D).astype(x_BSD.dtype)


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


def look_up(table_VD, token_BS, dtype):
    """Rows of the embedding table in compute dtype, (B, S, D).

    On a mesh a device has some columns of the table, and with `tensor` some of its ids; so ids travel to the columns
    that are stored elsewhere, and columns come back.
    """

    def local(table_VD, token_BS):
        stored = sharding.present(FSDP, EXPERT)
        if stored:
            token_BS = jax.lax.all_gather(token_BS, stored, axis=0, tiled=True)
        table_VD = sharding.varying(table_VD, DATA)
        if sharding.size(TENSOR) > 1:
            token_BS = token_BS - jax.lax.axis_index(TENSOR) * len(table_VD)
        here_BS = (token_BS >= 0) & (token_BS < len(table_VD))
        x_BSD = jnp.where(here_BS[..., None], table_VD[jnp.where(here_BS, token_BS, 0)], 0).astype(dtype)
        x_BSD = sharding.summed(x_BSD, TENSOR)
        return jax.lax.all_to_all(x_BSD, stored, 0, 2, tiled=True) if stored else x_BSD

    rows = sharding.spec("batch")
    return sharding.on_shards(local, (sharding.spec("vocab", "embed"), rows), rows)(table_VD, token_BS)


class Kernel(nn.Module):
    """A matrix of its own: the embedding table or the unembedding."""

    kernel: str
    axes: tuple[str, str]
    shape: tuple[int, int]
    init: Callable

    @nn.compact
    def __call__(self):
        return self.param(self.kernel, nn.with_logical_partitioning(self.init, self.axes), self.shape, jnp.float32)


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


class Decoder(nn.Module):
    """The decoder. Build it with `decoder_of`.

    Attributes:
      model: the model's part of the config.
      modalities: of the vocabulary, in order.
      quotas: hard bound on each modality's tokens in one routing group.
      group_rows: rows of a routing group.
      select: who takes which token, in groups of more than one expert.
      filled_only: compute filled slots alone (`experts.in_blocks`); without gradient.
    """

    model: ModelConfig
    modalities: tuple[Modality, ...]
    quotas: tuple[int, ...]
    group_rows: int
    select: Callable = expert_choice
    filled_only: bool = False

    @nn.compact
    def __call__(
        self,
        token_BS,
        segment_BS,
        position_BS,
        modality_BS,
        *,
        key,
        step=0,
        group_G=None,
        routing_state=None,
        train: bool = False,
        return_selections: bool = False,
    ) -> DecoderOutput:
        chex.assert_rank(token_BS, 2)
        chex.assert_equal_shape((token_BS, segment_BS, position_BS, modality_BS))
        chex.assert_is_divisible(token_BS.shape[0], self.group_rows)
        groups, shards = token_BS.shape[0] // self.group_rows, sharding.size(*BATCH)
        if groups % shards:
            raise InputError(f"mesh: {groups} routing groups do not split over {shards} devices; use a multiple")
        model, vocabulary = self.model, sum(m.size for m in self.modalities)
        dtype = compute_dtype(model)
        group_G = jnp.arange(token_BS.shape[0] // self.group_rows) if group_G is None else group_G
        embedding_VD = Kernel(
            "kernel_VD", ("vocab", "embed"), (vocabulary, model.width), nn.initializers.normal(1.0), name="embedding"
        )()
        # Declared here, used by the objective, which makes logits a chunk at a time.
        Kernel("kernel_DV", ("embed", "vocab"), (model.width, vocabulary), normal(model.width), name="unembedding")()
        rules = self.rules(dtype, token_BS.shape[1])
        jitter_key, step_key = jax.random.split(key)
        common = Common(
            segment_BS,
            position_BS,
            rotary_angles(position_BS, model.width // model.heads, model.rope_theta),
            self.place(rules, segment_BS, modality_BS, group_G),
            jitter_key,
            jax.random.fold_in(step_key, step),
        )
        layout = parse_ffn(model.ffn, self.modalities)
        layers = stacked(model)(model, rules, layout.shared, self.group_rows, train, return_selections, name="layers")
        state = {} if routing_state is None else routing_state
        x_BSD = look_up(embedding_VD, token_BS, dtype)
        x_BSD, (state, losses, (taken_LM3, predicted_LM4), selections) = layers(
            x_BSD, (jnp.arange(model.layers), state), common
        )
        count_M = taken_LM3[0].sum(-1)
        return DecoderOutput(
            RmsNorm(model.norm_epsilon, name="final_norm")(x_BSD),
            state,
            {name: loss_L.sum() for name, loss_L in losses.items()},
            RoutingReport(taken_LM3, jnp.broadcast_to(count_M, taken_LM3.shape[:2]), predicted_LM4),
            selections,
        )

    def rules(self, dtype, sequence: int) -> Rules:
        """The static side of routing for rows of `sequence` positions."""
        model, tokens = self.model, self.group_rows * sequence
        groups = parse_ffn(model.ffn, self.modalities).groups
        bounds = [min(tokens, sum(self.quotas[m] for m in g.modalities)) for g in groups]
        quotas = tuple(Quota(b, g.capacity(model.capacity)) for b, g in zip(bounds, groups, strict=True))
        return Rules(
            groups,
            quotas,
            len(self.modalities),
            self.select,
            model.jitter,
            model.gumbel,
            dtype,
            model.auxiliary,
            self.filled_only,
        )

    def place(self, rules: Rules, segment_BS, modality_BS, group_G) -> Place:
        """What routing knows about each token, the same in every layer."""
        groups, sequence = group_G.shape[0], segment_BS.shape[1]
        modality_GT = jnp.where(segment_BS > 0, modality_BS.astype(jnp.int32), -1).reshape(groups, -1)
        row_GR1 = (group_G[:, None] * self.group_rows + jnp.arange(self.group_rows))[..., None]
        hash_GT = place_hash(row_GR1, jnp.arange(sequence)).reshape(groups, -1)
        alone = {}
        for group, quota in zip(rules.groups, rules.quotas, strict=True):
            if group.experts == 1 and not is_dense(rules):
                eligible_GT = jnp.isin(modality_GT, jnp.array(group.modalities))
                alone[group.name] = jax.vmap(lambda e, quota=quota: take_all(e, quota))(eligible_GT)
        return Place(modality_GT, hash_GT, group_G, alone)


def stacked(model: ModelConfig):
    """All layers as one module that is scanned, parameters stacked."""
    return nn.scan(
        rematerialised(model.remat),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=model.layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


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


def compute_dtype(model: ModelConfig):
    """The dtype of activations; auto is bfloat16 where the hardware computes in it, else float32."""
    if model.dtype != "auto":
        return jnp.dtype(model.dtype)
    device = jax.devices()[0]
    match device.platform:
        case "tpu":
            return jnp.dtype("bfloat16")
        case "gpu":  # CUDA names it "8.0"; of the others all that JAX supports have it
            major = device.compute_capability.split(".")[0]
            return jnp.dtype("float32" if major.isdigit() and int(major) < 8 else "bfloat16")
        case _:
            return jnp.dtype("float32")


def decoder_of(config: Config, select: Callable = expert_choice) -> Decoder:
    """The decoder of a resolved config."""
    return Decoder(config.model, config.data.modalities, config.quotas, config.data.group_rows, select)


def choice_decoder(decoder: Decoder) -> Decoder:
    """A training decoder under expert choice: where thresholds are the rule, that of their warm-up."""
    select = decoder.select
    return decoder.clone(select=select.choice) if isinstance(select, causal.ThresholdTraining) else decoder


def causal_decoder(config: Config, routing: str) -> Decoder:
    """The decoder under a causal routing, "causal" or "threshold", without gradient.

    Every token finds a slot at every expert that it enters, whatever the documents' mixture of modalities; what is
    computed is what was taken.
    """
    group = config.group_tokens
    select = causal.inference_select(routing, config.data.group_rows)
    everyone = (group,) * len(config.data.modalities)
    return Decoder(config.model, config.data.modalities, everyone, config.data.group_rows, select, filled_only=True)
