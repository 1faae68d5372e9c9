"""Real pictures and text on two CPU cores: dense, 8x, 1t1i and 4t4i at equal active FLOPs and equal data.

Command:   moma train configs/corpus_cpu.py --model.ffn 4t4i --run.dir runs/corpus-4t4i
Data:      the folder named by MOMA_CORPUS (default ../shared/data; any Parquet folder of the documented schema),
           prepared on first use into stores/corpus: a BPE of 4,096 ids, pictures of 16 x 16 in a palette of 512.
Hardware:  2 CPU cores.
Time:      13 to 17 minutes measured on a machine shared with other work.
Losses:    held out, choice routing: dense 3.104 (text 4.501, image 1.720), 8x 3.139, 1t1i 3.045, 4t4i 3.080;
           one seed, see docs/results/corpus.md.
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
    RoutersConfig,
    StoreConfig,
    TrainConfig,
)


def config() -> Config:
    """The recipe."""
    store = "stores/corpus"
    return Config(
        model=ModelConfig(ffn="4t4i", layers=4, width=128, heads=4, ffn_width=512),
        data=DataConfig(
            modalities=(
                Modality("text", "t", size=4096, quota=0.5),
                Modality("image", "i", size=512, span=256, quota=0.5),
            ),
            stores=(
                StoreConfig("text", store, "text"),
                StoreConfig("pairs", store, "pairs", share={"image": 0.6}),
                StoreConfig("interleaved", store, "interleaved", share={"image": 0.4}),
            ),
            prepare=PrepareConfig(
                source=os.environ.get("MOMA_CORPUS", "../shared/data"), text_size=4096, image_side=16, colours=512
            ),
            sequence=512,
            group_rows=8,
            lanes=8,
        ),
        optimizer=OptimizerConfig(peak_lr=3e-3, end_lr=3e-5, schedule="cosine", warmup_steps=50),
        train=TrainConfig(
            tokens=4e6,
            batch_rows=8,
            eval_sets=(EvalSet("heldout", rows=256),),
            eval_every=200,
            checkpoint_every=200,
        ),
        routers=RoutersConfig(steps=200, peak_lr=1e-2, end_lr=3e-4, warmup_steps=10, checkpoint_every=100),
    )
