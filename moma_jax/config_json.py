"""A config as JSON and back; earlier formats are read, too."""

from __future__ import annotations

import dataclasses
from typing import Any

from moma_jax import rules
from moma_jax.config import Config, RunConfig, with_router
from moma_jax.errors import require
from moma_jax.fields import read, shown

FORMAT_VERSION = 2

OF_FORMAT_1 = {
    "jitter": "jitter",
    "gumbel": "gumbel",
    "threshold_decay": "decay",
    "auxiliary": "auxiliary",
    "routing_warmup": "warmup",
    "routing_slack": "slack",
}
"""Fields of the section model in format 1 that are options of the routing rule now."""


def to_json(config: Config) -> dict[str, Any]:
    """The content of config.json: plain values and a format version."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(as_recorded(config))}


def as_recorded(config: Config) -> Any:
    """The config with its routing rule as plain values, its name among them: what two runs are compared by."""
    return with_router(config, rules.to_json(config.model.router))


def from_json(data: dict[str, Any]) -> Config:
    """Reads `to_json`'s dictionary. A routing rule that is not built in stays a name (`rules.Unloaded`).

    Raises:
      InputError: it is of another format version, or a field is wrong, unknown or missing.
    """
    require(isinstance(data, dict), f"config.json: expected an object, found {str(data)[:40]}")
    version = data.get("format_version")
    known = version in (1, FORMAT_VERSION)
    require(known, f"config.json: format_version {shown(version)}; this moma_jax reads {FORMAT_VERSION} and 1")
    fields = {name: value for name, value in of_this_format(data).items() if name != "format_version"}
    if isinstance(model := fields.get("model"), dict) and isinstance(router := model.get("router"), dict):
        router = rules.from_json(router, lambda rule, options: read(rule, options, "model.router"))
        fields["model"] = model | {"router": router}
    return read(Config, fields)


def of_record(run: RunConfig) -> RunConfig:
    """A recorded section `run` for who uses the record. Compiled programs are code, and a config.json is data: no
    folder of them is taken from there, but that there shall be none is."""
    kept = run.compilation_cache if run.compilation_cache == "off" else None
    return dataclasses.replace(run, compilation_cache=kept)


def of_this_format(data: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json as this version would have written it; unread, so it may still be wrong."""
    if data.get("format_version") != 1 or not isinstance(data.get("model"), dict):
        return data
    return data | {"format_version": FORMAT_VERSION, "model": _model_of_format_1(data["model"])}


def _model_of_format_1(model: dict[str, Any]) -> dict[str, Any]:
    """The section model of format 1 in today's form: what its routing rule did was fields of its own."""
    own = {name: model[name] for name in OF_FORMAT_1 if name in model}
    rule = model.get("routing", "choice")
    options = {OF_FORMAT_1[n]: v for n, v in own.items() if rule == "threshold" or not n.startswith("routing_")}
    rest = {name: value for name, value in model.items() if name not in own and name != "routing"}
    return rest | {"router": {rules.NAME: rule, **options}}
