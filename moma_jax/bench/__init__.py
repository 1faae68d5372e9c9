"""Measurements: the training step of FFN variants and where its time goes, generation, the data pipeline, the FFN,
image tokenizers, preparing a store; and a suite of what one accelerator can tell in nine minutes.

Everything that is compared is timed in one process, in turns (first every variant once, then every variant again), so
that a slow minute of the machine hits all of them alike. Times are medians; `spread` is the interquartile range over
the median. Compilation and first calls are not timed. Ratios travel; absolute figures are those of this machine, now.
"""

import importlib

_HOME = {f"bench_{name}": name for name in ("codec", "data", "ffn", "generate", "prepare", "step", "suite")}
_HOME["format_bench"] = "report"
__all__ = sorted(_HOME)


def __getattr__(name):  # loaded when first used: each needs its own libraries
    if name not in _HOME:
        raise AttributeError(f"module 'moma_jax.bench' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moma_jax.bench.{_HOME[name]}"), name)


def __dir__():
    return __all__
