"""Studies: architectures compared at equal FLOPs on equal data. A study file imports what it needs from here."""

from moma_jax.studies.study import Study, Sweep, Upcycled, Variant, load_study

__all__ = ["Study", "Sweep", "Upcycled", "Variant", "load_study"]
