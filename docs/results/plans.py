"""Makes plans.md: what `moma plan` says of the paper's models on seven slices of TPUs.

Command: python docs/results/plans.py                           (all rows; five to eight minutes each on two cores)
         python docs/results/plans.py paper_90m 4t4i v5e-16     (only rows that have these words)
Needs:   pip install -e ".[plan]"; no accelerator.
Exit:    1 where a step moves the weights of experts that live apart, or holds logits beyond a chunk of a device's own.

Meshes, microbatches and, where the recipe's own does not fit, the remat policy are those that `moma plan` chooses.
Finished rows are kept in plans.json, and plans.md is written, after each row; the same command again does the rest.
Remove plans.json to begin anew.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import moma_jax

HERE = Path(__file__).parent
RECIPES = ("paper_90m", "paper_435m", "paper_1b4")
VARIANTS = ("dense", "8x", "4t4i")
TOPOLOGIES = ("v5p-128", "v6e-64", "v5e-256", "v4-32", "v5e-16", "v5e-64", "v5p-64")
KEPT = (
    *("topology", "devices", "mesh", "accumulate", "remat", "fits", "bytes_per_device", "memory_per_device"),
    *("step_seconds_estimate", "step_seconds_range", "mfu_range", "tokens_per_second_estimate", "mfu_estimate"),
    "exposed_communication_share",
    *("expert_stacks_gathered", "replicated_logits"),
)
COMPILERS = ("jax", "libtpu")
HEAD = """# What the paper's models need on seven slices

By `python docs/results/plans.py`, {done} of {rows} rows so far: the real training step, with the paper's batch,
compiled for each slice by the TPU compiler ({versions}) on a machine without one. Memory is the
compiler's; seconds, tokens/s and MFU are estimates from the compiled program
([how](../../moma_jax/plan/estimate.py)), good for comparing rows, not measurements; what a step takes lies in the range
behind it. MFU counts the FLOPs of `moma cost`. Any row again:
`moma plan configs/RECIPE.py --model.ffn FFN --topology SLICE`.

| recipe | ffn | slice | devices | mesh | accumulate | remat | GiB per device | s/step | tokens/s | MFU | waiting |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def main(words: list[str]) -> int:
    """Does what is not done yet and writes the table; the exit code."""
    path = HERE / "plans.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    wanted = [row for row in itertools.product(RECIPES, VARIANTS, TOPOLOGIES) if set(words) <= set(row)]
    if not wanted:
        print(f"{' '.join(words)}: in no row; words are {' '.join(RECIPES + VARIANTS + TOPOLOGIES)}", file=sys.stderr)
        return 2
    for recipe, ffn, topology in wanted:
        name = f"{recipe} {ffn} {topology}"
        if name in rows:
            continue
        start = time.monotonic()
        config = moma_jax.recipe(HERE.parent.parent / "configs" / f"{recipe}.py", {"model.ffn": ffn})
        rows[name] = planned(config, topology)
        path.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"{name}: {written(name, rows[name])} ({time.monotonic() - start:.0f} s)", flush=True)
        (HERE / "plans.md").write_text(table(rows))
    wrong = [name for name, row in rows.items() if row.get("expert_stacks_gathered") or row.get("replicated_logits")]
    for name in wrong:
        row = rows[name]
        print(f"{name}: moves {row['expert_stacks_gathered']}, logits replicated: {row['replicated_logits']}")
    return 1 if wrong else 0


def planned(config: moma_jax.config.Config, topology: str) -> dict:
    """What is kept of a plan, with the versions that made it."""
    plan = moma_jax.plan(config, topology)
    made_by = ", ".join(f"{package} {version(package)}" for package in COMPILERS)
    return {**{key: plan[key] for key in KEPT}, "versions": made_by}


def memory(row: dict) -> str:
    """GiB of a device that a plan takes."""
    total = row["bytes_per_device"]["total"]
    taken = f"{'?' if total is None else f'{total / 2**30:.1f}'} of {row['memory_per_device'] / 2**30:.0f}"
    return taken if row["fits"] else f"{taken}: does not fit"


def table(rows: dict[str, dict]) -> str:
    """The page."""
    order = [" ".join(row) for row in itertools.product(RECIPES, VARIANTS, TOPOLOGIES)]
    lines = [written(name, rows[name]) for name in order if name in rows]
    versions = "; ".join(sorted({row["versions"] for row in rows.values() if "versions" in row}))
    head = HEAD.format(versions=versions or "of unknown version", done=len(lines), rows=len(order))
    return head + "\n".join(lines) + "\n"


def written(name: str, row: dict) -> str:
    """One line of the table."""
    recipe, ffn, topology = name.split()
    mesh = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1) or "one device"
    if row["fits"]:
        (least, most), (low, high) = row["step_seconds_range"], row["mfu_range"]
        speed = [
            f"{row['step_seconds_estimate']:.2f} ({least:.2f} to {most:.2f})",
            f"{row['tokens_per_second_estimate']:,.0f}",
            f"{row['mfu_estimate']:.1%} ({low:.1%} to {high:.1%})",
            f"{row['exposed_communication_share']:.1%}",
        ]
    else:
        speed = ["", "", "", ""]
    setting = [str(row["devices"]), mesh, str(row["accumulate"]), row["remat"]]
    cells = [recipe, ffn, topology, *setting, memory(row), *speed]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
