"""`moma eval RUN --tasks`: questions with choices over pictures and text (evaluation/choices.py), and tasks of the
lm-evaluation-harness (evaluation/harness.py), on one model under one causal routing."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moma_jax.config import MeshConfig
from moma_jax.errors import InputError, RunError
from moma_jax.evaluation.choices import answer_tasks, choices_table, is_of_choices
from moma_jax.evaluation.scoring import Scorer
from moma_jax.training.load import load


def run_tasks(
    run: str,
    tasks: Sequence[str],
    routing: str = "causal",
    *,
    batch_size: int = 8,
    step: int | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    samples: bool = False,
    out: str | None = None,
    router: Any = None,
    mesh: MeshConfig | None = None,
) -> dict[str, Any]:
    """Runs tasks on a run, and writes the results to the new file `out`, whole or not at all.

    Args:
      tasks: "captions", "pictures", or .jsonl files, as of `answer_tasks`; all others as of `harness.evaluate_tasks`.
        Names may be joined by commas.
      routing: "causal" or "threshold". batch_size: documents at a time. step: which checkpoint; None: the newest.
      num_fewshot: of the harness's tasks. limit: questions of each task.
      samples: whether every document's answers are among the results.
      router: the run's own routing rule, where it was trained with one. mesh: devices to lay the model on; both as of
        `moma_jax.load`.

    Returns:
      What `answer_tasks` returns, under "choices", where there are such tasks, and all that `evaluate_tasks` returns,
      where there are others.

    Raises:
      InputError: as these, or `out` cannot be written. RunError: what the harness says of its tasks and their data.
    """
    path = None if out is None else Path(out)
    if path is not None:
        _require_free(path)
    names = [name for task in tasks for name in ([task] if os.path.exists(task) else task.split(",")) if name]
    own = [name for name in names if is_of_choices(name)]
    others = [name for name in names if not is_of_choices(name)]
    if limit is not None and limit < 1:
        raise InputError(f"--limit: {limit} questions of a task; give 1 or more")
    if own and not others and num_fewshot is not None:
        raise InputError(f"--num-fewshot: {own[0]} has no examples to show; it goes with tasks of the harness")
    evaluate = _harness() if others else None
    loaded = load(run, step=step, router=router, mesh=mesh)
    results: dict[str, Any] = {}
    if own:
        scorer = Scorer(loaded, routing, batch_rows=batch_size)
        results["choices"] = answer_tasks(loaded, own, scorer, limit=limit, samples=samples)
    if others:
        options = {"num_fewshot": num_fewshot, "limit": limit, "log_samples": samples}
        results |= evaluate(loaded, others, routing, batch_size, **options)
    if path is not None:
        partial = path.with_name(f".{path.name}.writing")
        try:
            partial.write_text(as_json(results, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise InputError(f"--out: {path}: cannot be written: {error.strerror}") from error
    return results


def _harness():
    """Runs tasks of the harness; InputError where that is not installed."""
    try:
        from moma_jax.evaluation import harness
    except ImportError as error:
        raise InputError(str(error)) from error

    def evaluate(loaded, names, routing, batch_size, **options):
        try:
            return harness.evaluate_tasks(harness.MomaLM(loaded, routing, batch_size), names, **options)
        except (InputError, RunError):
            raise
        except (ValueError, RuntimeError) as error:
            raise RunError(f"{type(error).__name__}: {error}") from error

    return evaluate


def as_json(results: dict[str, Any], indent: int | None = None) -> str:
    """Results as JSON; what the harness puts among them that is none, as it writes it itself."""

    def plain(value: Any) -> Any:
        from lm_eval.utils import handle_non_serializable

        return handle_non_serializable(value)

    return json.dumps(results, indent=indent, default=plain, ensure_ascii=False)


def show(results: dict[str, Any]) -> None:
    """Prints results as tables."""
    from rich.console import Console

    if "choices" in results:
        Console(width=max(Console().width, 110)).print(choices_table(results["choices"]))
    if "results" in results:
        from lm_eval.utils import make_table

        print(make_table(results))


def _require_free(out: Path) -> None:
    """InputError where the results cannot be written."""
    if not out.parent.is_dir():
        raise InputError(f"--out: {out}: no such folder; make it first")
    if out.exists():
        raise InputError(f"--out: {out} is {'a folder' if out.is_dir() else 'there already'}; name a new file")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise InputError(f"--out: {out.parent} cannot be written to; choose another folder")
