"""Equal FLOPs: every variant's config, its depth or hidden size chosen by `moma_jax.cost`, and its number of updates.

All variants of a size have the same updates on the same batches, so equal FLOPs of a run are equal FLOPs per token. No
JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moma_jax import recipes
from moma_jax.checks import resolve
from moma_jax.config import Config
from moma_jax.cost import flops_per_token, parameter_count, total_steps
from moma_jax.errors import InputError, require
from moma_jax.studies.study import SAME_IN_TRAIN, Study, Variant, check_study

HIDDEN_STEP = 8
"""Hidden sizes that are tried are multiples of it, as matrix units like them."""
LONGEST_WARMUP = 0.1
"""Of a stage's updates, for upcycled variants: a seed run may be shorter than the base's warm-up."""


@dataclass(frozen=True)
class Matched:
    """A variant at one size."""

    variant: Variant
    """The variant."""
    size: str
    """Name of the size."""
    config: Config
    """Resolved; seeds and run directory are those of the base."""
    seed_run: Config | None
    """The config of an upcycled variant's first stage."""
    baseline_flops: float
    """FLOPs per token of the baseline at this size."""
    budget: float = 1.0
    """Share of the study's budget; other than 1 for further runs of the baseline."""

    @property
    def stages(self) -> list[Config]:
        """The configs that are trained one after the other."""
        return [self.config] if self.seed_run is None else [self.seed_run, self.config]

    @property
    def share_of_baseline(self) -> float:
        """The FLOPs of the whole variant over the baseline's."""
        steps = [total_steps(stage) for stage in self.stages]
        spent = sum(n * flops_per_token(stage) for n, stage in zip(steps, self.stages, strict=True))
        return spent / (sum(steps) * self.baseline_flops)


def match_variants(study: Study, chosen: Mapping[tuple[str, str], Any] = {}) -> list[Matched]:
    """Every variant at every size, sizes outermost, in the study's order; the baseline's further budgets after it.

    Args:
      chosen: values of `study.sweep`'s field by (variant, size); the base's where there is none.

    Raises:
      InputError: the study contradicts itself; a variant's config does; or budgets would not be equal.
    """
    check_study(study)
    return [matched for size in study.sizes for matched in _match_size(study, size, chosen)]


def _match_size(study: Study, size: str, chosen: Mapping[tuple[str, str], Any]) -> list[Matched]:
    swept = {place: {study.sweep.field: value} for place, value in chosen.items()}
    variants = [
        dataclasses.replace(each, overrides={**each.overrides, **swept.get((each.name, size), {})})
        for each in study.variants
    ]
    base = _with(study.base, f"study.sizes: {size or 'the only size'}", study.sizes[size])
    budget = {"steps": None, "tokens": study.tokens, "flops": study.flops}
    base = dataclasses.replace(base, train=dataclasses.replace(base.train, **budget))
    first = next(variant for variant in variants if variant.name == study.baseline)
    baseline = _resolved(_with(base, first.name, first.overrides), first.name)
    baseline = with_steps(baseline, total_steps(baseline))
    base, found = with_steps(base, baseline.train.steps), []
    for variant in variants:
        found.append(_match(study, variant, size, base, baseline))
        if variant.name == study.baseline:
            found += [_shared(found[-1], share) for share in study.budgets]
    return found


def _shared(matched: Matched, share: float) -> Matched:
    """The baseline with another budget: a run of its own, whose learning rate decays to its own end."""
    steps = round(share * matched.config.train.steps)
    require(steps > 0, f"study.budgets: {share:g} of {matched.config.train.steps} updates leaves none")
    return dataclasses.replace(matched, config=with_steps(matched.config, steps), budget=share)


def _match(study: Study, variant: Variant, size: str, base: Config, baseline: Config) -> Matched:
    """One variant against the baseline of its size, which has the number of updates that all have."""
    target, where = flops_per_token(baseline), f"{variant.name} {size}".strip()
    overridden = _with(base, where, variant.overrides)
    config = adjusted(_even(overridden, variant.match), variant.match, target, study.tolerance, where)
    seed_run = None
    if variant.upcycled is not None:
        config, seed_run = _stages(config, variant, where)
    matched = Matched(variant, size, config, seed_run, target)
    for stage in matched.stages:
        _require_same_data(stage, baseline, where if stage is config else f"the seed run of {where}", study.baseline)
    share = matched.share_of_baseline
    remedy = "give the variant match='model.hidden' or 'model.layers'"
    if variant.match is not None:
        remedy = "make its seed run cost the same, or raise study.tolerance" if seed_run else "raise study.tolerance"
    require(
        abs(share - 1) <= study.tolerance,
        f"unequal budgets: {where} has {share:.4f} of the FLOPs of {study.baseline}, and the tolerance is "
        f"{study.tolerance:g}; {remedy}",
    )
    return matched


