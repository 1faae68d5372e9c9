"""The feed-forward layer alone: whole, and in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moma_jax.bench.timing import differentiated, in_turns, random, require_some, say, summarise
from moma_jax.config import IMAGE, TEXT, ModelConfig
from moma_jax.model import dispatch, moe
from moma_jax.model.decoder import Decoder
from moma_jax.model.parameters import ExpertWeights, FfnParameters, weights_of


def bench_ffn(
    ffn: str = "4t4i", *, width: int = 256, hidden: int = 704, tokens: int = 4096, repeats: int = 40
) -> dict[str, Any]:
    """The FFN alone, forward and backward in float32, against a dense one of equal active FLOPs.

    Args:
      ffn: the variant; text and image are half of the tokens of one routing group each.
      width: d. hidden: F of one expert. tokens: positions of the routing group. repeats: timed calls of each.

    Returns:
      {"ffn_seconds", "dense_seconds", "time_over_dense", "relative_to_dense", "spread", "parts", ...}:
      `time_over_dense` is the time over dense's (1.05 is 5% slower), `relative_to_dense` the speed over dense's, its
      inverse, as in `bench_step`; `parts` the seconds of its pieces, timed alone (see `pieces`).

    Raises:
      InputError: `ffn` is not an FFN of text and image, or numbers measure nothing.
    """
    require_some(tokens=tokens, repeats=repeats)
    x_BSD = random(0, (1, tokens, width), jnp.float32)
    cases = {name: _half_and_half(name, width, hidden, tokens) for name in dict.fromkeys(("dense", ffn))}
    say(f"FFN {ffn} and dense: d={width}, F={hidden}, {tokens} tokens, {repeats} times each")
    seconds = in_turns({name: case.whole(x_BSD) for name, case in cases.items()}, repeats)
    parts = in_turns(cases[ffn].pieces(x_BSD), max(repeats // 4, 1))
    (median, spread), (dense, _) = summarise(seconds[ffn]), summarise(seconds["dense"])
    return {
        "bench": "ffn",
        "device": jax.local_devices()[0].device_kind,
        "shape": {"ffn": ffn, "width": width, "hidden": hidden, "tokens": tokens},
        "ffn_seconds": median,
        "dense_seconds": dense,
        "time_over_dense": median / dense,
        "relative_to_dense": dense / median,
        "spread": spread,
        "parts": {name: summarise(times)[0] for name, times in parts.items()},
    }


def _half_and_half(ffn: str, width: int, hidden: int, tokens: int) -> FfnCase:
    """An FFN on one routing group, text in its first half and image in its second."""
    model = ModelConfig(ffn=ffn, width=width, hidden=hidden, dtype="float32")
    first = tokens // 2
    decoder = Decoder(model, (TEXT, IMAGE), (first, tokens - first), 1)
    place_BS = jnp.arange(tokens, dtype=jnp.int32)[None]
    modality_BS = (place_BS >= first).astype(jnp.int32)
    return FfnCase.of(decoder, (place_BS, jnp.ones((1, tokens), jnp.int32), place_BS, modality_BS))


class FfnCase(NamedTuple):
    """One FFN layer with what it needs to run: how it routes, its parameters, where its tokens are."""

    model: ModelConfig
    routing: moe.Routing
    params: Any
    tokens: moe.RoutingTokens
    keys: moe.RoutingKeys

    @classmethod
    def of(cls, decoder: Decoder, rows, params=None) -> FfnCase:
        """The FFN of a decoder on a batch; `rows`: its ids, segments, positions and modalities, int32 (B, S) each.

        `params` are one layer's; fresh ones where None.
        """
        batch_rows, sequence = rows[0].shape
        model, shape = decoder.model, decoder.shape(sequence)
        tokens = jax.jit(decoder.tokens)(*rows, jnp.arange(batch_rows // decoder.group_rows))
        if params is None:
            params = nn.unbox(jax.jit(FfnParameters(model, shape.groups).init)(jax.random.key(0)))["params"]
        routing = moe.layer_routing(model, shape, decoder.group_rows, None, True)
        return cls(model, routing, params, tokens, moe.RoutingKeys(jnp.uint32(1), jax.random.key(1)))

    def whole(self, x_BSD) -> Callable:
        """The layer as the decoder runs it."""

        def layer(params, x_GTD, around):
            options = {"routing": self.routing, "model": self.model}
            return moe.moe(x_GTD, *around, {}, weights_of(params), **options)[0]

        return differentiated(layer, (self.params, self._grouped(x_BSD)), (self.tokens, self.keys))

    def pieces(self, x_BSD, times: int = 1) -> dict[str, Callable]:
        """The layer's pieces, each alone, forward and backward, `times` of them in one call.

        router: scores and selections. dispatch: tokens to slots. experts: SwiGLU of every slot, shared experts
        included. combine: slots back to tokens, weighted. A dense FFN has experts alone.
        """
        weights, x_GTD, around = weights_of(self.params), self._grouped(x_BSD), (self.tokens, self.keys)
        always = [weights.pop(own.group.name) for own in self.routing.groups if own.everywhere]
        if not weights:
            return {"experts": differentiated(_everywhere, (always, x_GTD), times=times)}

        def chosen(weights, x_GTD, around):
            return moe.select(x_GTD, *around, {}, weights, self.routing)[0].selections

        def gates(weights, x_GTD, around):
            return {name: selection.gate_EC for name, selection in chosen(weights, x_GTD, around).items()}

        selections = jax.jit(chosen)(weights, x_GTD, around)
        taken_slots = {name: _slots(selection, x_GTD.shape[1]) for name, selection in selections.items()}
        index = {name: slot[0] for name, slot in taken_slots.items()}
        gate = {name: slot[1] for name, slot in taken_slots.items()}
        inputs = jax.jit(_dispatch)(x_GTD, index)
        calls = {}
        if self.routing.routed:
            calls["router"] = differentiated(gates, (weights, x_GTD), around, times=times)
        calls["dispatch"] = differentiated(_dispatch, (x_GTD,), index, times=times)
        calls["experts"] = differentiated(_experts, (weights, inputs, gate, always, x_GTD), times=times)
        calls["combine"] = differentiated(_combine, (inputs,), (index, x_GTD), times=times)
        return calls

    def _grouped(self, x_BSD):
        """Rows to routing groups."""
        return x_BSD.reshape(*self.tokens.modality_GT.shape, x_BSD.shape[-1])


def _slots(selection, tokens: int):
    """(index_EN, gate_EN) of all routing groups' slots, by expert."""
    selection = moe.offset(selection, tokens)
    return moe.flat(selection.index_EC), moe.flat(selection.gate_EC)


def _dispatch(x_GTD, index):
    x_ND = x_GTD.reshape(-1, x_GTD.shape[-1])
    return {name: dispatch.dispatch(x_ND, index_EN) for name, index_EN in index.items()}


def _experts(weights: dict[str, ExpertWeights], inputs, gate, always, x_GTD, _):
    outputs = {name: dispatch.swiglu(inputs[name], weights[name], gate[name]) for name in weights}
    return (outputs, _everywhere(always, x_GTD, _)) if always else outputs


def _everywhere(always: list[ExpertWeights], x_GTD, _):
    return sum(moe.everywhere(x_GTD, weight) for weight in always)


def _combine(outputs, around):
    index, x_GTD = around
    y_ND = jnp.zeros((x_GTD.shape[0] * x_GTD.shape[1], x_GTD.shape[2]), x_GTD.dtype)
    for name, out_END in outputs.items():
        y_ND = dispatch.combine(y_ND, index[name], out_END)
    return y_ND
