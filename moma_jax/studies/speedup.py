"""How much sooner a variant gets where the baseline ends: the speed-up factor eta (paper section 9), and power laws.

eta = (FLOPs that the baseline spent) / (FLOPs with which the variant reaches the baseline's final loss). Where the
variant ends above the baseline there is no such point, and the roles change: eta = (FLOPs with which the baseline
reached the variant's final loss) / (FLOPs that the variant spent), which is below 1. So eta of A over B is 1/eta of B
over A. A curve reaches a loss where its running minimum does, linear in log FLOPs between its points.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

ENUMERATED = 5
"""Seeds up to which every resample is counted; of more, DRAWS are drawn."""
DRAWS = 2000
LEVEL = 0.95
"""Of all intervals."""
SIZES_WITH_FLOOR = 4
"""Sizes from which a power law's floor c is fitted too: three parameters through three sizes would be no test."""

Line = tuple[np.ndarray, np.ndarray]
"""What was spent (FLOPs or seconds, rising, above 0) and the loss, each (N,)."""
Interval = tuple[float, float]


class Speedup(NamedTuple):
    """Eta over paired seeds.

    Attributes:
      eta: of the curves averaged over seeds.
      bound: "" or which side of the truth it is: ">=" or "<=", where the loss was passed before the first point.
      bootstrap: percentile interval over resamples of the seeds; None with one seed, and where eta of a resample is a
        bound: an interval of bounds would be narrow and mean nothing.
      student: t-interval of the mean of log eta over seeds; None with one seed, and where a seed's eta is a bound.
      per_seed: eta of each seed's own pair of curves.
      itself: eta of the baseline over itself: 1, or more where it had its final loss before its end. Training losses
        follow what the batches hold too; where that moves them as much as training does, eta says little.
    """

    eta: float
    bound: str
    bootstrap: Interval | None
    student: Interval | None
    per_seed: tuple[float, ...]
    itself: float


class _Stack(NamedTuple):
    """Curves of several seeds on one axis: share of a run's own spending (N,), losses (S, N), spending (S,)."""

    share_N: np.ndarray
    loss_SN: np.ndarray
    end_S: np.ndarray

    def mean(self, count_S: np.ndarray) -> Line:
        """The curve of a resample in which seed s stands `count_S[s]` times."""
        weight_S = count_S / count_S.sum()
        return self.share_N * (weight_S @ self.end_S), weight_S @ self.loss_SN


