"""The host memory of the stream of batches: its bound is what is counted, and above what a process is seen to take."""

import dataclasses
import json
import os
import sys
import time
import tracemalloc

import numpy as np
import pytest
from paths import ROOT
from processes import output, spawn
from small_stores import drawn_config
from tiny import tiny

from moma_jax.config_json import to_json
from moma_jax.data import memory
from moma_jax.data.assembly import assemble
from moma_jax.data.memory import loader_bytes
from moma_jax.data.stream import open_stream
from moma_jax.data.synthetic import Synthetic
from moma_jax.training.pretrain import prepare_missing_stores


@pytest.mark.parametrize(("prefetch", "threads"), [(1, 4), (4, 1), (9, 4)])
def test_no_more_batches_are_made_than_the_bound_counts(prefetch, threads, monkeypatch):
    made, original = [], Synthetic.packed
    monkeypatch.setattr(Synthetic, "packed", lambda self, plan: (made.append(plan), original(self, plan))[1])
    with open_stream(tiny(data_prefetch=prefetch, data_read_threads=threads)) as stream:
        for taken in range(1, 4):
            next(stream)  # which the loop has in hand while it asks for the next
            time.sleep(0.2)
            assert len(made) - taken + 1 <= prefetch + memory.BESIDE_PREFETCH
    assert len(made) - 3 >= prefetch, "it does read ahead"


def test_a_position_takes_what_the_bound_says():
    rows, sequence, piece = 32, 1024, 128
    count = rows * sequence // piece
    tokens = [np.zeros(piece + 1, np.uint16) for _ in range(count)]
    weights = [np.ones(piece + 1, np.float32) for _ in range(count)]
    row_N = np.repeat(np.arange(rows), sequence // piece)
    tracemalloc.start()
    batch = assemble(tokens, np.full(count, piece), row_N, rows, sequence, 0, np.zeros(1, np.int8), weights)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(x.nbytes for x in batch) == memory.POSITION * rows * sequence
    assert most <= memory.ASSEMBLING * rows * sequence


def test_the_bound_follows_its_settings(tmp_path):
    config = drawn_config(tmp_path)
    prepare_missing_stores(config, progress=False)
    before = loader_bytes(config)
    assert before["total"] == sum(size for name, size in before.items() if name != "total")
    parts = {"prefetch": "batches", "read_threads": "assembling", "cache_bytes": "cache", "read_concurrency": "reading"}
    for field, part in parts.items():
        value = getattr(config.data, field) + 7
        after = loader_bytes(dataclasses.replace(config, data=dataclasses.replace(config.data, **{field: value})))
        assert {name for name in before if before[name] != after[name]} == {part, "total"}
    assert loader_bytes(config, hosts=2)["batches"] == before["batches"] // 2
    assert loader_bytes(tiny()).keys() == {"batches", "assembling", "total"}


@pytest.mark.slow
def test_a_process_that_reads_stays_below(tmp_path):
    """`moma bench data` in a process of its own, with batches large enough to be seen."""
    config = drawn_config(tmp_path)
    prepare_missing_stores(config, progress=False)
    grown = {}
    for prefetch in (1, 24):
        data = dataclasses.replace(config.data, prefetch=prefetch)
        rows = 512 * config.data.group_rows
        large = dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, batch_rows=rows))
        (tmp_path / "config.json").write_text(json.dumps(to_json(large)))
        words = ("-m", "moma_jax", "bench", "data", tmp_path / "config.json", "--seconds", "3", "--json")
        found = json.loads(output(spawn(*words, cwd=ROOT, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))))
        assert found["host_bytes"] <= found["host_bytes_bound"]["total"]
        grown[prefetch] = found["host_bytes"]
    batches = 23 * memory.POSITION * large.batch_tokens
    assert grown[24] - grown[1] > batches / 8, "what is read ahead is seen; a slow machine has not all of it in time"
