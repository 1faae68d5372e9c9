"""What a study decides: eta off the curve through finished runs of the baseline, and intervals that keep their rate.

A point inside a run is no finished run of that length, as its learning rate has not decayed: a variant that is 1.2
times as efficient in truth got 1.6 off points inside a run. Here the baseline is trained to its end at several budgets
(`Study.budgets`), and eta = (FLOPs at which its finished runs have the variant's final loss) / (FLOPs of the variant),
seed by seed, monotone between budgets in log FLOPs. One variant against another is the ratio of their etas.

The t-interval of the logarithms over seeds pairs what shares a seed's data. Resampled from residuals of real runs it
holds the truth in 92% to 98% of studies of 3, 5 and 10 seeds (tests/studies/test_coverage.py). A bootstrap over three
seeds is no more than their range, and is not printed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import interpolate, optimize, stats

LEVEL = 0.95
"""Of all intervals."""
POWER = 0.8
"""Chance with which the least difference that a study could have seen would have been decided."""
AHEAD, BEHIND, UNDECIDED = "ahead", "behind", "undecided"

Interval = tuple[float, float]


class Baseline:
    """The FLOPs at which finished runs of the baseline have a loss."""

    def __init__(self, flops_B, loss_B):
        """Args: FLOPs and final losses (B,) of finished runs of one seed, or means over seeds, B of 2 or more."""
        order = np.argsort(flops_B)
        log_B = np.log(np.asarray(flops_B, np.float64)[order])
        # Where noise makes a longer run worse than a shorter one, both are where their mean is.
        level_B = optimize.isotonic_regression(np.asarray(loss_B, np.float64)[order], increasing=False).x
        self._loss_K = np.unique(level_B)[::-1]
        self._log_K = np.array([log_B[level_B == level].mean() for level in self._loss_K])

    def flops(self, loss: float) -> tuple[float, str]:
        """FLOPs, and "" or on which side of the truth they are where the loss is beyond the runs: "<=" or ">="."""
        if loss >= self._loss_K[0]:
            return float(np.exp(self._log_K[0])), "" if loss == self._loss_K[0] else "<="
        if loss <= self._loss_K[-1]:
            return float(np.exp(self._log_K[-1])), "" if loss == self._loss_K[-1] else ">="
        between = interpolate.PchipInterpolator(-self._loss_K, self._log_K)
        return float(np.exp(between(-loss))), ""


class Etas(NamedTuple):
    """Eta of one variant, by seed, and `Baseline.flops`'s bounds."""

    by_seed: dict[int, float]
    bounds: dict[int, str]


def etas(baseline: Mapping[int, tuple], variant: Mapping[int, tuple[float, float]]) -> Etas:
    """Eta by seed, of seeds that have two budgets of the baseline or more.

    Args:
      baseline: by seed, FLOPs (B,) and final losses (B,). variant: by seed, FLOPs and final loss.
    """
    found = Etas({}, {})
    for seed, (flops, loss) in variant.items():
        if seed in baseline and len(baseline[seed][0]) > 1:
            reached, found.bounds[seed] = Baseline(*baseline[seed]).flops(loss)
            found.by_seed[seed] = reached / flops
    return found


class Verdict(NamedTuple):
    """A ratio of etas, paired over seeds.

    Attributes:
      by_seed: the ratio of each seed. bound: "" or on which side of the truth the mean is.
      ratio: geometric mean. interval: of it, by t; None with one seed, and where a seed's is a bound.
      word: ahead or behind where the interval lies on one side of 1, else undecided.
      least: the least ratio that as many seeds, spread as these are, would have decided with a chance of POWER.
    """

    by_seed: dict[int, float]
    bound: str
    ratio: float
    interval: Interval | None
    word: str
    least: float | None


def verdict(ours: Etas, theirs: Etas | None = None) -> Verdict | None:
    """One variant over another, or over the baseline (`theirs` None); None where they share no seed."""
    seeds = [seed for seed in ours.by_seed if theirs is None or seed in theirs.by_seed]
    if not seeds:
        return None
    log_S = np.log([ours.by_seed[s] / (1.0 if theirs is None else theirs.by_seed[s]) for s in seeds])
    bounds = {ours.bounds[s] for s in seeds}
    if theirs is not None:
        turned = {"": "", "<=": ">=", ">=": "<="}
        bounds |= {turned[theirs.bounds[s]] for s in seeds}
    bounds -= {""}
    bound = "" if not bounds else bounds.pop() if len(bounds) == 1 else "?"
    interval = least = None
    if len(seeds) > 1 and not bound:
        low, high = student_interval(log_S)
        interval, least = (math.exp(low), math.exp(high)), math.exp(_least(log_S))
    word = UNDECIDED
    if interval is not None and not interval[0] <= 1 <= interval[1]:
        word = AHEAD if interval[0] > 1 else BEHIND
    by_seed = dict(zip(seeds, np.exp(log_S).tolist(), strict=True))
    return Verdict(by_seed, bound, math.exp(log_S.mean()), interval, word, least)


def student_interval(value_S: np.ndarray) -> Interval:
    """The t-interval of a mean over seeds."""
    half = stats.t.ppf((1 + LEVEL) / 2, len(value_S) - 1) * stats.sem(value_S)
    return float(np.mean(value_S) - half), float(np.mean(value_S) + half)


def _least(value_S: np.ndarray) -> float:
    spare = len(value_S) - 1
    return (stats.t.ppf((1 + LEVEL) / 2, spare) + stats.t.ppf(POWER, spare)) * stats.sem(value_S)


# Over documents -------------------------------------------------------------------------------------------------------

DRAWS = 2000


def document_interval(nats_D, other_D, weight_D) -> tuple[float, Interval]:
    """Difference of two mean losses on the same documents, and its percentile interval over resampled documents.

    Args:
      nats_D, other_D: cross-entropy of a document's targets, (D,) sums. weight_D: their weights.
    """
    change_D, weight_D = np.asarray(nats_D) - np.asarray(other_D), np.asarray(weight_D)
    documents = len(change_D)
    drawn_RD = np.random.default_rng(0).multinomial(documents, np.full(documents, 1 / documents), size=DRAWS)
    difference_R = (drawn_RD @ change_D) / np.maximum(drawn_RD @ weight_D, 1e-9)
    low, high = np.quantile(difference_R, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(change_D.sum() / weight_D.sum()), (float(low), float(high))


def pairs(names: list[str], baseline: str) -> list[tuple[str, str]]:
    """(variant, what it is held against): each against the baseline, then each against those before it."""
    others = [name for name in names if name != baseline]
    against = [(second, first) for first, second in itertools.combinations(others, 2)]
    return [(name, baseline) for name in others] + against
