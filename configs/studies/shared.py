"""An expert that every token passes beside those that choose (as in DeepSeekMoE), at equal FLOPs on equal data.

Command:   moma study configs/studies/shared.py
           moma study configs/studies/shared.py --report
Base:      configs/corpus_study.py, whose data, hardware and time for a run it has.
Runs:      8 trials of 0.3 of the budget, then 2 runs; dense and 4t4i are those of configs/studies/ffn.py.
"""

from moma_jax import recipes, shipped
from moma_jax.studies import Study, Sweep, Variant


def study() -> Study:
    """The study."""
    base = recipes.load(shipped.neighbour(__file__, "corpus_study"))
    return Study(
        base=base,
        variants=(
            Variant("dense", {"model.ffn": "dense"}),
            Variant("4t4i", {"model.ffn": "4t4i"}, match="model.hidden"),
            Variant("4t4i+1x", {"model.ffn": "4t4i+1x"}, match="model.hidden"),
            Variant("3t3i+1x", {"model.ffn": "3t3i+1x"}, match="model.hidden"),
        ),
        seeds=(0,),
        tokens=base.train.tokens,
        budgets=(0.5, 0.71, 1.41, 2.0),
        sweep=Sweep("optimizer.peak_lr", (5e-3, 1e-2, 2e-2, 4e-2), share=0.3),
        dir="runs/study",
        records="docs/results/studies/runs",
    )
