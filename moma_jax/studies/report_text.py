"""The Markdown of a study's report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from moma_jax.by_token import LOADS
from moma_jax.config_json import from_json
from moma_jax.cost import cost, parameter_count
from moma_jax.errors import InputError
from moma_jax.geometry import group_capacity
from moma_jax.runs.directory import command, commit
from moma_jax.studies.comparison import (
    Compared,
    Decided,
    Documents,
    Final,
    Finished,
    Law,
    eval_sets,
    final_losses,
    modalities,
    over_documents,
)
from moma_jax.studies.curves import WINDOW, Run
from moma_jax.studies.figures import figure_names
from moma_jax.studies.study import Study
from moma_jax.studies.sweep import tried

FFN_PARTS = ("router", "experts", "shared_experts")
"""Parts of a token's FLOPs by `moma cost` that variants differ in."""
BOUNDS = {"": "", ">=": "≥ ", "<=": "≤ ", "?": "? "}


def report_text(
    study: Study,
    runs: list[Run],
    finished: Finished,
    verdicts: list[Decided],
    compared: list[Compared],
    laws: list[Law] | str,
) -> str:
    """The whole page. What it says of eta is in `verdicts` and `speedup`, in words."""
    names = [variant for _, variant in finished.by_place]
    parts = [
        f"# {', '.join(dict.fromkeys(names))} at equal FLOPs on equal data",
        _opening(study, runs, finished),
        "## What was compared\n\n" + _match(finished),
        "## Final losses\n\n" + _finals(finished),
        *(["\n\n".join(["## How full experts were", *full])] if (full := _how_full(finished)) else []),
        "## Verdicts\n\n" + _verdicts(study, verdicts),
        "## The same documents\n\n" + _documents(over_documents(finished)),
        *(["## Chosen on trials\n\n" + _trials(study)] if study.sweep else []),
        "## Inside runs, as the paper does it\n\n" + _speedups(compared),
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
  is the routing of training of expert choice, which sees the future, so it compares runs but is no likelihood;
  `training` is that of other rules, under which tokens may be dropped. `threshold` (running thresholds) and `causal`
  (auxiliary routers, or the nature of a rule by token) are causal routings. Where variants have none in common `own` is
  each one's own: `threshold` of those that have it, `causal` of the others. Where no expert has to choose (`dense`,
  `1t1i`) all routings are the same, and one figure stands under each.
- **Verdicts** go by eta off finished runs: the FLOPs at which finished runs of `{baseline}` have the variant's final
  loss, over those of the variant, seed by seed; `{baseline}` is trained to its end at several budgets, and between them
  its loss is monotone in log FLOPs. One variant against another is the ratio of their etas, "image against its text"
  that of a variant's etas for the two. The interval is the t-interval of the logarithms over seeds, paired by seed;
  resampled from the residuals of real runs it keeps its 95% (tests/studies/test_coverage.py). Ahead or behind: it lies
  on one side of 1. `≥` and `≤`: a seed's loss lies beyond the baseline's budgets, so there is no interval. *Least* is
  the ratio that so many seeds, spread as these are, would have decided in 80% of studies.
- **The same documents**: both variants' losses on the same held-out documents, means over seeds; the interval is a
  bootstrap over documents, 95%. It says what other documents would have changed, not other seeds.
- **Inside runs** is the paper's way: the FLOPs of `{baseline}` over those with which the variant's curve reaches the
  final loss of `{baseline}`, or below 1 the other way round, by running minima, averaged over seeds. A point inside a
  run is no finished run, as its learning rate has not decayed, so these etas can be far off, to either side, and have
  no interval; those of single seeds stand beside them. Training losses are smoothed (at every point the mean over the
  last {percent}% of the FLOPs so far); held-out losses are interpolated, linearly in log FLOPs. *Baseline itself*: its
  eta over itself, 1 where its curve falls to the end. More means that it had its final loss before, as a training loss
  also follows what the batches hold: an eta of this size is no speed-up then, and stands in brackets.
- **Wall time** is the runs' own record, compiling, evaluation and repeated work included. Runs that shared a machine
  slowed each other, so it compares variants only where that was the same for all.
- FLOPs, tokens and wall time of an upcycled run include its seed run's; its curves begin where the seed run ended."""


LOADS_MEAN = """\
Under rules by token, in training: means over the last {percent}% of the updates, over layers, routing groups and seeds.
*Busiest*: choices of the expert that has most in a routing group, over an even share."""
LEFT_OUT = 0.001
LEFT_OUT_MEAN = """\
Tokens that no expert of a layer took, dropped ones included: means over the last {percent}% of the updates, over
layers; of variants with {least:.1%} or more."""

