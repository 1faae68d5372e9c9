"""Generation: tokens per second of prefill and cached decoding at equal active FLOPs, and the limit of the memory."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moma_jax import vocab
from moma_jax.bench.timing import in_turns, require_some, say, summarise, timed
from moma_jax.checks import resolve
from moma_jax.config import Config
from moma_jax.errors import InputError
from moma_jax.ffn import SHARED
from moma_jax.generation.decoding import Writer, Writing, model_of
from moma_jax.generation.grammar import first_state, make_rules
from moma_jax.generation.sampling import Sampling, draw_of
from moma_jax.model import decode
from moma_jax.model.auxiliary import taken_pairs
from moma_jax.model.decoder import Decoder, first_routing_state
from moma_jax.model.depth import SELECTED
from moma_jax.router import CAUSAL, CAUSAL_ROUTINGS
from moma_jax.training import step as step_lib
from moma_jax.training.load import lacks

BANDWIDTH_BYTES = 256 << 20
"""Bytes that the memory's speed is measured on."""


class DecodeVariant(NamedTuple):
    """One FFN, ready to write: random weights, thresholds at which tokens enter as many experts as in training."""

    config: Config
    params: Any
    routing_state: Any
    routing: str
    writer: Writer
    weights: Any


def bench_generate(
    config: Config,
    ffn: Sequence[str] = ("dense", "4t4i"),
    *,
    batch: Sequence[int] = (1, 8, 32),
    prompt: int = 64,
    tokens: int = 64,
    repeats: int = 5,
) -> dict[str, Any]:
    """Prefill and decode speed of FFN variants with random weights under threshold routing, or as a rule without
    thresholds decides.

    Half of the rows write text and half of them codes (a single row writes text). Thresholds are set on random tokens
    so that a token enters, on average, as many experts as expert choice gives it: equal active FLOPs.

    Args:
      config: what would be trained; its `model.ffn` is replaced. ffn: variants. batch: numbers of rows.
      prompt: tokens of each prompt. tokens: tokens written to each row. repeats: timed turns of all variants.

    Returns:
      {"bandwidth" in bytes/s, "rows": {batch: {name: {"prefill_tokens_per_second", "decode_tokens_per_second",
      "spread", "relative_to_dense", "experts_per_token", "bytes_per_step", "bandwidth_share"}}}, ...}. `spread` and
      `relative_to_dense` are decoding's; `bytes_per_step` is what one token of every row has to read: weights of the
      experts that any row enters, all others, and the rows' caches; `bandwidth_share` that over time and bandwidth.

    Raises:
      InputError: the config or a variant contradicts itself, or the modalities are not text and one with spans.
    """
    require_some(least=3, prompt=prompt)
    require_some(tokens=tokens, repeats=repeats, batch=min(batch, default=0))
    variants = {name: variant_of(config, name) for name in dict.fromkeys(ffn)}
    model = next(iter(variants.values())).config.model
    bandwidth = measure_bandwidth()
    figures = {}
    for rows in batch:
        say(f"{rows} rows: prompts of {prompt}, {tokens} tokens each")
        seconds = {name: [] for name in variants}
        for turn in range(repeats + 1):
            for name, variant in variants.items():
                took = write(variant, rows, prompt, tokens)
                if turn:  # the first turn compiles
                    seconds[name].append(took)
        own = {name: _figures(v, seconds[name], rows, prompt, tokens, bandwidth) for name, v in variants.items()}
        base = own.get("dense", {}).get("decode_tokens_per_second")
        for figure in own.values():
            figure["relative_to_dense"] = None if base is None else figure["decode_tokens_per_second"] / base
        figures[rows] = own
    device = jax.local_devices()[0].device_kind
    shape = {"layers": model.layers, "width": model.width, "hidden": model.hidden, "prompt": prompt, "tokens": tokens}
    shape |= {"vocabulary": config.vocabulary_size, "dtype": model.dtype}
    return {"bench": "generate", "device": device, "shape": shape, "bandwidth": bandwidth, "rows": figures}


