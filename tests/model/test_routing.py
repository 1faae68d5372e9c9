"""Selections: hand-checkable goldens, exact integer quotas, ties, noise."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from moma_jax.errors import InputError
from moma_jax.model.routing import checked, count_taken, position_hash, score_of, take_all
from moma_jax.router import Function, Quota, Routed, Score, Selection
from moma_jax.routers.choice import Choice, best_of

KEY = jax.random.key(0)


def pick(logit_TE, eligible_T, quota):
    logit_TE = jnp.asarray(logit_TE, jnp.float32)
    return Choice().select(Score(logit_TE, logit_TE, logit_TE), jnp.asarray(eligible_T, bool), quota, None, KEY)


def test_each_expert_takes_its_best_tokens():
    # Four tokens, two experts, half of the tokens each: expert 0 likes 3 and 0, expert 1 likes 3 and 1; none takes 2.
    logit_TE = [[2, -2], [0, 1], [-1, -3], [3, 4]]
    selection, state, losses, metrics = pick(logit_TE, [1, 1, 1, 1], Quota(4, Fraction(1, 2)))
    np.testing.assert_array_equal(selection.index_EC, [[3, 0], [3, 1]])
    np.testing.assert_allclose(selection.gate_EC, oracles.sigmoid(np.array([[3.0, 2], [4, 1]])), rtol=1e-6)
    assert selection.filled_EC.all() and state is None and losses == metrics == {}


def test_only_eligible_tokens_count_and_are_taken():
    # Token 3 is another modality's: k = ceil(3 / 2) = 2 of tokens 0, 1, 2.
    selection, *_ = pick([[2, -2], [0, 1], [-1, -3], [3, 4]], [1, 1, 1, 0], Quota(4, Fraction(1, 2)))
    np.testing.assert_array_equal(selection.index_EC, [[0, 1], [1, 0]])


def test_slots_beyond_k_are_empty_and_weigh_nothing():
    # Two eligible tokens of a quota of 6: k = 1, three slots.
    selection, *_ = pick(np.zeros((8, 2)), [0, 0, 1, 0, 0, 1, 0, 0], Quota(6, Fraction(1, 2)))
    np.testing.assert_array_equal(selection.filled_EC, [[True, False, False]] * 2)
    np.testing.assert_array_equal(selection.index_EC[:, 0], [2, 2])  # a tie goes to the lower token
    np.testing.assert_array_equal(selection.gate_EC[:, 1:], 0.0)
    assert ((selection.index_EC >= 0) & (selection.index_EC < 8)).all()


@pytest.mark.parametrize("eligible", [[0] * 8, [0, 0, 0, 0, 0, 0, 0, 1]])
def test_no_token_and_one_token(eligible):
    selection, *_ = pick(np.arange(16).reshape(8, 2), eligible, Quota(8, Fraction(1, 4)))
    assert selection.filled_EC.sum() == 2 * sum(eligible)
    if sum(eligible):
        np.testing.assert_array_equal(selection.index_EC[:, 0], 7)


def test_quota_is_exact_where_floats_are_not():
    # 0.1 * 30 is 3.0000000000000004 in floating point, whose ceiling is 4.
    assert Quota(30, Fraction(1, 10)).slots == 3 and int(Quota(30, Fraction(1, 10)).take(jnp.int32(30))) == 3
    for capacity in (Fraction(1), Fraction(1, 3), Fraction(1, 8), Fraction(3, 10), Fraction(9999, 10000)):
        quota = Quota(400_000, capacity)
        counts = np.concatenate([np.arange(100), [131_071, 250_001, 400_000]])
        exact = [math.ceil(int(n) * capacity) for n in counts]
        np.testing.assert_array_equal(jax.jit(quota.take)(jnp.asarray(counts, jnp.int32)), exact)
        assert quota.slots == exact[-1]


def test_take_all_lists_eligible_tokens_in_order():
    selection = take_all(jnp.array([0, 1, 0, 1, 1, 0], bool), Quota(4, Fraction(1)))
    np.testing.assert_array_equal(selection.index_EC, [[1, 3, 4, 0]])
    np.testing.assert_array_equal(selection.gate_EC, [[1, 1, 1, 0]])
    np.testing.assert_array_equal(selection.filled_EC, [[True, True, True, False]])


def test_jitter_is_the_hash_of_seed_row_position_expert():
    row, position = np.repeat(np.arange(5, 8), 4), np.tile(np.arange(4), 3)
    score = score_of(jnp.zeros((12, 3)), position_hash(row, position), jnp.uint32(4_000_000_000), Choice(jitter=1.0))
    expected = [[oracles.jitter(4_000_000_000, r, p, e) for e in range(3)] for r, p in zip(row, position, strict=True)]
    np.testing.assert_array_equal(score.rank_TE, np.array(expected, np.float32))
    np.testing.assert_array_equal(score.logit_TE, 0.0)


def test_jitter_spreads_evenly_and_breaks_ties_apart():
    hash_T = position_hash(jnp.arange(64)[:, None], jnp.arange(64)).reshape(-1)
    rank_TE = np.asarray(score_of(jnp.zeros((4096, 4)), hash_T, jnp.uint32(7), Choice(jitter=1.0)).rank_TE)
    assert rank_TE.min() >= 0 and rank_TE.max() < 1
    np.testing.assert_allclose(np.histogram(rank_TE, 16, (0, 1))[0] / rank_TE.size, 1 / 16, atol=0.01)
    assert abs(np.corrcoef(rank_TE.T) - np.eye(4)).max() < 0.06
    assert abs(np.corrcoef(rank_TE[:-1, 0], rank_TE[1:, 0])[0, 1]) < 0.06


def test_gradient_of_gates_reaches_taken_tokens_only():
    logit_TE = jnp.array([[2.0, -2], [0, 1], [-1, -3], [3, 4]])

    def total(logit_TE):
        score = score_of(logit_TE, position_hash(0, jnp.arange(4)), jnp.uint32(0), Choice())
        return best_of(score, jnp.ones(4, bool), Quota(4, Fraction(1, 4))).gate_EC.sum()

    expected = np.zeros((4, 2))
    s = oracles.sigmoid(np.array([3.0, 4.0]))
    expected[3] = s * (1 - s)
    np.testing.assert_allclose(jax.grad(total)(logit_TE), expected, rtol=1e-5)


def test_noise_is_the_difference_of_two_gumbel_samples_in_gate_and_rank():
    zero_TE = jnp.zeros((50_000, 2))
    score = score_of(zero_TE, jnp.zeros(50_000, jnp.uint32), jnp.uint32(0), Choice(jitter=0.0), (KEY, 1.0))
    # Logistic: mean 0, variance pi^2 / 3, quartiles at +-ln 3.
    noise = np.asarray(score.logit_TE)
    np.testing.assert_array_equal(noise, score.rank_TE)
    assert abs(noise.mean()) < 0.03 and abs(noise.var() / (np.pi**2 / 3) - 1) < 0.03
    np.testing.assert_allclose(np.quantile(noise, [0.25, 0.75]), [-np.log(3), np.log(3)], atol=0.04)
    half = score_of(zero_TE, jnp.zeros(50_000, jnp.uint32), jnp.uint32(0), Choice(jitter=0.0), (KEY, 0.5))
    np.testing.assert_allclose(half.logit_TE, noise / 2, rtol=1e-6)


def test_noise_fades_to_nothing_or_stays():
    sizes = [float(Choice(gumbel_until=0.5).noise_at(share)) for share in (0.0, 0.25, 0.5, 0.9)]
    assert sizes == [1.0, 0.5, 0.0, 0.0]
    assert Choice(gumbel_until=None).noise_at(0.9) == 1.0


def test_count_taken():
    # Text taken 0, 2 and 3 times; image once; padding never counts.
    counted = count_taken(jnp.array([0, 2, 3, 1, 1]), jnp.array([0, 0, 0, 1, -1]), 2)
    np.testing.assert_array_equal(counted, [[1, 0, 2], [0, 1, 0]])


def whole(score, eligible_T, quota, state, key):
    """A function that keeps the contract, to be spoilt."""
    return best_of(score, eligible_T, quota), state, {}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s, state, losses: s, r"must return Routed\(selection, state, ...\), returned Selection"),
        (lambda s, state, losses: ((s.index_EC, s.gate_EC, s.filled_EC), state, losses), "must return"),
        (lambda s, state, losses: (s._replace(index_EC=s.index_EC.T), state, losses), r"index_EC as int32\[2, 3\]"),
        (lambda s, state, losses: (s._replace(gate_EC=s.gate_EC[:, :1]), state, losses), "gate_EC as float32"),
        (lambda s, state, losses: (s._replace(filled_EC=s.gate_EC), state, losses), "filled_EC as float32"),
        (lambda s, state, losses: (s, state, {"extra": jnp.zeros(7)}), "loss extra of shape"),
        (lambda s, state, losses: Routed(s, state, losses, {"extra": jnp.zeros(7)}), "metric extra of shape"),
        (lambda s, state, losses: (s, {"calls": jnp.zeros(())}, losses), "state of another form"),
    ],
)
def test_a_rule_that_breaks_the_contract_is_named(spoil, message):
    score = score_of(jnp.zeros((8, 3)), position_hash(0, jnp.arange(8)), jnp.uint32(0), Choice())
    state = {"calls": jnp.zeros((), jnp.int32)}

    def spoilt(*arguments):
        return spoil(*whole(*arguments))

    def answer(rule):
        return rule.select(score, jnp.ones(8, bool), Quota(6, Fraction(1, 3)), state, None)

    with pytest.raises(InputError, match=f"router: .*spoilt .*{message}"):
        checked(answer(Function(spoilt)), Function(spoilt), (8, 3), state)
    checked(answer(Function(whole)), Function(whole), (8, 3), state)


def test_an_index_outside_the_group_is_an_empty_slot():
    selection = Selection(jnp.array([[0, 9, -1]]), jnp.ones((1, 3)), jnp.ones((1, 3), bool))
    (index_EC, gate_EC, filled_EC), *_ = checked(Routed(selection, None), Function(whole), (4, 1), None)
    np.testing.assert_array_equal(filled_EC, [[True, False, False]])
    np.testing.assert_array_equal(gate_EC, [[1, 0, 0]])
    np.testing.assert_array_equal(index_EC, [[0, 3, 0]])
