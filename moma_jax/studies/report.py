"""`moma study STUDY.py --report`: what the finished runs of a study say, as Markdown, figures, CSV and Parquet.

Only what run directories hold is read: status.json, summary.json, metrics.jsonl, config.json and ancestry.json. So a
report can be made while runs go on, on another machine than theirs, and of runs that no study began.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moma_jax.cost import flops_per_token
from moma_jax.errors import InputError
from moma_jax.runs.directory import RunDir
from moma_jax.runs.journal import finite
from moma_jax.storage.directory import Directory, first_line
from moma_jax.studies.comparison import (
    Compared,
    Decided,
    Finished,
    decided,
    final_losses,
    grouped,
    losses,
    modalities,
    power_laws,
    require_comparable,
    speedups,
)
from moma_jax.studies.curves import Measure, Run, read_run
from moma_jax.studies.figures import draw, figure_names
from moma_jax.studies.jobs import Job, require_same_config, state
from moma_jax.studies.records import read_record, write_run
from moma_jax.studies.report_text import parameters_of, report_text
from moma_jax.studies.study import Study
from moma_jax.studies.sweep import settled_jobs

FORMAT_VERSION = 1
RESULT = "report.json"
PLACES = ("run", "variant", "size", "budget", "seed")
AXES = ("step", "tokens", "flops", "seconds")


Page = Callable[[Study, list[Run], Finished], bytes]
"""What makes a further file of a report from the study, its runs, and the finished ones."""


def write_report(study: Study, out: str, added: dict[str, str], pages: Mapping[str, Page] = {}) -> dict[str, Any]:
    """Compares the finished runs of a study with its baseline (paper section 9) and writes a report of it.

    Args:
      study: its runs are where `jobs(study)` says; those that are missing or unfinished are listed as such.
      out: the report's directory, new, empty, or one that holds an earlier report of this study, whose files are
        replaced one by one, each whole.
      added: further runs by the variant's name that they get, directories or records (`studies.records`); several of
        one name, of different seeds, with commas between their paths.
      pages: further files by name.

    Returns:
      The content of report.json: "study" (where the runs are), "baseline", "runs" and "finished" (counts), "final"
      (means of final losses), "verdicts" (`Verdict`, by loss and modality) and "speedups" (`Speedup`), as plain values.

    Raises:
      InputError: no baseline run is finished; budgets or data differ; a run of the study has another config than the
        study says; an added run is not there; a file is damaged or of another format; or `out` holds something else.
        Nothing of the report was written then; records of runs whose directories are missing are unpacked.
    """
    _require_ours(RunDir(out), study)
    runs, finished = compared_runs(study, added)
    verdicts, compared, laws = decided(finished), speedups(finished), power_laws(finished, study.tolerance)
    result = _result(study, runs, finished, verdicts, compared)
    figures = {name: draw(finished, size, axis) for (size, axis), name in figure_names(finished).items()}
    tables = {"runs.csv": _csv(runs, finished), "curves.parquet": _parquet(runs)}
    text = report_text(study, runs, finished, verdicts, compared, laws)
    further = {name: make(study, runs, finished) for name, make in pages.items()}
    home = Directory(out)  # a RunDir's `write` asks for devices, which a run may hold
    home.write_json(RESULT, finite(result))  # first: by it a directory is known as ours
    for name, content in (figures | tables | {"report.md": text.encode()} | further).items():
        home.write(name, content)
    return result


def _require_ours(home: RunDir, study: Study) -> None:
    """InputError where the directory holds anything but an earlier report of the study."""
    before = home.read_json(RESULT)
    try:
        held = home.names("")
    except ValueError as error:
        raise InputError(f"--out: {home.path} is no directory ({first_line(error)}); choose another one") from error
    if before is None and held:
        raise InputError(f"--out: {home.path} is not empty and holds no report; choose another directory")
    ours = {"format_version": FORMAT_VERSION, "study": study.dir}
    if before is not None and {name: before.get(name) for name in ours} != ours:
        raise InputError(f"--out: {home.path} holds a {RESULT} that is not of this study; choose another directory")


# Runs -----------------------------------------------------------------------------------------------------------------


def compared_runs(study: Study, added: dict[str, str]) -> tuple[list[Run], Finished]:
    """Every run of a study and those that are added to it, and the finished ones; raises as `write_report`."""
    wanted = settled_jobs(study)
    runs = _study_runs(study, wanted) + _added_runs(study, wanted, added)
    finished = grouped(runs, study.baseline)
    require_comparable(finished, study.tolerance)
    return runs, finished


def _study_runs(study: Study, wanted: list[Job]) -> list[Run]:
    """Every run that the study wants, begun or not, by size and variant."""
    found = []
    for job in sorted(wanted, key=lambda job: (list(study.sizes).index(job.size), _order(study, job.variant))):
        run = read_run(job.variant, job.size, job.seed, job.config.run.dir)
        if run.config and not job.waits:
            require_same_config(run.config, job.config, run.path)
        run = dataclasses.replace(run, budget=job.budget)
        found.append(run if run.finished else dataclasses.replace(run, **state(job)))
    return found


def _order(study: Study, variant: str) -> int:
    """The baseline first, then the study's order."""
    names = [v.name for v in study.variants]
    return -1 if variant == study.baseline else names.index(variant)


