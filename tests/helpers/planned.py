"""A model to plan for, small enough to compile in seconds."""

from moma_jax.checks import resolve
from moma_jax.compiling import VMEM
from moma_jax.config import Config, DataConfig, MeshConfig, Modality, ModelConfig, RunConfig, TrainConfig


def small(ffn: str, mesh: MeshConfig, **train) -> Config:
    """Sizes that nobody mistakes for one another: width 256, rows of 384, hidden 896, 2560 ids, chunks of 192 tokens.

    Four layers: of fewer the TPU compiler leaves no loop. Without the option of `compiling.OPTIONS`, with
    which compiling takes twice as long.
    """
    modalities = (Modality("text", "t", 2048, quota=0.5), Modality("image", "i", 512, span=64, quota=0.5))
    return resolve(
        Config(
            model=ModelConfig(ffn=ffn, layers=4, width=256, heads=2, hidden=896, remat="dots", dtype="bfloat16"),
            data=DataConfig(kind="synthetic", modalities=modalities, sequence=384, group_rows=2),
            train=TrainConfig(steps=10, loss_chunk=192, **train),
            mesh=mesh,
            run=RunConfig(compiler_options={VMEM: ""}),
        )
    )
