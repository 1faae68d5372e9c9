"""Recipes and studies that come with the package, called by name: quickstart, codec/corpus_f8, studies/ffn. No JAX.

The files are those of configs/: setup.py puts them into a wheel, and in a checkout they lie beside the package.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path


def folder() -> Path:
    """Where they are."""
    installed = Path(__file__).with_name("configs")
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


def recipes_in(where: Path) -> list[Path]:
    """Files in a folder and below it that define a recipe or a study, sorted; they are not run."""
    return [path for path in sorted(where.rglob("*.py")) if _defines(path, ("config", "study"))]


def name_of(path: Path) -> str:
    """What a shipped file is called."""
    return path.relative_to(folder()).with_suffix("").as_posix()


def found(path: str | Path) -> Path:
    """The path, if it exists or nothing of the package has that name; else the package's file of that name.

    A folder without a config.json is no recipe, so it does not hide one of its name.
    """
    named = folder() / f"{path}.py"
    is_name = not Path(path).is_absolute() and ".." not in Path(path).parts
    there = os.path.join(path, "config.json") if os.path.isdir(path) else path
    return named if is_name and not os.path.exists(there) and os.path.isfile(named) else Path(path)


def neighbour(file: str, name: str) -> Path:
    """A recipe that another one builds on: NAME.py in the folder of `file` or in the one above, else the package's."""
    places = [where / f"{name}.py" for where in Path(file).resolve().parents[:2]]
    return next((path for path in places if path.is_file()), folder() / f"{name}.py")


def _defines(path: Path, names: tuple[str, ...]) -> bool:
    try:
        statements = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError):
        return False
    return any(isinstance(each, ast.FunctionDef) and each.name in names for each in statements)
