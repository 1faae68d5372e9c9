"""A feed-forward layer on random tokens, beside the oracle of paper Eq. 1."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles

from moma_jax.config import Modality, ModelConfig
from moma_jax.ffn import parse_ffn
from moma_jax.model.decoder import Decoder
from moma_jax.model.experts import Drawn, Ffn
from moma_jax.model.routing import Selection, expert_choice

ROWS, SEQUENCE, WIDTH, HIDDEN, SEED = 2, 12, 8, 16, 123
MODALITIES = (Modality("text", "t", 8), Modality("image", "i", 8, 4), Modality("sound", "s", 8, 2))


def random_params(boxed, rng):
    """Weights of these shapes, larger than at the start of training, so that gates are far from 1/2."""
    return jax.tree.map(lambda w: rng.normal(0, 0.6, w.shape).astype(np.float32), nn.unbox(boxed))


class Case:
    """An FFN on random tokens: `modality_GT` says what they are, -1 for padding."""

    def __init__(self, ffn, modality_GT, modalities=2, jitter=1e-3, select=expert_choice, seed=0, **model):
        modality_GT = np.asarray(modality_GT)
        groups, tokens = modality_GT.shape
        self.model = ModelConfig(ffn=ffn, layers=1, width=WIDTH, hidden=HIDDEN, jitter=jitter, dtype="float32", **model)
        self.modality_GT, self.layout = modality_GT, parse_ffn(ffn, MODALITIES[:modalities])
        decoder = Decoder(self.model, MODALITIES[:modalities], (tokens,) * modalities, ROWS, select)
        segment_BS = (modality_GT >= 0).astype(np.int32).reshape(groups * ROWS, -1)
        rules = decoder.rules(jnp.float32, tokens // ROWS)
        modality_BS = np.maximum(modality_GT, 0).reshape(segment_BS.shape)
        self.module = Ffn(self.model, rules, self.layout.shared, train=False)
        self.drawn = Drawn(np.uint32(SEED), jax.random.key(0))

        place = jax.jit(lambda: decoder.place(rules, segment_BS, jnp.asarray(modality_BS), jnp.arange(groups)))
        self.place = jax.device_get(place())
        rng = np.random.default_rng(seed)
        self.x_GTD, self.dy_GTD = rng.normal(size=(2, groups, tokens, WIDTH)).astype(np.float32)
        shapes = jax.eval_shape(self.module.init, jax.random.key(0), self.x_GTD, self.place, self.drawn, {})
        self.params = random_params(shapes["params"], rng)

    def run(self, x_GTD=None, state=None):
        """FfnOutput and its gradient in params and x along dy."""

        def total(params, x_GTD):
            output = self.module.apply({"params": params}, x_GTD, self.place, self.drawn, state or {})
            return jnp.sum(output.y_GTD * self.dy_GTD), output

        run = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
        gradient, output = jax.device_get(run(self.params, self.x_GTD if x_GTD is None else x_GTD))
        return output, gradient

    def check(self, x_GTD=None):
        """Asserts that selections, output and gradients are the oracle's."""
        x_GTD = self.x_GTD if x_GTD is None else x_GTD
        output, (d_params, dx_GTD) = self.run(x_GTD)
        groups = [(g.name, g.modalities, g.experts) for g in self.layout.groups]
        modality_GT = np.where(self.layout.dense, 0, self.modality_GT)  # dense computes padding too
        y_GTD, taken, gradient = oracles.moma_ffn(
            x_GTD, modality_GT, groups, self.params, capacity=self.model.capacity,
            rank_jitter=self.jitter if self.model.jitter else None, dy_GTD=self.dy_GTD,
        )  # fmt: skip
        for name, selection in output.selections.items():
            for g in range(len(modality_GT)):
                for e in range(selection.index_EC.shape[1]):
                    slots = selection.index_EC[g, e][selection.filled_EC[g, e]]
                    assert sorted(slots.tolist()) == sorted(taken[name, g, e])
        close(output.y_GTD, y_GTD)
        close(dx_GTD, gradient["x"])
        for name, weights in d_params.items():
            for kind, value in weights.items():
                close(value, gradient[name][kind])
        return output

    def jitter(self, g, t, e):
        row, position = divmod(t, self.modality_GT.shape[1] // ROWS)
        return self.model.jitter * oracles.jitter(SEED, g * ROWS + row, position, e)


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
