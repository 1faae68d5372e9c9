"""Experts that begin as copies (paper section 2.5): 4t4i from scratch, and from a 1t1i seed at 10% and 20% of training.

The seed's FLOPs are part of the budget. As in the paper, Gumbel noise on the router scores lets equal experts part, and
here it stays to the end, as it did in the runs that are published; one variant goes without it ("quiet"), where the
jitter of ranks alone parts them.

Command:   moma study configs/studies/upcycling.py
           moma study configs/studies/upcycling.py --report
Base:      configs/corpus_study.py, whose data, hardware and time for a run it has.
Runs:      5, of which dense and 4t4i are those of configs/studies/ffn.py.
"""

from pathlib import Path

from moma_jax import recipes
from moma_jax.studies import Study, Sweep, Upcycled, Variant


def study() -> Study:
    """The study."""
    base = recipes.load(Path(__file__).parent.parent / "corpus_study.py")
    grown = {"model.ffn": "4t4i", "model.router.gumbel": True, "model.router.gumbel_until": None}
    quiet = {"model.ffn": "4t4i", "model.router.gumbel": False}
    seed = {"model.ffn": "1t1i", "model.router.gumbel": False}
    return Study(
        base=base,
        variants=(
            Variant("dense", {"model.ffn": "dense"}),
            Variant("4t4i", {"model.ffn": "4t4i"}, match="model.hidden"),
            Variant("4t4i-from-10", grown, match="model.hidden", upcycled=Upcycled(seed, 0.1)),
            Variant("4t4i-from-20", grown, match="model.hidden", upcycled=Upcycled(seed, 0.2)),
            Variant("4t4i-from-10-quiet", quiet, match="model.hidden", upcycled=Upcycled(seed, 0.1)),
        ),
        seeds=(0,),
        tokens=base.train.tokens,
        sweep=Sweep("optimizer.peak_lr", (5e-3, 1e-2, 2e-2, 4e-2), share=0.3),
        dir="runs/study",
        records="docs/results/studies/runs",
    )
