"""Held-out losses of a run, or lm-evaluation-harness tasks."""

from __future__ import annotations

import dataclasses
import json as as_json
from dataclasses import dataclass
from typing import Annotated

import tyro

import moma_jax
from moma_jax.commands import DEVICES, Run
from moma_jax.config import MeshConfig
from moma_jax.errors import InputError


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are run."""

    batch_size: int = 8
    """With --tasks: documents at a time."""
    step: int | None = None
    """With --tasks: which checkpoint; the newest where None."""
    num_fewshot: int | None = None
    """With --tasks of the harness: examples in the context; what the task says where None."""
    limit: int | None = None
    """With --tasks: only the first documents of each task, for a trial."""
    samples: bool = False
    """With --tasks: write every document's answers to --out too."""
    out: str | None = None
    """With --tasks: new file for the results, JSON."""


def eval(
    run: Run,
    routing: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    options: Annotated[TaskOptions, tyro.conf.arg(name="", help="")] = TaskOptions(),
    mesh: MeshConfig = DEVICES,
    router: str | None = None,
    json: bool = False,
) -> None:
    """Held-out losses of a run under several routings, beside those of a unigram model; or tasks under a causal
    routing: which caption or picture fits, questions of one's own, EleutherAI's lm-evaluation-harness.

    Args:
      run: Run directory.
      routing: Routings to evaluate under: choice (as in training, sees the future), causal (auxiliary routers),
        threshold (running thresholds); all that the run has where none is named. With --tasks: one, causal where none
        is named.
      tasks: captions, pictures: which of 8 fits, of the run's held-out pairs; FILE.jsonl: questions with choices. Or
        the harness's tasks (pip install 'moma_jax[evals]'), also joined by commas; "paper" for the paper's eight;
        folders of task files.
      mesh: Devices to lay the model on.
      router: The run's own routing rule, FILE.py:ATTRIBUTE, where it was trained with one.
      json: Print JSON.
    """
    if tasks:
        if len(routing) > 1:
            raise InputError("--tasks: run under one --routing")
        from moma_jax.evaluation.tasks import as_json as tasks_json
        from moma_jax.evaluation.tasks import run_tasks, show

        results = run_tasks(run, tasks, *routing, router=router, mesh=mesh, **dataclasses.asdict(options))
        print(tasks_json(results)) if json else show(results)
        return
    if options != TaskOptions():
        raise InputError(f"--{_given(options)}: goes with --tasks")
    from rich.console import Console

    from moma_jax import hosts
    from moma_jax.evaluation.tables import evaluation_tables
    from moma_jax.runs.journal import finite

    result = finite(moma_jax.evaluate(run, routing=routing, mesh=mesh, router=router))
    if hosts.is_first():
        print(as_json.dumps(result, allow_nan=False)) if json else Console().print(*evaluation_tables(result))


def _given(options: TaskOptions) -> str:
    """The first option that was given."""
    fields = dataclasses.fields(options)
    return next(f.name for f in fields if getattr(options, f.name) != f.default).replace("_", "-")
