"""Generation: a trained model writes text and draws pictures."""

from moma_jax.late import attributes

_HOME = {
    **dict.fromkeys(("Settings", "generate", "generate_ids"), "moma_jax.generation.generating"),
    "MODES": "moma_jax.generation.grammar",
    "Output": "moma_jax.generation.output",
    **dict.fromkeys(("Guidance", "Sampling"), "moma_jax.generation.sampling"),
}
__all__ = sorted(_HOME)
__getattr__ = attributes(__name__, _HOME)  # decoding alone needs neither pictures nor tokenizers


def __dir__():
    return __all__
