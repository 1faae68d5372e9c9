"""Every cross-check of a config, made before any device work.

Each refusal is one line that names the field and a value that would be right.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing

from moma_jax.errors import InputError
from moma_jax.ffn import parse_ffn
from moma_jax.vocab import SPECIAL_NAMES

if typing.TYPE_CHECKING:
    from moma_jax.config import Config, PrepareConfig


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def check(config: Config) -> None:
    """Raises InputError for the first contradiction, naming the field and a value that would be right."""
    _check_ranges(config)
    _check_modalities(config)
    _check_model(config)
    _check_batches(config)
    _check_data(config)
    _check_length(config)
    if config.data.prepare is not None:
        check_prepare(config.data.prepare, "data.prepare")


def check_prepare(prepare: PrepareConfig, section: str = "prepare") -> None:
    """Raises InputError for a setting of `moma prepare` that cannot be meant."""
    for name in ("documents", "text_size", "image_side", "parts", "shard_bytes", "chunk_tokens"):
        value = getattr(prepare, name)
        require(value > 0, f"{section}.{name}: must be positive, is {value}")
    for name in ("codebook", "codes_per_image"):
        value = getattr(prepare, name)
        require(value is None or value > 0, f"{section}.{name}: must be positive, is {value}")
    most = 1 << 16
    require(1 <= prepare.colours <= most, f"{section}.colours: must be 1 to {most}, is {prepare.colours}")
    require(prepare.seed >= 0, f"{section}.seed: must be 0 or more, is {prepare.seed}")
    share = prepare.held_out
    require(0 <= share < 1, f"{section}.held_out: must be at least 0 and below 1, such as 0.05; is {share}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _check_ranges(config: Config) -> None:
    positive = {
        "model": ("layers", "width", "heads", "ffn_width", "hidden", "attention_chunk"),
        "data": (
            "sequence",
            "group_rows",
            "lanes",
            "wait_documents",
            "window_documents",
            "prefetch",
            "read_threads",
            "read_concurrency",
        ),
        "optimizer": ("peak_lr", "epsilon", "clip_norm"),
        "routers": ("steps", "peak_lr", "log_every", "checkpoint_every"),
        "train": ("batch_rows", "accumulate", "loss_chunk", "log_every", "eval_every", "checkpoint_every", "keep_last"),
    }
    for section, names in positive.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            require(value is not None and value > 0, f"{section}.{name}: must be positive, is {value}")
    steps = config.train.profile_steps
    require(
        not steps or (len(steps) == 2 and 1 <= steps[0] <= steps[1]),
        f"train.profile_steps: give the first and the last step, such as 10 12; is {steps}",
    )
    cache = config.data.cache_bytes
    require(cache >= 0, f"data.cache_bytes: must be 0 (no cache) or more, is {cache}")
    shares = {"model.dropout": config.model.dropout, "optimizer.beta1": config.optimizer.beta1,
              "optimizer.beta2": config.optimizer.beta2}  # fmt: skip
    for name, value in shares.items():
        require(0 <= value < 1, f"{name}: must be at least 0 and below 1, is {value}")
    _check_routing(config)
    capacity = config.model.capacity
    require(
        capacity is None or 1e-4 <= capacity <= 1,
        f"model.capacity: must be at least 0.0001 and at most 1, is {capacity}",
    )
    _check_mesh(config)


def _check_mesh(config: Config) -> None:
    sizes = dataclasses.asdict(config.mesh)
    for axis, size in sizes.items():
        require(size == -1 or size > 0, f"mesh.{axis}: must be -1 or positive, is {size}")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    require(len(open_axes) < 2, f"mesh: only one axis can be -1, these are: {', '.join(open_axes)}")
    hosts = config.hosts
    require(hosts.heartbeat_seconds > 0, "hosts.heartbeat_seconds: must be positive")
    require(
        hosts.coordinator is None or re.fullmatch(r".+:\d+", hosts.coordinator) is not None,
        f"hosts.coordinator: {hosts.coordinator} has no port; give ADDRESS:PORT of process 0",
    )
    require(hosts.count is None or hosts.count > 0, "hosts.count: must be positive")
    require(
        hosts.index is None or 0 <= hosts.index < (hosts.count or hosts.index + 1),
        f"hosts.index: {hosts.index} is not below hosts.count {hosts.count}; number the processes from 0",
    )


def _check_routing(config: Config) -> None:
    """Thresholds and auxiliary routers. Either is harmless where no group of experts has a router: nothing is made."""
    routers = config.routers
    for name in ("end_lr", "warmup_steps", "seed"):
        value = getattr(routers, name)
        require(value >= 0, f"routers.{name}: must be 0 or more, is {value}")
    rows, group = routers.batch_rows, config.data.group_rows
    require(
        rows is None or (rows > 0 and rows % group == 0),
        f"routers.batch_rows: {rows} rows are not whole routing groups of {group} rows; use "
        f"{round_up(max(rows or 1, 1), group)}",
    )


def _check_model(config: Config) -> None:
    model = config.model
    if model.width % model.heads or (model.width // model.heads) % 2:
        right = max(h for h in range(1, model.heads + 1) if model.width % h == 0 and (model.width // h) % 2 == 0)
        raise InputError(
            f"model.heads: {model.heads} heads do not divide the width {model.width} into even head widths; "
            f"{right} would"
        )
    _check_depth(config)


def _check_depth(config: Config) -> None:
    """Mixture of depths, where the FFN has it in front."""
    model, sequence = config.model, config.data.sequence
    require(model.depth_by in ("modality", "all"), f"model.depth_by: {model.depth_by!r} is none of modality, all")
    share = model.depth_capacity
    require(0 < share <= 1, f"model.depth_capacity: must be above 0 and at most 1, such as 0.25; is {share}")
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
        require(m.size > 0, f"data.modalities: {m.name} has size {m.size}; give the number of its ids")
        require(0 < m.quota <= 1, f"data.modalities: {m.name} has quota {m.quota}; give a share above 0, at most 1")
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
    rows, step = config.train.batch_rows, config.data.group_rows * config.train.accumulate
    require(
        rows % step == 0,
        f"train.batch_rows: {rows} rows do not split into {config.train.accumulate} microbatches of whole routing "
        f"groups of {config.data.group_rows} rows; use {round_up(rows, step)}",
    )
    for eval_set in config.train.eval_sets:
        require(
            eval_set.rows > 0 and eval_set.rows % config.data.group_rows == 0,
            f"train.eval_sets: {eval_set.name} has {eval_set.rows} rows; use whole routing groups, such as "
            f"{round_up(max(eval_set.rows, 1), config.data.group_rows)}",
        )
    names = [s.name for s in config.train.eval_sets]
    require(len(set(names)) == len(names), "train.eval_sets: two have the same name")
    _check_eval_routings(config)


def _check_eval_routings(config: Config) -> None:
    names, known = config.train.eval_routings, ("choice", "causal", "threshold")
    for name in names:
        require(name in known, f"train.eval_routings: {name!r} is none of {', '.join(known)}")
    require(len(set(names)) == len(names), "train.eval_routings: one is named twice")
    require(
        "causal" not in names or config.model.router.auxiliary or not config.routed,
        "train.eval_routings: causal needs auxiliary routers; set model.router.auxiliary, or leave it out",
    )


def _check_data(config: Config) -> None:
    data = config.data
    require(data.kind == "synthetic" or bool(data.stores), "data.stores: name a store, or set data.kind=synthetic")
    names = [s.name for s in data.stores]
    require(len(set(names)) == len(names), "data.stores: two have the same name")
    for eval_set in config.train.eval_sets:
        for name in eval_set.stores:
            require(name in names, f"train.eval_sets: {eval_set.name} draws from {name!r}; data.stores has {names}")
    known = {m.name for m in data.modalities}
    for store in data.stores:
        for name, share in store.share.items():
            require(name in known, f"data.stores: {store.name} has a share of {name!r}; modalities are {sorted(known)}")
            require(0 <= share <= 1, f"data.stores: {store.name} has a share of {share} of {name}; give 0 to 1")


def _check_length(config: Config) -> None:
    train = config.train
    given = [name for name in ("steps", "tokens", "flops") if getattr(train, name) is not None]
    require(
        len(given) == 1,
        f"train.steps: give exactly one of train.steps, train.tokens, train.flops; given: {', '.join(given) or 'none'}",
    )
    value = getattr(train, given[0])
    require(0 < value < math.inf, f"train.{given[0]}: must be positive and finite, is {value}")