def speedup(baseline: Sequence[Line], variant: Sequence[Line]) -> Speedup:
    """Eta of `variant` over `baseline`, curves of the same seeds in the same order."""
    ours, theirs, seeds = _stack(variant), _stack(baseline), len(variant)
    mean = theirs.mean(np.ones(seeds))
    (value, bound), itself = eta(mean, ours.mean(np.ones(seeds))), eta(mean, mean)[0]
    per_seed, bounds = zip(*(eta(b, v) for b, v in zip(baseline, variant, strict=True)), strict=True)
    if seeds == 1:
        return Speedup(value, bound, None, None, per_seed, itself)
    count_RS, weight_R = resamples(seeds)
    eta_R, bound_R = zip(*(eta(theirs.mean(count_S), ours.mean(count_S)) for count_S in count_RS), strict=True)
    bootstrap = student = None
    if not any(bound_R):
        bootstrap = tuple(quantile(np.array(eta_R), weight_R, q) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    if not any(bounds):
        low, high = student_interval(np.log(per_seed))
        student = math.exp(low), math.exp(high)
    return Speedup(value, bound, bootstrap, student, per_seed, itself)


def eta(baseline: Line, variant: Line) -> tuple[float, str]:
    """Eta of one curve over another, and `Speedup.bound`."""
    (spent_b, loss_b), (spent_v, loss_v) = baseline, variant
    if loss_v[-1] <= loss_b[-1]:
        spent = reached(variant, loss_b[-1])
        return float(spent_b[-1] / spent), ">=" if spent == spent_v[0] else ""
    spent = reached(baseline, loss_v[-1])
    return float(spent / spent_v[-1]), "<=" if spent == spent_b[0] else ""


def reached(line: Line, loss: float) -> float:
    """What was spent when the running minimum first was `loss`; NaN where it never was."""
    spent_N, lowest_N = np.log(line[0]), np.minimum.accumulate(line[1])
    if lowest_N[-1] > loss:
        return float("nan")
    after = int(np.argmax(lowest_N <= loss))
    if after == 0:
        return float(line[0][0])
    above, below = lowest_N[after - 1], lowest_N[after]
    share = (above - loss) / (above - below)
    return float(np.exp(spent_N[after - 1] + share * (spent_N[after] - spent_N[after - 1])))


def _stack(lines: Sequence[Line]) -> _Stack:
    share_N, end_S = lines[0][0] / lines[0][0][-1], np.array([spent[-1] for spent, _ in lines])
    loss_SN = [np.interp(np.log(share_N), np.log(spent / spent[-1]), loss) for spent, loss in lines]
    return _Stack(share_N, np.array(loss_SN), end_S)


# Over seeds -----------------------------------------------------------------------------------------------------------


def resamples(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap resamples of `seeds` seeds: how often each stands in it (R, S), and its probability (R,).

    Up to ENUMERATED seeds all that there are; of more seeds, DRAWS drawn by a fixed generator.
    """
    if seeds > ENUMERATED:
        drawn = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), size=DRAWS)
        return drawn, np.full(DRAWS, 1 / DRAWS)
    chosen = itertools.combinations_with_replacement(range(seeds), seeds)
    count_RS = np.array([np.bincount(c, minlength=seeds) for c in chosen])
    orders_R = [math.factorial(seeds) / math.prod(map(math.factorial, row)) for row in count_RS.tolist()]
    return count_RS, np.array(orders_R) / seeds**seeds


def quantile(value_R: np.ndarray, weight_R: np.ndarray, q: float) -> float:
    """The smallest value with at least the share `q` of the weight at or below it."""
    order = np.argsort(value_R)
    below_R = np.cumsum(weight_R[order])
    return float(value_R[order][min(np.searchsorted(below_R, q - 1e-12), len(order) - 1)])


def student_interval(value_S: np.ndarray) -> Interval:
    """The t-interval of a mean over seeds."""
    seeds = len(value_S)
    half = stats.t.ppf((1 + LEVEL) / 2, seeds - 1) * np.std(value_S, ddof=1) / math.sqrt(seeds)
    return float(np.mean(value_S) - half), float(np.mean(value_S) + half)


# Over sizes -----------------------------------------------------------------------------------------------------------


class PowerLaw(NamedTuple):
    """L = a * (C / unit)^-b + c, C in FLOPs; c is 0 and not fitted where `floor` is None.

    Each parameter with its t-interval over runs, None where there are no more runs than parameters.
    """

    unit: float
    a: tuple[float, Interval | None]
    b: tuple[float, Interval | None]
    floor: tuple[float, Interval | None] | None


def power_law(flops_N: np.ndarray, loss_N: np.ndarray, sizes: int) -> PowerLaw:
    """Least squares of log losses, (N,) runs of at least three `sizes`; with a floor where four show a positive one."""
    unit = float(np.exp(np.mean(np.log(flops_N))))
    x_N, log_N = flops_N / unit, np.log(loss_N)
    slope, level = np.polyfit(np.log(x_N), log_N, 1)
    plain, start = lambda x, a, b: np.log(a) - b * np.log(x), (math.exp(level), -slope)
    if sizes >= SIZES_WITH_FLOOR:
        least = float(loss_N.min())
        guess = (start[0] - least / 2, 2 * start[1], least / 2)
        found = _fitted(lambda x, a, b, c: np.log(np.maximum(a * x**-b + c, 1e-12)), x_N, log_N, guess)
        if found is not None and all(value > 0 for value, _ in found):
            return PowerLaw(unit, *found)
    a, b = _fitted(plain, x_N, log_N, start)
    return PowerLaw(unit, a, b, None)


def _fitted(law, x_N, y_N, start) -> list[tuple[float, Interval | None]] | None:
    """Parameters with intervals by the law's linearisation; None where no minimum is found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a covariance that cannot be told becomes infinite
        try:
            values, covariance = optimize.curve_fit(law, x_N, y_N, start, maxfev=20_000)
        except RuntimeError:
            return None
    spare = len(x_N) - len(values)
    if spare < 1 or not np.all(np.isfinite(covariance)):
        return [(float(v), None) for v in values]
    half = stats.t.ppf((1 + LEVEL) / 2, spare) * np.sqrt(np.diag(covariance))
    return [(float(v), (float(v - h), float(v + h))) for v, h in zip(values, half, strict=True)]
