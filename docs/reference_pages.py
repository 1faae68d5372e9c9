"""The pages of the reference, written from the package when the site is built: a hook of MkDocs (mkdocs.yml).

Fields of configs come from their dataclasses, with the strings under them; commands from the functions and option
classes that `--help` reads; functions from their docstrings, by mkdocstrings. Nothing here is a copy to keep.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from mkdocs.structure.files import File

import moma_jax
from moma_jax import commands, config, generation, router, rules, studies
from moma_jax.command_line import first_line
from moma_jax.fields import Facts
from moma_jax.training.codec.config import CodecConfig

FIELDS = "config.md"
"""The page of config fields, beside the others."""


def on_files(files, config):
    """Adds the pages to those that lie in docs/."""
    for name, text in pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


@functools.cache
def pages() -> dict[str, str]:
    """Markdown of every page of the reference, by name."""
    routing = (router.Router, router.Selection, router.Routed, router.Score, router.Quota, router.Parameter)
    return {
        "config": config_page(),
        "commands": command_page(),
        "functions": function_page(),
        "routers": _title("Routing rules", router) + "\n".join(map(_documented_by_docstring, routing)),
        "generation": generation_page(),
        "studies": study_page(),
    }


# Config fields --------------------------------------------------------------------------------------------------------

ROOTS = {"A run": config.Config, "An image tokenizer": CodecConfig}
"""Titles of the configs that recipes return."""


def config_page() -> str:
    """Every field of every config, sections first, then what stands in their lists, then routing rules."""
    lines = [
        "# Config fields\n",
        "Every field is an option: `data.group_rows` is `--data.group-rows` on the command line, and a key of the",
        "overrides of `moma_jax.recipe`. An item of a list has its number: `--data.modalities.0.quota`. A field of",
        "several parts is given whole as JSON. *May change*: a run may go on with another value; another value of any",
        "other field makes it another run.\n",
    ]
    told: set[type] = set()
    for title, root in ROOTS.items():
        lines += [f"## {title}: {root.__name__}\n", _docstring(root), ""]
        for kind, where, may_change in sections(root):
            if kind not in told:
                told.add(kind)
                lines += _section(kind, where, may_change)
    lines.append(
        "## Routing rules\n\nOptions of `model.router`, by the rule's name; see [routing rules](../routing.md).\n"
    )
    for name, kind in rules.built_in().items():
        lines += [f"### {name}: {kind.__name__}\n", _docstring(kind), "", *field_table(kind, "model.router")]
    return "\n".join(lines)


def sections(kind: type, where: str = "", may_change: bool = False) -> Iterator[tuple[type, str, bool]]:
    """The dataclasses that a config is made of, with their paths, each before those inside it."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        free = may_change or _facts(field).may_change
        for inner, several in _dataclasses(hints[field.name]):
            if not issubclass(inner, router.Router):
                path = f"{where}.{field.name}".lstrip(".") + (".N" if several else "")
                yield inner, path, free
                yield from sections(inner, path, free)


def _dataclasses(annotation: Any, several: bool = False) -> Iterator[tuple[type, bool]]:
    """Dataclasses that an annotation names, and whether they are items of a list."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        yield annotation, several
    for inner in typing.get_args(annotation):
        yield from _dataclasses(inner, several or typing.get_origin(annotation) in (tuple, dict))


def _section(kind: type, where: str, may_change: bool) -> list[str]:
    free = " *May change* as a whole.\n" if may_change else ""
    return [f"### {where}: {kind.__name__}\n", _docstring(kind) + free, "", *field_table(kind, where, may_change)]


def field_table(kind: type, where: str = "", may_change: bool = False) -> list[str]:
    """A table of the fields of a dataclass: type and unit, default, meaning."""
    hints, documented = typing.get_type_hints(kind), field_docs(kind)
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        facts, name = _facts(field), f"{where}.{field.name}".lstrip(".")
        meaning = documented.get(field.name, "") or _inner_docs(hints[field.name])
        meaning += " *May change.*" if facts.may_change and not may_change else ""
        cells = f"`{name}`", _kind_cell(hints[field.name], facts), _default(field), meaning
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return [*lines, ""]


def field_docs(kind: type) -> dict[str, str]:
    """The strings under the fields of a dataclass and of its bases, or what its docstring says of them, by field."""
    _, _, attributes = (inspect.getdoc(kind) or "").partition("\nAttributes:\n")
    found = _by_name(attributes)
    for each in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0].body
        for field, after in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                found[field.target.id] = " ".join(ast.literal_eval(after.value).split())
    return found


def _inner_docs(annotation: Any) -> str:
    """What the class of a field says, where the field has no string of its own."""
    return next((inspect.getdoc(kind).partition("\n")[0] for kind, _ in _dataclasses(annotation)), "")


def _facts(field: dataclasses.Field) -> Facts:
    return field.metadata.get("facts", Facts())


def _kind_cell(annotation: Any, facts: Facts) -> str:
    bounds = {"above": facts.above, "at least": facts.least, "below": facts.below, "at most": facts.most}
    limits = [f"{word} {bound:,.12g}" for word, bound in bounds.items() if bound is not None]
    return ", ".join(filter(None, [_kind(annotation), facts.unit, " and ".join(limits)]))


def _kind(annotation: Any) -> str:
    """An annotation as people read it."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    match origin:
        case typing.Annotated:
            return _kind(inner[0])
        case typing.Literal:
            return " \\| ".join(f"`{value}`" for value in inner)
        case typing.Union | types.UnionType:
            return " or ".join(dict.fromkeys("None" if kind is type(None) else _kind(kind) for kind in inner))
    if origin is tuple:
        several = inner[1:] == (...,)
        return f"list of {_kind(inner[0])}" if several else " and ".join(map(_kind, inner))
    if origin is not None and len(inner) == 2:
        return f"{_kind(inner[1])} by name"
    return getattr(annotation, "__name__", str(annotation))


