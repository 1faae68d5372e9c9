"""Figures of a report: losses against FLOPs, tokens and wall time, overall and by modality. PNG, for any eyes."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
from PIL import Image

from moma_jax.studies.comparison import Finished, Loss, measured, modalities
from moma_jax.studies.curves import Curve

AXES = {"flops": "training FLOPs", "tokens": "tokens", "seconds": "wall time, seconds"}
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
"""Okabe and Ito's, which colour-blind readers can tell apart."""
STYLES = ("-", "--", ":", "-.")
LEFT_OUT = 0.1
"""Share of a run before which losses fall so far that they would flatten all else."""
DOTS_PER_INCH = 90
PALETTE = 128
"""Colours of a file: lines need few, and it becomes a third as large."""


def figure_names(finished: Finished) -> dict[tuple[str, str], str]:
    """File names by (size, axis)."""
    sizes = dict.fromkeys(size for size, _ in finished.by_place)
    return {(s, axis): f"loss-{axis}{f'-{s}' if s else ''}.png" for s in sizes for axis in AXES}


def draw(finished: Finished, size: str, axis: str) -> bytes:
    """A PNG: a row for each measured loss, a column for each modality, a line for each variant of the size.

    Lines are means over seeds; bands one standard deviation to either side, where there are several seeds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

    rows, columns = measured(finished), modalities(finished)
    with matplotlib.rc_context({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3}):
        width, height = 3.6 * len(columns), 2.7 * len(rows)
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        room = {"left": 0.55 / width, "right": 1 - 0.15 / width, "bottom": 0.5 / height, "top": 1 - 0.3 / height}
        panels = figure.subplots(len(rows), len(columns), squeeze=False, gridspec_kw=room | {"hspace": 0.4})
        for loss, line in zip(rows, panels, strict=True):
            for modality, panel in zip(columns, line, strict=True):
                _draw_panel(panel, finished, size, axis, loss, modality)
                panel.set(title=f"{loss.title}: {modality or 'overall'}", xlabel=AXES[axis], xscale="log")
                panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # labels of others lie over each other
                panel.xaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf)))
                panel.xaxis.set_minor_formatter(NullFormatter())
            line[0].set_ylabel("nats per token")
        panels[0, 0].legend(fontsize=7)
        drawn, content = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png", dpi=DOTS_PER_INCH)
    Image.open(drawn).convert("RGB").quantize(PALETTE).save(content, format="png", optimize=True)
    return content.getvalue()


def _draw_panel(panel, finished: Finished, size: str, axis: str, loss: Loss, modality: str) -> None:
    variants = list(dict.fromkeys(variant for _, variant in finished.by_place))
    for i, variant in enumerate(variants):
        group = finished.by_place.get((size, variant), {})
        curves = [curve for run in group.values() if (curve := loss.of(run, modality)) is not None]
        if not curves:
            continue
        x_N, mean_N, deviation_N = _over_seeds(curves, axis)
        look = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}
        marker = {"marker": "o", "markersize": 2.5} if loss.title != "training" else {}
        panel.plot(x_N, mean_N, linewidth=1.2, label=variant, **look, **marker)
        if len(curves) > 1:
            panel.fill_between(x_N, mean_N - deviation_N, mean_N + deviation_N, color=look["color"], alpha=0.2, lw=0)


def _over_seeds(curves: list[Curve], axis: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spending, mean and standard deviation of the loss over seeds, at the same shares of each run."""
    spent = [getattr(curve, f"{axis}_N") for curve in curves]
    share_N = spent[0] / spent[0][-1]
    share_N = share_N[share_N >= LEFT_OUT]
    loss_SN = np.array([np.interp(share_N, x / x[-1], c.loss_N) for x, c in zip(spent, curves, strict=True)])
    deviation_N = loss_SN.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros_like(share_N)
    return share_N * np.mean([x[-1] for x in spent]), loss_SN.mean(axis=0), deviation_N
