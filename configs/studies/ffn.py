"""What modality-aware experts are worth: dense, 8x, 1t1i, 4t4i at equal FLOPs on equal data, three seeds.

Command:   moma study configs/studies/ffn.py
           moma study configs/studies/ffn.py --list      (how variants are matched; the runs and how far they are)
           moma study configs/studies/ffn.py --report    (at any time: figures, tables, the speed-up factor eta)
Base:      configs/corpus_study.py, whose data, hardware and time for a run it has. The command can be started several
           times at once; the studies of this folder share a directory, so that runs that they share are made once.
Runs:      12.
"""

from pathlib import Path

from moma_jax import recipes
from moma_jax.studies import Study, Variant


def study() -> Study:
    """The study."""
    base = recipes.load(Path(__file__).parent.parent / "corpus_study.py")
    return Study(
        base=base,
        variants=(
            Variant("dense", {"model.ffn": "dense"}),
            Variant("8x", {"model.ffn": "8x"}, match="model.hidden"),
            Variant("1t1i", {"model.ffn": "1t1i"}),
            Variant("4t4i", {"model.ffn": "4t4i"}, match="model.hidden"),
        ),
        seeds=(0, 1, 2),
        tokens=base.train.tokens,
        dir="runs/corpus_study",
    )
