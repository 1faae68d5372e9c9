"""Generation: a trained model writes text and draws pictures."""

import importlib

_HOME = {
    **dict.fromkeys(("Settings", "generate", "generate_ids"), "generating"),
    "MODES": "grammar",
    "Output": "output",
    **dict.fromkeys(("Guidance", "Sampling"), "sampling"),
}
__all__ = sorted(_HOME)


def __getattr__(name):  # loaded when first used: decoding alone needs neither pictures nor tokenizers
    if name not in _HOME:
        raise AttributeError(f"module 'moma_jax.generation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moma_jax.generation.{_HOME[name]}"), name)


def __dir__():
    return __all__
