"""Which mesh, remat policy and microbatch: closed-form candidates, the best of which are compiled."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from moma_jax.config import Config, MeshConfig
from moma_jax.cost import activation_bytes, flops_per_token
from moma_jax.errors import InputError
from moma_jax.plan import memory
from moma_jax.plan.topology import Topology

REMAT_FLOPS = {"none": 1.0, "dots": 1.1, "full": 1.33}
"""Work of a step over one without recomputation: a forward pass is a third of it; "dots" repeats attention's."""
REACHED = 0.4
"""Share of the peak that a program is taken to reach, for ranking alone."""
GPU_LINK = 100e9
"""Bytes/s between GPUs, for ranking alone."""


def choose(config: Config, target: Topology) -> Config:
    """The config with the mesh that promises most by arithmetic, and no more microbatches than it takes to fit.

    The remat policy is the config's, or one that keeps less where that is faster or where nothing else fits. Where
    nothing fits at all, the settings that come nearest.
    """
    options = list(candidates(config, target))
    if not options:
        raise InputError(_no_candidates(config, target))
    policies = _from(config.model.remat)
    fitting = [c for c in options if c.model.remat in policies and fits(c, target)]
    if fitting:
        return min(fitting, key=lambda c: arithmetic_seconds(c, target))
    return min(options, key=lambda c: sum(memory.arithmetic_bytes(c).values()))


def smaller(config: Config, chosen: Config, target: Topology) -> list[Config]:
    """Settings of `config` on the mesh that was chosen which need less memory, in the order to try them.

    First those with more microbatches, and so fewer rows in each; then, with each remat policy that keeps less, those
    that fit by arithmetic.
    """
    same, remat = [c for c in candidates(config, target) if c.mesh == chosen.mesh], chosen.model.remat
    more = [c for c in same if c.model.remat == remat and c.train.accumulate > chosen.train.accumulate]
    for policy in _from(remat)[1:]:
        more += [c for c in same if c.model.remat == policy and fits(c, target)]
    return more


def _from(policy: str) -> list[str]:
    """A remat policy and those that keep less."""
    policies = list(REMAT_FLOPS)
    return policies[policies.index(policy) :]


def search(
    config: Config,
    target: Topology,
    compiled: int,
    planned: Callable[[Config], dict[str, Any]],
    report: Callable[[str], None],
) -> dict[str, Any]:
    """`plan.plan_search`."""
    options = list(candidates(config, target))
    if not options:
        raise InputError(_no_candidates(config, target))
    fitting = sorted((c for c in options if fits(c, target)), key=lambda c: arithmetic_seconds(c, target))
    if not fitting:
        least = min(sum(memory.arithmetic_bytes(c).values()) for c in options)
        raise InputError(
            f"--topology: {target.name} has {target.memory / 2**30:.0f} GiB per device, and the least that any mesh "
            f"needs is about {least / 2**30:.0f} GiB; take more devices"
        )
    best = varied(fitting, compiled)
    report(f"{len(options)} settings, {len(fitting)} fit by arithmetic; planning the best {len(best)}")
    plans, refused, interrupted = _each(best, planned, report)
    if not plans:
        raise InputError(f"--search: none of {len(best)} settings could be planned, the last because {refused[-1]}")
    plans.sort(key=lambda p: (not p["fits"], -(p["tokens_per_second_estimate"] or 0)))
    counts = {"considered": len(options), "fit_by_arithmetic": len(fitting)}
    return {"plans": plans, **counts, "refused": refused, "interrupted": interrupted}


def varied(ranked: list[Config], number: int) -> list[Config]:
    """The first of a ranking, at most two of each remat policy and number of microbatches: ranks are only rough."""
    taken, chosen = Counter(), []
    for setting in ranked:
        kind = (setting.model.remat, setting.train.accumulate)
        if taken[kind] < 2 and len(chosen) < number:
            chosen.append(setting)
        taken[kind] += 1
    return chosen


def _each(
    settings: list[Config], planned: Callable[[Config], dict[str, Any]], report: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[str], bool]:
    """(plans, why others could not be planned, whether it was interrupted) of settings, one after the other."""
    plans, refused = [], []
    for number, setting in enumerate(settings, 1):
        try:
            plans.append(planned(setting))
        except KeyboardInterrupt:
            if not plans:
                raise
            report("interrupted: what follows is what was done")
            return plans, refused, True
        except (InputError, RuntimeError) as error:  # the compiler's are RuntimeErrors
            refused.append(f"{_setting(setting)}: {' '.join(str(error).split())[:300]}")
            report(f"{number}/{len(settings)} {refused[-1]}")
        else:
            report(f"{number}/{len(settings)} {written(plans[-1])}")
    return plans, refused, False


