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

With mixture of depths (mod+4t4i) layers come in pairs, of which only some tokens enter the first: layers/even/... and
layers/odd/... have half of the layers each, and layers/depth/<router>/router_DE [layers, embed, -] decides, with
<router> "depth_<modality>", or "depth_all" (model.depth_by); its auxiliary router is layers/depth/<router>_auxiliary.

<group> is a group of experts: a modality's name (1t1i, 4t4i), `all` (dense, 8x), and `shared` (+1x, of N times the
hidden width, one expert).

Initial weights are normal. Embeddings have deviation 1, so that a token's own vector is not drowned by what the first
sub-layers add, which is of that size. The unembedding has 1/sqrt(d), projections 1/sqrt(fan-in), so that a
unit-variance input stays one, routers included: their logits then have unit variance, and experts differ from the
start. Projections into the residual stream are scaled by a further 1/sqrt(2L) under pre-norm (`experts.output_scale`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from moma_jax import sharding
from moma_jax.config import Config, Modality, ModelConfig
from moma_jax.errors import InputError
from moma_jax.ffn import FfnLayout, depth_groups, depth_quotas, depth_share, depth_slots, parse_ffn
from moma_jax.model import causal
from moma_jax.model.attention import rotary_angles
from moma_jax.model.depth import DepthRules, Pair, of_layers, of_pairs
from moma_jax.model.experts import Place, Rules, normal, placed
from moma_jax.model.layer import Common, RmsNorm, rematerialised
from moma_jax.model.precision import compute_dtype
from moma_jax.model.routing import Quota, RoutingReport, Selection, expert_choice, place_hash
from moma_jax.sharding import BATCH, DATA, EXPERT, FSDP, TENSOR


class DecoderOutput(NamedTuple):
    """What a forward pass has to say.

    Attributes:
      hidden_BSD: after the final norm, in compute dtype.
      routing_state: the state after this step, stacked over layers, by group of experts.
      losses: float32 scalars of the select function, averaged over routing groups, summed over layers.
      report: tokens taken, layer by layer.
      selections: by group of experts, stacked (L, G, E, C), where asked for; else None. With mixture of depths they are
        stacked over pairs of layers, as "even/<group>" and "odd/<group>"; and "depth", who entered the even layers, in
        rows (P, B, 1, C).
    """

    hidden_BSD: Any
    routing_state: Any
    losses: dict[str, Any]
    report: RoutingReport
    selections: dict[str, Selection] | None


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


class Decoder(nn.Module):
    """The decoder. Build it with `decoder_of`.

    Attributes:
      model: the model's part of the config.
      modalities: of the vocabulary, in order.
      quotas: hard bound on each modality's tokens in one routing group.
      group_rows: rows of a routing group.
      select: who takes which token, in groups of more than one expert.
      filled_only: compute filled slots alone (`experts.in_blocks`); without gradient.
      select_depth: who enters a layer of mixture of depths; None: the model's rule of training.
    """

    model: ModelConfig
    modalities: tuple[Modality, ...]
    quotas: tuple[int, ...]
    group_rows: int
    select: Callable = expert_choice
    filled_only: bool = False
    select_depth: Callable | None = None

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
        state = {} if routing_state is None else routing_state
        x_BSD = look_up(embedding_VD, token_BS, dtype)
        through = self.in_pairs if parse_ffn(model.ffn, self.modalities).depth else self.in_layers
        x_BSD, state, losses, (taken_LM3, *predicted), selections = through(
            x_BSD, rules, common, state, (train, return_selections)
        )
        return DecoderOutput(
            RmsNorm(model.norm_epsilon, name="final_norm")(x_BSD),
            state,
            {name: loss_L.sum() for name, loss_L in losses.items()},
            RoutingReport(taken_LM3, taken_LM3.sum(-1), *predicted),
            selections,
        )

    def in_layers(self, x_BSD, rules: Rules, common: Common, state, asked):
        """All layers, one after the other: (x_BSD, state, losses, the fields of a RoutingReport, selections)."""
        layers = stacked(rematerialised(self.model.remat), self.model.layers)
        body = layers(self.model, rules, self._layout.shared, self.group_rows, *asked, name="layers")
        x_BSD, (state, losses, taken, selections) = body(x_BSD, (jnp.arange(self.model.layers), state), common)
        return x_BSD, state, losses, (*taken, jnp.zeros((0, len(self.modalities), 4), jnp.int32)), selections

    def in_pairs(self, x_BSD, rules: Rules, common: Common, state, asked):
        """`in_layers` where some tokens alone enter the first of every two layers (mixture of depths)."""
        model, depth = self.model, self.depth(rules.dtype, x_BSD.shape[1])
        pairs = stacked(Pair, model.layers // 2)
        body = pairs(model, rules, depth, self._layout.shared, self.group_rows, *asked, name="layers")
        numbers = jnp.arange(model.layers).reshape(-1, 2)
        scanned = (numbers, *of_pairs(state, depth.routers.groups))
        x_BSD, (state, own, losses, (taken, predicted, entered_PM4), selections) = body(x_BSD, scanned, common)
        return x_BSD, of_layers(state) | own, losses, (of_layers(taken), of_layers(predicted), entered_PM4), selections

    @property
    def _layout(self) -> FfnLayout:
        return parse_ffn(self.model.ffn, self.modalities)

    def rules(self, dtype, sequence: int) -> Rules:
        """The static side of routing for rows of `sequence` positions."""
        return self._of_experts(dtype, self.quotas, self.group_rows * sequence)

    def _of_experts(self, dtype, quotas: tuple[int, ...], tokens: int) -> Rules:
        """The same for groups of `tokens` positions, at most quotas[m] of modality m."""
        groups = self._layout.groups
        bounds = [min(tokens, sum(quotas[m] for m in g.modalities)) for g in groups]
        capacities = [g.capacity(self.model.capacity) for g in groups]
        return self._rules(dtype, groups, map(Quota, bounds, capacities), self.select, self.model.gumbel)

    def depth(self, dtype, sequence: int) -> DepthRules:
        """The static side of mixture of depths for rows of `sequence` positions."""
        model, share = self.model, depth_share(self.model)
        groups = depth_groups(model.depth_by, self.modalities)
        bounds = [min(sequence, sum(self.quotas[m] for m in g.modalities)) for g in groups]
        select = causal.depth_select(model) if self.select_depth is None else self.select_depth
        routers = self._rules(dtype, groups, (Quota(b, share, down=True) for b in bounds), select, False)
        if self.filled_only:  # however many a rule lets in
            return DepthRules(routers, self.rules(dtype, sequence), sequence)
        slots, quotas = depth_slots(model, sequence), depth_quotas(model, self.quotas, self.group_rows, sequence)
        return DepthRules(routers, self._of_experts(dtype, quotas, self.group_rows * slots), slots)

    def _rules(self, dtype, groups, quotas, select: Callable, gumbel: bool) -> Rules:
        model = self.model
        return Rules(
            groups,
            tuple(quotas),
            len(self.modalities),
            select,
            model.jitter,
            gumbel,
            dtype,
            model.auxiliary,
            self.filled_only,
        )

    def place(self, rules: Rules, segment_BS, modality_BS, group_G) -> Place:
        """What routing knows about each token, the same in every layer that all tokens enter."""
        groups, sequence = group_G.shape[0], segment_BS.shape[1]
        modality_GT = jnp.where(segment_BS > 0, modality_BS.astype(jnp.int32), -1).reshape(groups, -1)
        row_GR1 = (group_G[:, None] * self.group_rows + jnp.arange(self.group_rows))[..., None]
        hash_GT = place_hash(row_GR1, jnp.arange(sequence)).reshape(groups, -1)
        return placed(rules, modality_GT, hash_GT, group_G)


def stacked(layer, length: int):
    """So many layers, or pairs of them, as one module that is scanned, parameters stacked."""
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def decoder_of(config: Config, select: Callable = expert_choice) -> Decoder:
    """The decoder of a resolved config."""
    return Decoder(config.model, config.data.modalities, config.quotas, config.data.group_rows, select)


def choice_decoder(decoder: Decoder) -> Decoder:
    """A training decoder under expert choice: where thresholds are the rule, that of their warm-up."""
    select = decoder.select
    if not isinstance(select, causal.ThresholdTraining):
        return decoder
    model = dataclasses.replace(decoder.model, routing="choice")
    return decoder.clone(select=select.choice, model=model)


def causal_decoder(config: Config, routing: str) -> Decoder:
    """The decoder under a causal routing, "causal" or "threshold", without gradient.

    Every token finds a slot at every expert that it enters, whatever the documents' mixture of modalities; what is
    computed is what was taken.
    """
    data, everyone = config.data, (config.group_tokens,) * len(config.data.modalities)
    rules = {
        "select": causal.inference_select(routing, data.group_rows),
        "select_depth": causal.inference_select(routing, 1),
    }
    return Decoder(config.model, data.modalities, everyone, data.group_rows, filled_only=True, **rules)