def _default(field: dataclasses.Field) -> str:
    """A field's default, as code."""
    if field.default_factory is not dataclasses.MISSING:
        return f"`{_value(field.default_factory())}`"
    return "must be given" if field.default is dataclasses.MISSING else f"`{_value(field.default)}`"


def _value(value: Any) -> str:
    """A default, shortened: a dataclass by its name, items of a list by theirs."""
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return ", ".join(map(_value, value))
    if dataclasses.is_dataclass(value):
        return getattr(value, "name", type(value).__name__)
    if isinstance(value, int) and value >= 1 << 20 and math.log2(value).is_integer():
        return f"{value >> 20} * 2**20"
    return value if isinstance(value, str) and value else repr(value)


# Commands -------------------------------------------------------------------------------------------------------------

CONFIGS = {
    config.Config: "--model.ffn 4t4i",
    CodecConfig: "--network.codebook 4096",
    config.PrepareConfig: "--image-side 16",
    config.RoutersConfig: "--steps 1000",
}
"""Classes whose fields have a page of their own, and an option of each."""
POSITIONAL = typing.get_args(tyro.conf.Positional[int])[1]


def command_page() -> str:
    """Every command with its options, in the order of `moma --help`."""
    lines = [
        "# Commands\n",
        "`moma COMMAND --help` prints the same; [the commands at a glance](../commands.md) are a table.\n",
    ]
    for name in commands.COMMANDS:
        module = importlib.import_module(f"moma_jax.commands.{name}")
        lines.append(f"## moma {name}\n")
        if not hasattr(module, "SUBCOMMANDS"):
            lines += _command(getattr(module, name))
            continue
        lines += [first_line(Path(module.__file__)), ""]
        for subname, command in module.SUBCOMMANDS.items():
            lines += [f"### moma {name} {subname}\n", *_command(command)]
    return "\n".join(lines)


def _command(command: Any) -> list[str]:
    """What a command's docstring says, and its options, words without a name first."""
    text, about = _described(inspect.getdoc(command))
    hints = typing.get_type_hints(command, include_extras=True)
    rows, notes = [], []
    for name, parameter in inspect.signature(command).parameters.items():
        kind = next((each for each, _ in _dataclasses(hints[name])), None)
        if kind is None:
            rows.append(_option(name, hints[name], parameter.default, about.get(name, "")))
        else:
            default = None if parameter.default is parameter.empty else parameter.default
            rows += _options(kind, "" if _is_bare(hints[name]) else name, default, notes)
    lines = ["| option | type | default | meaning |", "|---|---|---|---|"] if rows else []
    lines += [
        "| " + " | ".join(map(_cell, row)) + " |" for row in sorted(rows, key=lambda row: row[0].startswith("`--"))
    ]
    return [text, "", *lines, "", *notes, ""]


def _options(kind: type, where: str, given: Any, notes: list[str]) -> list[tuple[str, ...]]:
    """Rows of an option class with the defaults of `given`; a config inside it becomes a note with a link."""
    if kind is config.MeshConfig:
        return [(f"`--{where}.*`", "MeshConfig", "", f"Devices along each axis: [mesh]({FIELDS}#mesh-meshconfig).")]
    hints, documented, rows = typing.get_type_hints(kind, include_extras=True), field_docs(kind), []
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], f"{where}.{field.name}".lstrip(".")
        inner = next((each for each, _ in _dataclasses(hint)), None)
        default = field.default if given is None else getattr(given, field.name)
        if inner in CONFIGS:
            notes.append(
                f"Besides, every field of [{inner.__name__}]({FIELDS}) is an option, such as `{CONFIGS[inner]}`.\n"
            )
        elif inner is not None:
            rows += _options(inner, name, default, notes)
        else:
            rows.append(_option(name, hint, default, documented.get(field.name, "")))
    return rows


