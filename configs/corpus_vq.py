"""Real pictures of 128 x 128 from captions, and captions from pictures, on two CPU cores: learned tokens, 4t4i.

Command:   moma codec train configs/codec/corpus_f8.py, then moma train configs/corpus_vq.py
Data:      the pairs of the folder named by MOMA_CORPUS (default ../shared/data), prepared on first use into
           stores/corpus_vq with the tokenizer in runs/corpus_f8: 256 codes of 2,048 a picture.
Hardware:  2 CPU cores.
Time:      36 minutes measured on a machine shared with other work; 60 processor minutes, the tokenizer's 61 apart.
Losses:    held out, causal: 3.422 (text 2.909, image 3.460); a unigram model has 6.971 (8.137, 6.884).
Verdict:   docs/results/corpus_vq.md, by `python docs/results/corpus_vq.py runs/corpus_vq`.

It is configs/pictures.py with other data: two documents a row, norms before the sub-layers, auxiliary routers trained
beside the model.
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
    StoreConfig,
    TrainConfig,
)
from moma_jax.routers.choice import Choice


def config() -> Config:
    """The recipe."""
    return Config(
        model=ModelConfig(
            ffn="4t4i",
            layers=4,
            width=128,
            heads=4,
            ffn_width=512,
            norm="pre",
            router=Choice(auxiliary=True),
        ),
        data=DataConfig(
            modalities=(
                Modality("text", "t", size=2048, quota=0.071),
                Modality("image", "i", size=2048, span=256, quota=0.93),  # 8 whole pictures in a routing group
            ),
            stores=(StoreConfig("corpus", "stores/corpus_vq", collection="pairs"),),
            prepare=PrepareConfig(
                source=os.path.join(os.environ.get("MOMA_CORPUS", "../shared/data"), "pairs"),
                text_size=2048,
                codec="runs/corpus_f8",
            ),
            sequence=564,  # two documents
            group_rows=4,
            lanes=8,
        ),
        optimizer=OptimizerConfig(peak_lr=3e-3, end_lr=3e-5, schedule="cosine", warmup_steps=100),
        train=TrainConfig(
            tokens=6e6,
            batch_rows=4,
            loss_chunk=1128,
            log_every=50,
            eval_sets=(EvalSet("heldout", rows=128),),
            eval_every=1000,
            checkpoint_every=500,
        ),
    )
