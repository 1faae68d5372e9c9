"""A config as JSON and back."""

from __future__ import annotations

import dataclasses
from typing import Any

from moma_jax.config import Config
from moma_jax.errors import require
from moma_jax.fields import read

FORMAT_VERSION = 1


def to_json(config: Config) -> dict[str, Any]:
    """The content of config.json: plain values and a format version."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}


def from_json(data: dict[str, Any]) -> Config:
    """Reads `to_json`'s dictionary.

    Raises:
      InputError: it is of another format version, or a field is wrong, unknown or missing.
    """
    require(isinstance(data, dict), f"config.json: expected an object, found {str(data)[:40]}")
    version = data.get("format_version")
    require(version == FORMAT_VERSION, f"config.json: format_version {version!r}; this moma_jax reads {FORMAT_VERSION}")
    return read(Config, {name: value for name, value in data.items() if name != "format_version"})
