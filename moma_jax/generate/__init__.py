"""Generation: a trained model writes text and draws pictures."""

from moma_jax.generate.grammar import MODES
from moma_jax.generate.output import Output
from moma_jax.generate.run import Settings, generate, generate_ids
from moma_jax.generate.sampling import Guidance, Sampling

__all__ = ["MODES", "Guidance", "Output", "Sampling", "Settings", "generate", "generate_ids"]
