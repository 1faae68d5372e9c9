"""How the figures of `moma_jax.evaluate` are shown: lines when a run is complete, tables for `moma eval`."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from moma_jax.runs.progress import likelihood, losses

SEES_THE_FUTURE = "choice sees the future: its loss is no likelihood"

EACH = "experts_per_token_"
"""How figures of single groups of experts begin."""
REMEDY = "set them by the final weights with: moma routers calibrate RUN"


def held_out_lines(name: str, result: dict[str, Any]) -> list[str]:
    """What a run says of an evaluation set: a line for each routing and the unigram model.

    Args:
      result: as `moma_jax.evaluate` returns it.
    """
    shown = {}
    for routing, figures in result.items():
        if routing != "gap_percent":
            gap = result["gap_percent"].get(routing, {}).get("loss")
            shown[_label(routing, figures)] = losses(figures, conditions=True) + likelihood(figures, gap)
    width = max(map(len, shown))
    lines = [f"held out, {name}:  {label:{width}}  {text}" for label, text in shown.items()]
    return lines + [f"held out, {name}:  {note}" for note in uncalibrated(result)]


def _names(key: str) -> str:
    """Whom a figure of experts_per_token is about."""
    group = key.removeprefix(EACH)
    modality = group.removeprefix("depth_")
    return f"the layers that depth routers choose, as {modality} tokens," if group != modality else f"experts {group}"


def uncalibrated(result: dict[str, Any]) -> list[str]:
    """A line for every group of experts that thresholds let too few or too many tokens enter, on average over its
    experts and layers.

    Args:
      result: as `moma_jax.evaluate` returns it.
    """
    choice, threshold, lines = result.get("choice", {}), result.get("threshold", {}), []
    for key, taken in choice.items():
        if key.startswith(EACH) and taken and not 0.8 <= (load := threshold.get(key, taken) / taken) <= 1.25:
            whom = _names(key).replace("_", " ")
            lines.append(f"thresholds let {load:.2f} of the tokens enter {whom} that choice does; {REMEDY}")
    return lines


def _label(routing: str, figures: dict[str, Any]) -> str:
    """A routing's name, and whether its loss is a likelihood."""
    match routing:
        case "unigram":
            return "unigram model"
        case "choice" if "perplexity" not in figures:
            return "choice (sees the future)"
        case "choice":
            return "choice (no routers)"
        case _:
            return f"{routing} routing"


def evaluation_tables(result: dict[str, Any]) -> list[Table]:
    """`moma eval`'s tables: losses, with the gap to choice where there is one; perplexities; costs.

    Args:
      result: as `moma_jax.evaluate` returns it.
    """
    shown = {name: figures for name, figures in result.items() if name != "gap_percent"}
    routings = {name: figures for name, figures in shown.items() if name != "unigram"}
    measures = [key.removeprefix("loss") for key in shown["unigram"] if key.startswith("loss")]
    return [
        _losses(shown, result["gap_percent"], measures),
        *_perplexities({name: f for name, f in routings.items() if "perplexity" in f}, measures),
        _costs(routings),
    ]


def _losses(shown: dict[str, Any], gaps: dict[str, Any], measures: list[str]) -> Table:
    table = _table("loss", [head for name in shown for head in ([name, "gap"] if name in gaps else [name])])
    if "choice" in shown and "perplexity" not in shown["choice"]:
        table.caption = SEES_THE_FUTURE
    for measure in measures:
        cells = []
        for name, figures in shown.items():
            cells.append(_number(figures.get(f"loss{measure}"), "{:,.4f}"))
            if name in gaps:
                cells.append(_number(gaps[name].get(f"loss{measure}"), "{:+.2f}%"))
        table.add_row(_words(measure), *cells)
    return table


def _perplexities(causal: dict[str, Any], measures: list[str]) -> list[Table]:
    if not causal:
        return []
    table = _table("perplexity", [*causal, "targets"])
    for measure in measures:
        cells = [_number(figures.get(f"perplexity{measure}"), "{:,.3f}") for figures in causal.values()]
        table.add_row(_words(measure), *cells, f"{next(iter(causal.values()))[f'tokens{measure}']:,}")
    return [table]


def _costs(routings: dict[str, Any]) -> Table:
    table = _table("cost", [*routings])
    if notes := uncalibrated(routings):
        table.caption = "\n".join(notes)
    for words, key, form in (("experts per token", "experts_per_token", "{:.3f}"), ("seconds", "seconds", "{:.2f}")):
        table.add_row(words, *(_number(figures.get(key), form) for figures in routings.values()))
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), caption_justify="left")
    table.add_column(title, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _words(measure: str) -> str:
    return measure.strip("_").replace("_", " ") or "all"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
