"""Measurements: the training step of FFN variants and where its time goes, generation, the data pipeline, the FFN,
image tokenizers, preparing a store.

Everything that is compared is timed in one process, in turns (first every variant once, then every variant again), so
that a slow minute of the machine hits all of them alike. Times are medians; `spread` is the interquartile range over
the median. Compilation and first calls are not timed. Ratios travel; absolute figures are those of this machine, now.
"""

from moma_jax.bench.codec import bench_codec
from moma_jax.bench.data import bench_data
from moma_jax.bench.ffn import bench_ffn
from moma_jax.bench.generate import bench_generate
from moma_jax.bench.prepare import bench_prepare
from moma_jax.bench.report import format_bench
from moma_jax.bench.step import bench_step

__all__ = ["bench_codec", "bench_data", "bench_ffn", "bench_generate", "bench_prepare", "bench_step", "format_bench"]
