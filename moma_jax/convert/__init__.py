"""Chameleon checkpoints of Hugging Face to dense runs and back: safetensors only, no pickle, no torch.

layout.py     what config.json says, the vocabulary's layout, which tensor is which parameter
weights.py    safetensors folders: read lazily, written in shards, whole or not at all
chameleon.py  the two conversions
command.py    `moma convert`
"""

from moma_jax.convert.to_folder import to_chameleon
from moma_jax.convert.to_run import from_chameleon

__all__ = ["from_chameleon", "to_chameleon"]
