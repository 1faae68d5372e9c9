"""Checkpoints of Hugging Face to dense runs and back: safetensors only, no pickle, no torch.

layout.py         which tensor is which parameter, and what all kinds of config.json share
chameleon.py      a Chameleon's config, vocabulary and tokenizer
language.py       a Llama's or Qwen3's, and the rows of the ids that they get for pictures
weights.py        safetensors folders: read lazily, written in shards, whole or not at all
to_run.py         checkpoints to runs
to_checkpoint.py  runs back
export.py         a run of any FFN as a folder for others, with its model card (card.py)
moma_torch.py     goes with it: logits in PyTorch; nothing here imports it
from_vqgan.py     image tokenizers, for `moma codec import`
"""

from moma_jax.convert.export import to_folder
from moma_jax.convert.to_checkpoint import to_chameleon, to_language_model
from moma_jax.convert.to_run import from_chameleon, from_language_model

__all__ = ["from_chameleon", "from_language_model", "to_chameleon", "to_folder", "to_language_model"]
