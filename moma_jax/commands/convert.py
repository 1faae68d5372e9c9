"""Checkpoints of Hugging Face to runs, and dense runs back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import tyro

from moma_jax.commands import Run
from moma_jax.convert import export, to_checkpoint, to_run

Folder = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DIR")]]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class CheckpointOptions:
    """How a run is written for Hugging Face."""

    like: str | None = None
    """The original folder, whose config and tokenizer, and a Chameleon's image tokenizer, are taken over; what the run
    keeps of them where None."""
    dtype: Dtype | None = None
    """Type of the weights; each tensor's own in the source where None, float32 where there was no source."""
    shard_gb: float = 0.5
    """Gigabytes of one file."""
    step: int | None = None
    """Which checkpoint; the newest where None."""


Written = Annotated[CheckpointOptions, tyro.conf.arg(name="", help="")]


def from_chameleon(folder: Folder, out: str) -> None:
    """Make a dense run of a Chameleon, `moma convert from-chameleon DIR --out RUN`: safetensors alone, no torch.

    Weights become float32, tensor by tensor. The image tokenizer (model.vqmodel.*) comes along; it, tokenizer and
    config are kept in RUN/chameleon for the way back.

    Args:
      folder: Folder of ChameleonForConditionalGeneration: config.json, safetensors, tokenizer.json.
      out: The new run directory, on a local disk.
    """
    _on_cpu()
    to_run.from_chameleon(folder, out)


def from_llama(folder: Folder, out: str, codec: str, seed: int = 0) -> None:
    """Make a dense run of a Llama with room for pictures, `moma convert from-llama DIR --codec CODEC --out RUN`.

    Its ids are moved up behind the marks of documents and pictures; behind them come the codec's. Text has the logits
    that it had. tokenizer and config are kept in RUN/llama for the way back.

    Args:
      folder: Folder of LlamaForCausalLM: config.json, safetensors, tokenizer.json, tokenizer_config.json.
      out: The new run directory, on a local disk.
      codec: Folder of an image tokenizer (moma codec import), or a store, whose image tokenizer is taken.
      seed: Seed of the new ids' rows.
    """
    _on_cpu()
    to_run.from_language_model("llama", folder, out, codec=codec, seed=seed)


def from_qwen3(folder: Folder, out: str, codec: str, seed: int = 0) -> None:
    """Make a dense run of a Qwen3 with room for pictures, `moma convert from-qwen3 DIR --codec CODEC --out RUN`.

    As from-llama. A Qwen3 has no mark that begins a document: <s> starts as a copy of the one that ends them.

    Args:
      folder: Folder of Qwen3ForCausalLM: config.json, safetensors, tokenizer.json, tokenizer_config.json.
      out: The new run directory, on a local disk.
      codec: Folder of an image tokenizer (moma codec import), or a store, whose image tokenizer is taken.
      seed: Seed of the new ids' rows.
    """
    _on_cpu()
    to_run.from_language_model("qwen3", folder, out, codec=codec, seed=seed)


def to_chameleon(run: Run, out: str, options: Written = CheckpointOptions()) -> None:
    """Write a dense run as a Chameleon of Hugging Face, `moma convert to-chameleon RUN --out DIR`.

    A run that was converted and not trained comes back bit for bit.

    Args:
      run: Run directory.
      out: The new folder, on a local disk.
    """
    _on_cpu()
    to_checkpoint.to_chameleon(run, out, **dataclasses.asdict(options))


def to_llama(run: Run, out: str, options: Written = CheckpointOptions()) -> None:
    """Write a dense run's text model as a Llama of Hugging Face, `moma convert to-llama RUN --out DIR`.

    Of a run of from-llama the ids that it came with, of any other all ids of text; codes of pictures stay behind. The
    run has model.norm pre and model.qk_norm none.

    Args:
      run: Run directory.
      out: The new folder, on a local disk.
    """
    _on_cpu()
    to_checkpoint.to_language_model("llama", run, out, **dataclasses.asdict(options))


def to_qwen3(run: Run, out: str, options: Written = CheckpointOptions()) -> None:
    """Write a dense run's text model as a Qwen3 of Hugging Face, `moma convert to-qwen3 RUN --out DIR`.

    As to-llama; the run has model.norm pre and model.qk_norm rms.

    Args:
      run: Run directory.
      out: The new folder, on a local disk.
    """
    _on_cpu()
    to_checkpoint.to_language_model("qwen3", run, out, **dataclasses.asdict(options))


def to_folder(
    run: Run,
    out: str,
    routing: Literal["causal", "threshold"] | None = None,
    dtype: Dtype = "float32",
    shard_gb: float = 0.5,
    step: int | None = None,
) -> None:
    """Export a run for others, `moma convert to-folder RUN --out DIR`: safetensors, model card, a reference in PyTorch.

    Any FFN under the rules choice, threshold and token_choice. The folder says what its tensors are; moma_torch.py in
    it computes logits with torch and safetensors alone.

    Args:
      run: Run directory.
      out: The new folder, on a local disk.
      routing: Causal routing that the folder's model has; the first that the run can be used under where None.
      dtype: Type of matrices; norms, routers and thresholds stay float32.
      shard_gb: Gigabytes of one file.
      step: Which checkpoint; the newest where None.
    """
    _on_cpu()
    export.to_folder(run, out, routing=routing, dtype=dtype, shard_gb=shard_gb, step=step)


def _on_cpu() -> None:
    jax.config.update("jax_platforms", "cpu")  # copying needs no accelerator


SUBCOMMANDS = {
    "from-chameleon": from_chameleon,
    "from-llama": from_llama,
    "from-qwen3": from_qwen3,
    "to-chameleon": to_chameleon,
    "to-folder": to_folder,
    "to-llama": to_llama,
    "to-qwen3": to_qwen3,
}
