"""Eta, its intervals and power laws, where the answer is known."""

import math

import numpy as np
import pytest
from scipy import stats

from moma_jax.studies.curves import Curve, smoothed
from moma_jax.studies.speedup import eta, power_law, reached, speedup

FLOPS_N = np.geomspace(1e12, 1e14, 60)


def line(speed=1.0, shift=0.0, floor=0.0):
    return FLOPS_N, 50 * (speed * FLOPS_N) ** -0.1 + shift + floor


@pytest.mark.parametrize("speed", [0.2, 0.5, 0.97, 1.0, 1.03, 2.0, 5.0])
def test_a_variant_that_is_c_times_faster_has_eta_c(speed):
    assert eta(line(), line(speed)) == (pytest.approx(speed, rel=1e-4), "")
    assert eta(line(speed), line()) == (pytest.approx(1 / speed, rel=1e-4), "")


def test_eta_beyond_the_curve_is_a_bound():
    assert eta(line(), line(1000.0)) == (pytest.approx(100), ">=")
    assert eta(line(), line(0.001)) == (pytest.approx(0.01), "<=")


def test_budgets_need_not_be_equal():
    flops_N, loss_N = line(2.0)
    assert eta(line(), (flops_N[:-2], loss_N[:-2]))[0] == pytest.approx(2, rel=1e-4)
    assert eta((flops_N[:-2], loss_N[:-2]), line())[0] == pytest.approx(0.5, rel=1e-4)


def test_a_curve_reaches_a_loss_where_its_running_minimum_does():
    spent_N, loss_N = np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([5.0, 3.0, 4.0, 3.5, 1.0])
    assert reached((spent_N, loss_N), 4.0) == pytest.approx(math.sqrt(2))  # half way in log spending
    assert reached((spent_N, loss_N), 3.0) == pytest.approx(2)
    assert reached((spent_N, loss_N), 2.0) == pytest.approx(8 * math.sqrt(2))
    assert reached((spent_N, loss_N), 6.0) == 1
    assert math.isnan(reached((spent_N, loss_N), 0.9))


def test_smoothing_ends_in_the_mean_of_the_last_tenth_and_keeps_eta():
    def curve(speed, ends):
        """Records of means between `ends` (FLOPs) of the loss (speed*C)^-0.1, exactly."""
        begins = np.concatenate([[0.0], ends[:-1]])
        loss_N = speed**-0.1 * (ends**0.9 - begins**0.9) / 0.9 / (ends - begins)
        return Curve(ends, ends, ends, ends, loss_N)

    fine, rough = curve(1.0, np.arange(1.0, 1001.0)), curve(1.0, np.array([*range(70, 1000, 70), 1000.0]))
    last = (1000**0.9 - 900**0.9) / 0.9 / 100
    assert fine.loss_N[-100:].mean() == pytest.approx(last)
    assert smoothed(fine).loss_N[-1] == pytest.approx(last)
    assert smoothed(rough).loss_N[-1] == pytest.approx(last, rel=1e-3)
    base, fast = smoothed(fine), smoothed(curve(3.0, np.arange(1.0, 1001.0)))
    assert eta((base.flops_N, base.loss_N), (fast.flops_N, fast.loss_N))[0] == pytest.approx(3, rel=1e-3)


def test_smoothing_does_not_reach_before_the_start():
    ends = np.array([101.0, 102.0, 200.0])
    curve = Curve(ends, ends, ends, ends, np.array([4.0, 2.0, 1.0]))
    assert smoothed(curve, 100.0).loss_N.tolist() == pytest.approx([4.0, 3.0, 1.0])


# Over seeds -----------------------------------------------------------------------------------------------------------

SHIFTS = (0.0, 0.05, -0.03)


def test_shifts_of_seeds_that_both_share_change_nothing():
    found = speedup([line(shift=s) for s in SHIFTS], [line(2.0, shift=s) for s in SHIFTS])
    assert found.eta == pytest.approx(2, rel=1e-4)
    assert found.per_seed == pytest.approx([2, 2, 2], rel=1e-4)


def test_a_baseline_that_had_its_final_loss_before_says_so():
    assert speedup([line()], [line(2.0)]).itself == pytest.approx(1)
    flops_N, loss_N = line()
    dip_N = np.where(np.abs(np.log(flops_N / 5e13)) < 0.1, loss_N - 1, loss_N)
    found = speedup([(flops_N, dip_N)], [(flops_N, dip_N - 0.001)])  # hardly better, but the dip makes it look so
    assert found.itself == pytest.approx(2.2, rel=0.1) and found.eta == pytest.approx(found.itself, rel=0.01)


# Over sizes -----------------------------------------------------------------------------------------------------------


def test_a_power_law_without_a_floor():
    flops_N = np.array([1e15, 1e16, 1e17])
    law = power_law(flops_N, 40 * flops_N**-0.07, 3)
    assert law.unit == pytest.approx(1e16) and law.floor is None
    assert law.a[0] == pytest.approx(40 * 1e16**-0.07) and law.b[0] == pytest.approx(0.07)
    assert law.b[1] == pytest.approx((0.07, 0.07), abs=1e-6)


def test_a_power_law_with_a_floor():
    flops_N = np.geomspace(1e15, 1e19, 5)
    law = power_law(flops_N, 2.5 * (flops_N / 1e17) ** -0.15 + 1.4, 5)
    assert law.unit == pytest.approx(1e17)
    assert (law.a[0], law.b[0], law.floor[0]) == pytest.approx((2.5, 0.15, 1.4), rel=1e-4)


def test_a_power_law_that_shows_no_floor_has_none():
    flops_N = np.geomspace(1e15, 1e19, 5)
    law = power_law(flops_N, 3 * (flops_N / 1e17) ** -0.1 - 0.5, 5)
    assert law.floor is None and law.b[0] > 0.1


def test_the_interval_of_a_power_law_is_that_of_the_line_through_logarithms():
    flops_N = np.repeat(np.geomspace(1e15, 1e17, 3), 2)
    loss_N = 3 * (flops_N / 1e16) ** -0.1 * np.exp([0.01, -0.01, 0.02, -0.01, 0.0, 0.01])
    law, fitted = power_law(flops_N, loss_N, 3), stats.linregress(np.log(flops_N), np.log(loss_N))
    half = stats.t.ppf(0.975, 4) * fitted.stderr
    assert law.b[0] == pytest.approx(-fitted.slope)
    assert law.b[1] == pytest.approx((-fitted.slope - half, -fitted.slope + half), rel=1e-3)
