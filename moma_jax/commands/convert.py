"""Chameleon checkpoints to runs, and dense runs back."""

from __future__ import annotations

from typing import Annotated, Literal

import jax
import tyro

from moma_jax.commands import Run
from moma_jax.convert import to_folder, to_run


def from_chameleon(folder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DIR")]], out: str) -> None:
    """Make a dense run of a Chameleon, `moma convert from-chameleon DIR --out RUN`: safetensors alone, no torch.

    Weights become float32, tensor by tensor: memory is what the checkpoint takes and one tensor. The image tokenizer
    (model.vqmodel.*) comes along; it, tokenizer and config are kept in RUN/chameleon for the way back.

    Args:
      folder: Folder of ChameleonForConditionalGeneration: config.json, safetensors, tokenizer.json.
      out: The new run directory, on a local disk.
    """
    jax.config.update("jax_platforms", "cpu")  # copying needs no accelerator
    to_run.from_chameleon(folder, out)


def to_chameleon(
    run: Run,
    out: str,
    like: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    shard_gb: float = 5.0,
    step: int | None = None,
) -> None:
    """Write a dense run as a Chameleon of Hugging Face, `moma convert to-chameleon RUN --out DIR`.

    A run that was converted and not trained comes back bit for bit. Memory: some times one parameter of all layers, and
    one shard.

    Args:
      run: Run directory.
      out: The new folder, on a local disk.
      like: The original folder: its image tokenizer, config and text tokenizer are taken over; what the run keeps of
        them where None.
      dtype: Type of the weights; each tensor's own in the source where None, float32 where there was no source.
      shard_gb: Gigabytes of one file.
      step: Which checkpoint; the newest where None.
    """
    jax.config.update("jax_platforms", "cpu")
    to_folder.to_chameleon(run, out, like=like, dtype=dtype, shard_gb=shard_gb, step=step)


SUBCOMMANDS = {"from-chameleon": from_chameleon, "to-chameleon": to_chameleon}
