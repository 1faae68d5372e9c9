"""Small decoders with random weights, and rows for them."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np

from moma_jax.config import Modality, ModelConfig
from moma_jax.model.decoder import Decoder

MODALITIES = (Modality("text", "t", 20), Modality("image", "i", 12, 4))
MODEL = ModelConfig(ffn="2t2i", layers=2, width=16, heads=2, hidden=24, dtype="float32")
ROWS, SEQUENCE = 8, 12
KEY = jax.random.key(5)


def make(group_rows=2, quotas=None, **model) -> Decoder:
    quotas = quotas or (group_rows * SEQUENCE,) * 2
    return Decoder(dataclasses.replace(MODEL, **model), MODALITIES, quotas, group_rows)


def rows(sequence=SEQUENCE, seed=0):
    """Tokens, segments, positions, modalities: two documents in a row, padding at its end; row 3 is all padding."""
    rng = np.random.default_rng(seed)
    token_BS = rng.integers(0, 32, (ROWS, SEQUENCE))
    segment_BS = np.tile([1] * 5 + [2] * 5 + [0] * 2, (ROWS, 1))
    segment_BS[3] = 0
    position_BS = np.tile([*range(5), *range(5), 0, 0], (ROWS, 1))
    more = [(0, 0), (0, sequence - SEQUENCE)]
    token_BS, segment_BS, position_BS = (np.pad(x, more) for x in (token_BS, segment_BS, position_BS))
    return token_BS, segment_BS, position_BS, (token_BS >= 20).astype(np.int8)


def random_params(decoder, seed=0):
    boxed = jax.eval_shape(lambda: decoder.init(KEY, *rows(), key=KEY))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, w):
        ones = "scale" in jax.tree_util.keystr(path)
        return (ones + rng.normal(0, 0.3, w.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(boxed))


@functools.partial(jax.jit, static_argnames=("decoder", "train", "return_selections"))
def apply(decoder, params, inputs, options, train, return_selections):
    return decoder.apply({"params": params}, *inputs, **options, train=train, return_selections=return_selections)


def run(decoder, params, inputs, train=False, return_selections=True, **options):
    options = {"key": KEY, "step": 3, "group_G": np.arange(len(inputs[0]) // 2), **options}
    return jax.device_get(apply(decoder, params, tuple(inputs), options, train, return_selections))
