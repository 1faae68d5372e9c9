"""Image tokenizers: import, train, judge."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import jax
import tyro

from moma_jax.commands import print_result
from moma_jax.convert import from_vqgan
from moma_jax.training.codec.config import CodecConfig, load

DATA = tyro.conf.arg(metavar="PICTURES")


@dataclass(frozen=True)
class CodecRecipe:
    """A recipe of an image tokenizer, whose values are the defaults of the options."""

    config: Annotated[CodecConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    recipe: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RECIPE")]] = ""
    """A .py file, a name that `moma recipes` lists (codec/...), a config.json, or a run directory."""
    EXAMPLE: ClassVar[str | None] = "codec/corpus_f8"

    @classmethod
    def named(cls, path: str | None) -> CodecRecipe:
        """The recipe at `path`; without one, for the help page, the defaults of every field."""
        return cls(recipe=path or "", config=CodecConfig())

    def reading(self, words: list[str]) -> tuple[CodecRecipe, list[str]]:
        """The recipe's values, and the words that are left for tyro: all of them."""
        if not self.recipe:
            return self, words
        flag = "--loss.perceptual"
        given = [w.partition("=")[2] for w in words if w.startswith(f"{flag}=")]
        given += [value for word, value in itertools.pairwise(words) if word == flag]
        return dataclasses.replace(self, config=load(self.recipe, *given[-1:])), words


def train(recipe: Annotated[CodecRecipe, tyro.conf.arg(name="", help="")]) -> None:
    """Train an image tokenizer from a recipe. Any field of its config can be overridden; a run that was interrupted
    goes on exactly. When it is complete, its directory is the codec's folder, for `moma prepare --codec`."""
    from moma_jax.training.codec.stage import train_codec  # the others need no optimizer

    train_codec(recipe.config)


def eval(
    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CODEC|STORE")]],
    data: Annotated[str, DATA],
    pictures: int | None = None,
    held_out: float = 0.05,
    side: int | None = None,
    sheet: str | None = None,
    json: bool = False,
) -> None:
    """Judge an image tokenizer on held-out pictures: PSNR, SSIM, use of its codebook.

    Args:
      path: Folder of a codec (imported, or a complete run of codec train), or a store, whose codec is judged.
      data: A folder of pictures, a folder of Parquet with pairs, or a .jsonl file of documents.
      pictures: At most so many, in the source's order; all held-out ones where None.
      held_out: Share held out, by content hash, where the source has no split of its own.
      side: Pixels of a side at which pictures are compared: the truth is read so, reconstructions are enlarged
        bicubically; the codec's own where None.
      sheet: A new PNG file: the first 32 pictures above their reconstructions.
      json: Print JSON.
    """
    from moma_jax.evaluation.judge_codec import judge

    found = judge(path, data, most=pictures, held_out=held_out, side=side, sheet=sheet)
    print_result(found, json, _judged)


def _judged(found: dict[str, Any]) -> str:
    """The figures for people."""
    return (
        f"{found['pictures']} pictures of {found['side']} x {found['side']} pixels\n"
        f"PSNR        {found['psnr']:.2f} dB\nSSIM        {found['ssim']:.4f}\n"
        f"use         {found['codebook_use']:.1%} of {found['codebook']} codes\nperplexity  {found['perplexity']:.0f}\n"
    )


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


SUBCOMMANDS = {"import": import_, "train": train, "eval": eval}
