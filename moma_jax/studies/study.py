"""What a study is: variants of one base that get equal FLOPs and equal data, seeds, sizes, a budget. No JAX.

A study file is Python with `def study() -> Study`. Everything that can be wrong with it is refused before anything is
trained or written; what its variants cost is checked where they are matched (`studies.matching`).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moma_jax import shipped
from moma_jax.config import Config
from moma_jax.errors import require
from moma_jax.recipes import called

OWN_FIELDS = (
    "train.seed",
    "data.seed",
    "train.steps",
    "train.tokens",
    "train.flops",
    "run.dir",
    "run.init_from",  # weights whose FLOPs nobody counts; `Upcycled` counts them
)
"""Fields that the study itself sets, so that no override may."""
MATCHES = ("model.hidden", "model.layers")
SAME_IN_TRAIN = ("batch_rows", "eval_sets", "eval_every", "log_every")
"""Fields of the section train that decide which tokens a run sees, and where its losses are comparable."""


@dataclass(frozen=True)
class Upcycled:
    """A variant that begins from a seed run's weights (paper section 2.5). Both stages share the variant's budget."""

    seed: Mapping[str, Any]
    """Overrides that make the variant's config the seed run's, such as {"model.ffn": "1t1i"}."""
    share: float
    """Share of the variant's updates, and so of its FLOPs, that the seed run has; above 0 and below 1."""


@dataclass(frozen=True)
class Variant:
    """One architecture, or one way to train it."""

    name: str
    """Unique; part of run directories, and the name in tables and figures."""
    overrides: Mapping[str, Any]
    """Fields of the base that differ, such as {"model.ffn": "4t4i"}."""
    match: str | None = None
    """Field that is adjusted until the FLOPs per token are nearest to the baseline's: "model.hidden", or "model.layers"
    (and then model.hidden, for what a whole layer is too coarse for). None: they are within the tolerance as it is."""
    upcycled: Upcycled | None = None
    """Begin from a seed run instead of from nothing."""


@dataclass(frozen=True)
class Sweep:
    """A field that every variant chooses for itself, on trial runs, before the runs that count.

    Trials never see the held-out split: they are judged by the overall loss, under the routing of training, on
    documents of the training split that they do not train on (`data.tuning`).
    """

    field: str
    """Such as "optimizer.peak_lr"."""
    values: tuple[Any, ...]
    """What is tried, in order; a best one at either end is warned of."""
    share: float = 0.5
    """Of the study's budget that a trial has."""
    seed: int = 1000
    """Of all trials; none of the study's."""
    tuning: float = 0.02
    """Share of the training documents that trials are judged on."""
    rows: int = 128
    """Rows of them, whole routing groups."""


@dataclass(frozen=True)
class Study:
    """Variants of one base that are compared at equal FLOPs, updates and data."""

    base: Config
    """What all variants share, as a recipe states it; its seeds, its length and its run directory are not used."""
    variants: tuple[Variant, ...]
    """What is compared; the baseline is one of them."""
    baseline: str = "dense"
    """Name of the variant that the others are matched to and measured against."""
    seeds: tuple[int, ...] = (0,)
    """Each sets train.seed and data.seed: all variants of a seed see the same tokens in the same order."""
    flops: float | None = None
    """Budget of every run in FLOPs (training, by `moma cost`'s convention). Exactly one of flops and tokens."""
    tokens: float | None = None
    """Budget of every run in positions (rows x sequence)."""
    budgets: tuple[float, ...] = ()
    """Shares of the budget, 1 apart, that further runs of the baseline are trained to: eta is read off the curve
    through finished runs. () leaves the paper's eta alone, off points inside a run."""
    sweep: Sweep | None = None
    """A field that is chosen for every variant first, on runs of its own."""
    records: str | None = None
    """Directory of small files, one for each finished run, that are written when it ends and taken for the run
    wherever its directory is missing (studies/records.py), so that a study goes on from them on another machine."""
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    """Name of a size -> its overrides of the base; each has the whole budget, and a baseline of its own."""
    tolerance: float = 0.01
    """Largest relative difference of a run's FLOPs (with its seed run's) from its baseline's."""
    dir: str | None = None
    """Directory of the runs; runs/<the study file's stem> where None. Studies may share one: a run that is there with
    the same config is not made again."""


