"""A config is checked and completed: each of its fields by the reader of `fields`, then what relates several of them.

All of it happens before any device work. Each refusal is one line that names the field and a value that would be right.
"""

from __future__ import annotations

import dataclasses
import math
import re

from moma_jax.config import Config, ModelConfig, with_router
from moma_jax.errors import InputError, require
from moma_jax.ffn import parse_ffn
from moma_jax.fields import read
from moma_jax.geometry import asked_capacity
from moma_jax.router import CAUSAL, CAUSAL_ROUTINGS
from moma_jax.rules import Unloaded, as_rule
from moma_jax.vocab import SPECIAL_NAMES


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def resolve(config: Config) -> Config:
    """Checks a config and fills its derived fields, those that are None in a recipe.

    Raises:
      InputError: the first field that is wrong, or the first contradiction, and a value that would be right.
    """
    config = read_config(config)
    if config.model.hidden is None:
        hidden = round_up(-(-2 * config.model.ffn_width // 3), 128)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden=hidden))
    _check_mesh(config)
    _check_modalities(config)
    _check_model(config)
    _check_batches(config)
    _check_data(config)
    _check_length(config)
    return config


def read_config(config: Config) -> Config:
    """A config of Python with every field read, by its own type and bounds; a named routing rule is loaded."""
    if isinstance(config, Config) and isinstance(config.model, ModelConfig):
        config = with_router(config, as_rule(config.model.router))
    return read(Config, config)


def _check_mesh(config: Config) -> None:
    sizes = dataclasses.asdict(config.mesh)
    for axis, size in sizes.items():
        require(size == -1 or size > 0, f"mesh.{axis}: must be -1 or positive, is {size}")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    require(len(open_axes) < 2, f"mesh: only one axis can be -1, these are: {', '.join(open_axes)}")
    hosts = config.hosts
    require(
        hosts.coordinator is None or re.fullmatch(r".+:\d+", hosts.coordinator) is not None,
        f"hosts.coordinator: {hosts.coordinator} has no port; give ADDRESS:PORT of process 0",
    )
    require(
        hosts.index is None or hosts.count is None or hosts.index < hosts.count,
        f"hosts.index: {hosts.index} is not below hosts.count {hosts.count}; number the processes from 0",
    )


def _check_model(config: Config) -> None:
    model = config.model
    if model.head_width is not None:
        require(
            model.head_width % 2 == 0,
            f"model.head_width: rotary positions turn channels in pairs; {model.head_width} is odd",
        )
    elif model.width % model.heads or model.head_size % 2:
        right = max(h for h in range(1, model.heads + 1) if model.width % h == 0 and (model.width // h) % 2 == 0)
        raise InputError(
            f"model.heads: {model.heads} heads do not divide the width {model.width} into even head widths; "
            f"{right} would"
        )
    require(
        model.heads % model.key_heads == 0,
        f"model.kv_heads: {model.kv_heads} do not divide model.heads {model.heads}; use a divisor of it",
    )
    scaling = model.rope_scaling
    if scaling is not None and scaling.low >= scaling.high:
        bounds = f"low is {scaling.low:g}, high {scaling.high:g}"
        raise InputError(f"model.rope_scaling: {bounds}; give a greater high, such as low 1 and high 4")
    _check_rule(config)
    _check_depth(config)


def _check_rule(config: Config) -> None:
    """The routing rule's options, against the experts that it routes to."""
    model = config.model
    for group in config.experts.groups if not isinstance(model.router, Unloaded) else ():
        refused = model.router.refuses(group.experts, asked_capacity(model)) if group.routed else None
        require(refused is None, f"model.{refused}")


def _check_depth(config: Config) -> None:
    """Mixture of depths, where the FFN has it in front."""
    model, sequence = config.model, config.data.sequence
    share = model.depth_capacity
    if not parse_ffn(model.ffn, config.data.modalities).depth:
        return
    require(
        model.layers % 2 == 0,
        f"model.layers: {model.layers} layers do not pair up, and {model.ffn} skips every second one; use "
        f"{model.layers + 1}",
    )
    for m in config.data.modalities:
        require(
            not m.name.startswith("depth"),
            f"data.modalities: {m.name} begins like the routers of {model.ffn}, depth_...; give it another name",
        )
    least = min(sequence, *config.quotas) if model.depth_by == "modality" else sequence
    require(
        math.floor(share * least) >= 1,
        f"model.depth_capacity: {share} of {least} tokens lets nobody in; use {math.ceil(1e4 / least) / 1e4} or more",
    )


def _check_modalities(config: Config) -> None:
    modalities, tokens = config.data.modalities, config.group_tokens
    require(bool(modalities), "data.modalities: name at least text")
    require(len({m.letter for m in modalities}) == len(modalities), "data.modalities: two have the same letter")
    require(len({m.name for m in modalities}) == len(modalities), "data.modalities: two have the same name")
    require(modalities[0].span == 0, "data.modalities: the first is text and has span 0")
    for m, quota in zip(modalities, config.quotas, strict=True):
        require(
            re.fullmatch("[a-wyz]", m.letter) is not None,
            f"data.modalities: {m.name} has letter {m.letter!r}; give one of a to z, but not x, which stands for all",
        )
        # The shortest document: begin, one token of text, end.
        least, holds = (m.span, f"one span of {m.span}") if m.span else (3, "a document of 3")
        require(
            quota >= least,
            f"data.modalities: the quota of {m.name}, {quota} tokens of a routing group of {tokens}, cannot hold "
            f"{holds}; raise it to {math.ceil(1000 * least / tokens) / 1000:.3f} or more, or data.group_rows",
        )
        if m.span:
            require(
                m.span + 3 <= config.data.sequence,
                f"data.sequence: {config.data.sequence} positions cannot hold a span of {m.name} ({m.span} codes and "
                f"its marks); use {m.span + 3} or more",
            )
    text, special = modalities[0], len(SPECIAL_NAMES) + 2 * sum(m.span > 0 for m in modalities)
    require(
        text.size >= special,
        f"data.modalities: {text.name} has size {text.size}, which cannot hold the {special} special ids; use "
        f"{special} or more",
    )
    total = sum(m.quota for m in modalities)
    require(
        total >= 1 - 1e-6,
        f"data.modalities: the quotas add up to {total:.3f}, so no routing group could be filled; raise them to 1",
    )


def _check_batches(config: Config) -> None:
    rows, group = config.train.batch_rows, config.data.group_rows
    step = group * config.train.accumulate
    require(
        rows % step == 0,
        f"train.batch_rows: {rows} rows do not split into {config.train.accumulate} microbatches of whole routing "
        f"groups of {group} rows; use {round_up(rows, step)}",
    )
    rows = config.routers.batch_rows
    require(
        rows is None or rows % group == 0,
        f"routers.batch_rows: {rows} rows are not whole routing groups of {group} rows; use "
        f"{round_up(rows or 1, group)}",
    )
    for eval_set in config.train.eval_sets:
        require(
            eval_set.rows % group == 0,
            f"train.eval_sets: {eval_set.name} has {eval_set.rows} rows; use whole routing groups, such as "
            f"{round_up(eval_set.rows, group)}",
        )
    names = [s.name for s in config.train.eval_sets]
    require(len(set(names)) == len(names), "train.eval_sets: two have the same name")
    for name in names:
        _check_file_name("train.eval_sets", name)
    _check_eval_routings(config)
    _check_samples(config)


def _check_file_name(where: str, name: str) -> None:
    known = re.fullmatch(r"[\w.+-]+", name, re.ASCII) is not None
    require(known, f"{where}: {name!r} is no name for files; use letters and digits")


def _check_samples(config: Config) -> None:
    for samples in config.train.samples:
        where = f"train.samples: {samples.name}"
        _check_file_name("train.samples", samples.name)
        require(0 < len(samples.prompts) <= 64, f'{where}: give 1 to 64 prompts, such as ["A red circle"]')
        places, given = sum(prompt.count("<image>") for prompt in samples.prompts), len(samples.images)
        require(
            places == given, f"{where}: {places} times <image> in its prompts, and {given} images; give one for each"
        )
        require(samples.routing in (None, *CAUSAL_ROUTINGS), f"{where}: routing is one of {', '.join(CAUSAL_ROUTINGS)}")
        lacks = _lacks_causal(config) if samples.routing == CAUSAL else None
        require(lacks is None, f"{where}: routing causal cannot be, as the run has {lacks}")
    names = [samples.name for samples in config.train.samples]
    require(len(set(names)) == len(names), "train.samples: two have the same name")


def _check_eval_routings(config: Config) -> None:
    names, rule = config.train.eval_routings, config.model.router
    known = (rule.training_name, *CAUSAL_ROUTINGS)
    for name in names if not isinstance(rule, Unloaded) else ():
        require(name in known, f"train.eval_routings: {name!r} is not one of {', '.join(known)}")
    require(len(set(names)) == len(names), "train.eval_routings: one is named twice")
    lacks = _lacks_causal(config) if CAUSAL in names else None
    require(
        lacks is None, f"train.eval_routings: causal cannot be, as the run has {lacks}; or set model.router.auxiliary"
    )


def _lacks_causal(config: Config) -> str | None:
    """What keeps the run from the routing `causal` while it trains; None where nothing does."""
    rule = config.model.router
    return rule.lacks(CAUSAL, None) if config.routed and not isinstance(rule, Unloaded) else None


def _check_data(config: Config) -> None:
    data = config.data
    require(data.kind == "synthetic" or bool(data.stores), "data.stores: name a store, or set data.kind=synthetic")
    names = [s.name for s in data.stores]
    require(len(set(names)) == len(names), "data.stores: two have the same name")
    require(data.tuning <= 0.5, f"data.tuning: {data.tuning:g} is more than half of the training documents; use less")
    for eval_set in config.train.eval_sets:
        require(
            eval_set.split != "tuning" or data.tuning > 0,
            f"train.eval_sets: {eval_set.name} is of the split tuning, and data.tuning keeps no documents for it; set "
            "data.tuning, such as 0.02",
        )
        for name in eval_set.stores:
            require(name in names, f"train.eval_sets: {eval_set.name} draws from {name!r}; data.stores has {names}")
    known = {m.name for m in data.modalities}
    for store in data.stores:
        for name in store.share:
            require(name in known, f"data.stores: {store.name} has a share of {name!r}; modalities are {sorted(known)}")


def _check_length(config: Config) -> None:
    train = config.train
    given = [name for name in ("steps", "tokens", "flops") if getattr(train, name) is not None]
    require(
        len(given) == 1,
        f"train.steps: give exactly one of train.steps, train.tokens, train.flops; given: {', '.join(given) or 'none'}",
    )
    require_profile(train.profile_steps)


def require_profile(steps: tuple[int, ...]) -> None:
    """InputError where these are neither () nor the first and last step of a profile."""
    require(
        not steps or (len(steps) == 2 and steps[0] <= steps[1]),
        f"train.profile_steps: give the first and the last step, such as 10 12; is {steps}",
    )
