"""The Markdown of a study's report."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from moma_jax.config_json import from_json
from moma_jax.cost import parameter_count
from moma_jax.errors import InputError
from moma_jax.runs.directory import command, commit
from moma_jax.studies.comparison import (
    Compared,
    Final,
    Finished,
    Law,
    eval_sets,
    final_losses,
    modalities,
)
from moma_jax.studies.curves import WINDOW, Run
from moma_jax.studies.figures import figure_names
from moma_jax.studies.study import Study

BOUNDS = {"": "", ">=": "≥ ", "<=": "≤ "}


def report_text(
    study: Study, runs: list[Run], finished: Finished, compared: list[Compared], laws: list[Law] | str
) -> str:
    """The whole page. What it says of eta is `speedup`'s module, in words."""
    names = [variant for _, variant in finished.by_place]
    parts = [
        f"# {', '.join(dict.fromkeys(names))} at equal FLOPs on equal data",
        _opening(study, runs, finished),
        "## What was compared\n\n" + _match(finished),
        "## Final losses\n\n" + _finals(finished),
        f"## Speed-up over {finished.baseline}\n\n" + _speedups(compared),
        "## Curves\n\n" + _figures(finished),
        "## Power law over sizes\n\n" + _laws(laws),
        "## What is missing\n\n" + _missing(study, runs, finished),
        "## How to read it\n\n" + HOW_TO_READ.format(percent=round(100 * WINDOW), baseline=finished.baseline),
        "## The runs\n\n" + _runs(runs),
        f"This report: `{command()}`, commit {commit() or 'unknown'}. Figures of every run: "
        "[runs.csv](runs.csv); every recorded loss: [curves.parquet](curves.parquet); the tables' values: "
        "[report.json](report.json).",
    ]
    return "\n\n".join(parts) + "\n"


HOW_TO_READ = """\
- **Losses** are nats per token. The final training loss is the mean over the last {percent}% of the updates. `choice`
  is the routing of training: experts choose, and see the future, so it compares runs but is no likelihood. `threshold`
  (running thresholds) and `causal` (auxiliary routers) are causal routings. Where no expert has to choose (`dense`,
  `1t1i`) all routings are the same, and one figure stands under each.
- **eta** is the FLOPs of `{baseline}` over those with which the variant reaches the final loss of `{baseline}`. Where
  it ends above that, eta is below 1: the FLOPs with which `{baseline}` reached the variant's final loss over those of
  the variant. Curves are averaged over seeds and made monotone by their running minimum. Training losses are smoothed
  (at every point the mean over the last {percent}% of the FLOPs so far); held-out losses are interpolated, linearly in
  log FLOPs. `≥` and `≤`: the loss was passed before the first point of the curve. Where that is so for a seed or a
  resample, there is no interval.
- **Bootstrap**: seeds are drawn with replacement, the same for both, and eta is that of the curves averaged over what
  was drawn; the interval holds from 2.5% to 97.5% of the draws (each possible one with its probability, up to 5 seeds).
  With few seeds it is too narrow, as it cannot leave the range of what was seen: variants that are equal in truth have
  n seeds on one side of 1 once in 2^(n-1) times, and then it leaves 1 out. **t**: of the mean of log eta over the
  seeds' own etas; with few seeds it is wide. Where it holds 1, the order of the two is not decided by these seeds. Both
  are about seeds alone: the held-out documents are the same for all, and others would move the etas too.
- **Baseline itself**: its eta over itself, 1 where its curve falls to the end. More means that it had its final loss
  before: a training loss also follows what the batches hold, in the same places for every variant of a seed, and where
  that moves a curve as much as training does, an eta of this size is no speed-up, nor one below 1 / this size a loss
  of speed: the running minimum takes such etas away from 1. They stand in brackets. Held-out losses are free of it.
- Points inside a run are no finished runs of that length where the learning rate decays to the end: a run that had been
  planned shorter would be lower there. That pulls eta towards 1. The paper's etas are made in the same way.
- **Wall time** is the runs' own record, compiling, evaluation and repeated work included. Runs that shared a machine
  slowed each other, so it compares variants only where that was the same for all.
- FLOPs, tokens and wall time of an upcycled run include its seed run's; its curves begin where the seed run ended."""


