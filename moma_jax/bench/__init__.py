"""Measurements: the training step of FFN variants and where its time goes, generation, the data pipeline, the FFN,
image tokenizers, preparing a store; and a suite of what one accelerator can tell in nine minutes.

Everything that is compared is timed in one process, in turns (first every variant once, then every variant again), so
that a slow minute of the machine hits all of them alike. Times are medians; `spread` is the interquartile range over
the median. Compilation and first calls are not timed. Ratios travel; absolute figures are those of this machine, now.
"""

from moma_jax.late import attributes

_HOME = {
    f"bench_{name}": f"moma_jax.bench.{name}"
    for name in ("codec", "data", "ffn", "generate", "prepare", "step", "study", "suite")
}
_HOME["format_bench"] = "moma_jax.bench.report"
__all__ = sorted(_HOME)
__getattr__ = attributes(__name__, _HOME)  # each needs its own libraries


def __dir__():
    return __all__
