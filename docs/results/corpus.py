"""Makes corpus.md and corpus.png from four finished runs of configs/corpus_cpu.py.

Command: python docs/results/corpus.py runs/corpus-dense runs/corpus-8x runs/corpus-1t1i runs/corpus-4t4i
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import moma_jax

HERE = Path(__file__).parent
KINDS = {"loss": "overall", "loss_text": "text", "loss_image": "image"}


def read(run: str) -> dict:
    """What the report needs of one run."""
    summary = json.loads((Path(run) / "summary.json").read_text())
    records = moma_jax.read_metrics(run)
    return {
        "ffn": moma_jax.recipe(run).model.ffn,
        "summary": summary,
        "cost": moma_jax.cost(moma_jax.recipe(run)),
        "eval": [r for r in records if r["kind"] == "eval"],
        "train": [r for r in records if r["kind"] == "train"],
    }


def require_fair(runs: list[dict]) -> None:
    """Same data in the same order (cumulative counts of every record) and FLOPs within 1%."""
    seen = [[(r["step"], r["tokens_text"], r["tokens_image"]) for r in run["train"]] for run in runs]
    assert all(s == seen[0] for s in seen), "the runs saw different data"
    flops = [run["summary"]["final"]["flops"] for run in runs]
    assert max(flops) < 1.01 * min(flops), flops


def draw(runs: list[dict], path: Path) -> None:
    """Held-out curves, one panel per modality."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for panel, (key, name) in zip(panels, KINDS.items(), strict=True):
        for run in runs:
            tokens = [r["step"] * run["cost"]["run"]["tokens"] / run["summary"]["steps"] / 1e6 for r in run["eval"]]
            panel.plot(tokens, [r[key] for r in run["eval"]], marker="o", markersize=3, label=run["ffn"])
        panel.set(title=f"held out, {name}", xlabel="million positions", ylabel="nats per token (choice routing)")
        panel.grid(alpha=0.3)
    panels[0].legend(title="model.ffn")
    figure.savefig(path, dpi=110)


def table(runs: list[dict]) -> str:
    """Final figures as Markdown."""
    lines = [
        "| ffn | overall | text | image | parameters | train FLOPs per token | share of dense | wall time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    dense = runs[0]["cost"]["flops_per_token"]["train"]
    for run in runs:
        last, cost = run["eval"][-1], run["cost"]
        flops = cost["flops_per_token"]["train"]
        losses = " | ".join(f"{last[key]:.3f}" for key in KINDS)
        lines.append(
            f"| {run['ffn']} | {losses} | {cost['parameters']['total'] / 1e6:.2f}M | {flops / 1e6:.2f}M "
            f"| {flops / dense:.4f} | {run['summary']['wall_seconds'] / 60:.0f} min |"
        )
    (baseline,) = [e["unigram"] for e in runs[0]["summary"]["eval"].values()]
    losses = " | ".join(f"{baseline[key]:.3f}" for key in KINDS)
    return "\n".join([*lines, f"| unigram | {losses} | | | | |"])


def main(paths: list[str]) -> None:
    """Checks fairness, draws, and prints the table and the circumstances."""
    runs = [read(path) for path in paths]
    require_fair(runs)
    draw(runs, HERE / "corpus.png")
    summary = runs[0]["summary"]
    print(table(runs))
    print(f"\ncommit {summary['commit']}, versions {summary['versions']}, device {summary['device']}")
    print(
        f"real tokens {summary['final']['tokens']:,}: { ({k: v for k, v in summary['final'].items() if 'epoch' in k}) }"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
