"""How many experts each modality needs: 1t1i, 2t2i, 4t4i, 7t1i, 6t2i against dense, at equal FLOPs on equal data.

Command:   moma study configs/studies/experts.py
           moma study configs/studies/experts.py --report
Base:      configs/corpus_study.py, whose data, hardware and time for a run it has.
Runs:      12 trials of 0.3 of the budget, then 3 runs; dense, 1t1i and 4t4i are those of configs/studies/ffn.py.
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
            Variant("1t1i", {"model.ffn": "1t1i"}),
            Variant("2t2i", {"model.ffn": "2t2i"}, match="model.hidden"),
            Variant("4t4i", {"model.ffn": "4t4i"}, match="model.hidden"),
            Variant("6t2i", {"model.ffn": "6t2i"}, match="model.hidden"),
            Variant("7t1i", {"model.ffn": "7t1i"}, match="model.hidden"),
        ),
        seeds=(0,),
        tokens=base.train.tokens,
        budgets=(0.5, 0.71, 1.41, 2.0),
        sweep=Sweep("optimizer.peak_lr", (5e-3, 1e-2, 2e-2, 4e-2), share=0.3),
        dir="runs/study",
        records="docs/results/studies/runs",
    )
