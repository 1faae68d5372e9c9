"""How much host memory reading takes, beside its bound: `moma bench data` in a process of its own for each setting.

Command: python docs/results/loader_memory.py DIR     # makes a store of 75 MB there, in a minute
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from moma_jax.checks import resolve
from moma_jax.config import (
    Config,
    DataConfig,
    Modality,
    ModelConfig,
    PrepareConfig,
    RunConfig,
    StoreConfig,
    TrainConfig,
)
from moma_jax.config_json import to_json
from moma_jax.runs.directory import commit, processor
from moma_jax.training.pretrain import prepare_missing_stores

SETTINGS = (
    (),
    ("--data.cache-bytes", "4194304"),
    ("--data.prefetch", "16"),
    ("--data.prefetch", "64"),
    ("--data.read-threads", "8"),
    ("--train.batch-rows", "128"),
)


def config_in(folder: Path) -> Config:
    """Drawn scenes of 1,024 codes, in rows of 4,096."""
    modalities = (Modality("text", "t", size=300, quota=0.042), Modality("image", "i", size=64, span=1024, quota=0.959))
    prepare = PrepareConfig(documents=24000, text_size=300, image_side=32, colours=64, parts=2)
    stores = (StoreConfig("scenes", str(folder / "store")),)
    data = DataConfig(modalities=modalities, stores=stores, prepare=prepare, sequence=4096, group_rows=2)
    model = ModelConfig(ffn="dense", layers=2, width=64, heads=2, ffn_width=64)
    train = TrainConfig(steps=10, batch_rows=32)
    return resolve(Config(model=model, data=data, train=train, run=RunConfig(dir=str(folder / "run"))))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    config = config_in(folder)
    prepare_missing_stores(config, progress=True)
    recipe = folder / "config.json"
    recipe.write_text(json.dumps(to_json(config)))
    print(f"{processor()}, {commit()}: grew, MiB; at most")
    for words in SETTINGS:
        bench = [sys.executable, "-m", "moma_jax", "bench", "data", str(recipe), *words, "--seconds", "8", "--json"]
        found = json.loads(subprocess.run(bench, check=True, stdout=subprocess.PIPE, text=True).stdout)
        grown, bound = found["host_bytes"] / 2**20, found["host_bytes_bound"]["total"] / 2**20
        print(f"{' '.join(words) or 'as it comes'}: {grown:,.0f}; {bound:,.0f}", flush=True)


if __name__ == "__main__":
    main()
