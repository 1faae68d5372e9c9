"""What a step of every rival would take on a pod: `moma plan` of the studies' variants at the size of the paper.

Command: python docs/results/rivals_plans.py              (all; three to four minutes each on one core; goes on)
         python docs/results/rivals_plans.py dense-mot    (these alone)
Needs:   pip install -e ".[plan]"; no accelerator.

The variants of configs/studies/rivals.py and more_rivals.py on configs/paper_435m.py, matched to equal FLOPs again,
with the paper's batch on a v5p-128, all on one mesh and in two microbatches, so that steps differ by the variants
alone. Finished rows are kept in rivals_plans.json; remove it to begin anew. The table is printed, as rivals.md has it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from plans import memory, planned

import moma_jax
from moma_jax.cost import flops_per_token
from moma_jax.studies import Study, load_study
from moma_jax.studies.matching import match_variants

HERE = Path(__file__).parent
CONFIGS = HERE.parent.parent / "configs"
SLICE = "v5p-128"
SETTING = {"mesh.data": 32, "mesh.fsdp": 2, "train.accumulate": 2, "model.ffn": "dense"}
HEAD = """\
| variant | hidden | FLOPs per token, of dense's | GiB per device | s/step | of dense's | MFU |
|---|---|---|---|---|---|---|"""


def main(words: list[str]) -> int:
    """Plans what is not done yet and prints the table; the exit code."""
    path = HERE / "rivals_plans.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    matched = match_variants(on_the_papers_model())
    if unknown := set(words) - {each.variant.name for each in matched}:
        print(f"{' '.join(sorted(unknown))}: no variant of the studies", file=sys.stderr)
        return 2
    for each in matched:
        name = each.variant.name
        if name in rows or (words and name not in words):
            continue
        own = {"hidden": each.config.model.hidden, "flops_per_token": flops_per_token(each.config)}
        rows[name] = own | planned(each.config, SLICE)
        path.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"{name} is planned", file=sys.stderr, flush=True)
    print("\n".join([HEAD, *(line(name, rows) for name in rows)]))
    return 0


def on_the_papers_model() -> Study:
    """The variants of both studies at one size, the paper's."""
    studies = [load_study(CONFIGS / "studies" / name) for name in ("rivals.py", "more_rivals.py")]
    variants = {variant.name: variant for study in studies for variant in study.variants}
    base = moma_jax.recipe(CONFIGS / "paper_435m.py", SETTING)
    ours = {"base": base, "variants": tuple(variants.values()), "tokens": base.train.steps * base.batch_tokens}
    return dataclasses.replace(studies[0], **ours, seeds=(0,), budgets=(), sweep=None, records=None)


def line(name: str, rows: dict[str, dict]) -> str:
    """One line of the table."""
    row, dense = rows[name], rows["dense"]
    least, most = row["step_seconds_range"]
    cells = [
        name,
        f"{row['hidden']}",
        f"{row['flops_per_token'] / dense['flops_per_token']:.3f}",
        memory(row),
        f"{row['step_seconds_estimate']:.2f} ({least:.2f} to {most:.2f})",
        f"{row['step_seconds_estimate'] / dense['step_seconds_estimate']:.2f}",
        f"{row['mfu_estimate']:.1%}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