def load_study(path: str | Path) -> Study:
    """The study of a file, checked.

    Raises:
      InputError: the file is missing or broken, or its study contradicts itself.
    """
    path = shipped.found(path)
    require(
        os.path.isfile(path),  # False for a name that is too long for files, where Path raises
        f"{path}: no such study; give a .py file with `def study() -> Study`, or a name of `moma recipes`",
    )
    study = called(path, "study", "Study")
    require(
        isinstance(study, Study),
        f"{path}: study() returned {type(study).__name__}; return a moma_jax.studies.Study",
    )
    if study.dir is None:
        study = dataclasses.replace(study, dir=f"runs/{path.stem}")
    check_study(study)
    return study


def check_study(study: Study) -> None:
    """Raises InputError for what cannot be meant, whatever the variants cost."""
    require(isinstance(study.base, Config), "study.base: give a Config, such as recipes.load('configs/NAME.py')")
    require(
        bool(study.dir) and isinstance(study.dir, str),
        "study.dir: name the directory of the runs, such as runs/first_study",
    )
    given = [name for name in ("flops", "tokens") if getattr(study, name) is not None]
    require(len(given) == 1, f"study.flops: give exactly one of flops and tokens; given: {', '.join(given) or 'none'}")
    budget = getattr(study, given[0])
    require(_number(budget) and 0 < budget < math.inf, f"study.{given[0]}: must be positive and finite, is {budget!r}")
    require(
        _number(study.tolerance) and 0 <= study.tolerance < 1,
        f"study.tolerance: must be at least 0 and below 1, such as 0.01; is {study.tolerance!r}",
    )
    require(
        study.records is None or isinstance(study.records, str) and study.records,
        f"study.records: {study.records!r} names no directory; such as docs/results/studies/runs, or None",
    )
    _check_seeds(study)
    _check_budgets(study)
    _check_sizes(study)
    _check_variants(study)
    _check_baseline(study)
    _check_sweep(study)


def _check_seeds(study: Study) -> None:
    require(_several(study.seeds), "study.seeds: give at least one, such as (0, 1, 2)")
    for seed in study.seeds:
        require(
            type(seed) is int and seed >= 0,
            f"study.seeds: {seed!r} is no seed; give whole numbers from 0, such as (0, 1, 2)",
        )
    require(len(set(study.seeds)) == len(study.seeds), f"study.seeds: one is repeated in {tuple(study.seeds)}")


def _check_budgets(study: Study) -> None:
    require(isinstance(study.budgets, (tuple, list)), f"study.budgets: {study.budgets!r}; give several, as in (0.5, 2)")
    for share in study.budgets:
        require(
            _number(share) and 0 < share < math.inf and share != 1,
            f"study.budgets: {share!r} is no share of the budget beside 1, which every variant has; such as 0.5 or 2",
        )
    require(len(set(study.budgets)) == len(study.budgets), f"study.budgets: one is repeated in {study.budgets}")


def _check_sweep(study: Study) -> None:
    sweep = study.sweep
    if sweep is None:
        return
    require(isinstance(sweep, Sweep), 'study.sweep: give a Sweep("optimizer.peak_lr", (3e-3, 6e-3)), or None')
    field = _plain(sweep.field)
    require(
        field.partition(".")[0] in ("model", "optimizer", "train")
        and field not in (*OWN_FIELDS, *(f"train.{name}" for name in SAME_IN_TRAIN)),
        f"study.sweep: {sweep.field} is not for a variant to choose; such as optimizer.peak_lr",
    )
    for variant in study.variants:
        seed = {} if variant.upcycled is None else variant.upcycled.seed
        require(
            field not in map(_plain, (*variant.overrides, *seed)),
            f"study.variants: {variant.name} sets {field}, for which trials choose a value; leave it out, or the sweep",
        )
    _check_tried(sweep)
    require(
        _number(sweep.share) and 0 < sweep.share <= 1,
        f"study.sweep: a share of {sweep.share!r} of the budget; give more than 0 and at most 1",
    )
    require(
        type(sweep.rows) is int and sweep.rows > 0, f"study.sweep: rows are a whole number above 0, not {sweep.rows!r}"
    )
    require(
        _number(sweep.tuning) and 0 < sweep.tuning <= 0.5,
        f"study.sweep: a tuning share of {sweep.tuning!r}; give more than 0 and at most 0.5 of the documents",
    )
    require(type(sweep.seed) is int and sweep.seed >= 0, f"study.sweep: {sweep.seed!r} is no seed; such as 1000")
    require(sweep.seed not in study.seeds, f"study.sweep: {sweep.seed} is a seed of the study; give another one")


