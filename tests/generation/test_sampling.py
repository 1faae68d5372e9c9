"""Temperature, top-k and top-p against slow NumPy; the formula of guidance; bad values."""

import jax
import numpy as np
import pytest

from moma_jax.errors import InputError
from moma_jax.generation.sampling import Draw, Guidance, Sampling, draw_of, guided, kept, sample


def oracle(logit_V, temperature, top_k, top_p):
    """Probabilities, by sorting and counting."""
    scaled_V = np.asarray(logit_V, np.float64) / temperature
    order = sorted(range(len(scaled_V)), key=lambda v: -scaled_V[v])
    chosen = order[: top_k or len(order)]
    weight = np.exp(scaled_V[chosen] - scaled_V[chosen].max())
    share, total, last = weight / weight.sum(), 0.0, []
    for v, p in zip(chosen, share, strict=True):
        if total < top_p:
            last.append(v)
        total += p
    result_V = np.zeros(len(scaled_V))
    result_V[last] = np.exp(scaled_V[last] - scaled_V[last].max())
    return result_V / result_V.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 4, 20])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
def test_top_k_and_top_p_keep_what_the_oracle_keeps(temperature, top_k, top_p):
    logit_BV = np.random.default_rng(0).normal(size=(16, 20)).astype(np.float32) * 2
    settings = draw_of(Sampling(temperature, top_p, top_k), Sampling(), None, 20)
    expected_BV = np.stack([oracle(row, temperature, top_k, top_p) > 0 for row in logit_BV])
    if settings.filters is None:
        assert expected_BV.all() and top_p == 1 and top_k is None
        return
    p, k = (np.broadcast_to(x[0], 16) for x in settings.filters)
    np.testing.assert_array_equal(kept(logit_BV / temperature, k, p), expected_BV)


def test_top_p_1_keeps_the_whole_tail():
    logit_BV = np.linspace(0, -60, 500, dtype=np.float32)[None]  # rounded sums reach 1 long before the end
    k, p = draw_of(Sampling(top_k=499), Sampling(), None, 500).filters[::-1]
    assert int(kept(logit_BV, k[:1], p[:1]).sum()) == 499


def test_equal_logits_are_kept_together_and_the_forbidden_never():
    logit_BV = np.array([[1, 3, 3, 3, -np.inf, 0]], np.float32)
    keep = np.asarray(kept(logit_BV, np.array([2]), np.array([np.inf], np.float32)))[0]
    assert keep.tolist() == [False, True, True, True, False, False]
    draw = draw_of(Sampling(top_k=6), Sampling(), None, 6)
    keys = jax.random.split(jax.random.key(0), 2000)
    tokens = np.asarray(sample(keys, np.repeat(logit_BV, 2000, 0), np.zeros(2000, np.int32), draw))
    assert set(tokens.tolist()) == {0, 1, 2, 3, 5}


@pytest.mark.parametrize("chosen", [Sampling(), Sampling(0.7), Sampling(1.5, 0.8), Sampling(1.0, 0.9, 5)])
def test_frequencies(chosen):
    logit_V = np.random.default_rng(1).normal(size=12).astype(np.float32) * 1.5
    count = 40_000
    draw = draw_of(chosen, Sampling(), None, 12)
    keys = jax.random.split(jax.random.key(5), count)
    tokens = sample(keys, np.broadcast_to(logit_V, (count, 12)), np.zeros(count, np.int32), draw)
    share_V = np.bincount(np.asarray(tokens), minlength=12) / count
    expected_V = oracle(logit_V, chosen.temperature, chosen.top_k, chosen.top_p)
    assert np.all(share_V[expected_V == 0] == 0)
    np.testing.assert_allclose(share_V, expected_V, atol=5 * np.sqrt(0.25 / count))


@pytest.mark.parametrize("image", [Sampling(0.0), Sampling(0.0, 0.5, 3), Sampling(1.0, 1.0, 1)])
def test_temperature_0_is_argmax_and_settings_follow_the_state(image):
    logit_BV = np.random.default_rng(2).normal(size=(400, 9)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 400)
    state_B = (np.arange(400) % 2).astype(np.int32)
    tokens = np.asarray(sample(keys, logit_BV, state_B, draw_of(Sampling(), image, None, 9)))
    best = logit_BV.argmax(-1)
    assert np.all(tokens[state_B == 1] == best[state_B == 1])
    assert 0.2 < np.mean(tokens[state_B == 0] == best[state_B == 0]) < 0.7


def test_a_rows_token_hangs_on_its_key_alone():
    logit_BV = np.random.default_rng(3).normal(size=(8, 30)).astype(np.float32)
    keys = jax.random.split(jax.random.key(9), 8)
    draw, state_B = draw_of(Sampling(1.0, 0.9), Sampling(), None, 30), np.zeros(8, np.int32)
    together = np.asarray(sample(keys, logit_BV, state_B, draw))
    alone = [int(sample(keys[b : b + 1], logit_BV[b : b + 1], state_B[:1], draw)[0]) for b in range(8)]
    assert together.tolist() == alone


def test_guidance_is_chameleons():
    full, pictures, none = np.random.default_rng(4).normal(size=(3, 2, 5))
    mixed = np.asarray(guided(full, pictures, none, np.array([3.0, 1.2])))
    np.testing.assert_allclose(mixed, none + 1.2 * (pictures - none) + 3.0 * (full - pictures), rtol=1e-5)
    np.testing.assert_allclose(guided(full, pictures, none, np.array([1.0, 1.0])), full, rtol=1e-5)
    assert draw_of(Sampling(), Sampling(), Guidance(1.0, 1.0), 5).scale_2 is None, "no guidance costs nothing"
    assert isinstance(draw_of(Sampling(), Sampling(), Guidance(), 5), Draw)


@pytest.mark.parametrize(
    "bad, message",
    [
        (Sampling(-0.1), "text.temperature: -0.1"),
        (Sampling(float("nan")), "text.temperature: nan"),
        (Sampling(1.0, 0.0), "text.top_p: 0.0"),
        (Sampling(1.0, 1.1), "text.top_p: 1.1"),
        (Sampling(1.0, 1.0, 0), "text.top_k: 0"),
    ],
)
def test_bad_settings(bad, message):
    with pytest.raises(InputError, match=message):
        bad.check("text")
    with pytest.raises(InputError, match="guidance.image: inf"):
        Guidance(1.0, float("inf")).check()
