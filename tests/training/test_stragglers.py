"""Waiting for data: how long is in every record, and of several hosts the one that holds the others up is named."""

import json
import re
import sys
import time

import pytest
from loopback import Processes, config_of
from loopback import main as train_as_one_of_several
from runs import changed_batches
from tiny import tiny

import moma_jax
from moma_jax.training import token_stage
from moma_jax.training.metrics import Stragglers

SLEEP = 0.8


def waits(*seconds, of=100.0):
    return [(f"worker-{p}", each, of) for p, each in enumerate(seconds)]


@pytest.mark.parametrize(
    ("seconds", "line"),
    [
        ((2, 2, 1, 40), "host 3 (worker-3) waits for data: 40% of its time; others 2%"),
        ((0, 30), "host 1 (worker-1) waits for data: 30% of its time; others 0%"),
        ((40, 2, 60, 2, 2),
         "host 2 (worker-2) waits for data: 60% of its time; host 0 (worker-0) waits for data: 40% of its time; "
         "others 2%"),
        ((4, 0, 0, 0), None),  # too little to matter
        ((30, 31, 29, 60), None),  # all are slow: it is not one host
        ((6, 3, 3, 3), None),
        ((90,), None),  # nobody waits for the only one
    ],
)  # fmt: skip
def test_a_host_that_holds_the_others_up_is_named(seconds, line):
    assert Stragglers().told(waits(*seconds)) == line


def test_it_is_named_when_it_begins_and_a_moment_is_nothing():
    stragglers = Stragglers()
    assert stragglers.told(waits(0.5, 0, of=1.0)) is None, "half a second"
    assert stragglers.told(waits(40, 0)) and stragglers.told(waits(50, 0)) is None
    assert "host 1" in stragglers.told(waits(0, 50))
    assert stragglers.told(waits(0, 0)) is None and "host 1" in stragglers.told(waits(0, 50))


def test_every_train_record_has_the_time_that_was_waited_since_the_last(tmp_path, monkeypatch):
    def slow(number, batch):
        time.sleep(0.2 * (number in (3, 4)))
        return batch

    changed_batches(monkeypatch, slow)
    moma_jax.train(tiny(tmp_path, train_eval_sets=()), quiet=True)
    train = [r for r in moma_jax.read_metrics(str(tmp_path)) if r["kind"] == "train"]
    waited = [record["data_wait_seconds"] for record in train]
    assert [record["step"] for record in train] == [2, 4, 6]
    assert 0.4 <= waited[1] < 2 * train[1]["step_seconds"]
    assert sum(waited) == pytest.approx(train[-1]["spent_data"])


@pytest.mark.slow
def test_two_processes_of_which_one_reads_slowly(tmp_path):
    config = config_of(tmp_path, "slow", mesh_data=2, train_steps=6, train_log_every=2, train_eval_sets=())
    codes, outputs = Processes(config, 2, script=__file__).ended()
    assert codes == [0, 0], outputs
    events = [r["event"] for r in moma_jax.read_metrics(config.run.dir) if r["kind"] == "event"]
    named = [event for event in events if "waits for data" in event]
    assert len(named) == 1 and re.fullmatch(r"host 1 \(.+\) waits for data: \d+% of its time; others \d+%", named[0])


class Slow:
    """A stream from a bad disk."""

    def __init__(self, stream):
        self._stream = stream

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(SLEEP)
        return next(self._stream)

    def close(self):
        self._stream.close()


if __name__ == "__main__":
    content, blow = json.loads(sys.argv[1])
    if content["hosts"]["index"] == 1:
        original = token_stage.open_stream
        token_stage.open_stream = lambda *words, **more: Slow(iter(original(*words, **more)))
    train_as_one_of_several(content, blow)
