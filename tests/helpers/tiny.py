"""A run that takes a second: a tiny model on random tokens, for the tests of training."""

import dataclasses

from moma_jax import checks
from moma_jax.config import (
    Config,
    DataConfig,
    EvalSet,
    Modality,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    with_router,
)

MODALITIES = (Modality("text", "t", size=40, quota=0.5), Modality("image", "i", size=24, span=4, quota=0.5))


def tiny(directory=None, **fields) -> Config:
    """The config; `fields` replace single ones, as train_steps=3 for train.steps, router_jitter=0 for its router's."""
    config = Config(
        model=ModelConfig(ffn="2t2i", layers=2, width=16, heads=2, ffn_width=32, hidden=16, dtype="float32"),
        data=DataConfig(kind="synthetic", modalities=MODALITIES, sequence=16, group_rows=2, lanes=4),
        optimizer=OptimizerConfig(peak_lr=1e-2, end_lr=1e-4, warmup_steps=2),
        train=TrainConfig(
            steps=6,
            batch_rows=8,
            loss_chunk=48,
            log_every=2,
            eval_every=4,
            eval_sets=(EvalSet(rows=4),),
            checkpoint_every=3,
        ),
        run=RunConfig(dir=None if directory is None else str(directory), tensorboard=False),
    )
    for name, value in fields.items():
        section, _, field = name.partition("_")
        if section == "router":
            config = with_router(config, dataclasses.replace(config.model.router, **{field: value}))
            continue
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{field: value})}
        )
    return checks.resolve(config)
