"""MoMa 1.4B, the paper's pre-training run (arXiv 2407.21770, Tables 1 and 5).

Command:   moma train configs/paper_1b4.py       (--model.ffn dense, 8x, 1t1i, 4t4i: Table 1)
           moma cost configs/paper_1b4.py --model.ffn dense  (parameters, FLOPs, bytes; needs no data)
           moma bench step configs/paper_1b4.py  (speed on synthetic tokens; needs no data)
           moma plan configs/paper_1b4.py --topology v5p-128  (does it fit a pod; needs no TPU)
Data:      a store under stores/paper, made with `moma prepare` from your own pictures (1024 codes each), captions and
           text; the paper's data are not public. Any field can be overridden, quotas and mixture included.
Hardware:  256 A100 (8 rows each) or the like; 4t4i's parameters, gradients and moments are 115 GB in float32.
Time:      an estimate, not a measurement: 1.06e22 FLOPs by `moma cost` for 120,000 updates take 4.4 days
           at 35% of the bf16 peak, which is what the paper's dense 435M model reached. 4t4i ran 17% below dense there.
Losses:    not run here.
"""

from moma_jax.config import (
    IMAGE,
    TEXT,
    Config,
    DataConfig,
    EvalSet,
    ModelConfig,
    OptimizerConfig,
    RoutersConfig,
    StoreConfig,
    TrainConfig,
)


def config() -> Config:
    """The recipe."""
    store = "stores/paper"
    return Config(
        model=ModelConfig(
            ffn="4t4i",
            layers=24,
            width=2048,
            heads=16,
            ffn_width=8192,
            norm="swin",
            remat="dots",
        ),
        data=DataConfig(
            modalities=(TEXT, IMAGE),  # 57,344 text ids and 8,192 image codes, 1024 to a picture; quotas 0.5 and 0.5
            # Text of pairs and interleaved documents counts too; the text store fills up what is left of its quota.
            stores=(
                StoreConfig("text", store, "text"),
                StoreConfig("pairs", store, "pairs", share={"image": 0.8}),
                StoreConfig("interleaved", store, "interleaved", share={"image": 0.2}),
            ),
            sequence=4096,
            group_rows=4,  # the paper does not say; up to 512 devices can share an update
            lanes=512,
            prefetch=8,
            read_threads=8,
            cache_bytes=2 << 30,
        ),
        optimizer=OptimizerConfig(peak_lr=1e-4, end_lr=1e-6, schedule="linear", warmup_steps=4000),
        train=TrainConfig(
            steps=120_000,
            batch_rows=2048,  # 8,388,608 tokens
            eval_sets=(EvalSet("heldout", rows=64),),
            eval_every=1000,
            checkpoint_every=1000,
            keep_every=20_000,
        ),
        routers=RoutersConfig(  # Table 6
            steps=10_000,
            batch_rows=1024,  # 4,194,304 tokens
            peak_lr=1e-4,
            end_lr=1e-6,
            schedule="linear",
            warmup_steps=2000,
        ),
    )
