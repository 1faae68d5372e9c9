"""The rivals side by side: other routing rules than MoMa's expert choice, at equal FLOPs on equal data.

Token choice with a loss, and the two controls that every routing study needs: hash routing, which learns nothing, and
random routing, under which experts cannot differ. Four experts for each modality. 4t4i-twice, whose experts choose
twice as many tokens at half the hidden size, was added when the others' runs had shown expert choice behind token
choice, to tell why: under it 4 to 5 tokens of 10 enter no expert of a layer. token-choice-tight, with slots for 1.25
times the even load instead of 2, was added when half the slots had stayed empty: what do fewer slots, and so faster
steps, cost?

Command:   moma study configs/studies/rivals.py
           moma study configs/studies/rivals.py --report
Base:      configs/corpus_study.py, whose data, hardware and time for a run it has.
Runs:      20 trials of 0.3 of the budget, then 15 runs, the longest of dense, too; the other ones of dense,
           1t1i and 4t4i are those of configs/studies/ffn.py.

The rule is that of configs/studies/ffn.py: a variant is ahead of another, or behind, where the 95% t-interval of the
paired log eta over the seeds lies on one side of 0, by the final held-out loss under the rule's own causal routing
(4t4i: calibrated thresholds). The learning rate is each variant's best of four trials on documents of the training
split.
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
            Variant("4t4i", {"model.ffn": "4t4i"}, match="model.hidden"),
            Variant("token-choice", {"model.ffn": "4t4i", "model.router": "token_choice"}, match="model.hidden"),
            Variant("hash", {"model.ffn": "4t4i", "model.router": "hash"}, match="model.hidden"),
            Variant("random", {"model.ffn": "4t4i", "model.router": "random"}, match="model.hidden"),
            Variant("4t4i-twice", {"model.ffn": "4t4i", "model.capacity": 0.5}, match="model.hidden"),
            Variant(
                "token-choice-tight",
                {"model.ffn": "4t4i", "model.router": "token_choice", "model.router.slack": 1.25},
                match="model.hidden",
            ),
        ),
        seeds=(0, 1, 2),
        tokens=base.train.tokens,
        budgets=(0.5, 0.71, 1.41, 2.0, 2.83),
        sweep=Sweep("optimizer.peak_lr", (5e-3, 1e-2, 2e-2, 4e-2), share=0.3),
        dir="runs/study",
        records="docs/results/studies/runs",
    )
