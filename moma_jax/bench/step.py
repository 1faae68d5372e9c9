"""The training step: tokens per second of FFN variants at equal active FLOPs, and where the time goes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moma_jax import sharding
from moma_jax.batch import Batch
from moma_jax.bench.parts import measure_parts
from moma_jax.bench.timing import require_some, say, summarise, timed
from moma_jax.checks import resolve
from moma_jax.config import Config
from moma_jax.cost import activation_bytes, flops_per_token, parameter_count, peak_flops
from moma_jax.data.packing import frame_of
from moma_jax.data.synthetic import Synthetic, SyntheticPlan
from moma_jax.errors import RunError
from moma_jax.geometry import layer_of
from moma_jax.model.decoder import first_routing_state
from moma_jax.process import is_exhausted
from moma_jax.training import step as step_lib
from moma_jax.vocab import contiguous

SAME_FLOPS = 0.01
"""Active FLOPs per token count as equal where they differ by less than this share."""


class StepVariant(NamedTuple):
    """One FFN, ready to step: `fresh` makes a state, `step` takes and donates one."""

    name: str
    program: step_lib.Program
    fresh: Callable
    step: Callable


def bench_step(
    config: Config, ffn: Sequence[str] = ("dense", "8x", "1t1i", "4t4i"), *, repeats: int = 9, parts: bool = True
) -> dict[str, Any]:
    """Training-step speed of FFN variants at equal active FLOPs, on synthetic tokens at the quotas' ratio.

    The step is the real one: forward, loss, backward, optimizer, on all devices of the config's mesh. The config's
    update is used where it fits them by `moma cost`'s estimate, else as many whole routing groups as do, without
    accumulation; "update" in the result says which it was.

    Args:
      config: what is trained; its `model.ffn` and data are replaced.
      ffn: variants.
      repeats: timed steps of each variant.
      parts: also measure where the time goes, piece by piece (see `measure_parts`); not of mixture of depths, whose
        layers differ.

    Returns:
      {"variants": {name: {"tokens_per_second", "spread", "relative_to_dense", "relative_flops", "mfu",
      "step_seconds", "quota_slack", "parts"}}, "update": {...}, "device", ...}. `relative_to_dense` is a ratio of
      tokens per second, None where dense is not among the variants; `relative_flops` of active training FLOPs per
      token (`moma cost`), with a warning where it is more than 1% off; `mfu` is None where the device's peak is not
      known; `quota_slack` is the share of expert slots that stay empty; `parts` are seconds per update and device.

    Raises:
      InputError: the config or a variant contradicts itself. RunError: a step ran out of device memory.
    """
    configs = {name: _variant_of(config, name) for name in ffn}
    return measured(configs, "dense", _variant_of(config, "dense"), repeats=repeats, parts=parts)


def measured(configs: dict[str, Config], base: str, baseline: Config, *, repeats: int, parts: bool) -> dict[str, Any]:
    """What `bench_step` says of these configs; `base`: which of them is the one that others are compared with."""
    require_some(repeats=repeats)
    asked = next(iter(configs.values()))
    rows = min(map(rows_that_fit, configs.values()))
    configs = {name: with_rows(config, rows) for name, config in configs.items()}
    batch = synthetic_batch(next(iter(configs.values())))
    with _out_of_memory_is_named():
        variants = [_compile(name, config) for name, config in configs.items()]
        seconds = _step_seconds(variants, batch, repeats)
    figures = {v.name: _figures(v, seconds[v.name], seconds.get(base), baseline, batch) for v in variants}
    for variant in [v for v in variants if parts and not v.program.config.depth]:
        say(f"where the time of {variant.name} goes")
        with _out_of_memory_is_named():
            pieces = measure_parts(variant.program, variant.fresh(), batch, repeats=min(repeats, 5))
        own = figures[variant.name]
        own["parts"] = {**pieces, "other": own["step_seconds"] - sum(pieces.values())}
    return {"bench": "step", **_setting(variants[0].program, asked), "variants": figures}


def synthetic_batch(config: Config) -> Batch:
    """The first batch of the synthetic stream: random tokens of the config's shapes at the quotas' ratio."""
    synthetic = Synthetic(frame_of(config.data), contiguous(config.data.modalities), config.data.seed)
    groups = range(config.train.batch_rows // config.data.group_rows)
    return synthetic.packed(SyntheticPlan(groups, {})).batch


def _variant_of(config: Config, ffn: str) -> Config:
    """The config with another FFN, on synthetic tokens."""
    return on_synthetic_tokens(dataclasses.replace(config, model=dataclasses.replace(config.model, ffn=ffn)))


def on_synthetic_tokens(config: Config) -> Config:
    """The config on random tokens, in the type that this hardware computes in."""
    data = dataclasses.replace(config.data, kind="synthetic", stores=())
    train = dataclasses.replace(config.train, eval_sets=())
    return step_lib.with_dtype(resolve(dataclasses.replace(config, data=data, train=train)))


def _compile(name: str, config: Config) -> StepVariant:
    say(f"compiling the step of {name}: {config.train.batch_rows} rows of {config.data.sequence}")
    program = step_lib.make_program(config)
    with sharding.use_mesh(program.mesh):
        routing_state = first_routing_state(config)
        abstract = step_lib.abstract_state(program, routing_state)
        fresh = step_lib.state_maker(program, routing_state)
        return StepVariant(name, program, fresh, step_lib.compile_step(program, abstract))


def _step_seconds(variants: list[StepVariant], batch: Batch, repeats: int) -> dict[str, list[float]]:
    """Seconds of `repeats` steps of each variant, in turns.

    States stay on the devices between turns where all of them fit into half of the memory. Where they do not, each
    turn makes its state anew, and a step that is not timed comes before the one that is.
    """
    batches = {v.name: step_lib.put(batch, v.program.mesh) for v in variants}
    size = sum(12 * parameter_count(v.program.config)["total"] for v in variants)
    states, resident = {}, size < _device_memory() / 2
    seconds = {v.name: [] for v in variants}
    for turn in range(repeats + 1):
        say(f"step {turn} of {repeats} of each variant" if turn else "first steps")
        for name, _, fresh, step in variants:
            state = states.pop(name, None) or step(fresh(), batches[name])[0]
            state = jax.block_until_ready(state)
            took, (state, _) = timed(lambda state=state, step=step, name=name: step(state, batches[name]))
            if turn:  # the first turn warms up
                seconds[name].append(took)
            if resident:
                states[name] = state
            del state
    return seconds


def _figures(
    variant: StepVariant, seconds: list[float], baseline: list[float] | None, dense: Config, batch: Batch
) -> dict[str, Any]:
    """One variant's figures; `baseline` are the seconds of `dense`, None where it is not measured."""
    config, mesh = variant.program.config, variant.program.mesh
    median, spread = summarise(seconds)
    speed = config.batch_tokens / median
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return {
        "tokens_per_second": speed,
        "spread": spread,
        "relative_to_dense": None if baseline is None else statistics.median(baseline) / median,
        "relative_flops": _relative_flops(variant.name, config, dense),
        "mfu": None if peak is None else speed * flops_per_token(config) / (peak * mesh.size),
        "step_seconds": median,
        "quota_slack": quota_slack(config, batch),
    }


