"""Attention inside documents: the oracle, chunks, leaks, padding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from moma_jax.config import ModelConfig
from moma_jax.model.attention import attend, attend_rows, rotary_angles, rotate
from moma_jax.model.kernels.splash import attend_fused, refusal
from moma_jax.model.parameters import AttentionParameters

# Two rows: documents of 5 and 4 tokens and padding; nothing but padding.
SEGMENT_BS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [0] * 12])
POSITION_BS = np.array([[*range(5), *range(4), 0, 0, 0], [0] * 12])
RNG = np.random.default_rng(0)
X_BSD = RNG.normal(size=(2, 12, 12)).astype(np.float32)


def attention(chunk=512, theta=10000.0):
    """The sub-layer, random weights for it, and a function (params, x) -> y, plain and compiled."""
    model = ModelConfig(width=12, heads=3, layers=2, attention_chunk=chunk, rope_theta=theta)
    angles = rotary_angles(POSITION_BS, 4, theta)
    boxed = jax.eval_shape(AttentionParameters(model).init, jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda w: rng.normal(0, 0.5, w.shape).astype(np.float32), nn.unbox(boxed)["params"])

    def run(params, x_BSD):
        return attend_rows(x_BSD, params, SEGMENT_BS, POSITION_BS, angles, model)

    return params, run, jax.jit(run)


def test_equals_the_oracle():
    params, _, run = attention(theta=100.0)
    y_BSD = run(params, X_BSD)
    for row in range(2):
        expected = oracles.attention(X_BSD[row], SEGMENT_BS[row], POSITION_BS[row], params, theta=100.0)
        real = SEGMENT_BS[row] > 0
        np.testing.assert_allclose(y_BSD[row][real], expected[real], atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_chunks_change_nothing(chunk):
    def gradients(run):
        return jax.jit(jax.grad(lambda p, x: jnp.sum(jnp.sin(run(p, x))), argnums=(0, 1)))

    (params, *whole), (_, *parts) = attention(), attention(chunk)
    np.testing.assert_allclose(parts[1](params, X_BSD), whole[1](params, X_BSD), atol=1e-5)
    for a, b in zip(*(jax.tree.leaves(gradients(run[0])(params, X_BSD)) for run in (whole, parts)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(a).max()))


def test_scores_of_all_queries_never_exist_at_once():
    q = jnp.zeros((1, 40, 2, 4))
    where = jnp.ones((1, 40), int)

    def jaxpr(chunk):
        return str(jax.make_jaxpr(jax.grad(lambda q: attend(q, q, q, where, where, chunk=chunk).sum()))(q))

    assert "40,40]" in jaxpr(40) and "40,40]" not in jaxpr(8) and "8,40]" in jaxpr(8)


def test_documents_and_the_future_do_not_leak():
    params, _, run = attention()
    before = np.asarray(run(params, X_BSD))
    for changed, same in ((slice(0, 5), slice(5, 9)), (slice(5, 9), slice(0, 5)), (slice(7, 12), slice(0, 7))):
        x_BSD = X_BSD.copy()
        x_BSD[0, changed] += 10
        np.testing.assert_array_equal(np.asarray(run(params, x_BSD))[0, same], before[0, same])


@pytest.mark.parametrize("chunk", [512, 5])
def test_padding_gives_no_nan(chunk):
    params, run, _ = attention(chunk)
    both = jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(run(p, x) ** 2), argnums=(0, 1)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(both(params, X_BSD * 100)))


def test_rotary_positions():
    x = jnp.asarray(RNG.normal(size=(1, 3, 1, 4)), jnp.float32)
    turned = rotate(x, rotary_angles(jnp.array([[0, 1, 7]]), 4, 100.0))
    np.testing.assert_array_equal(turned[0, 0], x[0, 0])  # position 0 turns nothing
    for s, position in enumerate((0, 1, 7)):
        np.testing.assert_allclose(turned[0, s, 0], oracles.rotary(x[0, s, 0], position, 100.0), atol=1e-6)
    # Only the distance counts.
    q, k = x[:, :1], x[:, 1:2]
    products = [
        float(jnp.sum(rotate(q, rotary_angles(jnp.array([[i + 3]]), 4, 100.0))
                      * rotate(k, rotary_angles(jnp.array([[i]]), 4, 100.0))))
        for i in (0, 11)
    ]  # fmt: skip
    assert products[0] == pytest.approx(products[1], abs=1e-5)


def test_query_and_key_norm_have_parameters_per_head_and_ignore_scale():
    params, _, run = attention()
    assert params["query_norm"]["scale_HK"].shape == params["key_norm"]["bias_HK"].shape == (3, 4)
    scaled = params | {"query_DHK": params["query_DHK"] * 50, "key_DHK": params["key_DHK"] * 50}
    np.testing.assert_allclose(run(scaled, X_BSD)[0, :9], run(params, X_BSD)[0, :9], atol=1e-3)


def test_bfloat16_stays_bfloat16():
    params, _, run = attention()
    y_BSD = run(params, X_BSD.astype(jnp.bfloat16))
    assert y_BSD.dtype == jnp.bfloat16
    np.testing.assert_allclose(y_BSD[0, :9].astype(np.float32), run(params, X_BSD)[0, :9], atol=0.3)


@pytest.mark.parametrize(("heads", "width"), [(2, 64), (1, 128)])
def test_the_fused_kernel_is_the_plain_attention(heads, width):
    rng = np.random.default_rng(0)
    q_BSHK, k_BSHK, v_BSHK, dy_BSHK = rng.normal(size=(4, 2, 256, heads, width)).astype(np.float32)
    length_N = [100, 60, 50]  # documents; the rest is padding
    segment_S = np.concatenate([np.repeat([1, 2, 3], length_N), np.zeros(46, int)]).astype(np.int32)
    position_S = np.concatenate([np.arange(n) for n in (*length_N, 46)])
    segment_BS, position_BS = (np.stack([x, np.roll(x, 46)]) for x in (segment_S, position_S))
    real_BS11 = (segment_BS > 0)[..., None, None]

    def run(attention):
        y_BSHK, backward = jax.vjp(attention, q_BSHK, k_BSHK, v_BSHK)
        return np.where(real_BS11, y_BSHK, 0), *backward(np.where(real_BS11, dy_BSHK, 0).astype(np.float32))

    plain = run(lambda *qkv: attend(*qkv, segment_BS, position_BS, chunk=256))
    fused = run(lambda *qkv: attend_fused(*qkv, jnp.asarray(segment_BS), interpret=True))
    for one, other in zip(plain, fused, strict=True):
        np.testing.assert_allclose(other, one, atol=2e-5 * np.abs(one).max())


def test_what_the_fused_kernel_refuses():
    assert refusal("cpu", 100) is None and refusal("tpu", 4096) is None
    assert "no multiple of 128" in refusal("tpu", 564) and "GPU" in refusal("gpu", 4096)