def measure_bandwidth() -> float:
    """Bytes per second that the device reads, the best of a sum and a product of a vector with a matrix."""
    width = 8192
    matrix = jnp.ones((width, BANDWIDTH_BYTES // width // 4), jnp.float32)
    vector = jnp.ones((1, width), jnp.float32)
    total, product = jax.jit(jnp.sum), jax.jit(jnp.matmul)
    seconds = in_turns({"sum": lambda: total(matrix), "product": lambda: product(vector, matrix)}, 5)
    return BANDWIDTH_BYTES / min(min(times) for times in seconds.values())


def variant_of(config: Config, ffn: str) -> DecodeVariant:
    """A variant of the config with random weights and fitting thresholds."""
    spans = [m for m in config.data.modalities[1:] if m.span]
    if len(config.data.modalities) != 2 or not spans:
        raise InputError("data.modalities: bench generate writes text and one modality with spans; give such a recipe")
    model = dataclasses.replace(config.model, ffn=ffn)
    data = dataclasses.replace(config.data, kind="synthetic", stores=())
    train = dataclasses.replace(config.train, eval_sets=())
    config = step_lib.with_dtype(resolve(dataclasses.replace(config, model=model, data=data, train=train)))
    say(f"weights of {ffn}")
    token_BS = _random_rows(config, 8, 64, seed=1)
    decoder = _decoder(config, token_BS.shape)
    boxed = jax.jit(lambda key: nn.unbox(decoder.init(key, *_arguments(config, token_BS), **_state(config, None))))
    params = boxed(jax.random.key(0))["params"]
    routing_state = _apply(config, decoder, params, token_BS, first_routing_state(config)).routing_state
    modality_V, routing = vocab.contiguous(config.data.modalities).modality_V, _causal_routing(config, routing_state)
    weights = jax.jit(lambda params, state: decode.unstack(params, config, state))(params, routing_state)
    writer = Writer(model_of(weights, config, modality_V, routing))
    return DecodeVariant(config, params, routing_state, routing, writer, weights)


def _causal_routing(config: Config, routing_state) -> str:
    """How tokens are written: by thresholds, which random tokens have set, or else as the rule decides by itself."""
    lacking = {routing: lacks(config, routing, routing_state) for routing in reversed(CAUSAL_ROUTINGS)}
    if all(lacking.values()):
        raise InputError(f"model.router: the model has {lacking[CAUSAL]}")
    return next(routing for routing, reason in lacking.items() if reason is None)


def _random_rows(config: Config, rows: int, length: int, seed: int) -> np.ndarray:
    """Rows of random ids: text; every second row an open span of codes. int32 (rows, length)."""
    vocabulary, dice = vocab.contiguous(config.data.modalities), np.random.default_rng(seed)
    text, image = vocabulary.modalities
    lowest = len(vocab.SPECIAL_NAMES) + 2
    token_BS = dice.integers(lowest, text.size, (rows, length))
    codes = dice.choice(image.code_ids, (rows, min(length - 2, image.span - 1)))
    token_BS[1::2, length - codes.shape[1] :] = codes[1::2]
    token_BS[1::2, length - codes.shape[1] - 1] = image.begin
    token_BS[:, 0] = vocabulary.begin_document
    return token_BS.astype(np.int32)


def _decoder(config: Config, shape: tuple[int, int]) -> Decoder:
    """The decoder with all rows in one routing group."""
    return Decoder(config.model, config.data.modalities, (shape[0] * shape[1],) * 2, shape[0])


def _arguments(config: Config, token_BS):
    """Token, segment, position and modality of rows of one document each."""
    modality_V = vocab.contiguous(config.data.modalities).modality_V
    position_BS = np.broadcast_to(np.arange(token_BS.shape[1]), token_BS.shape)
    return token_BS, np.ones_like(token_BS), position_BS, modality_V[token_BS].astype(np.int32)


def _state(config: Config, routing_state) -> dict[str, Any]:
    return {"key": jax.random.key(0), "routing_state": routing_state or first_routing_state(config)}


def _apply(config: Config, decoder: Decoder, params, token_BS, routing_state, **asked):
    """The decoder's output on these rows."""
    run = jax.jit(
        lambda params, state: decoder.apply(
            {"params": params}, *_arguments(config, token_BS), **_state(config, state), **asked
        )
    )
    return run(params, routing_state)


def write(variant: DecodeVariant, rows: int, prompt: int, tokens: int) -> tuple[float, float]:
    """Seconds of prefill and of decoding."""
    written, (prefill, decoding) = _written(variant, rows, prompt, tokens)
    if written.shape != (rows, tokens):
        raise AssertionError(f"wrote {written.shape}")
    return prefill, decoding


def _written(variant: DecodeVariant, rows: int, prompt: int, tokens: int):
    """(token_BN, seconds of prefill and of decoding) of random prompts written on at random."""
    config, vocabulary = variant.config, vocab.contiguous(variant.config.data.modalities)
    text, image = vocabulary.modalities
    rules = make_rules(vocabulary, range(text.size), "text", 1)
    rules.outside_V[vocabulary.end_document] = False  # rows write until they are full
    draw = draw_of(Sampling(), Sampling(), None, vocabulary.size)
    prompts = list(_random_rows(config, rows, prompt, seed=2))
    opened = [row[np.argmax(row == image.begin) :] if image.begin in row else row[:0] for row in prompts]
    prefill, read = timed(lambda: variant.writer.read(prompts, prompt + tokens, vocabulary.size))
    writing = Writing(read, None, first_state(vocabulary, opened, [tokens] * rows), np.bool_(True))

    def write():
        state, pieces = writing, []
        while sum(piece.shape[1] for piece in pieces) < tokens:
            state, token_BN = variant.writer.write(state, rules, draw, np.arange(rows, dtype=np.uint32))
            pieces.append(token_BN)
        return np.concatenate(pieces, axis=1)[:, :tokens]

    decoding, written = timed(write)
    return written, (prefill, decoding)


def _figures(variant: DecodeVariant, seconds, rows: int, prompt: int, tokens: int, bandwidth: float) -> dict[str, Any]:
    """One variant's figures at one number of rows."""
    prefill, decoding = zip(*seconds, strict=True)
    median, spread = summarise(list(decoding))
    use = _use(variant, rows, prompt, tokens)
    size = bytes_per_step(variant.config, variant.weights, use, rows, prompt + tokens // 2)
    return {
        "prefill_tokens_per_second": rows * prompt / statistics.median(prefill),
        "decode_tokens_per_second": rows * tokens / median,
        "spread": spread,
        "experts_per_token": use.per_token,
        "bytes_per_step": size,
        "bandwidth_share": size / (median / tokens) / bandwidth,
    }


class Use(NamedTuple):
    """How much of the model written tokens need, means over layers.

    Attributes:
      per_token: experts that a token enters, shared ones apart. experts: by group, those that any row enters.
      tokens, steps: share of tokens, and of steps in which any row's does, that enter a layer of mixture of depths.
    """

    per_token: float
    experts: dict[str, float]
    tokens: float = 1.0
    steps: float = 1.0


def _use(variant: DecodeVariant, rows: int, prompt: int, tokens: int) -> Use:
    """The use that is made of a variant while it writes."""
    config = variant.config
    written, _ = _written(variant, rows, prompt, tokens)
    token_BS = np.concatenate([_random_rows(config, rows, prompt, seed=2), written], axis=1)
    decoder = _decoder(config, token_BS.shape).clone(causal=variant.routing)
    output = _apply(config, decoder, variant.params, token_BS, variant.routing_state, return_selections=True)
    taken = {
        name: np.asarray(
            jax.vmap(jax.vmap(lambda s: taken_pairs(s, token_BS.size)))(selection)[:, 0]  # one routing group
        ).reshape(-1, *token_BS.shape, selection.index_EC.shape[2])
        for name, selection in output.selections.items()
        if name != SELECTED and not name.rpartition("/")[2].startswith(SHARED)
    }
    enters_LBS = np.ones((config.model.layers, *token_BS.shape), bool)
    if config.depth:
        index_PBS, _, filled_PBS = (np.asarray(x)[:, :, 0] for x in output.selections[SELECTED])
        np.put_along_axis(enters_LBS[::2], index_PBS, filled_PBS, axis=2)
        taken = {group.name: _of_layers(taken, group.name, index_PBS) for group in config.experts.groups if taken}
    if config.experts.dense:
        taken = {group.name: enters_LBS[..., None] for group in config.experts.groups}
    taken = {name: taken_LBSE[:, :, prompt:] for name, taken_LBSE in taken.items()}
    per_token = float(sum(taken_LBNE.sum(-1).mean() for taken_LBNE in taken.values()))
    experts = {name: float(taken_LBNE.any(axis=1).sum(-1).mean()) for name, taken_LBNE in taken.items()}
    skipped_PBN = enters_LBS[::2, :, prompt:]
    return Use(per_token, experts, float(skipped_PBN.mean()), float(skipped_PBN.any(axis=1).mean()))


def _of_layers(taken: dict[str, np.ndarray], group: str, index_PBS) -> np.ndarray:
    """Of mixture of depths: what a group took, layer by layer; even layers took by the order of who entered."""
    even, odd = taken[f"even/{group}"], taken[f"odd/{group}"]
    placed = np.zeros_like(even)
    np.put_along_axis(placed, index_PBS[..., None], even, axis=2)
    return np.stack([placed, odd], axis=1).reshape(-1, *odd.shape[1:])


def bytes_per_step(config: Config, weights: Any, use: Use, rows: int, position: int) -> int:
    """Bytes that decoding one token of every row has to read, at a mean `position`; embeddings are looked up."""

    def size(tree) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    model = config.model
    total = size((weights["unembedding_DV"], weights["final_norm_D"]))
    cache = rows * position * 2 * model.key_heads * model.head_size * weights["embedding_VD"].dtype.itemsize
    for layer in weights["layers"]:
        experts, depth = layer["experts"], size(layer["depth"])
        kept, read = (use.tokens, use.steps) if layer["depth"] else (1.0, 1.0)
        always = size(layer) - depth - size(experts)
        shared = sum(size(own[0]) for name, own in experts.items() if name not in use.experts)
        total += depth + read * (always + shared + kept * cache)
        total += sum(number * size(experts[name][0]) for name, number in use.experts.items())
    return int(total)