def _setting(config: Config) -> str:
    return written({"mesh": vars(config.mesh), "accumulate": config.train.accumulate, "remat": config.model.remat})


def written(plan: dict[str, Any]) -> str:
    """A plan's settings and, where it has one, outcome in one line."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    setting = f"{mesh}, accumulate {plan['accumulate']}, remat {plan['remat']}"
    if "fits" not in plan:
        return setting
    if not plan["fits"]:
        return f"{setting}: does not fit"
    total = f"{plan['bytes_per_device']['total'] / 2**30:.1f} GiB"
    if plan["step_seconds_estimate"] is None:
        return f"{setting}: {total}"
    speed = f"{plan['tokens_per_second_estimate']:,.0f} tokens/s, MFU {plan['mfu_estimate']:.1%} (estimates)"
    return f"{setting}: {total}, {speed}"


def candidates(config: Config, target: Topology) -> Iterator[Config]:
    """Every setting that the model's sizes and the batch allow on all devices of the topology."""
    model, layout = config.model, config.experts
    groups = config.train.batch_rows // config.data.group_rows
    most = max((g.experts for g in layout.groups), default=1)
    for tensor in _divisors(math.gcd(model.key_heads, model.hidden, target.devices)):
        if tensor > 8 or config.vocabulary_size % tensor:
            continue
        for expert in _divisors(math.gcd(most, target.devices // tensor)):
            for fsdp in _divisors(target.devices // (tensor * expert)):
                data = target.devices // (tensor * expert * fsdp)
                if model.width % (fsdp * expert) or (data % target.slices and fsdp % target.slices):
                    continue
                for accumulate in _divisors(groups):
                    if accumulate < config.train.accumulate or (groups // accumulate) % (data * fsdp * expert):
                        continue
                    yield from _with(config, MeshConfig(data, fsdp, expert, tensor), accumulate)


def _with(config: Config, mesh: MeshConfig, accumulate: int) -> Iterator[Config]:
    train = dataclasses.replace(config.train, accumulate=accumulate)
    for remat in REMAT_FLOPS:
        yield dataclasses.replace(config, mesh=mesh, train=train, model=dataclasses.replace(config.model, remat=remat))


def _divisors(number: int) -> list[int]:
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def _no_candidates(config: Config, target: Topology) -> str:
    groups = config.train.batch_rows // config.data.group_rows
    return (
        f"--topology: {groups} routing groups of an update do not split over {target.devices} devices; raise "
        "train.batch_rows or lower data.group_rows"
    )


def fits(config: Config, target: Topology) -> bool:
    """Whether a setting's closed-form sum leaves room."""
    return sum(memory.arithmetic_bytes(config).values()) <= memory.USABLE * target.memory


def arithmetic_seconds(config: Config, target: Topology) -> float:
    """A rough step time, to rank settings by: products at REACHED of the peak, and what must cross the network.

    For every microbatch weights are gathered twice and their gradients scattered once, and added up over data; experts
    that live apart see their tokens come and go in both passes; a tensor axis adds up activations.
    """
    mesh, model, train = config.mesh, config.model, config.train
    link = 2 * target.kind.link if target.kind else GPU_LINK
    tokens = config.batch_tokens / train.accumulate / memory.row_parts(config)
    passes = train.accumulate * model.layers
    products = flops_per_token(config) * config.batch_tokens / target.devices * REMAT_FLOPS[model.remat]
    gathered = 3 * 2 * memory.gathered_parameters(config) * _left(mesh.fsdp)
    split = sum(memory.splits_experts(g, mesh.expert) for g in config.experts.groups) / len(config.experts.groups)
    travelled = (6 if model.remat == "full" else 4) * 2 * tokens * model.width * _left(mesh.expert) * split
    added = 4 * 2 * 2 * tokens * model.width * _left(mesh.tensor)
    reduced = train.accumulate * memory.state_bytes(config)["parameters"] * _left(mesh.data)  # in bfloat16, twice
    kept = activation_bytes(config) / memory.row_parts(config) * train.accumulate / 1e13  # breaks ties
    network = passes * (gathered + travelled + added) + reduced
    return products / (REACHED * target.peak) + network / link + kept


def _left(devices: int) -> float:
    """Share of an array that other devices hold or need."""
    return (devices - 1) / devices
