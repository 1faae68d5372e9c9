"""A 4t4i MoMa that begins as Qwen3-1.7B, on pictures of 1024 codes of 8,192 and text.

Command:   moma convert from-qwen3 Qwen3-1.7B-Base --codec CODEC --out runs/qwen3
           python -c "import moma_jax as m; m.upcycle('runs/qwen3',
               m.recipe('configs/warm_qwen3_1b7.py', {'run.dir': 'runs/moma'}))"
           moma train runs/moma
           moma cost configs/warm_qwen3_1b7.py                     (parameters, FLOPs, bytes; needs no data)
           moma plan configs/warm_qwen3_1b7.py --topology v5p-128  (does it fit a pod; needs no TPU; or h100:8x8)
Data:      a store under stores/mine, made with `moma prepare ... --vocabulary runs/qwen3/vocabulary`.
Hardware:  64 TPU v5p or 64 H100; docs/results/warm_start.md has what each needs.
Time:      an estimate, not a measurement, by `moma cost` and `moma plan`.
Losses:    not run here.

Where the numbers come from: Qwen3-1.7B has 28 layers of width 2,048, 16 heads of 128 channels that share 8 of keys, an
FFN of 6,144, and one table for both embeddings. Its 151,936 ids with six marks before them are rounded up to 152,064
(1,188 x 128), and 8,192 codes follow. An FFN has 3 x 2,048 x 6,144 = 37.7 million parameters; 28 layers of eight
experts have 8.46 billion, of which a token meets an eighth, as its modality's four experts take a quarter of the tokens
each. With attention (0.35 billion) and the table (0.33) these are 9.1 billion parameters, and a token costs what it
costs in Qwen3-1.7B. In float32 with gradients and both moments 9.1 billion take 146 GB: 2.3 GB on each of 64 devices.
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
    StoreConfig,
    TrainConfig,
)


def config() -> Config:
    """The recipe."""
    store = "stores/mine"
    return Config(
        model=ModelConfig(
            ffn="4t4i",
            layers=28,
            width=2048,
            heads=16,
            kv_heads=8,
            ffn_width=9216,  # 3/2 of the hidden size, 6,144
            norm="pre",
            qk_norm="rms",
            rope_theta=1e6,
            norm_epsilon=1e-6,
            tied_embeddings=True,
            remat="dots",
        ),
        data=DataConfig(
            modalities=(dataclasses.replace(TEXT, size=152064), IMAGE),
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
        optimizer=OptimizerConfig(peak_lr=5e-5, end_lr=1e-6, schedule="cosine", warmup_steps=2000),
        train=TrainConfig(
            tokens=1e11,
            batch_rows=512,  # 2,097,152 tokens
            eval_sets=(EvalSet("heldout", rows=64),),
            eval_every=1000,
            checkpoint_every=1000,
        ),
    )
