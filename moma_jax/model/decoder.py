"""The Chameleon decoder with a mixture of modality-aware experts (paper sections 2.1 and 2.2).

Its parameters are declared in model/parameters.py, its layer is model/block.py; model/decode.py runs the same layers
with a cache.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moma_jax import sharding
from moma_jax.config import Config, Modality, ModelConfig
from moma_jax.ffn import parse_ffn
from moma_jax.geometry import DepthShape, GroupRows, LayerShape, depth_rule, depth_shape, layer_shape, require_shards
from moma_jax.model.attention import rotary_angles
from moma_jax.model.block import Context, rematerialised, rms_norm
from moma_jax.model.depth import Pair, of_layers, of_pairs
from moma_jax.model.moe import RoutingTokens, routing_tokens
from moma_jax.model.parameters import MatrixParameters, NormParameters
from moma_jax.model.precision import compute_dtype
from moma_jax.model.routing import RoutingReport, position_hash
from moma_jax.router import Selection
from moma_jax.sharding import BATCH, DATA, EXPERT, FSDP, TENSOR


class DecoderOutput(NamedTuple):
    """Result of a forward pass.

    Attributes:
      hidden_BSD: after the final norm, in compute dtype.
      routing_state: the state after this step, stacked over layers, by group of experts.
      losses: float32 scalars of the routing rule, averaged over routing groups, summed over layers.
      metrics: float32 scalars of the routing rule that are only recorded, averaged over layers and the routing groups
        that have tokens.
      report: tokens taken, layer by layer.
      selections: by group of experts, stacked (L, G, E, C), where asked for; else None. With mixture of depths they are
        stacked over pairs of layers, as "even/<group>" and "odd/<group>"; and "depth", who entered the even layers, in
        rows (P, B, 1, C).
    """

    hidden_BSD: Any
    routing_state: Any
    losses: dict[str, Any]
    metrics: dict[str, Any]
    report: RoutingReport
    selections: dict[str, Selection] | None


class Decoder(nn.Module):
    """The decoder. Build it with `decoder_of`, or `causal_decoder` for a causal routing.

    Attributes:
      model: the model's part of the config, with its routing rule.
      modalities: of the vocabulary, in order.
      quotas: hard bound on each modality's tokens in one routing group.
      group_rows: rows of a routing group.
      causal: name of a causal routing of the rule, under which tokens decide by themselves and every one finds a slot,
        whatever the documents' mixture of modalities; without gradient. None: the routing of training.
    """

    model: ModelConfig
    modalities: tuple[Modality, ...]
    quotas: tuple[int, ...]
    group_rows: int
    causal: str | None = None

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
        noise=1.0,
        group_G=None,
        routing_state=None,
        train: bool = False,
        return_selections: bool = False,
    ) -> DecoderOutput:
        chex.assert_rank(token_BS, 2)
        chex.assert_equal_shape((token_BS, segment_BS, position_BS, modality_BS))
        chex.assert_is_divisible(token_BS.shape[0], self.group_rows)
        model, vocabulary = self.model, sum(m.size for m in self.modalities)
        groups, sequence = token_BS.shape[0] // self.group_rows, token_BS.shape[1]
        require_shards(groups, sharding.size(*BATCH))
        tied, of_logits = model.tied_embeddings, 1 / math.sqrt(model.width)
        table = ("kernel_VD", ("vocab", "embed"), (vocabulary, model.width), of_logits if tied else 1.0)
        embedding_VD = MatrixParameters(*table, name="embedding")()
        if not tied:  # declared here, used by the objective, which makes logits a chunk at a time
            table = ("kernel_DV", ("embed", "vocab"), (model.width, vocabulary), of_logits)
            MatrixParameters(*table, name="unembedding")()
        jitter_key, step_key = jax.random.split(key)
        context = Context(
            segment_BS,
            position_BS,
            rotary_angles(position_BS, model),
            self.tokens(
                token_BS, segment_BS, position_BS, modality_BS, jnp.arange(groups) if group_G is None else group_G
            ),
            jitter_key,
            jax.random.fold_in(step_key, step),
            jnp.float32(noise),
        )
        with jax.named_scope("embedding"):
            x_BSD = look_up(embedding_VD, token_BS, compute_dtype(model))
        state = {} if routing_state is None else routing_state
        layers = self.in_pairs if parse_ffn(model.ffn, self.modalities).depth else self.in_layers
        x_BSD, state, result, entered_PM4 = layers(x_BSD, context, sequence, state, (train, return_selections))
        scale_D = NormParameters(model.width, name="final_norm")()
        return DecoderOutput(
            rms_norm(x_BSD, scale_D, model.norm_epsilon),
            state,
            {name: loss_L.sum() for name, loss_L in result.losses.items()},
            {name: value_L.mean() for name, value_L in result.metrics.items()},
            RoutingReport(result.taken_M3, result.taken_M3.sum(-1), result.predicted_M4, entered_PM4),
            result.selections,
        )

    def in_layers(self, x_BSD, context: Context, sequence: int, state, asked):
        """All layers, one after the other: (x_BSD, state, RoutingResult stacked over layers, entered_PM4)."""
        model, zero = self.model, jnp.zeros((0, len(self.modalities), 4), jnp.int32)
        body = stacked(rematerialised(model.remat), model.layers)
        layers = body(model, self.shape(sequence), self.group_rows, self.causal, *asked, name="layers")
        x_BSD, result = layers(x_BSD, (jnp.arange(model.layers), state), context)
        return x_BSD, result.state, result, zero

    def in_pairs(self, x_BSD, context: Context, sequence: int, state, asked):
        """`in_layers` where some tokens alone enter the first of every two layers (mixture of depths)."""
        model, depth = self.model, self.depth(sequence)
        body = stacked(Pair, model.layers // 2)
        pairs = body(model, self.shape(sequence), depth, self.group_rows, self.causal, *asked, name="layers")
        numbers = jnp.arange(model.layers).reshape(-1, 2)
        scanned = (numbers, *of_pairs(state, depth.routers))
        x_BSD, (result, of_routers) = pairs(x_BSD, scanned, context)
        state, taken_LM3, predicted_LM4 = map(of_layers, (result.state, result.taken_M3, result.predicted_M4))
        result = result._replace(taken_M3=taken_LM3, predicted_M4=predicted_LM4)
        return x_BSD, state | of_routers.state, result, of_routers.predicted_M4

    def shape(self, sequence: int) -> LayerShape:
        """Quotas and slots for rows of `sequence` positions."""
        return layer_shape(self.model, self._rows(sequence))

    def depth(self, sequence: int) -> DepthShape:
        """The same of a layer of mixture of depths."""
        return depth_shape(self.model, self._rows(sequence))

    def _rows(self, sequence: int) -> GroupRows:
        return GroupRows(self.modalities, self.quotas, self.group_rows, sequence, everyone=self.causal is not None)

    def tokens(self, token_BS, segment_BS, position_BS, modality_BS, group_G) -> RoutingTokens:
        """What routing knows about each token, the same in every layer that all tokens enter."""
        groups, sequence = group_G.shape[0], segment_BS.shape[1]
        modality_GT = jnp.where(segment_BS > 0, modality_BS.astype(jnp.int32), -1).reshape(groups, -1)
        row_GR1 = (group_G[:, None] * self.group_rows + jnp.arange(self.group_rows))[..., None]
        hash_GT = position_hash(row_GR1, jnp.arange(sequence)).reshape(groups, -1)
        id_GT, position_GT = (x_BS.astype(jnp.int32).reshape(groups, -1) for x_BS in (token_BS, position_BS))
        return routing_tokens(self.shape(sequence), modality_GT, hash_GT, id_GT, position_GT, group_G)


def look_up(table_VD, token_BS, dtype):
    """Rows of the embedding table in compute dtype, (B, S, D).

    On a mesh a device has some columns of the table, and with `tensor` some of its ids. Where the table is small beside
    the rows it is gathered, in float32, as its gradient is summed; else ids travel to the columns that are stored
    elsewhere, and columns come back.
    """

    def local(table_VD, token_BS):
        stored = sharding.split_axes(FSDP, EXPERT)
        if stored and gathering_pays(table_VD.shape, token_BS.size, sharding.size(*stored)):
            table_VD, stored = sharding.gather_weight(table_VD, ("vocab", "embed"), table_VD.dtype), ()
        else:
            table_VD = sharding.pvary(table_VD, DATA)
        if stored:
            token_BS = jax.lax.all_gather(token_BS, stored, axis=0, tiled=True)
        if sharding.size(TENSOR) > 1:
            token_BS = token_BS - jax.lax.axis_index(TENSOR) * len(table_VD)
        here_BS = (token_BS >= 0) & (token_BS < len(table_VD))
        x_BSD = jnp.where(here_BS[..., None], table_VD[jnp.where(here_BS, token_BS, 0)], 0).astype(dtype)
        x_BSD = sharding.psum(x_BSD, TENSOR)
        return jax.lax.all_to_all(x_BSD, stored, 0, 2, tiled=True) if stored else x_BSD

    rows = sharding.spec("batch")
    return sharding.shard_map(local, (sharding.spec("vocab", "embed"), rows), rows)(table_VD, token_BS)


def gathering_pays(shape: tuple[int, int], tokens: int, parts: int) -> bool:
    """Whether a table stored by columns in so many parts is better gathered, for so many tokens of each device.

    By bytes of memory, which bound both, forward and backward: gathered, the table is written and read, its gradient
    written, summed and scattered, and each token's row moves twice; apart, the tokens of all parts move twice, by rows
    of at least the 128 columns that memory is laid out in.
    """
    ids, columns = shape
    whole = ids * columns * parts
    return 4 * whole + 2 * tokens * columns * parts < 2 * tokens * parts * max(columns, 128)


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


def decoder_of(config: Config) -> Decoder:
    """The decoder of a resolved config under its routing of training."""
    return Decoder(config.model, config.data.modalities, config.quotas, config.data.group_rows)


def evaluation_decoder(decoder: Decoder) -> Decoder:
    """A decoder under what its rule's evaluations call the routing of training."""
    router = decoder.model.router.for_evaluation()
    return decoder.clone(model=dataclasses.replace(decoder.model, router=router))


def causal_decoder(config: Config, routing: str) -> Decoder:
    """The decoder under a causal routing of its rule, without gradient."""
    return decoder_of(config).clone(causal=routing)


def first_routing_state(config: Config) -> dict[str, Any]:
    """The routing state of a run that has not begun: each rule's, by group of experts that has a router, stacked over
    layers; and by router of mixture of depths, stacked over the layers that have it."""
    model, layers = config.model, config.model.layers
    rules = [(group, model.router, layers) for group in config.experts.groups if group.routed]
    rules += [(group, depth_rule(model), layers // 2) for group in config.depth]
    states = {group.name: (rule.state(group.experts), number) for group, rule, number in rules}
    return {
        name: jax.tree.map(lambda x, number=number: np.broadcast_to(x, (number, *np.shape(x))), state)
        for name, (state, number) in states.items()
        if state
    }
