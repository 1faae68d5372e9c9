"""A config as JSON and back, and what may change in it when a run goes on."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from moma_jax import rules
from moma_jax.checks import require
from moma_jax.config import Config
from moma_jax.router import Router

FORMAT_VERSION = 2


def to_json(config: Config) -> dict[str, Any]:
    """The content of config.json: plain values and a format version."""
    plain = dataclasses.asdict(dataclasses.replace(config, model=dataclasses.replace(config.model, router=None)))
    return {
        "format_version": FORMAT_VERSION,
        **plain,
        "model": plain["model"] | {"router": rules.to_json(config.model.router)},
    }


def from_json(data: dict[str, Any]) -> Config:
    """Reads `to_json`'s dictionary; raises InputError for unknown or missing keys and other format versions."""
    require(isinstance(data, dict), f"config.json: expected an object, found {str(data)[:40]}")
    version = data.get("format_version")
    if version == 1:
        data, version = _of_format_1(data), FORMAT_VERSION
    require(version == FORMAT_VERSION, f"config.json: format_version {version!r}; this moma_jax reads {FORMAT_VERSION}")
    return _read(Config, {k: v for k, v in data.items() if k != "format_version"}, "config")


_OF_FORMAT_1 = {
    "jitter": "jitter",
    "gumbel": "gumbel",
    "threshold_decay": "decay",
    "auxiliary": "auxiliary",
    "routing_warmup": "warmup",
    "routing_slack": "slack",
}
"""Fields of the section model that are options of the routing rule now."""


def _of_format_1(data: dict[str, Any]) -> dict[str, Any]:
    """The dictionary of format 1 in today's form: its routing fields were the model's own."""
    model = data.get("model")
    if not isinstance(model, dict) or "router" in model:
        return data
    own = {name: model[name] for name in _OF_FORMAT_1 if name in model}
    rule = model.get("routing", "choice")
    options = {_OF_FORMAT_1[n]: v for n, v in own.items() if rule == "threshold" or not n.startswith("routing_")}
    rest = {name: value for name, value in model.items() if name not in own and name != "routing"}
    return data | {"model": rest | {"router": {rules.NAME: rule, **options}}}


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` of a JSON document as the annotated type `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Router:
        require(isinstance(value, dict), f"{where}: expected an object, found {value!r}")
        return rules.from_json(value, lambda rule, options: _read(rule, options, where))
    if dataclasses.is_dataclass(kind):
        hints = {n: h for n, h in typing.get_type_hints(kind).items() if n in kind.__dataclass_fields__}
        require(isinstance(value, dict), f"{where}: expected an object, found {value!r}")
        unknown = sorted(set(value) - set(hints))
        require(not unknown, f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(hints)}")
        missing = sorted(
            f.name
            for f in dataclasses.fields(kind)
            if f.name not in value and f.default is f.default_factory is dataclasses.MISSING
        )
        require(not missing, f"{where}: missing key {', '.join(missing)}")
        return kind(**{k: _read(hints[k], v, f"{where}.{k}") for k, v in value.items()})
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _read(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{where}: expected a list, found {value!r}")
        return tuple(_read(arguments[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if origin is dict:
        require(isinstance(value, dict), f"{where}: expected an object, found {value!r}")
        return {k: _read(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is Literal:
        require(value in arguments, f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(type(value) is kind, f"{where}: expected {kind.__name__}, found {value!r}")
    return value


# What may change when a run goes on -----------------------------------------------------------------------------------

MAY_CHANGE = (
    "mesh",
    "hosts",
    "run",
    "routers",  # a stage of its own, after this one
    "data.prepare",  # how to make a store that is not there; the store itself is known by its own hashes
    # How much is computed at once; smaller devices may need less.
    "model.remat",
    "model.attention_chunk",
    "train.accumulate",
    "train.loss_chunk",
    "data.prefetch",
    "data.read_threads",
    "data.cache_bytes",
    "data.read_concurrency",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_every",
    "train.profile_steps",
)


def differences(before: Config, after: Config) -> list[str]:
    """Fields that forbid continuing a run, as lines `data.modalities.1.quota: old -> new`."""
    return _differences(before, after, "")


def _differences(old: Any, new: Any, path: str) -> list[str]:
    if old == new or path in MAY_CHANGE:
        return []
    if isinstance(old, Router):
        pair = [rules.to_json(rule) for rule in (old, new)]
        return [] if rules.same_rule(old, new) else [f"{path}: {pair[0]} -> {pair[1]}"]
    if isinstance(old, tuple) and len(old) == len(new):
        pairs = [(i, *values) for i, values in enumerate(zip(old, new, strict=True))]
    elif dataclasses.is_dataclass(old):
        pairs = [(f.name, getattr(old, f.name), getattr(new, f.name)) for f in dataclasses.fields(old)]
    else:
        shown = [[getattr(i, "name", i) for i in v] if isinstance(v, tuple) else v for v in (old, new)]
        return [f"{path}: {shown[0]} -> {shown[1]}"]
    return [line for name, *values in pairs for line in _differences(*values, f"{path}.{name}".lstrip("."))]
