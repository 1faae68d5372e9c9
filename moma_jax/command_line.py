"""Command lines read by tyro: what is wrong is one line, and options have the defaults of what the first word names."""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import inspect
import io
import itertools
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tyro

from moma_jax.errors import InputError

Parsed = TypeVar("Parsed")


def parse(kind: type[Parsed], default: Parsed | None, words: list[str], program: str = "moma") -> Parsed:
    """Command-line words read into a dataclass; raises InputError with one line instead of printing a page."""
    return read(functools.partial(tyro.cli, kind, default=default), words, program)


def read(cli: Callable[..., Parsed], words: list[str], program: str, prog: str | None = None) -> Parsed:
    """What `cli`, tyro's own or that of a SubcommandApp, makes of the words.

    Raises:
      InputError: it cannot read them; one line, with the nearest option where one was misspelt.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return cli(args=words, prog=prog or program, config=(tyro.conf.AvoidSubcommands,))
    except SystemExit as stopped:
        if not stopped.code:  # the help page was asked for
            raise
    raise InputError(_one_line(complaint.getvalue(), program))


def bound(command: Callable[..., Any], words: list[str], program: str) -> tuple[Callable[..., Any], list[str]]:
    """A command whose options have the values of the recipe, or of the run, that the first word names.

    An option whose class has `named` gets that class's instance for the first word as its default, and if it has
    `reading` it takes the words that only it can read.

    Returns:
      (a function with the command's signature that returns a call of it, not yet made; the words that are left).
    """
    signature = inspect.signature(command)
    hints, parameters = typing.get_type_hints(command), []
    first = next(iter(words[:1]), "-")
    for parameter in signature.parameters.values():
        kind = hints[parameter.name]
        if hasattr(kind, "named"):
            asked = bool({"--help", "-h"} & set(words))
            if first.startswith("-") and not asked and kind.EXAMPLE:
                raise InputError(f"{program}: name a {parameter.name} first, such as: {program} {kind.EXAMPLE}")
            default = kind.named(None if first.startswith("-") else first)
            if hasattr(kind, "reading"):
                default, words = default.reading(words)
            parameter = parameter.replace(default=default)
        parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def call(**options: Any) -> Callable[[], Any]:
        return functools.partial(command, **options)

    call.__signature__ = signature.replace(parameters=parameters)
    return call, words


def _one_line(page: str, program: str) -> str:
    """The complaint of tyro's boxed error page, with the nearest option where one was misspelt."""
    frame = "│╭╮╰╯─ "
    lines = [line.strip(frame) if line.strip(frame + "-") else "" for line in page.splitlines()]
    help_starts = ("Available subcommands", "Perhaps you meant", "Argument helptext", "For full helptext")
    body = filter(None, lines[1:])  # the first line is the box's title
    message = " ".join(itertools.takewhile(lambda line: not line.startswith(help_starts), body))
    unknown = re.fullmatch(r"Unrecognized options: ([^\s,]+).*", message)
    if message.startswith("Expected one of"):
        return f"{program}: {message[0].lower()}{message[1:]}"
    if unknown is None:
        return message or f"cannot read the command line; see {program} --help"
    word = unknown[1]
    if commands := re.search(r"Available subcommands: (.*?) (?:Perhaps|For full)", " ".join(lines)):
        return f"{word}: no such command; {program} has {commands[1]}"
    options = re.findall(r"^--[\w.-]+", "\n".join(lines), re.MULTILINE)  # those that tyro thinks are meant
    near = max(options, key=lambda option: difflib.SequenceMatcher(None, word, option).ratio(), default=None)
    return f"{word}: no such option; " + (f"did you mean {near}?" if near else f"see {program} --help")


def first_line(path: Path) -> str:
    """The first line of a Python file's docstring; the file is not run."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return (docstring or "").partition("\n")[0]
