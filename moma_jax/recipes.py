"""Recipes: a Python file or a config.json, with any field overridden, becomes a resolved Config."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import itertools
import json
import os
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from moma_jax import command_line, rules, shipped
from moma_jax.checks import read_config, resolve
from moma_jax.config import Config
from moma_jax.config_json import from_json, of_record
from moma_jax.errors import InputError
from moma_jax.fields import read
from moma_jax.router import Router

LENGTHS = ("steps", "tokens", "flops")
"""Fields of `train` of which one says how long a run is."""
_COUNT = itertools.count()


@dataclass(frozen=True)
class ConfigOptions:
    """Options of a command that takes a config: its fields without a prefix, truth values written out."""

    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    options: str | None = None
    """JSON file of fields, nested or dotted ({"train.steps": 100}). What the command line says comes after it; there
    a field of several parts is given whole as JSON: --data.stores '[]'."""

    def reading(self, words: list[str]) -> tuple[ConfigOptions, list[str]]:
        """These options after the words that tyro cannot read, and the words that are left for it."""
        config, words = read_words(self.config, words)
        rules.require_loaded(config.model.router)
        return dataclasses.replace(self, config=config), words


@dataclass(frozen=True)
class Recipe(ConfigOptions):
    """A recipe, whose values are the defaults of the options."""

    recipe: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RECIPE")]] = ""
    """A .py file, a name that `moma recipes` lists, a config.json, or a run directory."""
    EXAMPLE: ClassVar[str | None] = "quickstart"

    @classmethod
    def named(cls, path: str | None) -> Recipe:
        """The recipe at `path`; without one, for the help page, the defaults of every field."""
        return cls(load(path), recipe=path) if path else cls(Config())

    def resolved(self) -> Config:
        """The config, its derived fields filled in, checked."""
        return resolve(self.config)


RecipeOption = Annotated[Recipe, tyro.conf.arg(name="", help="")]
"""What a command takes whose first word is a recipe."""


def recipe(path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Config:
    """The resolved config of a recipe.

    Args:
      path: a .py file with `def config() -> Config`, a name that `moma recipes` lists, a config.json, or a run
        directory that holds one.
      overrides: fields to replace, as {"model.ffn": "4t4i", "data.stores": []}, or as on the command line,
        ["--model.ffn", "4t4i"].

    Raises:
      InputError: the recipe is missing or broken, a key is unknown, or the result contradicts itself.
    """
    return resolve(override(load(path), overrides))


# Files ----------------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> Config:
    """The config as its file states it, every field read: derived fields unfilled, contradictions not looked for."""
    return load_as(path, Config, from_json, read_config)


def load_as(path: str | Path, kind: type, from_json: Callable[[Any], Any], read_fields: Callable[[Any], Any]) -> Any:
    """The config, of a class that has a section `run`, of a recipe, a config.json or a run directory.

    Args:
      from_json: reads a config.json. read_fields: checks the fields of what a recipe's config() returned.
    """
    path = shipped.found(path)
    run = os.path.isdir(path)  # False for a name that is too long for files, where Path raises
    path = path / "config.json" if run else path
    if not os.path.isfile(path):
        raise InputError(
            f"{path}: no such recipe; give a .py file, a config.json, a run directory or a name of `moma recipes`"
        )
    if path.suffix == ".json":
        config = from_json(_json(path, "the config.json of a run"))
        config = dataclasses.replace(config, run=of_record(config.run))
    elif not isinstance(config := called(path, "config", kind.__name__), kind):
        raise InputError(
            f"{path}: config() returned {type(config).__name__}; return a {kind.__module__}.{kind.__name__}"
        )
    else:
        config = read_fields(config)
    if run or config.run.dir is None:  # a run that was moved goes on where it is now
        where = str(path.parent) if run else f"runs/{path.stem}"
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=where))
    return config


def is_record(path: str | Path) -> bool:
    """Whether what `load_as` reads at a path is data, a config.json or a run's, and no recipe, which is code."""
    path = shipped.found(path)
    return os.path.isdir(path) or path.suffix == ".json"


def _json(path: str | Path, wanted: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); give {wanted}") from error


def called(path: Path, function: str, returns: str) -> Any:
    """What a function without arguments of a Python file returns; the file may import those that lie beside it.

    Raises:
      InputError: the file is no Python, has no such function, or fails.
    """
    name = f"moma_jax_recipe_{next(_COUNT)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    wanted = f"`def {function}() -> {returns}`"
    if spec is None:
        raise InputError(f"{path}: not a Python file; give a .py file with {wanted}")
    module = importlib.util.module_from_spec(spec)
    module.__moma_file__ = str(path)  # how routing rules that it defines are called in records
    beside = str(path.resolve().parent)
    sys.modules[name] = module  # dataclasses look their module up there
    sys.path.append(beside)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise InputError(f"has no {function}(); write {wanted}")
        return getattr(module, function)()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"{path}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(beside)


# Overrides ------------------------------------------------------------------------------------------------------------


def override(config: Config, overrides: Mapping[str, Any] | Sequence[str]) -> Config:
    """`config` with fields replaced; see `recipe`."""
    if isinstance(overrides, Mapping):
        return _assigned(_one_length(config, _leaves(overrides)), Config, (), overrides, ())
    options, words = ConfigOptions(config).reading(list(overrides))
    return command_line.parse(ConfigOptions, options, words).config