def _added_runs(study: Study, wanted: list[Job], added: dict[str, str]) -> list[Run]:
    found: list[Run] = []
    for name, paths in added.items():
        if name in [v.name for v in study.variants]:
            raise InputError(f"--add: {name} is a variant of the study; give the added run another name")
        for path in paths.split(","):
            run = _read_added(name, path)
            if not run.curves:
                raise InputError(f"--add: {path} has no metrics; give a run that has trained")
            if any((run.variant, run.seed) == (other.variant, other.seed) for other in found):
                raise InputError(f"--add: two runs of {name} have the seed {run.seed}; give runs of different seeds")
            found.append(dataclasses.replace(run, size=_size_of(study, wanted, run)))
    return found


def _read_added(name: str, path: str) -> Run:
    """A run directory, or the record of one."""
    if path.endswith(".zip"):
        with tempfile.TemporaryDirectory() as where:
            write_run(read_record(path), where)
            return dataclasses.replace(read_run(name, "", None, where), path=path)
    if RunDir(path).read("status.json") is None:
        raise InputError(f"--add: {path} is no run directory (it has no status.json)")
    return read_run(name, "", None, path)


def _size_of(study: Study, wanted: list[Job], run: Run) -> str:
    """The size of the study whose baseline has an added run's FLOPs per token."""
    if len(study.sizes) == 1:
        return next(iter(study.sizes))
    ours = (run.end.flops - run.start.flops) / (run.end.tokens - run.start.tokens)
    budgets = {job.size: flops_per_token(job.config) for job in wanted if job.variant == study.baseline}
    found = [size for size, theirs in budgets.items() if abs(ours / theirs - 1) <= study.tolerance]
    if len(found) != 1:
        sizes = ", ".join(f"{size} {theirs:.4g}" for size, theirs in budgets.items())
        raise InputError(f"--add: {run.path} has {ours:.4g} FLOPs per token, which is no size of the study ({sizes})")
    return found[0]


# Files ----------------------------------------------------------------------------------------------------------------


def _csv(runs: list[Run], finished: Finished) -> bytes:
    """One row per run; final losses of finished runs alone, counts with those of an upcycled run's seed."""
    rows = [_row(run, finished) for run in runs]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _row(run: Run, finished: Finished) -> dict[str, Any]:
    row = {
        "variant": run.variant,
        "size": run.size,
        "budget": run.budget,
        "seed": run.seed,
        "path": run.path,
        "state": run.state,
    }
    row |= {"steps": run.step, "tokens": run.end.tokens, "flops": run.end.flops, "parameters": parameters_of(run)}
    for loss in losses(finished):
        name = loss.title.replace(", ", "_")
        for modality in modalities(finished):
            curve = loss.of(run, modality) if run.finished else None
            column = "_".join(filter(None, (name, "loss", modality)))
            row[column] = None if curve is None else float(curve.loss_N[-1])
    row |= {"wall_seconds": run.end.seconds, "tokens_per_second": run.tokens_per_second}
    row |= {name: run.summary.get(name) for name in ("command", "commit", "processor")}
    return row | {"config_hash": run.config_hash}


def _parquet(runs: list[Run]) -> bytes:
    """Every recorded loss of every run: a row for each run, measure and step; training losses are not smoothed."""
    columns: dict[str, list] = {name: [] for name in (*PLACES, *Measure._fields, *AXES, "loss")}
    for run in runs:
        for measure, curve in run.curves.items():
            length = len(curve.loss_N)
            named = (run.path, run.variant, run.size, run.budget, run.seed, *measure)
            for name, value in zip((*PLACES, *Measure._fields), named, strict=True):
                columns[name] += [value] * length
            for name, array_N in zip((*AXES, "loss"), curve, strict=True):
                columns[name] += array_N.tolist()
    types = {"budget": pa.float64(), "seed": pa.int64(), "step": pa.int64()} | dict.fromkeys(
        (*AXES[1:], "loss"), pa.float64()
    )
    table = pa.table({name: pa.array(v, types.get(name, pa.string())) for name, v in columns.items()})
    content = io.BytesIO()
    pq.write_table(table, content)
    return content.getvalue()


def _result(
    study: Study, runs: list[Run], finished: Finished, verdicts: list[Decided], compared: list[Compared]
) -> dict[str, Any]:
    final = [
        {"variant": f.variant, "size": f.size, "loss": f.loss.title}
        | {modality or "overall": statistics.fmean(values) for modality, values in f.by_modality.items() if values}
        for f in final_losses(finished)
    ]
    etas = [
        {"variant": c.variant, "size": c.size, "loss": c.loss.title, "modality": c.modality or "overall"}
        | {"seeds": list(c.seeds), "differences": list(c.differences), **c.flops._asdict()}
        for c in compared
    ]
    about = {"format_version": FORMAT_VERSION, "study": study.dir, "baseline": study.baseline}
    counts = {"runs": len(runs), "finished": sum(run.finished for run in runs)}
    decisions = [
        {"variant": d.variant, "against": d.against, "size": d.size, "loss": d.loss.title}
        | {"modality": d.modality or "overall", **d.verdict._asdict()}
        for d in verdicts
    ]
    return about | counts | {"final": final, "verdicts": decisions, "speedups": etas}
