"""A run at a glance: state, last records, checkpoints."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.table import Table

from moma_jax.commands import Run, print_result
from moma_jax.config import Config
from moma_jax.config_json import from_json
from moma_jax.cost import cost
from moma_jax.errors import InputError
from moma_jax.rules import Unloaded
from moma_jax.runs.directory import RunDir
from moma_jax.runs.journal import records_of


def show(run: Run, json: bool = False) -> None:
    """A run at a glance: what it is, how far it is, its last train and eval records, its checkpoints.

    Args:
      run: Run directory.
      json: Print JSON.
    """
    print_result(glance(run), json, format_glance)


def glance(path: str) -> dict[str, Any]:
    """What `moma show` prints.

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
        raise InputError(f"{path}: no config.json here; give a run directory")
    config, status, records = from_json(written), run.read_json("status.json") or {}, records_of(run) or []
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
    console = Console(width=120, highlight=False)
    with console.capture() as capture:
        console.print("\n".join(lines), *([table] if records else []), soft_wrap=not records)
    return capture.get()


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4f}"