def _option(name: str, hint: Any, default: Any, meaning: str) -> tuple[str, ...]:
    """A row of a table of options."""
    required = default in (inspect.Parameter.empty, dataclasses.MISSING)
    shown = "must be given" if required else "" if default == "" else f"`{_value(default)}`"
    return f"`{_word(name, hint)}`", _kind(hint), shown, meaning


def _is_bare(hint: Any) -> bool:
    """Whether the options of a class have no prefix."""
    return any(getattr(each, "name", None) == "" for each in typing.get_args(hint)[1:])


def _word(name: str, hint: Any) -> str:
    """How an option is written: `--name`, or the name that stands for a positional word."""
    extras = list(_extras(hint))
    if POSITIONAL not in extras:
        return f"--{name.replace('_', '-')}"
    return next((each.metavar for each in extras if getattr(each, "metavar", None)), name.upper())


def _extras(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) is typing.Annotated:
        yield from hint.__metadata__
        yield from _extras(hint.__origin__)


def _described(docstring: str) -> tuple[str, dict[str, str]]:
    """A docstring in Google style: its text, and what it says of each argument."""
    text, _, rest = docstring.partition("\nArgs:\n")
    text = re.split(r"\n(?:Returns|Raises):\n", text)[0].strip()
    rest = re.split(r"\n(?=\S)", rest)[0]
    return text, _by_name(rest)


def _by_name(text: str) -> dict[str, str]:
    """Indented lines `name: meaning` of a docstring, by name; two may share a meaning, as `text, image: ...`."""
    found = re.findall(r"^  (\w+(?:, \w+)*): (.*(?:\n    .*)*)", text, re.M)
    return {name: " ".join(meaning.split()) for names, meaning in found for name in names.split(", ")}


# Functions and classes ------------------------------------------------------------------------------------------------


def function_page() -> str:
    """Every public function of the package, and the two errors that they raise."""
    lines = [
        "# Functions\n",
        "`import moma_jax` gives all of these. What a newcomer needs are `recipe`, `train`, `load`.\n",
    ]
    for name in moma_jax.__all__:
        lines.append(_directive(getattr(moma_jax, name), f"moma_jax.{name}"))
    loaded = importlib.import_module("moma_jax.training.load").Loaded
    errors = importlib.import_module("moma_jax.errors")
    return "\n".join([*lines, *map(_documented_by_docstring, (loaded, errors.InputError, errors.RunError))])


def generation_page() -> str:
    """What a loaded model's `generate` takes and returns."""
    text = "`moma_jax.load(run).generate(prompts, **settings)`; how to use it: [Generating](../generating.md).\n"
    lines = [
        "# Generation\n",
        text,
        _directive(generation.generate, "generate"),
        "## Settings\n",
        _docstring(generation.Settings),
        "",
    ]
    lines += field_table(generation.Settings)
    for kind in (generation.Sampling, generation.Guidance):
        lines += [f"## {kind.__name__}\n", _docstring(kind), "", *field_table(kind)]
    return "\n".join([*lines, _documented_by_docstring(generation.Output)])


def study_page() -> str:
    """What a study file returns."""
    lines = [
        "# Studies\n",
        "A study file has `def study() -> Study`; how to use it: [Comparing architectures](../studies.md).\n",
    ]
    for kind in (studies.Study, studies.Variant, studies.Sweep, studies.Upcycled):
        lines += [f"## {kind.__name__}\n", _docstring(kind), "", *field_table(kind)]
    return "\n".join(lines)


def _directive(thing: Any, heading: str) -> str:
    """What mkdocstrings replaces by the docstring and the signature of a function or class."""
    return f"::: {thing.__module__}.{thing.__qualname__}\n    options:\n      heading: {heading}\n"


def _documented_by_docstring(kind: type) -> str:
    return _directive(kind, kind.__name__)


def _title(title: str, module: Any) -> str:
    """A page's title and its module's docstring."""
    return f"# {title}\n\n{inspect.getdoc(module)}\n\n"


def _docstring(kind: type) -> str:
    """What a class says, but for its attributes, which have a table."""
    return inspect.getdoc(kind).partition("\nAttributes:\n")[0].strip()


def _cell(text: str) -> str:
    """Text that may stand in a table's cell; what looks like a tag stays text."""
    text = re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))
    return re.sub(r"(`[^`]*`)|<", lambda found: found[1] or "&lt;", text)
