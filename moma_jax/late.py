"""What is imported when first used: JAX, as routing rules are part of a config and configs are read without it,
pyarrow, and what packages offer under names of their own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


class _Late:
    """Stands for a module until an attribute of it is asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


jax, jnp = _Late("jax"), _Late("jax.numpy")
pa, pq = _Late("pyarrow"), _Late("pyarrow.parquet")


def attributes(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__` that finds names in modules, by name in full, which are loaded then."""

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return find
