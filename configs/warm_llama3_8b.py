"""A 4t4i MoMa that begins as Llama-3.1-8B, on pictures of 1024 codes of 8,192 and text.

Command:   moma convert from-llama Llama-3.1-8B --codec CODEC --out runs/llama
           python -c "import moma_jax as m; m.upcycle('runs/llama',
               m.recipe('configs/warm_llama3_8b.py', {'run.dir': 'runs/moma'}))"
           moma train runs/moma
           moma cost configs/warm_llama3_8b.py                     (parameters, FLOPs, bytes; needs no data)
           moma plan configs/warm_llama3_8b.py --topology v5p-128  (does it fit a pod; needs no TPU; or h100:8x8)
Data:      a store under stores/mine, made with `moma prepare ... --vocabulary runs/llama/vocabulary`.
Hardware:  64 TPU v5p or 64 H100; docs/results/warm_start.md has what each needs.
Time:      an estimate, not a measurement, by `moma cost` and `moma plan`.
Losses:    not run here.

Where the numbers come from: Llama-3.1-8B has 32 layers of width 4,096, 32 heads of 128 channels that share 8 of keys,
an FFN of 14,336 and two tables of embeddings. Its 128,256 ids with six marks before them are rounded up to 128,384
(1,003 x 128), and 8,192 codes follow. An FFN has 3 x 4,096 x 14,336 = 176 million parameters; 32 layers of eight
experts have 45.1 billion, of which a token meets an eighth, as its modality's four experts take a quarter of the tokens
each. With attention (1.34 billion) and the tables (1.12) these are 47.6 billion parameters, and a token costs what it
costs in Llama-3.1-8B. In float32 with gradients and both moments they take 761 GB: 11.9 GB on each of 64 devices.
"""

import dataclasses

from moma_jax import recipes, shipped
from moma_jax.config import TEXT, Config, ModelConfig, RopeScaling, RunConfig


def config() -> Config:
    """The recipe: configs/warm_qwen3_1b7.py with another seed's decoder and ids, and a lower learning rate."""
    base = recipes.load(shipped.neighbour(__file__, "warm_qwen3_1b7"))
    model = ModelConfig(
        ffn="4t4i",
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        ffn_width=21504,  # 3/2 of the hidden size, 14,336
        norm="pre",
        qk_norm="none",
        rope_theta=5e5,
        rope_scaling=RopeScaling(factor=8.0, low=1.0, high=4.0, positions=8192),
        norm_epsilon=1e-5,
        remat="full",
    )
    _, image = base.data.modalities
    data = dataclasses.replace(base.data, modalities=(dataclasses.replace(TEXT, size=128384), image))
    optimizer = dataclasses.replace(base.optimizer, peak_lr=3e-5)
    return dataclasses.replace(base, model=model, data=data, optimizer=optimizer, run=RunConfig())
