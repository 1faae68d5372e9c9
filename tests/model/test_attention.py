"""Attention inside documents: the oracle, chunks, leaks, padding."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from moma_jax.config import ModelConfig, RopeScaling
from moma_jax.model.attention import attend, attend_rows, qk_norm, rotary_angles, rotate
from moma_jax.model.blockwise import attend_blocks
from moma_jax.model.kernels import refusal
from moma_jax.model.kernels.splash import attend_fused
from moma_jax.model.kernels.triton import attend_triton
from moma_jax.model.kernels.turned import Norm, turned
from moma_jax.model.parameters import AttentionParameters

# Two rows: documents of 5 and 4 tokens and padding; nothing but padding.
SEGMENT_BS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [0] * 12])
POSITION_BS = np.array([[*range(5), *range(4), 0, 0, 0], [0] * 12])
RNG = np.random.default_rng(0)
X_BSD = RNG.normal(size=(2, 12, 12)).astype(np.float32)


def attention(chunk=512, theta=10000.0, **options):
    """The sub-layer, random weights for it, and a function (params, x) -> y, plain and compiled."""
    model = ModelConfig(**{"width": 12, "heads": 3, "layers": 2} | options, attention_chunk=chunk, rope_theta=theta)
    angles = rotary_angles(POSITION_BS, model)
    boxed = jax.eval_shape(AttentionParameters(model).init, jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda w: rng.normal(0, 0.5, w.shape).astype(np.float32), nn.unbox(boxed)["params"])

    def run(params, x_BSD):
        return attend_rows(x_BSD, params, SEGMENT_BS, POSITION_BS, angles, model)

    return params, run, jax.jit(run)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": 6, "kv_heads": 2, "head_width": 8},
        {"heads": 2, "kv_heads": 1, "qk_norm": "none"},
        {"head_width": 2, "qk_norm": "rms"},
        {"head_width": 12, "rope_scaling": RopeScaling(factor=3, low=0.4, high=2, positions=20)},
    ],
)
def test_equals_the_oracle(options):
    """Heads of their own width, such as share keys, other norms of them, and slowed rotations, too."""
    params, _, run = attention(theta=100.0, **options)
    scaling = options.get("rope_scaling")
    y_BSD = run(params, X_BSD)
    for row in range(2):
        arguments = (X_BSD[row], SEGMENT_BS[row], POSITION_BS[row], params)
        expected = oracles.attention(*arguments, theta=100.0, scaling=scaling)
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


def packed_rows(rng, rows, sequence, longest):
    """Segments and positions of documents of any length, padding behind them."""
    segment_BS, position_BS = np.zeros((rows, sequence), np.int32), np.zeros((rows, sequence), np.int32)
    for row in range(rows):
        start, number = 0, 1
        while start < sequence - rng.integers(0, 9):
            length = int(min(rng.integers(1, longest + 1), sequence - start))
            segment_BS[row, start : start + length] = number
            position_BS[row, start : start + length] = np.arange(length)
            start, number = start + length, number + 1
        position_BS[row, start:] = np.arange(sequence - start)
    return segment_BS, position_BS


def all_pairs(q_BHSK, k_BHSK, v_BHSK, segment_BS, position_BS):
    """The definition, every pair of positions at once, float64."""
    score_BHQS = jnp.einsum("bhqk,bhsk->bhqs", q_BHSK, k_BHSK) / np.sqrt(q_BHSK.shape[-1])
    later_BQS = position_BS[:, :, None] >= position_BS[:, None]
    visible_BQS = (segment_BS[:, :, None] == segment_BS[:, None]) & later_BQS
    return jnp.einsum("bhqs,bhsk->bhqk", jax.nn.softmax(score_BHQS, where=visible_BQS[:, None]), v_BHSK)


@pytest.mark.parametrize(
    ("sequence", "longest", "queries"),
    [(1, 1, 1), (24, 24, 24), (40, 9, 8), (41, 41, 8), (64, 16, 5), (64, 200, 16), (96, 3, 13), (50, 20, 7)],
)
def test_blocks_are_all_pairs(sequence, longest, queries):
    """Whatever window a block takes: one document, many, padding, rows that no block divides."""
    rng = np.random.default_rng(sequence)
    segment_BS, position_BS = packed_rows(rng, 3, sequence, longest)
    with jax.enable_x64():
        qkv = [jnp.asarray(rng.normal(size=(3, 2, sequence, 4))) for _ in range(4)]
        q, k, v, dy = qkv

        def run(function):
            y, backward = jax.vjp(function, q, k, v)
            return y, *backward(dy)

        blocks = run(lambda *qkv: attend_blocks(*qkv, segment_BS, position_BS, queries))
        whole = run(lambda *qkv: all_pairs(*qkv, segment_BS, position_BS))
        for one, other in zip(blocks, whole, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-12)


def test_blocks_in_bfloat16():
    """Against an oracle in float32: what is rounded is the weights and what comes out, to 8 bits."""
    rng = np.random.default_rng(0)
    segment_BS, position_BS = packed_rows(rng, 2, 96, 40)
    narrow = [jnp.asarray(rng.normal(size=(2, 2, 96, 16)), jnp.bfloat16) for _ in range(4)]

    def run(function, q, k, v, dy):
        y, backward = jax.vjp(function, q, k, v)
        return y, *backward(dy)

    blocks = run(lambda *qkv: attend_blocks(*qkv, segment_BS, position_BS, 16), *narrow)
    whole = run(lambda *qkv: all_pairs(*qkv, segment_BS, position_BS), *(x.astype(jnp.float32) for x in narrow))
    for one, other in zip(blocks, whole, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(np.float32), other, atol=2**-6 * np.abs(other).max())


def test_masks_of_all_blocks_never_exist_at_once():
    """What depends on no layer JAX takes out of a scan over layers, were it not held in its block."""
    x_BHSK = jnp.ones((1, 2, 64, 8))
    segment_BS, position_BS = jnp.ones((1, 64), jnp.int32), jnp.arange(64)[None]

    def loss(x_BHSK):
        def layer(x, _):
            return x + attend_blocks(x, x, x, segment_BS, position_BS, 16), None

        return jax.lax.scan(layer, x_BHSK, None, length=3)[0].sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(x_BHSK))
    sizes = {int(size) for size in re.findall(r"\[(?:\d+,)*16,(\d+)\]", text)}
    assert 64 in sizes, "a block's scores are seen, or this test looks at nothing"
    whole = [shape for shape in re.findall(r"\[[\d,]+\]", text) if re.fullmatch(r"\[4,1,2,16,(16|32|48|64)\]", shape)]
    assert not whole


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
    def angles(position_S):
        return rotary_angles(jnp.array([position_S]), ModelConfig(head_width=4, rope_theta=100.0))

    x = jnp.asarray(RNG.normal(size=(1, 3, 1, 4)), jnp.float32)
    turned = rotate(x, angles([0, 1, 7]))
    np.testing.assert_array_equal(turned[0, 0], x[0, 0])  # position 0 turns nothing
    for s, position in enumerate((0, 1, 7)):
        np.testing.assert_allclose(turned[0, s, 0], oracles.rotary(x[0, s, 0], position, 100.0), atol=1e-6)
    # Only the distance counts.
    q, k = x[:, :1], x[:, 1:2]
    products = [float(jnp.sum(rotate(q, angles([i + 3])) * rotate(k, angles([i])))) for i in (0, 11)]
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


# Kernels of a TPU, interpreted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "width"), [(2, 64), (1, 128)])
def test_the_fused_kernel_is_the_plain_attention(heads, width):
    rng = np.random.default_rng(0)
    q_BHSK, k_BHSK, v_BHSK, dy_BHSK = rng.normal(size=(4, 2, heads, 256, width)).astype(np.float32)
    length_N = [100, 60, 50]  # documents; the rest is padding
    segment_S = np.concatenate([np.repeat([1, 2, 3], length_N), np.zeros(46, int)]).astype(np.int32)
    position_S = np.concatenate([np.arange(n) for n in (*length_N, 46)])
    segment_BS, position_BS = (np.stack([x, np.roll(x, 46)]) for x in (segment_S, position_S))
    real_B1S1 = (segment_BS > 0)[:, None, :, None]

    def run(attention):
        y_BHSK, backward = jax.vjp(attention, q_BHSK, k_BHSK, v_BHSK)
        return np.where(real_B1S1, y_BHSK, 0), *backward(np.where(real_B1S1, dy_BHSK, 0).astype(np.float32))

    def kernel(segment_BS):
        return lambda q, k, v: attend_fused(q / np.sqrt(width), k, v, jnp.asarray(segment_BS), interpret=True)

    plain = run(lambda *qkv: attend_blocks(*qkv, segment_BS, position_BS, 64))
    for one, other in zip(run(kernel(segment_BS)), plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())
    assert np.abs(run(kernel(np.ones_like(segment_BS)))[0] - plain[0]).max() > 0.1, "documents matter"


@pytest.mark.parametrize(
    ("sequence", "heads", "width", "dtype"),
    [
        (64, 2, 128, "float32"),
        (48, 4, 64, "float32"),
        (32, 8, 32, "float32"),
        (32, 1, 256, "float32"),
        (64, 2, 128, "bfloat16"),
    ],
)
def test_norm_and_rotation_in_one_pass(sequence, heads, width, dtype, monkeypatch):
    monkeypatch.setattr("moma_jax.model.kernels.turned.BLOCK_BYTES", 16 * heads * width * 4)  # several blocks
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x_BSF, dy_BHSK = draw(2, sequence, heads * width).astype(dtype), draw(2, heads, sequence, width).astype(dtype)
    weights = draw(heads, width), draw(heads, width)
    position_BS = np.stack([np.arange(sequence), np.arange(sequence) % 7])
    angles = rotary_angles(position_BS, ModelConfig(head_width=width, rope_theta=100.0))

    def plain(x_BSF, scale_HK, bias_HK):
        x_BSHK = x_BSF.reshape(2, sequence, heads, width)
        return (rotate(qk_norm(x_BSHK, {"scale_HK": scale_HK, "bias_HK": bias_HK}, 1e-5), angles) * 0.3).swapaxes(1, 2)

    def run(function, x_BSF, dy_BHSK):
        y_BHSK, backward = jax.vjp(function, x_BSF, *weights)
        return y_BHSK, *backward(dy_BHSK)

    kernel = run(lambda x, *weights: turned(x, *weights, angles, Norm(1e-5, 0.3, interpret=True)), x_BSF, dy_BHSK)
    oracle = run(plain, x_BSF.astype(jnp.float32), dy_BHSK.astype(jnp.float32))
    for one, other in zip(kernel, oracle, strict=True):
        atol = (1e-5 if one.dtype == jnp.float32 else 2**-8) * np.abs(other).max()  # half a bit of what is stored
        np.testing.assert_allclose(one.astype(np.float32), other, atol=atol)
    assert kernel[0].dtype == kernel[1].dtype == x_BSF.dtype


@pytest.mark.parametrize("width", [64, 128])
def test_the_kernel_of_gpus_is_the_plain_attention(width):
    rng = np.random.default_rng(0)
    segment_BS, position_BS = packed_rows(rng, 2, 256, 120)
    q_BSHK, k_BSHK, v_BSHK, dy_BSHK = rng.normal(size=(4, 2, 256, 2, width)).astype(np.float32)
    real_BS11 = (segment_BS > 0)[..., None, None]

    def run(attention):
        y_BSHK, backward = jax.vjp(attention, q_BSHK, k_BSHK, v_BSHK)
        return np.where(real_BS11, y_BSHK, 0), *backward(np.where(real_BS11, dy_BSHK, 0).astype(np.float32))

    plain = run(lambda *qkv: attend(*qkv, segment_BS, position_BS, chunk=64))
    for one, other in zip(run(lambda *qkv: attend_triton(*qkv, segment_BS, interpret=True)), plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())
    blind = attend_triton(q_BSHK, k_BSHK, v_BSHK, np.ones_like(segment_BS), interpret=True)
    assert np.abs(blind - plain[0])[segment_BS > 1].max() > 0.1, "documents matter"


def test_what_the_kernels_refuse():
    assert refusal("cpu", "cpu", 100, 1, 3) is None and refusal("tpu", "TPU v5", 4096, 16, 64) is None
    assert "no multiple of 128" in refusal("tpu", "TPU v5", 564, 1, 128)
    assert "heads of 48 channels" in refusal("tpu", "TPU v5", 512, 4, 48)
    assert "heads of 64" in refusal("tpu", "TPU v5", 512, 3, 64)
    assert refusal("gpu", "NVIDIA H100 80GB HBM3", 4096, 1, 128) is None is refusal("gpu", "NVIDIA L4", 256, 1, 64)
    assert "no multiple of 128" in refusal("gpu", "NVIDIA L4", 564, 1, 128)
    assert "too old" in refusal("gpu", "Tesla T4", 4096, 1, 128) and "wider" in refusal("gpu", "NVIDIA L4", 512, 1, 512)
