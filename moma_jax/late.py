"""JAX, imported when first used: routing rules are part of a config, and configs are read without JAX."""

from __future__ import annotations

import importlib
from typing import Any


class _Late:
    """Stands for a module until an attribute of it is asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


jax, jnp = _Late("jax"), _Late("jax.numpy")
