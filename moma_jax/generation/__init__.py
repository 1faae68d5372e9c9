"""Generation: a trained model writes text and draws pictures."""

from moma_jax.generation.generate import Settings, generate, generate_ids
from moma_jax.generation.grammar import MODES
from moma_jax.generation.output import Output
from moma_jax.generation.sampling import Guidance, Sampling

__all__ = ["MODES", "Guidance", "Output", "Sampling", "Settings", "generate", "generate_ids"]
