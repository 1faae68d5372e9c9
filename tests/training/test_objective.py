"""Chunked cross-entropy against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import long_but

from moma_jax.training.objective import cross_entropy, token_nats

ROWS, SEQUENCE, WIDTH, VOCABULARY = 3, 10, 8, 32
MODALITY_V = np.repeat([0, 1, 2], [16, 12, 4]).astype(np.int8)


def plain(hidden_BSD, kernel_DV, target_BS, weight_BS, z_loss):
    """Logits of everything at once."""
    logit_BSV = jnp.einsum("bsd,dv->bsv", hidden_BSD, kernel_DV)
    lse_BS = jax.nn.logsumexp(logit_BSV, axis=-1)
    nats_BS = lse_BS - jnp.take_along_axis(logit_BSV, target_BS[..., None], axis=-1)[..., 0]
    return jnp.sum(weight_BS * (nats_BS + z_loss * lse_BS**2)), (nats_BS, lse_BS)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    hidden_BSD = rng.normal(size=(ROWS, SEQUENCE, WIDTH)).astype(np.float32)
    kernel_DV = rng.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)
    target_BS = rng.integers(0, VOCABULARY, (ROWS, SEQUENCE)).astype(np.int32)
    weight_BS = rng.choice([0, 0.5, 1, 2], (ROWS, SEQUENCE)).astype(np.float32)
    return hidden_BSD, kernel_DV, target_BS, weight_BS


@pytest.mark.parametrize("chunk", long_but(7, of=[1, 7, 10, 30, 1000]))
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_chunks_change_neither_value_nor_gradient(arrays, chunk, z_loss):
    hidden_BSD, kernel_DV, target_BS, weight_BS = arrays

    def chunked(hidden_BSD, kernel_DV):
        return cross_entropy(
            hidden_BSD, kernel_DV, target_BS, weight_BS, MODALITY_V[target_BS], kinds=3, chunk=chunk, z_loss=z_loss
        )

    def scaled(function):
        return lambda h, k, *rest: (3 * function(h, k, *rest)[0], function(h, k, *rest)[1])

    (total, sums), grads = jax.value_and_grad(scaled(chunked), argnums=(0, 1), has_aux=True)(hidden_BSD, kernel_DV)
    (expected, (nats_BS, lse_BS)), expected_grads = jax.value_and_grad(scaled(plain), argnums=(0, 1), has_aux=True)(
        hidden_BSD, kernel_DV, target_BS, weight_BS, z_loss
    )
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    each_BS = token_nats(hidden_BSD, kernel_DV, target_BS, weight_BS, chunk=chunk)
    np.testing.assert_allclose(each_BS, weight_BS * nats_BS, rtol=1e-5, atol=1e-6)
    for m in range(3):
        weight_m_BS = weight_BS * (MODALITY_V[target_BS] == m)
        np.testing.assert_allclose(sums.cross_entropy_J[m], np.sum(weight_m_BS * nats_BS), rtol=1e-5)
        np.testing.assert_allclose(sums.weight_J[m], weight_m_BS.sum())
    np.testing.assert_allclose(sums.square_log_partition, np.sum(weight_BS * np.square(lse_BS)), rtol=1e-5)
    np.testing.assert_allclose(chunked(hidden_BSD, kernel_DV)[0], expected / 3, rtol=1e-6)  # no gradient asked


def test_tokens_without_weight_may_hold_anything(arrays):
    hidden_BSD, kernel_DV, target_BS, weight_BS = arrays

    def total(hidden_BSD, kernel_DV):
        return cross_entropy(hidden_BSD, kernel_DV, target_BS, weight_BS, MODALITY_V[target_BS], kinds=3, chunk=8)[0]

    broken_BSD = np.where(weight_BS[..., None] == 0, np.nan, hidden_BSD)
    clean = jax.value_and_grad(total, argnums=(0, 1))(hidden_BSD, kernel_DV)
    broken = jax.value_and_grad(total, argnums=(0, 1))(broken_BSD, kernel_DV)
    jax.tree.map(np.testing.assert_array_equal, broken, clean)
    assert not np.any(np.asarray(clean[1][0])[weight_BS == 0])


def test_logits_of_all_tokens_never_exist(arrays):
    hidden_BSD, kernel_DV, target_BS, weight_BS = arrays

    def total(hidden_BSD, kernel_DV):
        return cross_entropy(hidden_BSD, kernel_DV, target_BS, weight_BS, MODALITY_V[target_BS], kinds=3, chunk=5)[0]

    compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(hidden_BSD, kernel_DV).compile()
    text = compiled.as_text()
    assert f"f32[5,{VOCABULARY}]" in text
    assert f"f32[{ROWS * SEQUENCE},{VOCABULARY}]" not in text and f"f32[{ROWS},{SEQUENCE},{VOCABULARY}]" not in text


def test_bfloat16_hidden_states_give_float32_sums(arrays):
    hidden_BSD, kernel_DV, target_BS, weight_BS = arrays
    total, sums = cross_entropy(
        jnp.asarray(hidden_BSD, jnp.bfloat16), kernel_DV, target_BS, weight_BS, MODALITY_V[target_BS], kinds=3, chunk=8
    )
    assert total.dtype == jnp.float32 and sums.cross_entropy_J.dtype == jnp.float32
    expected = plain(hidden_BSD, kernel_DV, target_BS, weight_BS, 0.0)[0]
    np.testing.assert_allclose(total, expected, rtol=2e-2)
