"""Ten minutes from nothing to a model that draws, on drawn scenes with captions.

Command:   moma train quickstart
Data:      `scenes`, drawn by this package: coloured shapes in a spatial relation, with a true caption.
Hardware:  2 CPU cores.
Time:      11 minutes of processor time, preparing included, on one core of an AMD EPYC.
Losses:    held out, after 4,667 updates, on one core 0.187 (text 0.678, image 0.147), under thresholds 0.186; on two
           0.153 (0.655, 0.112), as sums round otherwise. A unigram model has 2.386 (6.286, 2.068).
Pictures:  runs/quickstart/sheets/samples-STEP.png, drawn at the end from the captions below.

Small, so that minutes hold many updates, which is what drawing wants: rows of one picture and its caption, four of them
an update, norms before the sub-layers, and a learning rate that a model of this width bears.
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
    SampleConfig,
    StoreConfig,
    TrainConfig,
)

CAPTIONS = (
    "A red circle is to the left of a blue square.",
    "A yellow triangle is above a green cross.",
    "A purple diamond is to the right of a cyan circle.",
    "There is an orange square below a pink triangle.",
    "A green circle is inside a white square.",
    "On a black background, a red diamond is above a yellow circle.",
    "A blue cross is to the right of an orange circle.",
    "There is a cyan triangle above a purple square.",
)
"""What is drawn at the end."""


def config() -> Config:
    """The recipe."""
    return Config(
        model=ModelConfig(ffn="4t4i", layers=3, width=64, heads=2, ffn_width=192, norm="pre"),
        data=DataConfig(
            modalities=(
                # The quota of pictures is four whole ones in a routing group of four rows.
                Modality("text", "t", size=512, quota=0.12),
                Modality("image", "i", size=32, span=256, quota=0.92),
            ),
            stores=(StoreConfig("scenes", "stores/scenes", collection="pairs"),),
            prepare=PrepareConfig(source="scenes", documents=20_000, text_size=512, image_side=16, colours=32),
            sequence=300,  # a picture and its caption
            group_rows=4,
            lanes=4,
        ),
        optimizer=OptimizerConfig(peak_lr=1e-2, end_lr=3e-5, schedule="cosine", warmup_steps=100),
        train=TrainConfig(
            tokens=5.6e6,
            batch_rows=4,
            loss_chunk=1200,  # all logits at once, as all attention scores: nothing is computed twice
            log_every=50,
            eval_sets=(EvalSet("heldout", rows=128),),
            eval_every=2400,
            checkpoint_every=1200,
            samples=(SampleConfig(CAPTIONS, temperature=0.9, guidance=2.5),),
        ),
        routers=RoutersConfig(steps=700, peak_lr=1e-2, end_lr=3e-4, warmup_steps=70, checkpoint_every=350),
    )
