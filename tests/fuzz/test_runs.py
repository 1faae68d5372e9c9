"""Damaged files of a run: config, records, status, summary, thresholds, a checkpoint's cursor and plain values."""

import json
import os
import random
import re

import numpy as np
import pytest
from mutations import COUNTS, damaged, mutants, mutated, replacing, require_refusals, written
from small_stores import drawn_config

import moma_jax
from moma_jax.checks import resolve
from moma_jax.commands.show import format_glance, glance
from moma_jax.data.stream import open_stream
from moma_jax.page.reading import read_seen
from moma_jax.page.write import page
from moma_jax.runs.checkpoint import Checkpoints, pack_arrays, unpack_arrays
from moma_jax.runs.directory import RunDir
from moma_jax.runs.journal import METRICS, FileSink
from moma_jax.runs.resume import require_resumable
from moma_jax.training import load as load_lib
from moma_jax.training.load import THRESHOLDS, config_of


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """That of a run on drawn scenes, calibrated."""
    config = drawn_config(tmp_path_factory.mktemp("fuzz"), eval_every=2)
    moma_jax.train(config, quiet=True)
    moma_jax.calibrate(config.run.dir, batches=1)
    return config


@pytest.fixture
def file(config):
    """Reads a file of the run, and puts others in its place; it is there again after the test."""
    with replacing(config.run.dir) as replaced:
        yield replaced


def seen(run):
    """What commands show of a run, as terminals and files take it."""
    format_glance(glance(run)).encode(errors="backslashreplace")
    page(run, [read_seen(run)])


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["config.json", "status.json", "summary.json"])
def test_files_of_a_run(config, file, name, count):
    def use(content):
        file(name, content)
        seen(config.run.dir)
        resolve(config_of(config.run.dir))
        require_resumable(config)

    use(file(name))
    require_refusals(use, mutants(file(name), count))


def with_one_damaged(content, count):
    """A file of records, in each of which one record is damaged, or the whole of them."""
    lines = content.splitlines(keepends=True)
    damaged = [iter(mutants(line, count, seed)) for seed, line in enumerate(lines)]
    for n in range(count):
        k = n % (len(lines) + 1)
        if k == len(lines):
            yield mutated(content, random.Random(n))
        else:
            yield b"".join((*lines[:k], next(damaged[k]) + b"\n", *lines[k + 1 :]))


@pytest.mark.parametrize("count", COUNTS)
def test_records(config, file, count):
    def use(content):
        file(METRICS, content)
        moma_jax.read_metrics(config.run.dir)
        seen(config.run.dir)
        FileSink(RunDir(config.run.dir), 3).close()

    use(file(METRICS))
    unsummed = re.sub(rb', "crc32c": "\w+"', b"", file(METRICS))  # what is damaged is to be looked at, not only noticed
    require_refusals(use, with_one_damaged(unsummed, count))


def repacked(content, count):
    """Cursors whose numbers are damaged, within arrays of the right form or not."""
    cursor, chance = unpack_arrays(json.loads(content)), random.Random(1)
    plain = {name: value.tolist() for name, value in cursor.items()}
    for _ in range(count):
        found = damaged(plain, chance)
        packed = {}
        for name, value in found.items() if isinstance(found, dict) else ():
            try:
                packed[name] = pack_arrays(np.array(value, cursor[name].dtype))
            except (KeyError, ValueError, TypeError, OverflowError):
                packed[name] = value
        yield written(packed)


@pytest.mark.parametrize("count", COUNTS)
def test_cursors(config, file, count):
    (name,) = (name for name in os.listdir(f"{config.run.dir}/checkpoints"))
    name = f"checkpoints/{name}/cursor/metadata"

    def use(content):
        file(name, content)
        with Checkpoints(RunDir(config.run.dir)) as checkpoints:
            cursor = checkpoints.saved(checkpoints.latest()).cursor
        with open_stream(config, cursor=cursor) as stream:
            next(stream)

    use(file(name))
    require_refusals(use, mutants(file(name), count))
    require_refusals(use, repacked(file(name), count))


@pytest.mark.parametrize("count", COUNTS)
def test_thresholds(config, file, count):
    """Of a model that was loaded once: only what lies beside its checkpoint is read anew."""
    model = moma_jax.load(config.run.dir)

    def use(content):
        file(THRESHOLDS, content)
        load_lib._calibrated(RunDir(config.run.dir), model.step, model.params, model.routing_state, model.program)

    use(file(THRESHOLDS))
    require_refusals(use, mutants(file(THRESHOLDS), count))


@pytest.mark.parametrize("count", COUNTS)
def test_plain_values_of_a_checkpoint(config, file, count):
    (step,) = os.listdir(f"{config.run.dir}/checkpoints")
    name = f"checkpoints/{step}/meta/metadata"

    def use(content):
        file(name, content)
        require_resumable(config)

    use(file(name))
    require_refusals(use, mutants(file(name), count))
