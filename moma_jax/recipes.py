"""Recipes: a Python file or a config.json, with any field overridden, becomes a resolved Config."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from moma_jax.checks import resolve
from moma_jax.config import Config
from moma_jax.config_json import from_json
from moma_jax.errors import InputError
from moma_jax.fields import read

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class ConfigOptions:
    """Options of a command that takes a config: its fields without a prefix, truth values written out."""

    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]


def recipe(path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Config:
    """The resolved config of a recipe.

    Args:
      path: `configs/NAME.py` with `def config() -> Config`, a config.json, or a run directory that holds one.
      overrides: fields to replace, as {"model.ffn": "4t4i"} or as on the command line, ["--model.ffn", "4t4i"].

    Raises:
      InputError: the recipe is missing or broken, a key is unknown, or the result contradicts itself.
    """
    return resolve(override(load(path), overrides))


def load(path: str | Path) -> Config:
    """The config as its file states it, every field read: derived fields unfilled, contradictions not looked for."""
    path, run = Path(path), Path(path).is_dir()
    path = path / "config.json" if run else path
    if not path.is_file():
        raise InputError(f"{path}: no such recipe; give a configs/NAME.py, a config.json or a run directory")
    config = _from_json(path) if path.suffix == ".json" else _from_python(path)
    if run or config.run.dir is None:  # a run that was moved goes on where it is now
        where = str(path.parent) if run else f"runs/{path.stem}"
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=where))
    return config


def _from_json(path: Path) -> Config:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); give the config.json of a run") from error
    return from_json(data)


def _from_python(path: Path) -> Config:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None:
        raise InputError(f"{path}: not a recipe; give a .py file or a config.json")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.config()
    except Exception as error:
        raise InputError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise InputError(f"{path}: config() returned {type(config).__name__}; return a moma_jax.config.Config")
    return read(Config, config)


def override(config: Config, overrides: Mapping[str, Any] | Sequence[str]) -> Config:
    """`config` with fields replaced; see `recipe`."""
    if isinstance(overrides, Mapping):
        overrides = [word for name, value in overrides.items() for word in (f"--{name}", *_words(value))]
    return one_length(parse(ConfigOptions, ConfigOptions(config), list(overrides)).config, overrides)


def _words(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [str(word) for item in value.items() for word in item]
    if isinstance(value, (tuple, list)):
        return [str(word) for word in value]
    return [str(value)]


def one_length(config: Config, overrides: Sequence[str]) -> Config:
    """Training length is one of three fields: an override of one clears what the recipe gave in another."""
    names = ("steps", "tokens", "flops")
    given = [name for name in names if any(word.split("=")[0] == f"--train.{name}" for word in overrides)]
    if len(given) != 1:
        return config
    cleared = {name: None for name in names if name != given[0]}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **cleared))


def parse(kind: type[Parsed], default: Parsed | None, words: list[str], program: str = "moma") -> Parsed:
    """Command-line words read into a dataclass by tyro; raises InputError with one line instead of printing a page."""
    complaint = io.StringIO()
    flags = (tyro.conf.AvoidSubcommands,)
    if "--help" in words or "-h" in words:
        tyro.cli(kind, default=default, args=["--help"], prog=program, config=flags)
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            return tyro.cli(kind, default=default, args=words, prog=program, config=flags)
    except SystemExit:
        raise InputError(_one_line(complaint.getvalue(), kind, default, program)) from None


def _one_line(page: str, kind: type, default: Any, program: str) -> str:
    """The complaint of tyro's boxed error page, with the nearest option where one was misspelt."""
    frame = "│╭╮╰╯─ "
    lines = [line.strip(frame) if line.strip(frame + "-") else "" for line in page.splitlines()]
    help_starts = ("Available subcommands", "Perhaps you meant", "Argument helptext", "For full helptext")
    body = filter(None, lines[1:])  # the first line is the box's title
    message = " ".join(itertools.takewhile(lambda line: not line.startswith(help_starts), body))
    misspelt = re.findall(r"--[a-z][\w.-]*", message)
    if "nrecognized" not in message or not misspelt:
        return message or f"cannot read the command line; see {program} --help"
    near = difflib.get_close_matches(misspelt[0].replace("_", "-"), _flags(default), n=1)
    return f"{misspelt[0]}: no such option" + (f"; did you mean {near[0]}?" if near else f"; see {program} --help")


def _flags(value: Any, prefix: str = "--") -> list[str]:
    """Every option that a dataclass instance offers."""
    names = []
    for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        inner = getattr(value, field.name)
        path = prefix + ("" if isinstance(inner, Config) else field.name.replace("_", "-"))
        names.append(path)
        names += _flags(inner, prefix if isinstance(inner, Config) else f"{path}.")
    return names