def _check_tried(sweep: Sweep) -> None:
    """Each value is the end of a directory's name."""
    require(_several(sweep.values), f"study.sweep: give values of {sweep.field} to try")
    for value in sweep.values:
        require(_file_name(f"trial-{value}"), f"study.sweep: {value!r} cannot be part of a directory's name")
    names = [str(value) for value in sweep.values]
    require(len(set(names)) == len(names), f"study.sweep: a value is repeated in {tuple(sweep.values)}")


def _check_sizes(study: Study) -> None:
    require(isinstance(study.sizes, Mapping) and bool(study.sizes), "study.sizes: give a name and overrides of each")
    for name, overrides in study.sizes.items():
        require(name == "" and len(study.sizes) == 1 or _file_name(name), _bad_name("study.sizes", name))
        _check_overrides(f"study.sizes: {name or 'the only size'}", overrides)


def _check_variants(study: Study) -> None:
    require(_several(study.variants), "study.variants: give at least one Variant")
    for variant in study.variants:
        require(
            isinstance(variant, Variant), f"study.variants: {variant!r} is no Variant; write Variant(name, {{...}})"
        )
        where = f"study.variants: {variant.name}"
        require(_file_name(variant.name), _bad_name("study.variants", variant.name))
        _check_overrides(where, variant.overrides)
        require(
            variant.match is None or variant.match in MATCHES,
            f"{where} matches {variant.match!r}; give one of {', '.join(MATCHES)}, or None",
        )
        if variant.upcycled is not None:
            require(
                isinstance(variant.upcycled, Upcycled),
                f"{where}: upcycled is no Upcycled; write Upcycled({{...}}, 0.1)",
            )
            share = variant.upcycled.share
            require(
                _number(share) and 0 < share < 1,
                f"{where} has a seed with share {share!r} of its FLOPs; give more than 0 and less than 1, such as 0.1",
            )
            _check_overrides(f"{where}, its seed", variant.upcycled.seed)
    names = [variant.name for variant in study.variants]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"study.variants: two have the name {twice}; rename one")


def _check_baseline(study: Study) -> None:
    names = [variant.name for variant in study.variants]
    require(study.baseline in names, f"study.baseline: {study.baseline!r} is none of the variants {', '.join(names)}")
    baseline = study.variants[names.index(study.baseline)]
    require(
        baseline.match is None and baseline.upcycled is None,
        f"study.baseline: {baseline.name} is what others are matched to; give it neither match nor upcycled",
    )


def _check_overrides(where: str, overrides: Any) -> None:
    require(isinstance(overrides, Mapping), f"{where}: overrides are a dictionary such as {{'model.ffn': '4t4i'}}")
    for name in overrides:
        require(
            _plain(name) not in OWN_FIELDS,
            f"{where} overrides {name}, which the study sets for all its runs; leave it out",
        )


def _plain(name: Any) -> str:
    """A field's name as configs have it; overrides may have it with dashes."""
    return str(name).replace("-", "_")


def _several(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and bool(value)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _file_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name, re.ASCII) is not None


def _bad_name(where: str, name: Any) -> str:
    return f"{where}: {name!r} is no name for files; begin with a letter or digit and go on with those, . _ + -"
