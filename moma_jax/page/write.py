"""The page: sections of HTML, Plotly's script and this package's own, in one file that needs no network."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
import plotly.offline
from PIL import Image

from moma_jax.codec.pictures import data_uri
from moma_jax.config import Config
from moma_jax.config_json import to_json
from moma_jax.errors import InputError
from moma_jax.fields import leaves
from moma_jax.page import curves, experts
from moma_jax.page.reading import Seen
from moma_jax.router import CAUSAL_ROUTINGS

MOST_BYTES = 8 << 20
"""Of a page."""
SHEET_WIDTH = 960
MOST_NAMED = 40
"""Experts of a run that are listed as dead or overloaded."""
OTHER_PLACES = ("run", "hosts")
"""Sections of a config that say where a run was, not what."""


class Section(NamedTuple):
    """A part of the page: its name in links, its heading, one line about it, its HTML."""

    name: str
    heading: str
    about: str
    content: str


def page(title: str, seen: list[Seen], more: Iterable[Section] = ()) -> bytes:
    """The HTML of some runs; InputError where it would be larger than MOST_BYTES.

    Args:
      more: sections that come after the runs' table.
    """
    sections = [_runs(seen), *more, _losses(seen), _gap(seen), *_routing(seen), *_rows(seen), *_samples(seen)]
    sections += [_speed(seen), _configs(seen)]
    sections = [section for section in sections if section.content]
    links = "".join(f"<a href='#{s.name}'>{html.escape(s.heading)}</a>" for s in sections)
    body = "".join(
        f"<section id='{s.name}'><h2>{html.escape(s.heading)}</h2>"
        f"<p class='about'>{html.escape(s.about)}</p>{s.content}</section>"
        for s in sections
    )
    script = f"<script>{plotly.offline.get_plotlyjs()}</script><script>{_file('page.js')}</script>"
    masks = f"<script type='application/json' id='masks'>{json.dumps(experts.MASKS)}</script>"
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{_file('page.css')}</style>"
    head += "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>"
    content = (
        f"<!doctype html><html lang='en' class='no-script'><head>{head}</head><body><h1>{html.escape(title)}</h1>"
        f"<nav aria-label='sections'>{links}</nav>{body}{masks}{script}</body></html>\n"
    ).encode()
    if len(content) > MOST_BYTES:
        raise InputError(f"--html: {len(content) / 2**20:.1f} MiB, more than a page may have; show fewer runs")
    return content


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def plot(name: str, figure: go.Figure | None) -> str:
    """A place for a plot, and its data."""
    if figure is None:
        return ""
    data = figure.to_json().replace("<", "\\u003c")  # a name in it may end the script, or begin a comment
    return (
        f"<div class='plot' id='{name}' role='img' aria-label='plot: {name}'></div>"
        f"<script type='application/json' id='data-{name}'>{data}</script>"
    )


def buttons(kind: str, target: str, names: dict[str, str], chosen: str) -> str:
    """A row of buttons of which one is pressed; `kind` is what they do, as page.js has it."""
    what = "axis" if kind == "axes" else "show"
    each = "".join(
        f"<button type='button' data-{what}='{html.escape(name)}' aria-pressed='{str(name == chosen).lower()}'>"
        f"{html.escape(words)}</button>"
        for name, words in names.items()
    )
    return f"<div class='controls' role='group' data-{kind}='{target}'>{each}</div>"


def table(heads: list[str], rows: list[list[str]], caption: str = "") -> str:
    """A table of texts, escaped."""
    head = "".join(f"<th scope='col'>{html.escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    named = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{named}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# Sections -------------------------------------------------------------------------------------------------------------


def _runs(seen: list[Seen]) -> Section:
    rows = []
    for each in seen:
        run, model, device = each.run, each.run.config.get("model", {}), each.run.summary.get("device", {})
        progress = f"{run.step:,}" + (f" of {run.total:,}" if run.total else "")
        where = f"{device.get('count', '')} {device.get('kind', '')}".strip() or "-"
        about = [str(model.get(name, "-")) for name in ("ffn", "layers", "width", "hidden")]
        spent = [f"{run.end.tokens:,}", f"{run.end.flops:.3g}", f"{run.end.seconds:,.0f}"]
        rows.append([each.name, run.state, progress, *about, *spent, where, str(run.summary.get("commit", "-"))[:12]])
    heads = [
        "run",
        "state",
        "updates",
        "FFN",
        "layers",
        "width",
        "hidden",
        "tokens",
        "FLOPs",
        "seconds",
        "device",
        "commit",
    ]
    return Section("runs", "Runs", "What was trained, and how far it is.", table(heads, rows) + _final(seen))


def _final(seen: list[Seen]) -> str:
    """The newest evaluation of every set and routing: it needs no script."""
    modalities = list(dict.fromkeys(modality for each in seen for modality in each.run.modalities))
    rows = []
    for each in seen:
        for record in {(r["eval_set"], r["routing"]): r for r in each.evaluated}.values():
            losses = [record.get(f"loss_{m}" if m else "loss") for m in ("", *modalities)]
            causal = record["routing"] in CAUSAL_ROUTINGS or each.run.unrouted
            routing = f"{record['routing']} ({'causal' if causal else 'sees the future'})"
            gap = record.get("gap_percent")
            cells = ["-" if loss is None else f"{loss:.4f}" for loss in losses] + [
                "-" if gap is None else f"{gap:+.2f}%"
            ]
            rows.append([each.name, record["eval_set"], routing, f"{record['step']:,}", *cells])
    heads = ["run", "set", "routing", "update", "loss", *modalities, "gap"]
    return table(heads, rows, "The newest held-out losses, nats per token") if rows else ""


def _losses(seen: list[Seen]) -> Section:
    about = "By modality: training (thin), and held out under each routing. Buttons change what runs along the x axis."
    content = buttons("axes", "losses", curves.AXES, "flops") + plot("losses", curves.losses(seen))
    return Section("loss", "Losses", about, content if any(each.run.curves for each in seen) else "")


def _gap(seen: list[Seen]) -> Section:
    about = "By how much the loss under a causal routing lies above that of training, whose experts see the future."
    return Section("gap", "The causal gap", about, plot("gaps", curves.gaps(seen)))


def _routing(seen: list[Seen]) -> Iterator[Section]:
    names = {name: name.replace("_", " ") for name in experts.FIGURES}
    for number, each in enumerate(each for each in seen if each.experts):
        found, key = experts.groups(each), f"heat-{number}"
        maps = ""
        for name in names:
            hidden, inner = " hidden" * (name != "load"), "".join(experts.heat_map(group, name) for group in found)
            maps += f"<div class='maps {key}' data-name='{name}'{hidden}>{inner}</div>"
        lines = [f"<li class='bad'>{html.escape(line)}</li>" for line in experts.named(each)[:MOST_NAMED]]
        told = "".join(lines) or "<li>no expert is dead or overloaded</li>"
        takes = "".join(experts.favourites(each, group) for group in found)
        about = f"At update {each.experts[0]['step']:,}, on held-out rows. Columns are experts, rows are layers."
        content = buttons("shows", key, names, "load") + maps + f"<ul>{told}</ul>" + takes
        yield Section(f"routing-{number}", f"Routing: {each.name}", about, content)


PACKED = (
    "One packed row as the model saw it: a line at its left for every document, a colour for each expert that took a "
    "token, stripes where several did; pictures with the experts of every code laid over them."
)

UNREAD = " Its store is not here, or no longer the one that it was trained on: ids stand for text and pictures."


def _rows(seen: list[Seen]) -> Iterator[Section]:
    for number, each in enumerate(each for each in seen if each.row):
        routings = list(dict.fromkeys(token["routing"] for token in each.row))
        routing = next((name for name in routings if name in CAUSAL_ROUTINGS), routings[0])
        last = len(each.row[0]["experts"]) - 1
        count = max(mask.bit_length() for token in each.row for mask in token["experts"])
        colours = [experts.MASKS[n % len(experts.MASKS)] for n in range(count)]
        keys = " ".join(f"<span class='key' style='background:{c}'>{n}</span>" for n, c in enumerate(colours))
        options = "".join(f"<option value='{n}'{' selected' * (n == last)}>{n}</option>" for n in range(last + 1))
        choose = f"<label>layer <select data-row='row-{number}'>{options}</select></label> experts: {keys}"
        body = f"<div class='row' id='row-{number}' tabindex='0'>{experts.row_html(each, routing)}</div>"
        content = f"<div class='controls'>{choose}</div>{body}"
        about = f"{PACKED} Routing: {routing}." + UNREAD * each.unread
        yield Section(f"packed-{number}", f"A packed row: {each.name}", about, content)


def _samples(seen: list[Seen]) -> Iterator[Section]:
    for number, each in enumerate(each for each in seen if each.sheets):
        shown = []
        for name, sheets in each.sheets.items():
            for step, picture in sheets.items():
                words = html.escape(f"{name}, update {step:,}")
                shown.append(f"<figure><figcaption>{words}</figcaption>{_sheet(picture, words)}</figure>")
        yield Section(f"samples-{number}", f"Samples: {each.name}", "What it wrote and drew.", "".join(reversed(shown)))


def _sheet(picture: Image.Image, words: str) -> str:
    if picture.width > SHEET_WIDTH:
        picture = picture.resize((SHEET_WIDTH, round(picture.height * SHEET_WIDTH / picture.width)))
    few = picture.convert("RGB").quantize(128).convert("RGB")
    return f"<img class='sheet' loading='lazy' alt='{words}' src='{data_uri(few)}'>"


def _speed(seen: list[Seen]) -> Section:
    content = plot("speeds", curves.speeds(seen)) + plot("shares", curves.shares(seen))
    return Section("speed", "Speed", "Tokens a second, and where the time went.", content)


def _configs(seen: list[Seen]) -> Section:
    """Fields that differ between runs; of one run those that are not the defaults."""
    flat = [dict(leaves({k: v for k, v in each.run.config.items() if k not in OTHER_PLACES})) for each in seen]
    others = flat if len(seen) > 1 else [*flat, dict(leaves(to_json(Config())))]
    names = dict.fromkeys(name for own in flat for name in own)
    rows = [[name, *("-" if name not in own else _short(own[name]) for own in others)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    heads = ["field", *(each.name for each in seen)] + (["default"] if len(seen) == 1 else [])
    return Section("config", "Configs", "Fields that differ.", table(heads, rows) if rows else "")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."
