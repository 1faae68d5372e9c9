"""Plots of a page: losses, the causal gap, speed, verdicts. Made by Plotly, from records of runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moma_jax.page.reading import Seen
from moma_jax.runs.progress import time_spent
from moma_jax.studies.comparison import Decided
from moma_jax.studies.curves import OVERALL, Curve

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Of runs: Okabe and Ito's, which the colour-blind tell apart."""
DASHES = {"training": "solid", "choice": "dot", "threshold": "dash", "causal": "dashdot"}
MOST_POINTS = 600
"""Of a line: longer ones are means over as many stretches, and the last point."""
AXES = {"flops": "FLOPs", "tokens": "tokens", "step": "updates", "seconds": "seconds"}


def thinned(*arrays_N: np.ndarray) -> list[np.ndarray]:
    """Arrays of at most MOST_POINTS points: means over stretches of equal length, the last point as it is."""
    count = len(arrays_N[0])
    if count <= MOST_POINTS:
        return [np.asarray(a, np.float64) for a in arrays_N]
    edges = np.linspace(0, count - 1, MOST_POINTS).astype(int)
    widths = np.diff(edges)
    return [np.append(np.add.reduceat(np.asarray(a, np.float64)[:-1], edges[:-1]) / widths, a[-1]) for a in arrays_N]


def rounded(value_N: np.ndarray) -> list[float | None]:
    """Five significant digits, which is what a screen shows."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in value_N]


def losses(seen: list[Seen]) -> go.Figure:
    """Loss by modality: a column for each, training thin, held-out losses by routing with a marker."""
    modalities = list(dict.fromkeys([OVERALL, *(m for each in seen for m in each.run.modalities)]))
    figure = make_subplots(1, len(modalities), subplot_titles=[m or "overall" for m in modalities])
    for number, each in enumerate(seen):
        for measure, curve in each.run.curves.items():
            if measure.modality not in modalities:
                continue
            what = "training" if measure.kind == "train" else f"{measure.eval_set}, {measure.routing}"
            trace = _line(curve, f"{each.name}: {what}", COLOURS[number % len(COLOURS)], measure)
            trace.showlegend = measure.modality == OVERALL
            figure.add_trace(trace, 1, 1 + modalities.index(measure.modality))
    figure.update_yaxes(title_text="loss, nats per token", col=1)
    return _finished(figure, "flops")


def _line(curve: Curve, name: str, colour: str, measure: Any) -> go.Scatter:
    step_N, tokens_N, flops_N, seconds_N, loss_N = thinned(*curve)
    axes = dict(zip(("step", "tokens", "flops", "seconds"), (step_N, tokens_N, flops_N, seconds_N), strict=True))
    training = measure.kind == "train"
    return go.Scatter(
        x=rounded(flops_N),
        y=rounded(loss_N),
        name=name,
        legendgroup=name,
        mode="lines" if training else "lines+markers",
        line={"color": colour, "width": 1.5 if training else 2, "dash": DASHES.get(measure.routing, "solid")},
        opacity=0.65 if training else 1.0,
        meta={axis: rounded(value_N) for axis, value_N in axes.items()},
    )


def gaps(seen: list[Seen]) -> go.Figure | None:
    """By how many percent causal losses lie above those of training, along the run."""
    figure = go.Figure()
    for number, each in enumerate(seen):
        found: dict[str, list[tuple[int, float]]] = {}
        for record in each.evaluated:
            if record.get("gap_percent") is not None:
                key = f"{each.name}: {record['eval_set']}, {record['routing']}"
                found.setdefault(key, []).append((record["step"], record["gap_percent"]))
        for name, points in found.items():
            step_N, gap_N = thinned(*np.array(points, np.float64).T)
            line = {"color": COLOURS[number % len(COLOURS)]}
            figure.add_trace(
                go.Scatter(x=rounded(step_N), y=rounded(gap_N), name=name, line=line, mode="lines+markers")
            )
    if not figure.data:
        return None
    figure.update_yaxes(title_text="causal over training routing, %")
    return _finished(figure, "step")


def speeds(seen: list[Seen]) -> go.Figure:
    """Tokens a second along the run."""
    figure = go.Figure()
    for number, each in enumerate(seen):
        points = [(r["step"], r["tokens_per_second"]) for r in each.train if r.get("tokens_per_second") is not None]
        if points:
            step_N, speed_N = thinned(*np.array(points, np.float64).T)
            line = {"color": COLOURS[number % len(COLOURS)]}
            points = {"x": rounded(step_N), "y": rounded(speed_N)}
            figure.add_trace(go.Scatter(**points, name=each.name, line=line, mode="lines"))
    figure.update_yaxes(title_text="tokens a second", rangemode="tozero")
    return _finished(figure, "step")


def shares(seen: list[Seen]) -> go.Figure | None:
    """Where the time of each run went."""
    last = {each.name: each.run.summary.get("time") or (each.train[-1] if each.train else None) for each in seen}
    spent = {name: time_spent(record) for name, record in last.items() if record and "wall_seconds" in record}
    spent = {name: own for name, own in spent.items() if len(own) > 1}  # older runs did not say
    if not spent:
        return None
    figure = go.Figure(layout={"barmode": "stack"})
    for number, part in enumerate(dict.fromkeys(part for own in spent.values() for part in own)):
        seconds = [own.get(part, 0.0) for own in spent.values()]
        bar = go.Bar(y=[*spent], x=rounded(np.array(seconds)), name=part, orientation="h")
        bar.marker = {"color": COLOURS[number % len(COLOURS)]}
        figure.add_trace(bar)
    figure.update_xaxes(title_text="seconds")
    return _finished(figure, None)


def verdicts(found: Iterable[Decided]) -> go.Figure | None:
    """Ratios of etas with their intervals, by modality."""
    figure, colour = go.Figure(), dict(zip((OVERALL, "text", "image"), COLOURS, strict=False))
    for modality in dict.fromkeys(each.modality for each in found):
        own = [each for each in found if each.modality == modality]
        ratio = [each.verdict.ratio for each in own]
        interval = [each.verdict.interval or (each.verdict.ratio,) * 2 for each in own]
        error = {"array": [high - r for r, (_, high) in zip(ratio, interval, strict=True)], "symmetric": False}
        error |= {"arrayminus": [r - low for r, (low, _) in zip(ratio, interval, strict=True)]}
        label = [f"{each.variant} over {each.against}" for each in own]
        marker = {"color": colour.get(modality, "#000000"), "size": 9}
        dots = go.Scatter(x=ratio, y=label, error_x=error, mode="markers", name=modality or "overall", marker=marker)
        figure.add_trace(dots)
    if not figure.data:
        return None
    figure.add_vline(x=1, line_dash="dot")
    figure.update_xaxes(title_text="ratio of etas, 95% interval over seeds", type="log")
    return _finished(figure, None)


def _finished(figure: go.Figure, axis: str | None) -> go.Figure:
    """Layout that all share; `axis` is what the x axis shows first."""
    figure.update_layout(
        template="plotly_white",
        height=420,
        margin={"l": 60, "r": 10, "t": 40, "b": 50},
        legend={"orientation": "h", "y": -0.2},
    )
    if axis is not None:
        figure.update_xaxes(title_text=AXES[axis], rangemode="tozero")
    return figure
