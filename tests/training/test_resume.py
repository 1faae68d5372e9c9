"""A run that is killed at random moments ends as if nothing had happened, bit for bit."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import output, spawn
from rival_rules import RIVALS
from runs import parameters, records
from tiers import long_but
from tiny import tiny

import moma_jax
from moma_jax.routers.choice import Choice
from moma_jax.training import token_stage

KILLS, STEPS = 5, 66
AS_USERS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}
"""What users run is compiled with JAX's own settings."""


def config_of(directory, cache, steps, rule="choice"):
    rules = RIVALS | {"choice": Choice()}
    return tiny(
        directory, model_router=rules[rule],
        train_steps=steps, train_checkpoint_every=3, train_log_every=2, train_eval_every=20,
        run_compilation_cache=cache, run_tensorboard=True,
    )  # fmt: skip


def start(directory, cache):
    """A real training process, its data as slow as a bad disk so that a kill can hit any step."""
    return spawn(__file__, directory, STEPS, 0, cache, **AS_USERS)


def journal_size(directory):
    path = Path(directory) / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


@pytest.mark.parametrize("rule", long_but("choice", "deepseek", of=["choice", *RIVALS]))
def test_killed_once(tmp_path, rule):
    """Compiled as all tests are: what goes on here is what was killed there."""
    calm, killed = (config_of(tmp_path / name, None, 12, rule) for name in ("calm", "killed"))
    process = spawn(__file__, killed.run.dir, 12, 9, "", rule)
    _, err = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL, err[-3000:]
    for config in (killed, calm):
        moma_jax.train(config, quiet=True)
    assert records(killed.run.dir) == records(calm.run.dir)
    jax.tree.map(np.testing.assert_array_equal, parameters(killed.run.dir), parameters(calm.run.dir))


@pytest.mark.long
def test_killed_five_times_at_random(tmp_path):
    draw = random.Random(1)
    cache, calm, killed = tmp_path / "cache", tmp_path / "calm", tmp_path / "killed"
    undisturbed = start(calm, cache)
    output(undisturbed)
    for _ in range(KILLS):
        process, before = start(killed, cache), journal_size(killed)
        while process.poll() is None and journal_size(killed) <= before:  # steps are under way
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err[-3000:]
    last = start(killed, cache)
    assert "goes on from step" in output(last)
    assert records(killed) == records(calm)
    jax.tree.map(np.testing.assert_array_equal, parameters(killed), parameters(calm))


def main(directory, steps, killed_at=0, cache="", rule="choice"):
    """Trains; dies before batch `killed_at`, counted from 1, or leaves that to others where it is 0."""
    original = token_stage.open_stream

    def slow(*arguments, **settings):
        stream = original(*arguments, **settings)
        batches = enumerate(stream, 1)

        class Slow:
            def __iter__(self):
                return self

            def __next__(self):
                time.sleep(0.03)
                number, batch = next(batches)
                if number == int(killed_at):
                    os.kill(os.getpid(), signal.SIGKILL)
                return batch

            def close(self):
                stream.close()

        return Slow()

    token_stage.open_stream = slow
    moma_jax.train(config_of(directory, cache or None, int(steps), rule))


if __name__ == "__main__":
    main(*sys.argv[1:])
