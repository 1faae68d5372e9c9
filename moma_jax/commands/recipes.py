"""List recipes and studies by name, or copy one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import tyro

from moma_jax import shipped
from moma_jax.command_line import first_line
from moma_jax.commands import print_list
from moma_jax.errors import InputError
from moma_jax.storage.directory import require_new_file, write_file


def recipes(
    folder: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="[FOLDER]")]] = None,
    copy: tuple[str, str] | None = None,
    json: bool = False,
) -> None:
    """List the recipes and studies that come with the package, by the names that other commands take, with the first
    lines of their docstrings. They are not run.

    Args:
      folder: List those in this folder and below it instead.
      copy: The name of one, and a new file that is to be a copy of it: --copy quickstart mine.py.
      json: Print JSON.
    """
    if copy is not None:
        return _copy(*copy)
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder; name one with recipes, or none for those of the package")
    found = shipped.recipes_in(shipped.folder() if folder is None else Path(folder))
    name_of = shipped.name_of if folder is None else str
    print_list([{"name": name_of(path), "about": first_line(path)} for path in found], json)


def _copy(name: str, out: str) -> None:
    path = shipped.found(name)
    if not os.path.isfile(path):
        raise InputError(f"--copy: there is no recipe {name}; moma recipes lists them")
    require_new_file("--copy", out)
    write_file(out, path.read_bytes())
    print(out)
