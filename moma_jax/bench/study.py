"""The training step of a study's variants. Apart from `bench.step`, which works without what reads recipes."""

from __future__ import annotations

from typing import Any

from moma_jax.bench.step import measured, on_synthetic_tokens
from moma_jax.studies.matching import match_variants
from moma_jax.studies.study import Study


def bench_study(study: Study, *, repeats: int = 9, parts: bool = False) -> dict[str, Any]:
    """`bench_step` of a study's variants, as it matches them at its first size; "relative_to_dense" and
    "relative_flops" are of its baseline."""
    first = next(iter(study.sizes))
    matched = [each for each in match_variants(study) if each.size == first and each.budget == 1]
    configs = {each.variant.name: on_synthetic_tokens(each.config) for each in matched}
    return measured(configs, study.baseline, configs[study.baseline], repeats=repeats, parts=parts)
