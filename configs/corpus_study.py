"""What the scaling studies on two CPU cores share: a small model on real pictures and text (see configs/studies/).

Command:   moma study configs/studies/ffn.py
Data:      the folder named by MOMA_CORPUS (default ../shared/data; any Parquet folder of the documented schema),
           prepared on first use into stores/corpus_study: a BPE of 2,048 ids, pictures of 16 x 16 in a palette of 256.
Hardware:  2 CPU cores; one run uses one of them well, so start the command twice.
Time:      about 7 minutes a run of 8 million tokens on a core.

Small, so that a token costs little and a model of this size sees enough of them to be short of parameters: 16 tokens
for each of them, beside 2 in configs/corpus_cpu.py. Pre-norm, because routers learn little under swin norms: the norm
behind the layer takes the gate out of what a single expert says (see docs/results/paper.md).
"""

import os

from moma_jax.config import (
    Config,
    DataConfig,
    EvalSet,
    Modality,
    ModelConfig,
    OptimizerConfig,
    PrepareConfig,
    RunConfig,
    StoreConfig,
    TrainConfig,
)


def config() -> Config:
    """The recipe."""
    store = "stores/corpus_study"
    return Config(
        model=ModelConfig(ffn="4t4i", layers=4, width=64, heads=2, hidden=192, norm="pre"),
        data=DataConfig(
            modalities=(
                Modality("text", "t", size=2048, quota=0.5),
                Modality("image", "i", size=256, span=256, quota=0.5),
            ),
            stores=(
                StoreConfig("text", store, "text"),
                StoreConfig("pairs", store, "pairs", share={"image": 0.6}),
                StoreConfig("interleaved", store, "interleaved", share={"image": 0.4}),
            ),
            prepare=PrepareConfig(
                source=os.environ.get("MOMA_CORPUS", "../shared/data"), text_size=2048, image_side=16, colours=256
            ),
            sequence=384,
            group_rows=8,
            lanes=8,
        ),
        optimizer=OptimizerConfig(peak_lr=6e-3, end_lr=6e-5, schedule="cosine", warmup_steps=50),
        train=TrainConfig(
            tokens=8e6,
            batch_rows=8,
            eval_sets=(EvalSet("heldout", rows=128),),
            eval_every=260,
            checkpoint_every=520,
        ),
        run=RunConfig(tensorboard=False),
    )
