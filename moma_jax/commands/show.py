"""Runs or a store at a glance; as pictures, or a page."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Annotated, Any

import jax
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from moma_jax.codec.pictures import png_of
from moma_jax.commands import print_result
from moma_jax.config import Config
from moma_jax.config_json import from_json
from moma_jax.cost import cost
from moma_jax.data.store import Store, open_store
from moma_jax.errors import InputError
from moma_jax.rules import Unloaded
from moma_jax.runs.directory import RunDir
from moma_jax.runs.journal import records_of
from moma_jax.runs.status import read_status
from moma_jax.storage.directory import require_new_file, write_file

MOST_DOCUMENTS = 256
"""Documents of a sheet, at most."""


def show(
    paths: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN|STORE")]],
    n: int = 0,
    html: str | None = None,
    out: str = "sheet.png",
    seed: int = 0,
    json: bool = False,
) -> None:
    """A run at a glance: what it is, how far it is, its last train and eval records, its checkpoints. A store: its
    documents, tokens and codecs. With --n, also a contact sheet: documents as the model sees them, decoded, and of a
    run the batch that it trains on next, packed rows coloured by modality and document. With --html, a page to look at,
    of one run or of several side by side: losses, what experts do, samples, speed, configs; it needs no network.

    Args:
      paths: Run directory, or a token store; several run directories with --html.
      n: Documents on the sheet; 0 makes none.
      html: The page, a new HTML file.
      out: The sheet, a new PNG file.
      seed: Of the choice of documents.
      json: Print JSON.
    """
    if html is not None:
        return _page(paths, html)
    if len(paths) != 1:
        raise InputError("moma show: give one run or store; several runs go with --html page.html")
    (path,) = paths
    is_store = RunDir(path).read_json("config.json") is None and RunDir(path).read_json("manifest.json") is not None
    found = glance_of_store(path) if is_store else glance(path)
    if n:
        if n < 0 or n > MOST_DOCUMENTS:
            raise InputError(f"--n: {n} is not from 0 to {MOST_DOCUMENTS}")
        require_new_file("--out", out)
        jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy with the very run
        sheet = store_sheet(open_store(path), n, seed) if is_store else run_sheet(path, n, seed)
        write_file(out, png_of(sheet))
        found["sheet"] = out
    print_result(found, json, format_store if is_store else format_glance)
    if n and not json:
        print(out)


def _page(paths: tuple[str, ...], out: str) -> None:
    from moma_jax.page.reading import read_seen
    from moma_jax.page.write import page

    require_new_file("--html", out)
    if len({os.path.realpath(path) for path in paths}) < len(paths) or not paths:
        raise InputError("moma show: name each run once, and at least one")
    names = [path.rstrip("/").rpartition("/")[2] for path in paths]
    alike = len(set(names)) < len(names)
    seen = [read_seen(path, path if alike else name) for path, name in zip(paths, names, strict=True)]
    write_file(out, page(", ".join(each.name for each in seen), seen))
    print(out)


def store_sheet(store: Store, count: int, seed: int) -> Image.Image:
    """Documents of a store."""
    from moma_jax.data.sheet import document_sheet, shown_documents  # a glance does without, and opens at once

    return document_sheet(store.path, shown_documents(store, count, seed))


def run_sheet(path: str, count: int, seed: int) -> Image.Image:
    """The next batch of a run above documents of its first store."""
    from moma_jax.checks import resolve
    from moma_jax.data.sheet import batch_sheet, below_each_other
    from moma_jax.data.stream import open_stream
    from moma_jax.runs.checkpoint import Checkpoints
    from moma_jax.training.load import config_of

    config = resolve(config_of(path))
    with contextlib.closing(Checkpoints(RunDir(path))) as checkpoints:
        latest = checkpoints.latest()
        cursor = None if latest is None else checkpoints.saved(latest).cursor
    with open_stream(config, cursor=cursor) as stream:
        batch = next(stream).batch
    names = [m.name for m in config.data.modalities]
    packed = batch_sheet(f"{path}, after step {latest or 0}", batch, names, config.data.group_rows)
    if config.data.kind != "store":
        return packed
    return below_each_other([packed, store_sheet(open_store(config.data.stores[0].path), count, seed)])


def glance_of_store(path: str) -> dict[str, Any]:
    """What `moma show` prints of a store: "store", "documents", "broken", "counts" of documents and tokens by
    collection and split, "modalities" with their ids, "image_codec": its kind, None without one."""
    store = open_store(path)
    codec, vocabulary = store.codecs.image, store.vocabulary
    known = {"documents": 0, "broken": 0, "counts": {}} | store.manifest
    return {
        "store": path,
        **{name: known[name] for name in ("documents", "broken", "counts")},
        "modalities": {m.name: {"ids": m.size, "span": m.span} for m in vocabulary.modalities},
        "image_codec": None if codec is None else codec.get("kind"),
    }


def format_store(found: dict[str, Any]) -> str:
    """What `glance_of_store` returned, for the terminal."""
    lines = [f"{found['store']}: {found['documents']:,} documents, {found['broken']:,} broken"]
    for name, own in found["modalities"].items():
        span = f", spans of {own['span']:,}" if own["span"] else ""
        codec = f", {found['image_codec'] or 'ready codes'}" if name == "image" else ""
        lines.append(f"{name}: {own['ids']:,} ids{span}{codec}")
    for name, count in found["counts"].items():
        tokens = ", ".join(f"{number:,} {modality}" for modality, number in count["tokens"].items())
        lines.append(f"{name}: {count['documents']:,} documents; tokens: {tokens}")
    return "\n".join(lines) + "\n"


def glance(path: str) -> dict[str, Any]:
    """What `moma show` prints of a run.

    Returns:
      "run"; "state", "step", "total", "updated" (seconds since 1970) of status.json, None before training; "config":
      its main figures; "train": the last train record or None; "eval": the last record of each evaluation set and
      routing; "checkpoints": their steps.

    Raises:
      InputError: there is no run.
    """
    run = RunDir(path)
    written = run.read_json("config.json")
    if written is None:
        raise InputError(f"{path}: neither config.json nor manifest.json here; give a run directory or a store")
    config, status, records = from_json(written), read_status(path), records_of(run) or []
    evaluated = {(r["eval_set"], r["routing"]): r for r in records if r["kind"] == "eval"}
    steps = {name.split("/")[1] for name in run.names("checkpoints/")}
    return {
        "run": path,
        **{name: status.get(name) for name in ("state", "step", "total", "updated")},
        "config": {
            **{name: getattr(config.model, name) for name in ("ffn", "layers", "width", "hidden")},
            "parameters": _parameters(config),
            "batch_rows": config.train.batch_rows,
            "sequence": config.data.sequence,
            "stores": [store.path for store in config.data.stores],
        },
        "train": next((r for r in reversed(records) if r["kind"] == "train"), None),
        "eval": [*evaluated.values()],
        "checkpoints": sorted(int(step) for step in steps if step.isdecimal()),
    }


def _parameters(config: Config) -> int | None:
    """How many there are; None where a rule whose code is not run for this has some of its own."""
    return None if isinstance(config.model.router, Unloaded) else cost(config)["parameters"]["total"]


def format_glance(found: dict[str, Any]) -> str:
    """What `glance` returned, for the terminal."""
    config, train = found["config"], found["train"]
    when = "" if found["updated"] is None else time.strftime(", %Y-%m-%d %H:%M", time.localtime(found["updated"]))
    state = "not begun" if found["state"] is None else f"{found['state']}, step {found['step']:,} of {found['total']:,}"
    parameters = "unknown" if config["parameters"] is None else f"{config['parameters']:,}"
    lines = [
        f"{found['run']}: {state}{when}",
        f"{config['ffn']}, {config['layers']} layers, width {config['width']}, hidden {config['hidden']}, "
        f"{parameters} parameters; {config['batch_rows']} rows of {config['sequence']:,} an update",
        f"checkpoints: {', '.join(map(str, found['checkpoints'])) or 'none'}",
    ]
    records = [("train", "", train)] * (train is not None)
    records += [(record["eval_set"], record["routing"], record) for record in found["eval"]]
    losses = [name for name in (records[0][2] if records else {}) if name.split("_")[0] == "loss"]
    table = Table("record", "routing", *(["step", *losses, "perplexity", "tokens/s"]), box=None, pad_edge=False)
    for name, routing, record in records:
        figures = [_figure(record.get(key)) for key in (*losses, "perplexity", "tokens_per_second")]
        table.add_row(name, routing, f"{record['step']:,}", *figures)
    console = Console(width=120, highlight=False, markup=False)
    with console.capture() as capture:
        console.print("\n".join(lines), *([table] if records else []), soft_wrap=not records)
    return capture.get()


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4f}"
