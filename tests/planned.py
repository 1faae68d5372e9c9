"""A model to plan for, small enough to compile in seconds."""

from moma_jax.config import Config, DataConfig, MeshConfig, Modality, ModelConfig, TrainConfig, resolve


def small(ffn: str, mesh: MeshConfig, **train) -> Config:
    """Two layers, whose sizes nobody mistakes for one another: width 256, rows of 384, hidden 640, 2560 ids."""
    modalities = (Modality("text", "t", 2048, quota=0.5), Modality("image", "i", 512, span=64, quota=0.5))
    return resolve(
        Config(
            model=ModelConfig(ffn=ffn, layers=2, width=256, heads=2, hidden=640, remat="dots", dtype="bfloat16"),
            data=DataConfig(kind="synthetic", modalities=modalities, sequence=384, group_rows=2),
            train=TrainConfig(steps=10, loss_chunk=768, **train),
            mesh=mesh,
        )
    )
