"""What tests ask of runs, and do to them."""

import dataclasses

import jax

import moma_jax
from moma_jax.routers.choice import best_of
from moma_jax.training import token_stage

TIMINGS = {"time", "wall_seconds", "seconds", "step_seconds", "data_wait_seconds", "tokens_per_second", "mfu"}


def records(run):
    """A run's records without what clocks say, and without those of saves, which stand where the clock has them."""
    timed = lambda name: name in TIMINGS or name.startswith("spent_")  # noqa: E731
    return [
        {k: v for k, v in r.items() if not timed(k)} for r in moma_jax.read_metrics(run) if r["kind"] != "checkpoint"
    ]


def parameters(run):
    return jax.device_get(moma_jax.load(str(run)).params)


def changed_batches(monkeypatch, change):
    """Makes the loop's stream hand out change(number, batch), numbered from 1 in this process."""
    original = token_stage.open_stream

    class Changed:
        def __init__(self, stream):
            self.stream, self.number = stream, 0

        def __iter__(self):
            return self

        def __next__(self):
            packed = next(self.stream)
            self.number += 1
            return dataclasses.replace(packed, batch=change(self.number, packed.batch))

        def close(self):
            self.stream.close()

    monkeypatch.setattr(token_stage, "open_stream", lambda *a, **k: Changed(iter(original(*a, **k))))


def my_choice(score, eligible_T, quota, state, key):
    return best_of(score, eligible_T, quota), jax.tree.map(lambda n: n + 1, state), {"pull": score.logit_TE.mean() ** 2}
