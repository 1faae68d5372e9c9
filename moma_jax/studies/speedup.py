"""How much sooner a variant gets where the baseline ends: the speed-up factor eta as the paper has it (section 9), off
points inside runs, and power laws. What a study decides by is in studies/verdicts.py.

eta = (FLOPs that the baseline spent) / (FLOPs with which the variant reaches the baseline's final loss). Where the
variant ends above the baseline there is no such point, and the roles change: eta = (FLOPs with which the baseline
reached the variant's final loss) / (FLOPs that the variant spent), which is below 1. So eta of A over B is 1/eta of B
over A. A curve reaches a loss where its running minimum does, linear in log FLOPs between its points.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from moma_jax.studies.verdicts import LEVEL, Interval

SIZES_WITH_FLOOR = 4
"""Sizes from which a power law's floor c is fitted too: three parameters through three sizes would be no test."""

Line = tuple[np.ndarray, np.ndarray]
"""What was spent (FLOPs or seconds, rising, above 0) and the loss, each (N,)."""


class Speedup(NamedTuple):
    """Eta over paired seeds, off points inside runs.

    Attributes:
      eta: of the curves averaged over seeds.
      bound: "" or which side of the truth it is: ">=" or "<=", where the loss was passed before the first point.
      per_seed: eta of each seed's own pair of curves.
      itself: eta of the baseline over itself: 1, or more where it had its final loss before its end. Training losses
        follow what the batches hold too; where that moves them as much as training does, eta says little.
    """

    eta: float
    bound: str
    per_seed: tuple[float, ...]
    itself: float


def speedup(baseline: Sequence[Line], variant: Sequence[Line]) -> Speedup:
    """Eta of `variant` over `baseline`, curves of the same seeds in the same order."""
    ours, theirs = _mean(variant), _mean(baseline)
    value, bound = eta(theirs, ours)
    per_seed = tuple(eta(b, v)[0] for b, v in zip(baseline, variant, strict=True))
    return Speedup(value, bound, per_seed, eta(theirs, theirs)[0])


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


def _mean(lines: Sequence[Line]) -> Line:
    """The mean over seeds, at the same shares of each run's own spending."""
    share_N, ends = lines[0][0] / lines[0][0][-1], [spent[-1] for spent, _ in lines]
    loss_SN = [np.interp(np.log(share_N), np.log(spent / spent[-1]), loss) for spent, loss in lines]
    return share_N * np.mean(ends), np.mean(loss_SN, axis=0)


# Over sizes -----------------------------------------------------------------------------------------------------------


class PowerLaw(NamedTuple):
    """L = a * (C / unit)^-b + c, C in FLOPs; c is 0 and not fitted where `floor` is None.

    Each parameter with its t-interval over runs, exact for a line through logarithms; None where there are no more runs
    than parameters, and with a floor, where a linearised one is known to be off.
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
            return PowerLaw(unit, *((value, None) for value, _ in found))
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