def _relative_flops(name: str, config: Config, dense: Config) -> float:
    """Active training FLOPs per token over those of `dense`; says so where they are not equal."""
    relative = flops_per_token(config) / flops_per_token(dense)
    if abs(relative - 1) > SAME_FLOPS:
        say(
            f"warning: {name} has {relative:.3f} times dense's active FLOPs per token, so their speeds do not compare; "
            "give it another --model.hidden, or of expert choice --model.capacity None"
        )
    return relative


def quota_slack(config: Config, batch: Batch) -> float:
    """Share of the routed experts' slots that stay empty on a batch: k_e below ceil(capacity * quota)."""
    dispatched = [own for own in layer_of(config).groups if not own.everywhere and not own.group.shared]
    if not dispatched:
        return 0.0
    modality_BS = np.where(np.asarray(batch.segment_BS) > 0, np.asarray(batch.modality_BS), -1)
    modality_GT = modality_BS.reshape(-1, config.group_tokens)
    slots = filled = 0
    for own in dispatched:
        count_G = np.isin(modality_GT, own.group.modalities).sum(1)
        slots += own.group.experts * own.slots * len(count_G)
        filled += own.group.experts * sum(own.quota.take(int(count)) for count in count_G)
    return 1 - filled / slots


def _setting(program: step_lib.Program, asked: Config) -> dict[str, Any]:
    """What the figures were measured on."""
    config, device = program.config, program.mesh.devices.flat[0]
    return {
        "device": device.device_kind,
        "devices": program.mesh.size,
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "update": {
            "rows": config.train.batch_rows,
            "rows_of_recipe": asked.train.batch_rows,
            "accumulate": config.train.accumulate,
            "sequence": config.data.sequence,
            "tokens": config.batch_tokens,
        },
    }


# What fits ------------------------------------------------------------------------------------------------------------


def _device_memory() -> float:
    """Bytes of one device's memory (the machine's, on CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def rows_that_fit(config: Config) -> int:
    """Rows of an update: the config's, or as many whole routing groups as `moma cost` says that the devices hold.

    Parameters, gradient and moments are 16 bytes per parameter; a tenth of the memory is left alone.
    """
    sizes = dataclasses.asdict(config.mesh).values()
    devices = len(jax.devices()) if -1 in sizes else math.prod(sizes)
    room = devices * (0.9 * _device_memory() - 16 * parameter_count(config)["total"])
    if activation_bytes(config) <= room:
        return config.train.batch_rows
    unit = config.data.group_rows * devices
    units = max(config.train.batch_rows // unit, 1)
    while units > 1 and activation_bytes(with_rows(config, units * unit)) > room:
        units //= 2
    return units * unit


def with_rows(config: Config, rows: int) -> Config:
    """The config with updates of `rows` rows, in one microbatch where that is not the config's own number."""
    if rows == config.train.batch_rows:
        return config
    return resolve(dataclasses.replace(config, train=dataclasses.replace(config.train, batch_rows=rows, accumulate=1)))


@contextlib.contextmanager
def _out_of_memory_is_named():
    """Turns XLA's running out of memory into advice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        raise RunError("out of device memory; lower --train.batch-rows or set --model.remat full") from error
