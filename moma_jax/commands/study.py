"""Compare architectures at equal FLOPs on equal data."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from moma_jax.errors import require
from moma_jax.studies.jobs import chosen, state
from moma_jax.studies.matching import match_rows, match_variants
from moma_jax.studies.study import Study, load_study
from moma_jax.studies.sweep import all_jobs, chosen_values

INDEX_VARIABLES = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")
"""Where Slurm and Kubernetes say which task of an array job this is."""


@dataclass(frozen=True)
class StudyOptions:
    """What is to be done with a study."""

    index: int | None = None
    """Train this run alone, numbered from 0 as --list does; SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX where None. The
    tasks of such an array are then runs of their own; say it where they are the hosts of one run."""
    list: bool = False
    """Print how variants are matched, and the runs with their states; train nothing."""
    json: bool = False
    """With --list or --report: print JSON."""
    report: bool = False
    """Write the report on the runs that there are; train nothing."""
    html: bool = False
    """With --report: also a page to look at, page.html: verdicts, and the first run of every variant side by side."""
    out: str | None = None
    """With --report: its directory; report-STUDY beside the runs where None."""
    add: tuple[str, ...] = ()
    """With --report: run directories made elsewhere, or records of them (.zip), each as NAME=PATH; several seeds of one
    name as NAME=PATH,PATH."""
    dir: str | None = None
    """Directory of the runs, instead of the study's own."""


def study(
    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="STUDY")]],
    options: Annotated[StudyOptions, tyro.conf.arg(name="", help="")] = StudyOptions(),
) -> None:
    """Compare architectures at equal FLOPs on equal data, `moma study configs/studies/ffn.py`: train every run that is
    not complete, one after the other. The same command again goes on; several at once share the work.

    Args:
      path: Study file, with `def study() -> Study`.
    """
    _check(options)
    study = load_study(path)
    if options.dir is not None:
        study = dataclasses.replace(study, dir=options.dir)
    if options.report:
        return _report(study, path, options)
    variable = _index_variable() if options.index is None and not options.list else None
    if variable == "JOB_COMPLETION_INDEX":  # which else says that the pods of a Job are the hosts of one run
        alone = dataclasses.replace(study.base.hosts, start="off")
        study = dataclasses.replace(study, base=dataclasses.replace(study.base, hosts=alone))
    found = all_jobs(study)
    matched = match_variants(study, chosen_values(study))
    if options.list:
        states = [{"index": n, "name": j.name, "dir": j.config.run.dir, **state(j)} for n, j in enumerate(found)]
        return _print_list({"match": match_rows(matched), "jobs": states}, options.json)
    selected = chosen(found, _index(variable) if variable else options.index, variable or "--index")
    _print_match(match_rows(matched))
    from moma_jax.studies.running import run_study

    run_study(study, selected)


def _check(options: StudyOptions) -> None:
    require(not (options.list and options.report), "--list: prints what --report reads; give one of the two")
    require(
        options.index is None or not (options.list or options.report),
        "--index: trains one run; leave it out with --list and --report",
    )
    require(options.list or options.report or not options.json, "--json: goes with --list or --report")
    others = options.out is not None or options.add or options.html
    require(options.report or not others, "--out, --add, --html: go with --report alone")


def _index_variable() -> str | None:
    """Which variable says what task of an array job this is."""
    return next((name for name in INDEX_VARIABLES if os.environ.get(name)), None)


def _index(variable: str) -> int:
    """The number of this task."""
    text = os.environ[variable]
    require(text.isascii() and text.isdigit(), f"{variable}: {text!r} is no number of a run; give --index")
    return int(text)


def _report(study: Study, path: str, options: StudyOptions) -> None:
    from moma_jax.runs.journal import finite
    from moma_jax.studies.report import write_report

    added = {}
    for word in options.add:
        name, _, runs = word.partition("=")
        require(
            name and all(runs.split(",")),
            f"--add: {word!r} is not NAME=PATH or NAME=PATH,PATH, such as outside=runs/elsewhere",
        )
        require(name not in added, f"--add: two runs have the name {name}; rename one")
        added[name] = runs
    out = options.out or f"{study.dir.rstrip('/')}/report-{Path(path).stem}"
    if options.html:
        from moma_jax.page.study import study_page

        write_report = functools.partial(write_report, pages={"page.html": study_page})
    result = write_report(study, out, added)
    if options.json:
        print(json.dumps(finite(result), allow_nan=False))
    else:
        print(f"{out}/report.md: {result['finished']} of {result['runs']} runs are finished")


# For people -----------------------------------------------------------------------------------------------------------


def _print_list(listed: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(listed))
        return
    _print_match(listed["match"])
    rows = [[str(j["index"]), j["name"], j["state"], f"{j['step']:,}/{j['total']:,}", j["dir"]] for j in listed["jobs"]]
    _print_table(["", "run", "state", "updates", "directory"], rows, "r<<r<")


def _print_match(rows: list[dict[str, Any]]) -> None:
    sized = any(row["size"] for row in rows)
    heads = ["variant", *(["size"] if sized else []), "ffn", "layers", "width", "hidden", "parameters"]
    heads += ["FLOPs/token", "of baseline", "updates", "tokens"]
    cells = []
    for row in rows:
        cells.append([row["variant"], *([row["size"]] if sized else []), row["ffn"]])
        cells[-1] += [f"{row[name]:,}" for name in ("layers", "width", "hidden", "parameters")]
        cells[-1] += [f"{row['flops_per_token']:,.0f}", f"{row['share']:.4f}", f"{row['updates']:,}"]
        cells[-1] += [f"{row['tokens']:,}"]
    _print_table(heads, cells, "<<<"[: 2 + sized] + "r" * 8)


def _print_table(heads: list[str], rows: list[list[str]], align: str) -> None:
    """Columns as wide as they need to be, so that a file that takes the output has whole lines."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in [heads, *rows]:
        cells = [f"{cell:{'>' if a == 'r' else '<'}{w}}" for cell, a, w in zip(row, align, widths, strict=True)]
        print("  ".join(cells).rstrip())
    print()
