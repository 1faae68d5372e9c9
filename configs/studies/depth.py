"""Mixture of depths in front of the experts (paper section 2.3): mod+1t1i and mod+4t4i against dense, 1t1i and 4t4i.

Layers that three quarters of the tokens pass by are cheap, so at equal FLOPs the model is deeper: the number of layers
is matched first, the hidden size for the rest. Tokens are ranked over the routing group, as a threshold does; the
paper's ranking within a row is there with mod+4t4i. Auxiliary routers train beside the models with depths, so that
both causal routings are reported.

Command:   moma study configs/studies/depth.py
           moma study configs/studies/depth.py --report
Base:      configs/corpus_study.py, whose data, hardware and time for a run it has.
Runs:      12 trials of 0.3 of the budget for the three models with depths, then 9 runs; dense, 1t1i and 4t4i are those
           of configs/studies/ffn.py.
"""

from moma_jax import recipes, shipped
from moma_jax.studies import Study, Sweep, Variant


def study() -> Study:
    """The study."""
    base = recipes.load(shipped.neighbour(__file__, "corpus_study"))
    depth = {"model.depth_over": "group", "model.router.auxiliary": True}
    return Study(
        base=base,
        variants=(
            Variant("dense", {"model.ffn": "dense"}),
            Variant("1t1i", {"model.ffn": "1t1i"}),
            Variant("4t4i", {"model.ffn": "4t4i"}, match="model.hidden"),
            Variant("mod+1t1i", {**depth, "model.ffn": "mod+1t1i"}, match="model.layers"),
            Variant("mod+4t4i", {**depth, "model.ffn": "mod+4t4i"}, match="model.layers"),
            Variant(
                "mod+4t4i-row", {**depth, "model.ffn": "mod+4t4i", "model.depth_over": "row"}, match="model.layers"
            ),
        ),
        seeds=(0, 1, 2),
        tokens=base.train.tokens,
        budgets=(0.5, 0.71, 1.41, 2.0),
        sweep=Sweep("optimizer.peak_lr", (5e-3, 1e-2, 2e-2, 4e-2), share=0.3),
        dir="runs/study",
        records="docs/results/studies/runs",
    )
