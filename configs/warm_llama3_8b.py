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

from moma_jax.config import (
    IMAGE,
    TEXT,
    Config,
    DataConfig,
    EvalSet,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    StoreConfig,
    TrainConfig,
)


def config() -> Config:
    """The recipe."""
    store = "stores/mine"
    return Config(
        model=ModelConfig(
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
        ),
        data=DataConfig(
            modalities=(dataclasses.replace(TEXT, size=128384), IMAGE),
            stores=(
                StoreConfig("text", store, "text"),
                StoreConfig("pairs", store, "pairs", share={"image": 0.8}),
                StoreConfig("interleaved", store, "interleaved", share={"image": 0.2}),
            ),
            sequence=4096,
            group_rows=4,
            lanes=128,
            prefetch=8,
            read_threads=8,
            cache_bytes=2 << 30,
        ),
        # Lower than from scratch, as the text experts are trained already.
        optimizer=OptimizerConfig(peak_lr=3e-5, end_lr=1e-6, schedule="cosine", warmup_steps=2000),
        train=TrainConfig(
            tokens=1e11,
            batch_rows=512,  # 2,097,152 tokens
            eval_sets=(EvalSet("heldout", rows=64),),
            eval_every=1000,
            checkpoint_every=1000,
        ),
    )