# Tables ---------------------------------------------------------------------------------------------------------------


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(heads), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _named(size: str, variant: str) -> str:
    return f"{variant} {size}".strip()


def _opening(study: Study, runs: list[Run], finished: Finished) -> str:
    budget = f"{study.flops:.4g} FLOPs" if study.flops is not None else f"{study.tokens:.4g} tokens of the baseline"
    done = f"{sum(run.finished for run in runs)} of {len(runs)} runs are finished"
    return f"Budget of a run: {budget}. Baseline: `{finished.baseline}`. Seeds: {_listed(study.seeds)}. {done}."


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _match(finished: Finished) -> str:
    heads = ["variant", "layers", "width", "hidden", "parameters", "FFN's share", "FLOPs per token"]
    rows = []
    for (size, variant), group in finished.by_place.items():
        run = next(iter(group.values()))
        baseline = finished.by_place.get((size, finished.baseline))
        share = "-" if baseline is None else f"{_flops(run) / _flops(next(iter(baseline.values()))):.4f}"
        model, count, end = run.config.get("model", {}), parameters_of(run), run.end
        steps = f"{run.step:,}" + (f" ({run.start.step:,} of the seed run)" if run.start.step else "")
        shape = [str(model.get(name, "unknown")) for name in ("layers", "width", "hidden")]
        known = "unknown" if count is None else f"{count:,}"
        spent = [ffn_share(run), f"{_flops(run):.4g}", share, f"{end.tokens:,}", f"{end.flops:.4g}", steps]
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


def ffn_share(run: Run) -> str:
    """What the experts and their routers have of the run's FLOPs."""
    try:
        by_part = cost(from_json(run.config))["flops_per_token"]["by_part"]
    except InputError:
        return "unknown"
    return f"{sum(by_part[name] for name in FFN_PARTS) / sum(by_part.values()):.0%}"


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


def _how_full(finished: Finished) -> list[str]:
    """Tables of what experts took, those that say something."""
    return [table for table in (_loads(finished), _left_out(finished)) if table]


def _loads(finished: Finished) -> str:
    """Of rules under which tokens choose; empty where there are none."""
    rows = []
    for (size, variant), group in finished.by_place.items():
        runs = list(group.values())
        for name in runs[0].loads:
            found = [[run.loads.get(name, {}).get(figure, math.nan) for run in runs] for figure in LOADS]
            means = map(statistics.fmean, found)
            cells = ["-" if math.isnan(mean) else f"{mean:.3f}" for mean in means]
            rows.append([_named(size, variant), name, _aim(runs[0], name), *cells, str(len(runs))])
    heads = ["variant", "group", "experts of a token, aimed at", "chosen", "choices dropped", "slots empty", "busiest"]
    return LOADS_MEAN.format(percent=round(100 * WINDOW)) + "\n\n" + _table([*heads, "seeds"], rows) if rows else ""


def _left_out(finished: Finished) -> str:
    """What no expert took; empty where that is next to nothing everywhere."""
    rows = []
    for (size, variant), group in finished.by_place.items():
        runs = list(group.values())
        for modality in runs[0].left_out:
            each = [run.left_out.get(modality, math.nan) for run in runs]
            if (share := statistics.fmean(each)) >= LEFT_OUT:
                rows.append([_named(size, variant), modality, f"{share:.1%}", _listed(f"{one:.1%}" for one in each)])
    heads = ["variant", "modality", "entered no expert of a layer", "by seed"]
    words = LEFT_OUT_MEAN.format(percent=round(100 * WINDOW), least=LEFT_OUT)
    return f"{words}\n\n{_table(heads, rows)}" if rows else ""


def _aim(run: Run, group: str) -> str:
    """The experts of a token that a rule's FLOPs are counted by."""
    try:
        config = from_json(run.config)
    except InputError:
        return "unknown"
    aims = {g.name: group_capacity(config.model, g) * g.experts for g in config.experts.groups}
    return f"{float(aims[group]):g}" if group in aims else "-"


def _speedups(compared: list[Compared]) -> str:
    if not compared:
        return "No other variant has a finished run of a seed that the baseline has too."
    heads = ["variant", "modality", "eta", "by seed", "baseline itself", "by wall time", "final loss, difference"]
    parts = []
    for title in dict.fromkeys(c.loss.title for c in compared):
        of_loss = [c for c in compared if c.loss.title == title]
        words = "the training loss" if title == "training" else f"held-out loss: {title}"
        points = min(c.points for c in of_loss)
        rows = map(_speedup_row, of_loss)
        parts.append(f"**By {words}** (at least {points} points a curve)\n\n" + _table([*heads, "seeds"], rows))
    return "\n\n".join(parts)


