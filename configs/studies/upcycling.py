"""Experts that begin as copies (paper section 2.5): 4t4i from scratch, and from a 1t1i seed at 10% and 20% of training.

The seed's FLOPs are part of the budget. As in the paper, Gumbel noise on the router scores lets equal experts part; it
fades to nothing at half of training. 4t4i-noisy is the control that has the same noise and begins from nothing, quiet
goes without it, swin has the paper's norms, and the seed of 4t4i-from-10-constant keeps its learning rate to its end.

Command:   moma study configs/studies/upcycling.py
           moma study configs/studies/upcycling.py --report
Base:      configs/corpus_study.py, whose data, hardware and time for a run it has.
Runs:      28 trials of 0.3 of the budget, then 21 runs; dense and 4t4i are those of configs/studies/ffn.py.
"""

from moma_jax import recipes, shipped
from moma_jax.studies import Study, Sweep, Upcycled, Variant


def study() -> Study:
    """The study."""
    base = recipes.load(shipped.neighbour(__file__, "corpus_study"))
    noisy = {"model.ffn": "4t4i", "model.router.gumbel": True}
    quiet, swin = {"model.ffn": "4t4i", "model.router.gumbel": False}, {"model.norm": "swin"}
    seed = {"model.ffn": "1t1i", "model.router.gumbel": False}
    constant = {**seed, "optimizer.end_lr": base.optimizer.peak_lr}
    return Study(
        base=base,
        variants=(
            Variant("dense", {"model.ffn": "dense"}),
            Variant("4t4i", {"model.ffn": "4t4i"}, match="model.hidden"),
            Variant("4t4i-noisy", noisy, match="model.hidden"),
            Variant("4t4i-from-10", noisy, match="model.hidden", upcycled=Upcycled(seed, 0.1)),
            Variant("4t4i-from-20", noisy, match="model.hidden", upcycled=Upcycled(seed, 0.2)),
            Variant("4t4i-from-10-quiet", quiet, match="model.hidden", upcycled=Upcycled(seed, 0.1)),
            Variant("4t4i-from-10-constant", noisy, match="model.hidden", upcycled=Upcycled(constant, 0.1)),
            Variant("4t4i-swin", {**noisy, **swin}, match="model.hidden"),
            Variant("4t4i-from-10-swin", {**noisy, **swin}, match="model.hidden", upcycled=Upcycled(seed, 0.1)),
        ),
        seeds=(0, 1, 2),
        tokens=base.train.tokens,
        budgets=(0.5, 0.71, 1.41, 2.0),
        sweep=Sweep("optimizer.peak_lr", (5e-3, 1e-2, 2e-2, 4e-2), share=0.3),
        dir="runs/study",
        records="docs/results/studies/runs",
    )
