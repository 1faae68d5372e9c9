"""A few minutes from nothing to a trained mixed-modal model, on drawn scenes with captions.

Command:   moma train configs/quickstart.py
Data:      `scenes`, drawn by this package: coloured shapes in a spatial relation, with a true caption.
Hardware:  2 CPU cores.
Time:      2 min 48 s measured, preparing included.
Losses:    held out 0.322 (text 1.167, image 0.259) after 170 updates; a unigram model has 2.319 (6.422, 2.011).
"""

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
    return Config(
        model=ModelConfig(ffn="4t4i", layers=4, width=128, heads=4, ffn_width=512),
        data=DataConfig(
            modalities=(
                # Nothing but pictures with short texts: rows are filled by choosing documents, so the quotas add up to
                # 1.04. The quota of pictures is 33 whole ones in a routing group.
                Modality("text", "t", size=512, quota=0.084),
                Modality("image", "i", size=32, span=256, quota=0.957),
            ),
            stores=(StoreConfig("scenes", "stores/scenes"),),
            prepare=PrepareConfig(source="scenes", documents=20_000, text_size=512, image_side=16, colours=32),
            sequence=1104,  # four documents of one picture
            group_rows=8,
            lanes=8,
        ),
        optimizer=OptimizerConfig(peak_lr=3e-3, end_lr=3e-5, schedule="cosine", warmup_steps=30),
        train=TrainConfig(
            tokens=1.5e6,
            batch_rows=8,
            loss_chunk=8832,  # all logits at once, as all attention scores: nothing is computed twice
            eval_sets=(EvalSet("heldout", rows=32),),
            eval_every=100,
            checkpoint_every=100,
        ),
        routers=RoutersConfig(steps=100, peak_lr=1e-2, end_lr=3e-4, warmup_steps=10, checkpoint_every=50),
    )
