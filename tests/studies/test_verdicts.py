"""Eta off finished runs where the truth is known, and whether intervals hold it as often as they say."""

import numpy as np
import pytest
from scipy import stats

from moma_jax.studies.verdicts import Baseline, etas, pairs, verdict

BUDGETS = np.array([0.5, 0.71, 1.0, 1.41, 2.0])


def law(budget):
    """Like the dense runs of docs/results/studies: 5% less loss for twice the FLOPs, falling ever more slowly."""
    return 1.4 + 0.75 * np.asarray(budget) ** -0.13


@pytest.mark.parametrize("speed", [0.55, 0.8, 1.0, 1.2, 1.9])
def test_a_variant_that_is_c_times_as_efficient_has_eta_c(speed):
    found = etas({3: (BUDGETS, law(BUDGETS))}, {3: (1.0, float(law(speed))), 4: (1.0, 2.0)})
    assert found.by_seed == {3: pytest.approx(speed, rel=2e-3)} and found.bounds == {3: ""}
    other_budget = etas({3: (BUDGETS, law(BUDGETS))}, {3: (1.05, float(law(1.05 * speed)))})
    assert other_budget.by_seed[3] == pytest.approx(speed, rel=2e-3)


def test_beyond_the_budgets_it_is_a_bound_without_an_interval():
    ladder = {seed: (BUDGETS, law(BUDGETS)) for seed in range(2)}
    far = etas(ladder, {0: (1.0, float(law(1.5))), 1: (1.0, float(law(5.0)))})
    assert far.by_seed[1] == pytest.approx(2) and far.bounds == {0: "", 1: ">="}
    result = verdict(far)
    assert (result.bound, result.interval, result.word, result.least) == (">=", None, "undecided", None)
    near = etas(ladder, {0: (1.0, float(law(1.1))), 1: (1.0, float(law(1.2)))})
    assert verdict(near, far).bound == "<=", "over a variant that is better than is known"
    assert verdict(near, etas(ladder, {})) is None


def test_a_longer_run_that_is_worse_is_one_with_its_neighbour():
    """Pool adjacent violators: the loss is their mean, at the mean of their log FLOPs."""
    baseline = Baseline([1.0, 2.0, 4.0, 8.0], [3.0, 2.4, 2.6, 2.0])
    assert baseline.flops(2.5) == (pytest.approx(8**0.5), "")
    assert baseline.flops(3.0) == (1.0, "") and baseline.flops(2.0) == (pytest.approx(8.0), "")
    assert baseline.flops(2.7)[0] < baseline.flops(2.5)[0] < baseline.flops(2.3)[0]


def test_a_verdict_is_a_paired_t_test_of_logarithms():
    ladder = {seed: (BUDGETS, law(BUDGETS) + 0.1 * seed) for seed in range(5)}
    ours, theirs = (1.2, 1.3, 1.25, 1.4, 1.2), (1.1, 1.1, 1.2, 1.1, 1.05)
    a, b = (
        etas(ladder, {s: (1.0, float(law(speed)) + 0.1 * s) for s, speed in enumerate(speeds)})
        for speeds in (ours, theirs)
    )
    result = verdict(a, b)
    logs = np.log(ours) - np.log(theirs)
    assert list(result.by_seed.values()) == pytest.approx(np.exp(logs), rel=5e-3)
    assert np.log(result.interval) == pytest.approx(stats.t.interval(0.95, 4, logs.mean(), stats.sem(logs)), abs=5e-3)
    assert result.word == "ahead" and verdict(b, a).word == "behind"
    chance = stats.nct.sf(stats.t.ppf(0.975, 4), 4, np.log(result.least) / stats.sem(logs))
    assert chance == pytest.approx(0.8, abs=0.03), "the least ratio is what would have been seen in 80% of studies"
    one = verdict(etas(ladder, {0: (1.0, float(law(1.3)))}))
    assert (one.word, one.interval) == ("undecided", None)


def test_who_is_held_against_whom():
    assert pairs(["8x", "dense", "4t4i"], "dense") == [("8x", "dense"), ("4t4i", "dense"), ("4t4i", "8x")]
