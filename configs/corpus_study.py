"""What the scaling studies on two CPU cores share: a small MoMa on real pictures and text (see configs/studies/).

Command:   moma study configs/studies/ffn.py
Data:      the folder named by MOMA_CORPUS (default ../shared/data; any Parquet folder of the documented schema),
           prepared on first use into stores/corpus_study_8: a BPE of 512 ids, pictures of 8 x 8 in a palette of 256.
           6.5 million positions are 0.5 passes over the text and 2.6 over the pictures.
Hardware:  2 CPU cores; one run uses one of them well, so start the command twice, each on a core of its own:
           XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 0 moma study configs/studies/ffn.py
Time:      12 to 15 minutes a run on a core of an AMD EPYC (Milan).

Short rows and few ids, so that the FFN, which is what variants differ in, has 51% of the FLOPs (`moma cost`), as it has
about half at the paper's 1.4B. Pictures of 64 codes leave less to be read off a code's neighbours than larger ones,
which is nearer to the learned codes of the paper. Pre-norm, because routers learn little under swin norms: the norm
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
    store = "stores/corpus_study_8"
    return Config(
        model=ModelConfig(ffn="4t4i", layers=2, width=128, heads=2, hidden=400, norm="pre"),
        data=DataConfig(
            modalities=(
                Modality("text", "t", size=512, quota=0.5),
                Modality("image", "i", size=256, span=64, quota=0.5),
            ),
            stores=(
                StoreConfig("text", store, "text"),
                StoreConfig("pairs", store, "pairs", share={"image": 0.6}),
                StoreConfig("interleaved", store, "interleaved", share={"image": 0.4}),
            ),
            prepare=PrepareConfig(
                source=os.environ.get("MOMA_CORPUS", "../shared/data"), text_size=512, image_side=8, colours=256
            ),
            sequence=128,
            group_rows=16,
            lanes=8,
        ),
        optimizer=OptimizerConfig(peak_lr=1e-2, end_lr=1e-4, schedule="cosine", warmup_steps=50),
        train=TrainConfig(
            tokens=6.5e6,
            batch_rows=16,
            eval_sets=(EvalSet("heldout", rows=768),),
            eval_every=800,
            checkpoint_every=800,
            keep_last=1,
        ),
        run=RunConfig(tensorboard=False),
    )