# Tables ---------------------------------------------------------------------------------------------------------------


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(heads), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _named(size: str, variant: str) -> str:
    return f"{variant} {size}".strip()


def _opening(study: Study, runs: list[Run], finished: Finished) -> str:
    budget = f"{study.flops:.4g} FLOPs" if study.flops is not None else f"{study.tokens:.4g} tokens of the baseline"
    done = f"{len(finished.runs)} of {len(runs)} runs are finished and compared here"
    return f"Budget of a run: {budget}. Baseline: `{finished.baseline}`. Seeds: {_listed(study.seeds)}. {done}."


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _match(finished: Finished) -> str:
    heads = ["variant", "layers", "width", "hidden", "parameters", "FLOPs per token"]
    rows = []
    for (size, variant), group in finished.by_place.items():
        run = next(iter(group.values()))
        baseline = finished.by_place.get((size, finished.baseline))
        share = "-" if baseline is None else f"{_flops(run) / _flops(next(iter(baseline.values()))):.4f}"
        model, count, end = run.config.get("model", {}), parameters_of(run), run.end
        steps = f"{run.step:,}" + (f" ({run.start.step:,} of the seed run)" if run.start.step else "")
        shape = [str(model.get(name, "unknown")) for name in ("layers", "width", "hidden")]
        known = "unknown" if count is None else f"{count:,}"
        spent = [f"{_flops(run):.4g}", share, f"{end.tokens:,}", f"{end.flops:.4g}", steps]
        rows.append([_named(size, variant), *shape, known, *spent])
    return _table([*heads, f"of {finished.baseline}'s", "tokens", "FLOPs", "updates"], rows)


def _flops(run: Run) -> float:
    """Training FLOPs of a token, a mean over the seed run and the run where it is upcycled."""
    return run.end.flops / run.end.tokens


def parameters_of(run: Run) -> int | None:
    """Parameters of the decoder; None where the config is of another version of this package."""
    try:
        return parameter_count(from_json(run.config))["total"]
    except InputError:
        return None


def _finals(finished: Finished) -> str:
    finals, columns = final_losses(finished), modalities(finished)
    parts = []
    for title in dict.fromkeys(f.loss.title for f in finals):
        rows = [
            [_named(f.size, f.variant), *(_spread(f.by_modality[m]) for m in columns), str(_seeds(f))]
            for f in finals
            if f.loss.title == title
        ]
        heads = ["variant", *(m or "overall" for m in columns), "seeds"]
        parts.append(f"**{title}**: mean and standard deviation over seeds.\n\n" + _table(heads, rows))
    if not eval_sets(finished):
        parts.append("No run was evaluated on held-out data.")
    return "\n\n".join(parts)


def _seeds(final: Final) -> int:
    return max(map(len, final.by_modality.values()))


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.4f}{deviation}"


def _speedups(compared: list[Compared]) -> str:
    if not compared:
        return "No other variant has a finished run of a seed that the baseline has too."
    heads = ["variant", "modality", "eta", "bootstrap 95%", "t 95%", "baseline itself", "by wall time"]
    heads += ["final loss, difference", "seeds"]
    parts = []
    for title in dict.fromkeys(c.loss.title for c in compared):
        of_loss = [c for c in compared if c.loss.title == title]
        words = "the training loss" if title == "training" else f"held-out loss: {title}"
        points = min(c.points for c in of_loss)
        parts.append(
            f"**By {words}** (at least {points} points a curve)\n\n" + _table(heads, map(_speedup_row, of_loss))
        )
    if any(len(c.seeds) == 1 for c in compared):
        parts.append("Where there is one seed there is no interval: nothing is known of how much seeds matter.")
    return "\n\n".join(parts)


