"""A language model that is given pictures and grown into a MoMa, against 4t4i from nothing, at equal total FLOPs.

Command: python docs/results/warm_start.py --dir runs/warm_start --out docs/results
         (the corpus where configs/corpus_study.py says; half an hour of one core a seed; runs that are there go on)

    text      a dense Llama (pre-norm, no QK-norm) on the corpus's text alone, 30% of the FLOPs; written as a Llama of
              Hugging Face and read back with room for the store's pictures (moma convert to-llama, from-llama)
    warm      grown into 4t4i, experts of both modalities copies of the Llama's, trained on text and pictures
    fresh     the same, experts of pictures drawn anew
    scratch   4t4i of the same size on text and pictures from the beginning

warm_start.json has every held-out evaluation, by FLOPs since the beginning of everything; warm_start.png its curves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

import matplotlib
import numpy as np

import moma_jax
from moma_jax.checks import resolve
from moma_jax.config import Config, StoreConfig, with_router
from moma_jax.convert import from_language_model, to_language_model
from moma_jax.cost import cost
from moma_jax.rules import with_gumbel
from moma_jax.upcycling.upcycle import upcycle

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CORPUS = os.environ.get("MOMA_CORPUS", "../shared/data")
SHARE = 0.3
"""Of the FLOPs, for the language model."""
SEEDS = (0, 1, 2)
LOSSES = ("loss", "loss_text", "loss_image")


def base(seed: int, directory: Path, ffn: str) -> Config:
    """configs/corpus_study.py as a Llama has its layers."""
    config = moma_jax.recipe("configs/corpus_study.py")
    model = dataclasses.replace(config.model, ffn=ffn, qk_norm="none")
    data, run = dataclasses.replace(config.data, seed=seed), dataclasses.replace(config.run, dir=str(directory))
    train = dataclasses.replace(config.train, seed=seed, eval_every=400)
    return resolve(dataclasses.replace(config, model=model, data=data, train=train, run=run))


def with_flops(config: Config, flops: float) -> Config:
    """The config with another budget."""
    return resolve(dataclasses.replace(config, train=dataclasses.replace(config.train, tokens=None, flops=flops)))


def language_model(seed: int, home: Path, flops: float) -> tuple[str, float]:
    """(the run of a Llama with room for pictures, FLOPs that it took)."""
    config = base(seed, home / "text", "dense")
    store, alone = config.data.stores[0].path, str(home.parent / "text_store")
    text = dataclasses.replace(config.data.modalities[0], quota=1.0)
    prepare = dataclasses.replace(config.data.prepare, source=f"{CORPUS}/text", tokenizer=f"{store}/tokenizer.json")
    settings = {"modalities": (text,), "stores": (StoreConfig("text", alone, "text"),), "prepare": prepare}
    data = dataclasses.replace(config.data, **settings)
    config = with_flops(dataclasses.replace(config, data=data), flops)
    moma_jax.train(config)
    if not (home / "begun").exists():
        if not (home / "llama").exists():
            to_language_model("llama", str(home / "text"), str(home / "llama"))
        from_language_model("llama", str(home / "llama"), str(home / "begun"), codec=store)
    return str(home / "begun"), cost(config)["run"]["flops"]


def curves(run: str, before: float) -> list[dict[str, float]]:
    """Held-out losses under the routing of training, and at the end under calibrated thresholds, by FLOPs."""
    config = moma_jax.load(run).config
    each = cost(config)["flops_per_token"]["train"] * config.batch_tokens
    return [
        {"flops": before + each * record["step"], "routing": record["routing"]}
        | {name: record[name] for name in LOSSES}
        for record in moma_jax.read_metrics(run)
        if record["kind"] == "eval" and record.get("eval_set") == "heldout" and "loss_image" in record
    ]


def study(seed: int, root: Path) -> dict[str, list[dict[str, float]]]:
    """All runs of one seed; curves by name."""
    home = root / str(seed)
    scratch = base(seed, home / "scratch", "4t4i")
    whole = cost(scratch)["run"]["flops"]
    moma_jax.train(scratch)
    found = {"scratch": curves(scratch.run.dir, 0.0)}
    begun, spent = language_model(seed, home, SHARE * whole)
    for name, fresh in (("warm", ()), ("fresh", ("image",))):
        config = with_flops(base(seed, home / name, "4t4i"), whole - spent)
        config = with_router(config, with_gumbel(config.model.router))
        if not (home / name / "config.json").exists():
            upcycle(begun, config, fresh=fresh)
        moma_jax.train(config)
        found[name] = curves(config.run.dir, spent)
    return found


def draw(found: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
    """Mean curves by modality, and each seed's."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True)
    colours = {"scratch": "black", "warm": "tab:red", "fresh": "tab:blue"}
    for axis, loss in zip(axes, LOSSES[1:], strict=True):
        for name, colour in colours.items():
            for number, runs in enumerate(own for own in found.values() if name in own):
                line = [record for record in runs[name] if record["routing"] == "choice"]
                label = name if number == 0 else None
                x, y = zip(*((record["flops"], record[loss]) for record in line), strict=True)
                axis.plot(x, y, color=colour, label=label, linewidth=1)
        axis.set(xlabel="FLOPs, the language model's included", ylabel=loss.replace("loss_", "held-out loss, "))
        axis.set_ylim(top=np.quantile([r[loss] for runs in found.values() for r in runs["scratch"]], 0.9) + 0.6)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where runs are")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    found = {}
    for seed in options.seeds:
        found[str(seed)] = study(seed, options.dir)
        (options.out / "warm_start.json").write_text(json.dumps(found, indent=1) + "\n")
        draw(found, options.out / "warm_start.png")
        for name, line in found[str(seed)].items():
            last = {record["routing"]: record for record in line}
            print(seed, name, *(f"{routing} {record['loss']:.4f}" for routing, record in last.items()))


if __name__ == "__main__":
    main()
