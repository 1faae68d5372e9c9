"""List the recipes of a folder."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated

import tyro

from moma_jax.command_line import first_line
from moma_jax.commands import print_list
from moma_jax.errors import InputError


def recipes(
    folder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FOLDER")]] = "configs", json: bool = False
) -> None:
    """List the recipes in a folder and below it, with the first lines of their docstrings. They are not run.

    Args:
      folder: Where to look.
      json: Print JSON.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder; name one with recipes, such as configs")
    found = [path for path in sorted(Path(folder).rglob("*.py")) if _is_recipe(path)]
    print_list([{"name": str(path), "about": first_line(path)} for path in found], json)


def _is_recipe(path: Path) -> bool:
    """Whether a file defines `config`."""
    try:
        statements = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError):
        return False
    return any(isinstance(each, ast.FunctionDef) and each.name == "config" for each in statements)
