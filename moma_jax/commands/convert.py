"""`moma convert from-chameleon DIR --out RUN` and `moma convert to-chameleon RUN --out DIR`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import tyro

from moma_jax import recipes
from moma_jax.convert.to_folder import to_chameleon
from moma_jax.convert.to_run import from_chameleon
from moma_jax.errors import InputError

USAGE = """usage: moma convert from-chameleon DIR --out RUN   a Hugging Face Chameleon as a dense run
       moma convert to-chameleon RUN --out DIR     a dense run as a Hugging Face Chameleon"""


@dataclass(frozen=True)
class FromChameleon:
    """Make a dense run of a Chameleon, `moma convert from-chameleon DIR --out RUN`: safetensors alone, no torch.

    Weights become float32, tensor by tensor: memory is what the checkpoint takes and one tensor. The image tokenizer
    (model.vqmodel.*) is left out; tokenizer and config are kept in RUN/chameleon for the way back.
    """

    folder: tyro.conf.Positional[str]
    """Folder of ChameleonForConditionalGeneration: config.json, safetensors, tokenizer.json."""
    out: str
    """The new run directory, on a local disk."""


@dataclass(frozen=True)
class ToChameleon:
    """Write a dense run as a Chameleon of Hugging Face, `moma convert to-chameleon RUN --out DIR`.

    A run that was converted and not trained comes back bit for bit. Memory: some times one parameter of all layers, and
    one shard.
    """

    run: tyro.conf.Positional[str]
    """Run directory."""
    out: str
    """The new folder, on a local disk."""
    like: str | None = None
    """The original folder: its image tokenizer, config and text tokenizer are taken over."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; each tensor's own in the source where None, float32 where there was no source."""
    shard_gb: float = 5.0
    """Gigabytes of one file."""
    step: int | None = None
    """Which checkpoint; the newest where None."""


def run(words: list[str]) -> None:
    """`moma convert`."""
    direction, rest = (words[0], words[1:]) if words else ("", [])
    jax.config.update("jax_platforms", "cpu")  # copying needs no accelerator
    match direction:
        case "from-chameleon":
            given = recipes.parse(FromChameleon, None, rest, "moma convert from-chameleon")
            from_chameleon(given.folder, given.out)
        case "to-chameleon":
            given = recipes.parse(ToChameleon, None, rest, "moma convert to-chameleon")
            settings = {name: getattr(given, name) for name in ("like", "dtype", "shard_gb", "step")}
            to_chameleon(given.run, given.out, **settings)
        case "--help" | "-h":
            print(USAGE)
        case _:
            raise InputError("moma convert: say from-chameleon DIR --out RUN, or to-chameleon RUN --out DIR")