def read_words(config: Config, words: list[str]) -> tuple[Config, list[str]]:
    """Applies the words that tyro cannot read; the others are returned, options over the new config's values.

    These are `--options FILE`, and fields of several parts that are given whole, as JSON. Of the three fields that say
    how long training is, the one that is given takes the place of the recipe's.
    """
    files, fields, left, rest = [], {}, [], list(words)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        value = value if equals else next(iter(rest), "")
        if option != "--options" and not _given_whole(config, option, value):
            left.append(word)
            continue
        if not value:
            raise InputError(f"{option}: a value is missing; give a JSON file or the field as JSON, such as '[]'")
        if not equals:
            del rest[0]
        if option == "--options":
            files.append(_options_file(value))
        else:
            fields[option[2:]] = _json_value(option, value)
    for layer in (*files, fields):
        config = override(config, layer)
    return _one_length(config, {word.partition("=")[0][2:] for word in left}), left


def _options_file(path: str) -> dict[str, Any]:
    layer = _json(path, 'an object of fields, such as {"train.steps": 100}')
    if not isinstance(layer, dict):
        raise InputError(f'{path}: not a JSON object; give one of fields, such as {{"train.steps": 100}}')
    return layer


def _json_value(option: str, text: str) -> Any:
    if option == "--model.router" and not text.startswith("{"):
        return text  # the name of a rule
    try:
        return json.loads("null" if text == "None" else text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{option}: {text[:60]!r} is not JSON; give the whole field, such as '[]'") from error


def _given_whole(config: Config, option: str, value: str) -> bool:
    """Whether a word names a field of several parts, which tyro has no option for."""
    part = (config, Config)
    for name in option.removeprefix("--").split("."):
        part = part and _part(*part, name)
    if not option.startswith("--") or part is None:
        return False
    kinds = list(_kinds(part[1]))
    listed = any(typing.get_origin(kind) in (tuple, dict) for kind in kinds)
    return any(map(dataclasses.is_dataclass, kinds)) or (listed and value.startswith(("[", "{")))


def _kinds(kind: Any) -> Iterator[Any]:
    """A type and those that it is made of."""
    yield kind
    for inner in typing.get_args(kind):
        yield from _kinds(inner)


def _part(value: Any, kind: Any, name: str) -> tuple[Any, Any] | None:
    """A field of a dataclass or an item of a tuple, and its type; None where there is none of that name."""
    if dataclasses.is_dataclass(value):
        field = name.replace("-", "_")
        known = field in (each.name for each in dataclasses.fields(value))
        return (getattr(value, field), typing.get_type_hints(type(value))[field]) if known else None
    if isinstance(value, tuple) and name.isdecimal() and int(name) < len(value):
        items = next(inner for inner in _kinds(kind) if typing.get_origin(inner) is tuple)
        return value[int(name)], typing.get_args(items)[0]
    return None


def _assigned(value: Any, kind: Any, names: Sequence[str], new: Any, path: tuple[str, ...]) -> Any:
    """`value`, of type `kind`, with `new` for the part that `names` lead to; the fields of a dataclass are merged."""
    if names:
        part = _part(value, kind, names[0])
        if part is None:
            raise InputError(_unknown(value, (*path, names[0])))
        part = _assigned(*part, names[1:], new, (*path, names[0]))
        if isinstance(value, tuple):
            return (*value[: int(names[0])], part, *value[int(names[0]) + 1 :])
        return dataclasses.replace(value, **{names[0].replace("-", "_"): part})
    if isinstance(value, Router) and not isinstance(new, Mapping):
        whole = isinstance(new, Router) and not isinstance(value, rules.Unloaded)  # with its options
        return rules.as_rule(new) if whole else rules.switched(value, rules.as_rule(new))
    if isinstance(value, Router) and rules.NAME in new:
        value = rules.switched(value, rules.as_rule(new[rules.NAME]))
        new = {name: item for name, item in new.items() if name != rules.NAME}
    if dataclasses.is_dataclass(value) and isinstance(new, Mapping):
        for name, item in sorted(new.items(), key=lambda field: str(field[0]).count(".")):  # wholes before their parts
            value = _assigned(value, kind, str(name).split("."), item, path)
        return value
    return read(kind, _plain(new), ".".join(path))


def _plain(value: Any) -> Any:
    """A value as JSON would have it."""
    match value:
        case os.PathLike():
            return os.fspath(value)
        case list() | tuple():
            return [_plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def _unknown(value: Any, path: tuple[str, ...]) -> str:
    known = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    near = difflib.get_close_matches(path[-1].replace("-", "_"), known, n=1)
    remedy = f"did you mean {'.'.join((*path[:-1], *near))}?" if near else f"known are {', '.join(known) or 'none'}"
    return f"{'.'.join(path)}: no such field; {remedy}"


def _leaves(fields: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all values."""
    for name, value in fields.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")


def _one_length(config: Config, names: Iterable[str]) -> Config:
    """Training length is one of three fields: giving one clears what the recipe gave in another."""
    given = {f"train.{length}" for length in LENGTHS} & set(names)
    if len(given) != 1:
        return config
    cleared = {length: None for length in LENGTHS if f"train.{length}" not in given}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **cleared))
