"""Whole rows by the decoder, and the same rows told piece by piece to a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tiny import MODALITIES

from moma_jax.model import decode
from moma_jax.model.decoder import causal_decoder
from moma_jax.vocab import contiguous

MODALITY_V = contiguous(MODALITIES).modality_V
SEQUENCE = 16


def rows_of(seed, rows):
    """Random ids, rows by `SEQUENCE`; images and text mixed at will."""
    return np.random.default_rng(seed).integers(0, len(MODALITY_V), (rows, SEQUENCE)).astype(np.int32)


def forced(model, routing, token_BS):
    """Hidden states of whole rows by the decoder, one document a row; and how many entered 0, 1, 2+ experts."""
    config, params, routing_state = model
    decoder = causal_decoder(config, routing)
    one_BS = np.ones_like(token_BS)
    position_BS = np.broadcast_to(np.arange(token_BS.shape[1]), token_BS.shape)
    output = jax.jit(lambda params: decoder.apply(
        {"params": params}, token_BS, one_BS, position_BS, jnp.asarray(MODALITY_V, jnp.int32)[token_BS],
        key=jax.random.key(0), routing_state=routing_state,
    ))(params)  # fmt: skip
    return np.asarray(output.hidden_BSD), np.asarray(output.report.taken_LM3).sum((0, 1))


def extends(config, routing, jit=jax.jit):
    return jit(functools.partial(decode.extend, config=config, vocabulary_modality_V=MODALITY_V, routing=routing))


def cached(model, routing, rows, splits, positions=SEQUENCE):
    """Hidden states of ragged rows told piece by piece: `splits` are the widths of the calls."""
    config, params, routing_state = model
    extend = extends(config, routing)
    weights, cache = decode.unstack(params, config, routing_state), decode.new_cache(config, len(rows), positions)
    length_B, hidden = np.array([len(row) for row in rows]), [[] for _ in rows]
    start = 0
    for width in splits:
        count_B = np.clip(length_B - start, 0, width)
        token_BQ = np.full((len(rows), width), 39, np.int32)
        for b, row in enumerate(rows):
            token_BQ[b, : count_B[b]] = row[start : start + count_B[b]]
        hidden_BQD, cache = extend(weights, cache, token_BQ, count_B)
        for b in range(len(rows)):
            hidden[b].append(np.asarray(hidden_BQD)[b, : count_B[b]])
        start += width
    np.testing.assert_array_equal(cache.length_B, length_B)
    return [np.concatenate(pieces) for pieces in hidden]