def adjusted(config: Config, field: str | None, target: float, tolerance: float, where: str) -> Config:
    """The resolved config whose FLOPs per token are as near to `target` as the field `field` can bring them.

    Hidden sizes are multiples of HIDDEN_STEP, or the one that the variant has where that is as near. Layers are chosen
    first, with the variant's hidden size.

    Args:
      config: unresolved; where `field` is None it is only resolved.
      target: training FLOPs of one position.
      tolerance: where hidden sizes in multiples of HIDDEN_STEP miss the target by more than this share of it (small
        models), any hidden size may be chosen.
      where: the variant's name, for messages.

    Raises:
      InputError: no positive number of layers or hidden size comes near.
    """
    resolved = _resolved(config, where)
    if field is None:
        return resolved
    if field == "model.layers":
        step = _layer_step(resolved)
        resolved = _nearest(resolved, "layers", step, target, where)
    coarse = _nearest(resolved, "hidden", HIDDEN_STEP, target, where)
    return coarse if _off(coarse, target) <= tolerance else _nearest(resolved, "hidden", 1, target, where)


def _nearest(config: Config, field: str, step: int, target: float, where: str) -> Config:
    """FLOPs are linear in layers and in the hidden size, so two costs tell the nearest multiple of `step`."""
    now = getattr(config.model, field)
    slope = (flops_per_token(_model(config, field, now + step)) - flops_per_token(config)) / step
    wanted = now + (target - flops_per_token(config)) / slope
    below = int(wanted // step) * step
    tried = [value for value in (now, below, below + step) if value > 0]
    require(
        wanted > 0,
        f"{where}: no model.{field} brings it down to the baseline's {target:.4g} FLOPs per token; make another part "
        "of the variant cheaper",
    )
    return min((_model(config, field, value) for value in tried), key=lambda each: _off(each, target))


def _off(config: Config, target: float) -> float:
    """By what share of `target` the FLOPs per token lie beside it."""
    return abs(flops_per_token(config) / target - 1)


def _even(config: Config, field: str | None) -> Config:
    """Where depths are adjusted, an odd number of layers is no reason to refuse a variant that needs an even one."""
    return config if field != "model.layers" else _model(config, "layers", -(-config.model.layers // 2) * 2)


def _layer_step(config: Config) -> int:
    """Layers of a mixture of depths come in pairs."""
    return 2 if config.experts.depth else 1


def _stages(config: Config, variant: Variant, where: str) -> tuple[Config, Config]:
    """The upcycled run and its seed run: the variant's updates are split between them.

    The seed run is the variant with the seed's overrides, hidden size and depth included, as weights are copied. Each
    stage has a learning-rate schedule of its own; the warm-up is the base's, or LONGEST_WARMUP of the stage where that
    is less.
    """
    total, share = config.train.steps, variant.upcycled.share
    first = round(share * total)
    require(
        0 < first < total,
        f"{where}: a share of {share:g} of {total} updates leaves one stage without any; raise the budget",
    )
    seed_run = _resolved(_with(config, f"the seed run of {where}", variant.upcycled.seed), where)
    return _short_warmup(with_steps(config, total - first)), _short_warmup(with_steps(seed_run, first))


def _short_warmup(config: Config) -> Config:
    longest = max(1, int(LONGEST_WARMUP * config.train.steps))
    warmup = min(config.optimizer.warmup_steps, longest)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, warmup_steps=warmup))


def with_steps(config: Config, steps: int) -> Config:
    """The config with its length in updates."""
    train = dataclasses.replace(config.train, steps=steps, tokens=None, flops=None)
    return dataclasses.replace(config, train=train)


def _require_same_data(config: Config, baseline: Config, where: str, name: str) -> None:
    changed = ["data"] if config.data != baseline.data else []
    changed += [f"train.{f}" for f in SAME_IN_TRAIN if getattr(config.train, f) != getattr(baseline.train, f)]
    require(
        not changed,
        f"{where}: {', '.join(changed)} differs from that of {name}; all variants see the same data, so set it in "
        "the base or in a size",
    )


def _with(config: Config, where: str, overrides: Any) -> Config:
    try:
        return recipes.override(config, overrides)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _resolved(config: Config, where: str) -> Config:
    try:
        return resolve(config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _model(config: Config, field: str, value: int) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **{field: value}))


# For people -----------------------------------------------------------------------------------------------------------


def match_rows(matched: list[Matched]) -> list[dict[str, Any]]:
    """The match as plain values: one row for every variant and size, one more for a seed run.

    `share` is the FLOPs of the row over those of the baseline for as many tokens; an upcycled variant's row has that of
    both stages together, and its own updates and tokens.
    """
    rows = []
    for each in (each for each in matched if each.budget == 1):
        for stage in reversed(each.stages):
            seed, model, flops = stage is each.seed_run, stage.model, flops_per_token(stage)
            rows.append(
                {
                    "variant": each.variant.name + (" (seed run)" if seed else ""),
                    "size": each.size,
                    "ffn": model.ffn,
                    "layers": model.layers,
                    "width": model.width,
                    "hidden": model.hidden,
                    "parameters": parameter_count(stage)["total"],
                    "flops_per_token": flops,
                    "share": flops / each.baseline_flops if seed else each.share_of_baseline,
                    "updates": total_steps(stage),
                    "tokens": total_steps(stage) * stage.batch_tokens,
                }
            )
    return rows