def _speedup_row(c: Compared) -> list[str]:
    wall = f"{BOUNDS[c.seconds.bound]}{_factor(c.seconds.eta)}"
    intervals = [_interval(each, _factor) for each in (c.flops.bootstrap, c.flops.student)]
    beyond = max(c.flops.eta, 1 / c.flops.eta) > c.flops.itself  # what the batches alone could make of it
    value = f"{BOUNDS[c.flops.bound]}" + (f"**{_factor(c.flops.eta)}**" if beyond else f"({_factor(c.flops.eta)})")
    about, itself = [_named(c.size, c.variant), c.modality or "overall"], _factor(c.flops.itself)
    return [*about, value, *intervals, itself, wall, _spread(c.differences, "+"), _listed(c.seeds)]


def _factor(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0e}"


def _four(value: float) -> str:
    return f"{value:.4f}"


def _interval(interval: tuple[float, float] | None, written: Callable[[float], str]) -> str:
    return "none" if interval is None else " to ".join(map(written, interval))


def _figures(finished: Finished) -> str:
    words = (
        "Means over seeds, from a tenth of the budget on; bands: one standard deviation. Training losses are smoothed."
    )
    return "\n\n".join([words, *(f"![{_alt(*key)}]({name})" for key, name in figure_names(finished).items())])


def _alt(size: str, axis: str) -> str:
    names = {"flops": "FLOPs", "tokens": "tokens", "seconds": "wall time"}
    return f"Losses against {names[axis]}{f', size {size}' if size else ''}"


def _laws(laws: list[Law] | str) -> str:
    if isinstance(laws, str):
        return laws
    rows = []
    for variant, loss, modality, law in laws:
        values = [f"{value:.4g} ({_interval(interval, _four)})" for value, interval in (law.a, law.b)]
        floor = "not fitted" if law.floor is None else f"{law.floor[0]:.4g} ({_interval(law.floor[1], _four)})"
        rows.append([variant, loss.title, modality or "overall", *values, floor, f"{law.unit:.3g}"])
    words = (
        "L = a * (C / C0)^-b + c of final losses, C the FLOPs of a run, fitted to the logarithm of every run's loss by "
        "least squares. Without c, L = a * (C / C0)^-b, where it is not fitted: fewer than four sizes, or no positive "
        "floor in these runs. In parentheses t-intervals of 95% over runs."
    )
    return words + "\n\n" + _table(["variant", "loss", "modality", "a", "b", "c", "C0"], rows)


def _missing(study: Study, runs: list[Run], finished: Finished) -> str:
    lines = [f"- `{run.path}`: {run.state}, {_progress(run)}" for run in runs if not run.finished]
    for size, variant in dict.fromkeys((run.size, run.variant) for run in runs):
        wanted = [run.seed for run in runs if (run.size, run.variant) == (size, variant)]
        short = sorted(set(wanted) - set(finished.by_place.get((size, variant), {})))
        if short:
            lines.append(f"- {_named(size, variant)}: {len(short)} of {len(wanted)} seeds missing: {_listed(short)}")
    for (size, variant), group in finished.by_place.items():
        lonely = sorted(set(group) - set(finished.by_place.get((size, finished.baseline), {})))
        if lonely:
            lines.append(f"- {_named(size, variant)}: not compared, for want of a baseline: seed {_listed(lonely)}")
    return "\n".join(lines) or "Nothing: every run is finished."


def _progress(run: Run) -> str:
    total = "" if run.total is None else f" of {run.total:,}"
    return f"{run.step:,}{total} updates" if run.total is not None or run.step else "no update yet"


def _runs(runs: list[Run]) -> str:
    heads = ["run", "state", "command", "commit", "config", "machine", "versions"]
    seen: dict[str, str] = {}
    rows = []
    for run in runs:
        said, device = run.summary, run.summary.get("device", {})
        versions = _listed(f"{name} {version}" for name, version in sorted(said.get("versions", {}).items()))
        number = seen.setdefault(versions, f"({len(seen) + 1})") if versions else "-"
        machine = f"{device.get('count')} x {device.get('kind')}" if device else "-"
        command = f"`{said['command']}`" if "command" in said else "-"
        words = [f"`{run.path}`", run.state, command, (said.get("commit") or "-")[:12], run.config_hash or "-"]
        rows.append([*words, machine, number])
    notes = [f"Versions {number}: {versions}." for versions, number in seen.items()]
    return "\n\n".join([_table(heads, rows), *notes])
