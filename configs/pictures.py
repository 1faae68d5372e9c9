"""Twenty minutes from nothing to a model that draws scenes from captions and describes scenes that it sees.

Command:   moma train configs/pictures.py
Data:      `scenes`, pairs of a picture and its caption alone, drawn by this package.
Hardware:  2 CPU cores.
Time:      19 minutes of training.
Losses:    held out 0.096 (text 0.483, image 0.063) after 5,320 updates; a unigram model has 2.366 (6.233, 2.031).
Verdict:   docs/results/pictures.md, by `python docs/results/pictures.py runs/pictures`.

It differs from the quickstart in what makes so short a training go far: two documents a row (less attention is masked),
8 pictures an update (many updates), norms before the sub-layers (routers learn from gates that no norm cancels).
Auxiliary routers are trained beside the model.
"""

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
                Modality("text", "t", size=512, quota=0.1),
                Modality("image", "i", size=32, span=256, quota=0.908),  # 8 whole pictures in a routing group
            ),
            stores=(StoreConfig("scenes", "stores/pictures", collection="pairs"),),
            prepare=PrepareConfig(source="scenes", documents=60_000, text_size=512, image_side=16, colours=32),
            sequence=564,  # two documents
            group_rows=4,
            lanes=8,
        ),
        optimizer=OptimizerConfig(peak_lr=3e-3, end_lr=3e-5, schedule="cosine", warmup_steps=100),
        train=TrainConfig(
            tokens=1.2e7,
            batch_rows=4,
            loss_chunk=2256,  # all logits at once, as all attention scores: nothing is computed twice
            log_every=50,
            eval_sets=(EvalSet("heldout", rows=128),),
            eval_every=1000,
            checkpoint_every=1000,
        ),
    )
