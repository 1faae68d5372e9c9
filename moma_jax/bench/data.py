"""The data pipeline: planning, reading, assembling batches. No device takes part."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from moma_jax.bench.timing import say
from moma_jax.checks import resolve
from moma_jax.config import Config
from moma_jax.data.memory import loader_bytes
from moma_jax.data.stream import open_stream
from moma_jax.errors import InputError

SECONDS_TO_FILL = 3.0
"""In which data.prefetch batches are made, so that memory is what it is in training."""


def bench_data(config: Config, *, seconds: float = 10.0) -> dict[str, Any]:
    """Speed of the config's data pipeline on this machine, from its stores (or its synthetic tokens).

    Batches are taken as fast as they come, for `seconds`, after a first one that is not counted; so caches are as warm
    as a run's are.

    Args:
      config: what is trained; only its data and batch sizes matter.
      seconds: how long to measure.

    Returns:
      {"tokens_per_second" (real tokens, padding apart, by the clock), "tokens_per_second_per_core" (by the CPU time
      that this process used, all threads together), "cores_used", "fill" (share of positions that are real tokens),
      "tokens": {modality: count}, "batches", "seconds", "host_bytes" (by which the process grew),
      "host_bytes_bound" (at most, by what they are for: `data.memory.loader_bytes`), ...}.

    Raises:
      InputError: a store is missing, empty or of another vocabulary.
    """
    config = resolve(config)
    _require_stores(config)
    say(f"data: {config.train.batch_rows} rows of {config.data.sequence} to a batch, for {seconds:g} s")
    before = most = _resident()
    with open_stream(config) as stream:
        next(stream)
        tokens_M = np.zeros(len(config.data.modalities), np.int64)
        batches, wall, busy = 0, time.perf_counter(), time.process_time()
        counting = 0.0  # what this measurement itself costs
        while not batches or time.perf_counter() - wall < seconds:
            batch = next(stream).batch
            start = time.perf_counter()
            modality_N = batch.modality_BS[batch.segment_BS > 0]
            tokens_M += np.bincount(modality_N, minlength=len(tokens_M))
            most = max(most, _resident())
            counting += time.perf_counter() - start
            batches += 1
        wall, busy = time.perf_counter() - wall - counting, time.process_time() - busy - counting
        time.sleep(min(seconds, SECONDS_TO_FILL))  # as before a loop that is slower than reading
        most = max(most, _resident())
    return _figures(config, tokens_M, batches, wall, busy) | {
        "host_bytes": most - before,
        "host_bytes_bound": loader_bytes(config),
    }


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else 0


def _figures(config: Config, tokens_M: np.ndarray, batches: int, wall: float, busy: float) -> dict[str, Any]:
    tokens = int(tokens_M.sum())
    return {
        "bench": "data",
        "tokens_per_second": tokens / wall,
        "tokens_per_second_per_core": tokens / busy,
        "cores_used": busy / wall,
        "cores": os.cpu_count(),
        "fill": tokens / (batches * config.batch_tokens),
        "tokens": {m.name: int(count) for m, count in zip(config.data.modalities, tokens_M, strict=True)},
        "batches": batches,
        "batch_tokens": config.batch_tokens,
        "seconds": wall,
        "stores": [dataclasses.asdict(store) for store in config.data.stores] if config.data.kind == "store" else [],
    }


def _require_stores(config: Config) -> None:
    """Raises InputError with the command that makes the first missing store."""
    for store in config.data.stores if config.data.kind == "store" else ():
        if "://" not in store.path and not os.path.exists(os.path.join(store.path, "manifest.json")):
            source = config.data.prepare.source if config.data.prepare else "SOURCE"
            raise InputError(
                f"data.stores: {store.name} is not at {store.path}; make it with `moma prepare {source} --out "
                f"{store.path}`, or measure random tokens with --data.kind synthetic"
            )
