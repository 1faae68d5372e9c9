"""What modality-aware experts are worth: dense, 8x, 1t1i, 4t4i at equal FLOPs on equal data, five seeds.

Command:   moma study configs/studies/ffn.py
           moma study configs/studies/ffn.py --list      (how variants are matched; the runs and how far they are)
           moma study configs/studies/ffn.py --report    (at any time: figures, tables, the speed-up factor eta)
Base:      configs/corpus_study.py, whose data, hardware and time for a run it has. The command can be started several
           times at once; the studies of this folder share a directory, so that runs that they share are made once.
Runs:      16 trials of 0.3 of the budget, then 40 runs: dense at five budgets and the others at one, by seed.
           Finished ones are kept in docs/results/studies/runs and are not made again.

The rule, stated before the first run that counts: a variant is ahead of another (or behind) where the 95% t-interval
of the paired log eta over the five seeds lies on one side of 0, eta being read off the curve through finished dense
runs (for 4t4i against 8x and 1t1i: the ratio of their etas), by the final held-out loss under causal routing with
calibrated thresholds, overall and by modality. "Image gains more than text" is decided in the same way by the ratio of
4t4i's etas for image and text. Everything else is undecided. The learning rate is each variant's best of four trials
on documents of the training split; no setting is chosen by the held-out split.
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
            Variant("8x", {"model.ffn": "8x"}, match="model.hidden"),
            Variant("1t1i", {"model.ffn": "1t1i"}),
            Variant("4t4i", {"model.ffn": "4t4i"}, match="model.hidden"),
        ),
        seeds=(0, 1, 2, 3, 4),
        tokens=base.train.tokens,
        budgets=(0.5, 0.71, 1.41, 2.0),
        sweep=Sweep("optimizer.peak_lr", (5e-3, 1e-2, 2e-2, 4e-2), share=0.3),
        dir="runs/study",
        records="docs/results/studies/runs",
    )
