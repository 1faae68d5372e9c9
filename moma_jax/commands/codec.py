"""Image tokenizers: import public ones."""

from __future__ import annotations

from typing import Annotated, Literal

import jax
import tyro

from moma_jax.convert import from_vqgan


def import_(
    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PATH")]],
    out: str,
    side: int | None = None,
    unit_length: Literal["neither", "codes", "both"] | None = None,
    lowest: float | None = None,
) -> None:
    """Make a codec of a public image tokenizer, `moma codec import PATH --out DIR`; `moma prepare --codec DIR` uses it.

    Chameleon's, taming-transformers', LlamaGen's, Janus' and aMUSEd's networks are known. Chameleon's safetensors hold
    no decoder: pictures become codes, and codes no pictures; its original vqgan.ckpt has both.

    Args:
      path: Folder of Hugging Face, safetensors file, or .ckpt or .pt (needs torch; opened with weights_only).
      out: The new folder, on a local disk.
      side: Pixels of a side of its pictures; what config.json says where None.
      lowest: What a black pixel is to the network, a white one being 1: -1, or aMUSEd's 0; as its family has it where
        None.
      unit_length: What has its length divided out; as its family has it where None. codes: as transformers' Janus.
    """
    jax.config.update("jax_platforms", "cpu")  # copying needs no accelerator
    codec = from_vqgan.import_codec(path, out, side=side, unit_length=unit_length, lowest=lowest)
    drawn = "" if codec.draws else "; it has no decoder, so codes cannot be drawn"
    print(f"{out}: {codec.side} x {codec.side} pixels, {codec.codes_per_image} codes of {codec.codebook}{drawn}")


SUBCOMMANDS = {"import": import_}
