"""MoMa 90M, the paper's pre-training run (arXiv 2407.21770, Tables 1 and 5).

Command:   moma train configs/paper_90m.py       (--model.ffn dense, 8x, 1t1i, 4t4i: Table 1)
           moma cost configs/paper_90m.py --model.ffn dense  (parameters, FLOPs, bytes; needs no data)
           moma bench step configs/paper_90m.py  (speed on synthetic tokens; needs no data)
           moma plan configs/paper_90m.py --topology v5e-16  (does it fit a pod; needs no TPU)
Data:      a store under stores/paper, made with `moma prepare` from your own pictures (1024 codes each), captions and
           text; the paper's data are not public. Any field can be overridden, quotas and mixture included.
Hardware:  64 A100 (24 rows each) or the like; one device holds the model. A step of one row fits 8 GiB of a CPU.
Time:      an estimate, not a measurement: 5.6e20 FLOPs by `moma cost` for 160,000 updates take 22 hours
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
            layers=8,
            width=512,
            heads=8,
            ffn_width=2048,
            norm="swin",
            remat="none",
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
            group_rows=6,  # the 435M model's routing groups, so that sizes can be compared
            lanes=256,
            prefetch=8,
            read_threads=8,
            cache_bytes=2 << 30,
        ),
        optimizer=OptimizerConfig(peak_lr=1e-4, end_lr=1e-6, schedule="linear", warmup_steps=4000),
        train=TrainConfig(
            steps=160_000,
            batch_rows=1536,  # 6,291,456 tokens
            eval_sets=(EvalSet("heldout", rows=96),),
            eval_every=1000,
            checkpoint_every=1000,
            keep_every=20_000,
        ),
        routers=RoutersConfig(  # Table 6
            steps=5000,
            batch_rows=1152,  # 4,718,592 tokens: the paper's 4,194,304 in routing groups that 64 devices can share
            peak_lr=1e-4,
            end_lr=1e-6,
            schedule="linear",
            warmup_steps=1000,
        ),
    )
