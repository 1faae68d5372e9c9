"""Studies: architectures compared at equal FLOPs on equal data. A study file imports what it needs from here."""

from moma_jax.studies.study import Study, Upcycled, Variant, load_study

__all__ = ["Study", "Upcycled", "Variant", "load_study"]
