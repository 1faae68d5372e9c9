"""A feed-forward layer on random tokens, beside the oracle of paper Eq. 1."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles

from moma_jax.config import Modality, ModelConfig
from moma_jax.ffn import parse_ffn
from moma_jax.model.decoder import Decoder
from moma_jax.model.moe import RoutingKeys, layer_routing, moe
from moma_jax.model.parameters import FfnParameters, weights_of
from moma_jax.router import Function, Selection
from moma_jax.routers.choice import Choice

ROWS, SEQUENCE, WIDTH, HIDDEN, SEED = 2, 12, 8, 16, 123
CHOICE = Choice()
MODALITIES = (Modality("text", "t", 8), Modality("image", "i", 8, 4), Modality("sound", "s", 8, 2))


def random_params(boxed, rng):
    """Weights of these shapes, larger than at the start of training, so that gates are far from 1/2."""
    return jax.tree.map(lambda w: rng.normal(0, 0.6, w.shape).astype(np.float32), nn.unbox(boxed))


class Case:
    """An FFN on random tokens: `modality_GT` says what they are, -1 for padding."""

    def __init__(self, ffn, modality_GT, modalities=2, router=CHOICE, seed=0, **model):
        modality_GT = np.asarray(modality_GT)
        groups, tokens = modality_GT.shape
        self.model = ModelConfig(ffn=ffn, layers=1, width=WIDTH, hidden=HIDDEN, router=router, dtype="float32", **model)
        self.modality_GT, self.layout = modality_GT, parse_ffn(ffn, MODALITIES[:modalities])
        decoder = Decoder(self.model, MODALITIES[:modalities], (tokens,) * modalities, ROWS)
        segment_BS = (modality_GT >= 0).astype(np.int32).reshape(groups * ROWS, -1)
        shape = decoder.shape(tokens // ROWS)
        modality_BS = np.maximum(modality_GT, 0).reshape(segment_BS.shape)
        self.routing = layer_routing(self.model, shape, ROWS, None, False)
        self.keys = RoutingKeys(np.uint32(SEED), jax.random.key(0))

        position_BS = np.broadcast_to(np.arange(segment_BS.shape[1], dtype=np.int32), segment_BS.shape)
        id_BS = np.random.default_rng(seed + 1).integers(0, 64, segment_BS.shape, dtype=np.int32)
        rows = id_BS, segment_BS, position_BS, jnp.asarray(modality_BS)
        known = jax.jit(lambda: decoder.tokens(*rows, jnp.arange(groups)))
        self.tokens = jax.device_get(known())
        rng = np.random.default_rng(seed)
        self.x_GTD, self.dy_GTD = rng.normal(size=(2, groups, tokens, WIDTH)).astype(np.float32)
        shapes = jax.eval_shape(FfnParameters(self.model, shape.groups).init, jax.random.key(0))
        self.params = random_params(shapes["params"], rng)

    def run(self, x_GTD=None, state=None):
        """((y_GTD, RoutingResult), the gradient in params and x along dy)."""

        def total(params, x_GTD):
            arguments = (x_GTD, self.tokens, self.keys, state or {}, weights_of(params))
            y_GTD, result = moe(*arguments, routing=self.routing, model=self.model)
            return jnp.sum(y_GTD * self.dy_GTD), (y_GTD, result)

        run = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
        gradient, output = jax.device_get(run(self.params, self.x_GTD if x_GTD is None else x_GTD))
        return output, gradient

    def check(self, x_GTD=None):
        """Asserts that selections, output and gradients are the oracle's."""
        x_GTD = self.x_GTD if x_GTD is None else x_GTD
        (found_GTD, result), (d_params, dx_GTD) = self.run(x_GTD)
        padding = (-1,) if self.layout.dense else ()  # dense computes it, too
        groups = [(g.name, g.modalities + padding, g.experts) for g in self.layout.groups]
        groups += [(g.name, g.modalities, 1) for g in self.layout.shared if g.name != "shared"]
        y_GTD, taken, gradient = oracles.moma_ffn(
            x_GTD, self.modality_GT, groups, self.params, capacity=self.model.capacity,
            rank_jitter=self.jitter if self.model.router.jitter else None, dy_GTD=self.dy_GTD,
        )  # fmt: skip
        for name, selection in result.selections.items():
            for g in range(len(self.modality_GT)):
                for e in range(selection.index_EC.shape[1]):
                    slots = selection.index_EC[g, e][selection.filled_EC[g, e]]
                    assert sorted(slots.tolist()) == sorted(taken[name, g, e])
        close(found_GTD, y_GTD)
        close(dx_GTD, gradient["x"])
        for name, weights in d_params.items():
            for kind, value in weights.items():
                close(value, gradient[name][kind])
        return found_GTD, result

    def jitter(self, g, t, e):
        row, position = divmod(t, self.modality_GT.shape[1] // ROWS)
        return self.model.router.jitter * oracles.jitter(SEED, g * ROWS + row, position, e)


def close(fast, slow):
    np.testing.assert_allclose(fast, slow, atol=2e-5 * max(np.abs(slow).max(), 1e-3), rtol=0)


def mixed(modalities, groups=2, seed=0, padding=0.2):
    """Random modalities; some padding at the ends of rows."""
    rng = np.random.default_rng(seed)
    modality_BS = rng.integers(0, modalities, (groups * ROWS, SEQUENCE))
    modality_BS[:, SEQUENCE - int(padding * SEQUENCE) :] = -1
    return modality_BS.reshape(groups, -1)


def hashed(score, eligible_T, quota, state, key):
    """Ten lines of routing: the first tokens, one expert after the other, in a random order."""
    experts = score.logit_TE.shape[1]
    count, order_T = jnp.sum(eligible_T), jax.random.permutation(key, eligible_T.shape[0])
    order_T = order_T[jnp.argsort(~eligible_T[order_T], stable=True)]
    slot_EC = jnp.arange(quota.slots) * experts + jnp.arange(experts)[:, None]
    index_EC = order_T[jnp.minimum(slot_EC, order_T.shape[0] - 1)]
    gate_EC = jax.nn.sigmoid(jnp.take_along_axis(score.logit_TE.T, index_EC, axis=1))
    seen = None if state is None else state + count
    return Selection(index_EC, gate_EC, slot_EC < count), seen, {"balance": jnp.float32(2.0)}


class NoisyFunction(Function):
    """A function whose scores have noise."""

    gumbel = True