def _speedup_row(c: Compared) -> list[str]:
    wall = f"{BOUNDS[c.seconds.bound]}{_factor(c.seconds.eta)}"
    beyond = max(c.flops.eta, 1 / c.flops.eta) > c.flops.itself  # what the batches alone could make of it
    value = f"{BOUNDS[c.flops.bound]}" + (f"**{_factor(c.flops.eta)}**" if beyond else f"({_factor(c.flops.eta)})")
    about, itself = [_named(c.size, c.variant), c.modality or "overall"], _factor(c.flops.itself)
    each = _listed(map(_factor, c.flops.per_seed))
    return [*about, value, each, itself, wall, _spread(c.differences, "+"), _listed(c.seeds)]


def _verdicts(study: Study, verdicts: list[Decided]) -> str:
    if not verdicts:
        return "None: the baseline has no two finished budgets (study.budgets) of a seed that another variant has too."
    heads = ["variant", "against", "modality", "eta or ratio", "95%", "verdict", "least", "by seed"]
    parts = []
    for place in dict.fromkeys((d.loss.title, d.size) for d in verdicts):
        rows = []
        for each in (d for d in verdicts if (d.loss.title, d.size) == place):
            v = each.verdict
            value = f"{BOUNDS[v.bound]}**{_factor(v.ratio)}**"
            least = "-" if v.least is None else _factor(v.least)
            seeds = _listed(f"{seed}: {_factor(ratio)}" for seed, ratio in v.by_seed.items())
            about = [each.variant, each.against, each.modality or "overall"]
            rows.append([*about, value, _interval(v.interval, _factor), v.word, least, seeds])
        title, size = place
        parts.append(f"**By {title}{f', {size}' if size else ''}**\n\n" + _table(heads, rows))
    budgets = _listed(f"{share:g}" for share in sorted({1.0, *study.budgets}))
    return f"Budgets of the baseline: {budgets} of the study's.\n\n" + "\n\n".join(parts)


def _documents(found: list[Documents]) -> str:
    if not found:
        return "None: no two variants have losses by document of the same seed."
    heads = ["variant", "against", "set, routing", "modality", "difference", "95% over documents", "seeds"]
    rows = []
    for d in found:
        about = [_named(d.size, d.variant), d.against, f"{d.eval_set}, {d.routing}", d.modality or "overall"]
        interval = _interval(d.interval, lambda value: f"{value:+.4f}")
        rows.append([*about, f"{d.difference:+.4f}", interval, _listed(d.seeds)])
    return _table(heads, rows)


def _trials(study: Study) -> str:
    sweep, found = study.sweep, tried(study)
    rows = []
    for each in found:
        losses = ["-" if loss is None else f"{loss:.4f}" for loss in each.loss_K]
        best = "-" if each.best is None else f"{each.best:g}" if isinstance(each.best, float) else str(each.best)
        rows.append([_named(each.size, each.variant), *losses, best + (" (edge)" if each.at_edge else "")])
    words = (
        f"`{sweep.field}` of every variant, by the loss on documents of the training split that trials do not train on "
        f"({sweep.share:g} of the budget, seed {sweep.seed}; `data.tuning`). The held-out split was not looked at."
    )
    if any(each.at_edge for each in found):
        words += " Edge: the best lies at an end of what was tried, and a better one may lie beyond."
    return words + "\n\n" + _table(["variant", *map(str, sweep.values), "chosen"], rows)


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
        "floor in these runs. In parentheses t-intervals of 95% over runs, which a law with c has none of."
    )
    return words + "\n\n" + _table(["variant", "loss", "modality", "a", "b", "c", "C0"], rows)


def _missing(study: Study, runs: list[Run], finished: Finished) -> str:
    lines = [f"- `{run.path}`: {run.state}, {_progress(run)}" for run in runs if not run.finished]
    for size, variant in dict.fromkeys((run.size, run.variant) for run in runs):
        wanted = [run.seed for run in runs if (run.size, run.variant, run.budget) == (size, variant, 1)]
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
        machine += f" on {said['processor']}" if "processor" in said else ""
        command = f"`{said['command']}`" if "command" in said else "-"
        words = [f"`{run.path}`", run.state, command, (said.get("commit") or "-")[:12], run.config_hash or "-"]
        rows.append([*words, machine, number])
    notes = [f"Versions {number}: {versions}." for versions, number in seen.items()]
    return "\n\n".join([_table(heads, rows), *notes])
