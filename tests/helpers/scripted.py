"""A stand-in for a trained model: small, fast, and its next token depends on every token before it."""

import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moma_jax import sharding
from moma_jax.config import MeshConfig
from moma_jax.errors import InputError
from moma_jax.generation.decoding import Model

WIDTH = 8
CONTEXT = 96


class Memory(NamedTuple):
    """A cache with the contract of model/decode.py: what lies beyond a row's length is never seen."""

    value_BPD: Any
    length_B: Any


def new_cache(rows, positions):
    return Memory(jnp.full((rows, positions, WIDTH), jnp.nan), jnp.zeros(rows, jnp.int32))


@jax.jit
def extend(weights, cache, token_BQ, count_B):
    """Hidden: the token's own vector and the fading sum of all before it in its row."""
    rows, pieces = token_BQ.shape
    offset_Q = jnp.arange(pieces)
    real_BQ = offset_Q < count_B[:, None]
    position_BQ = cache.length_B[:, None] + offset_Q
    target_BQ = jnp.where(real_BQ, position_BQ, cache.value_BPD.shape[1])
    value_BPD = cache.value_BPD.at[jnp.arange(rows)[:, None], target_BQ].set(weights["in_VD"][token_BQ], mode="drop")
    age_BQP = position_BQ[..., None] - jnp.arange(value_BPD.shape[1])
    weight_BQP = jnp.where(age_BQP >= 0, 0.8**age_BQP, 0.0)
    seen_BPD = jnp.where(
        (jnp.arange(value_BPD.shape[1]) < (cache.length_B + count_B)[:, None])[..., None], value_BPD, 0
    )
    hidden_BQD = jnp.einsum("bqp,bpd->bqd", weight_BQP, seen_BPD)
    hidden_BQD = jnp.where(real_BQ[..., None], hidden_BQD, jnp.nan)  # what belongs to no token must not be used
    return hidden_BQD, Memory(value_BPD, cache.length_B + count_B)


@jax.jit
def logits(weights, hidden):
    return hidden @ weights["out_DV"]


def make(vocabulary: int, seed: int = 0, scale: float = 1.0, whole: bool = True) -> Model:
    """A random model of `vocabulary` ids; a larger `scale` makes it surer."""
    random = np.random.default_rng(seed)
    in_VD = random.normal(size=(vocabulary, WIDTH)).astype(np.float32)
    out_DV = (scale * random.normal(size=(WIDTH, vocabulary))).astype(np.float32)
    return Model({"in_VD": jnp.asarray(in_VD), "out_DV": jnp.asarray(out_DV)}, new_cache, extend, logits, whole)


def logits_of(model: Model, ids) -> np.ndarray:
    """Logits after a whole sequence, float64, without a cache: an oracle."""
    value_SD = np.asarray(model.weights["in_VD"], np.float64)[np.asarray(ids)]
    weight_S = 0.8 ** np.arange(len(ids))[::-1]
    return weight_S @ value_SD @ np.asarray(model.weights["out_DV"], np.float64)


def scripted(vocabulary: int, words: dict[int, int]) -> Model:
    """A model that is certain: after token a comes words[a]."""
    in_VD, out_DV = np.eye(vocabulary, dtype=np.float32), np.zeros((vocabulary, vocabulary), np.float32)
    for token, following in words.items():
        out_DV[token, following] = 1e4

    def extend_last(weights, cache, token_BQ, count_B):
        return weights["in_VD"][token_BQ], Memory(cache.value_BPD, cache.length_B + count_B)

    return Model({"in_VD": jnp.asarray(in_VD), "out_DV": jnp.asarray(out_DV)}, new_cache, extend_last, logits, True)


class StandIn(types.SimpleNamespace):
    """What generation reads of a loaded model; `causal` is the only routing it has."""

    run, step, params, routing_state, routings = "runs/standin", 7, {}, {}, ("choice", "causal")
    program = types.SimpleNamespace(mesh=sharding.make_mesh(MeshConfig(1), 1))

    def under(self, routing):
        if routing not in self.routings:
            raise InputError(f"routing: {self.run} has no {routing}")


def picture(seed=0, side=4):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
