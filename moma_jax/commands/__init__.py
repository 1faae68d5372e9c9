"""The commands of `moma`. A file here is one command: the function of its name, or several that SUBCOMMANDS names.

Commands are shells over the package's functions. What their options mean stands in their docstrings, from which tyro
makes the help pages; the first line of a file is its line on the page of all commands.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.extras import SubcommandApp

from moma_jax import command_line
from moma_jax.config import MeshConfig

COMMANDS = (
    *("codec", "prepare", "train", "eval", "generate", "routers", "upcycle", "study"),
    *("convert", "cost", "plan", "bench", "show", "verify", "recipes", "doctor"),
)
"""In the order of the help page."""
ALIASES = {"fit-routers": ["routers", "fit"]}

Run = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
"""A run directory."""
DEVICES = MeshConfig()
"""What `--mesh` is where nothing is said."""


def run(words: list[str]) -> Any:
    """Runs the command that the words name, which alone is imported; returns what it returns.

    Raises:
      InputError: there is no such command or option, a value cannot be read, or the command refuses.
    """
    return parsed(words)()


def parsed(words: list[str]) -> Callable[[], Any]:
    """The call that the words ask for, not yet made; raises InputError where they cannot be read."""
    words = [*ALIASES.get(words[0], words[:1]), *words[1:]] if words else ["--help"]
    program, app = "moma", SubcommandApp()
    for name in COMMANDS:
        app.command(_another, name=name, help=command_line.first_line(Path(__file__).with_name(f"{name}.py")))
    if words[0] in COMMANDS:
        program, command, words = _command(words)
        app.command(command, name=program.split()[1])
    return command_line.read(functools.partial(app.cli, description=""), words, program, prog="moma")


def _command(words: list[str]) -> tuple[str, Callable[..., Any] | SubcommandApp, list[str]]:
    """(its whole name, the command or subcommands with its defaults in place, the words that are left for tyro)."""
    name, *rest = words
    module = importlib.import_module(f"{__name__}.{name}")
    if not hasattr(module, "SUBCOMMANDS"):
        command, rest = command_line.bound(getattr(module, name), rest, f"moma {name}")
        return f"moma {name}", command, [name, *rest]
    group, program = SubcommandApp(), f"moma {name}"
    group.__doc__ = module.__doc__
    for subname, command in module.SUBCOMMANDS.items():
        line = command.__doc__.partition("\n")[0]
        if rest[:1] == [subname]:
            program, line = f"moma {name} {subname}", None
            command, left = command_line.bound(command, rest[1:], program)
            words = [name, subname, *left]
        group.command(command, name=subname, help=line)
    return program, group, words


def _another() -> None:
    """A command that is listed and not run."""


def print_result(result: dict[str, Any], as_json: bool, text: Callable[[dict[str, Any]], str]) -> None:
    """Prints what a command found, as JSON or as text for people."""
    print(json.dumps(result, allow_nan=False) if as_json else text(result), end="\n" if as_json else "")


def print_list(rows: list[dict[str, str]], as_json: bool) -> None:
    """Prints names and what they are, as JSON or in two columns."""
    width = max((len(row["name"]) for row in rows), default=0)
    print(json.dumps(rows) if as_json else "\n".join(f"{row['name']:{width}}  {row['about']}".rstrip() for row in rows))
