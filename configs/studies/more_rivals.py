"""More rivals, three seeds each, beside those of configs/studies/rivals.py.

Token choice by a bias that follows the load instead of a loss, fine-grained experts beside a shared one, top-p, ReMoE,
and null experts; and attention weights of each modality's own (Mixture-of-Transformers, -mot). Rules under which tokens
enter a varying number of experts are matched at the mean that they aim at; what was measured, and how many slots stayed
empty, is in the report.

Command:   moma study configs/studies/more_rivals.py
           moma study configs/studies/more_rivals.py --report
Base:      configs/corpus_study.py, whose data, hardware and time for a run it has.
Runs:      32 trials of 0.3 of the budget, then 27 runs, the longest of dense among them; dense, 1t1i and 4t4i are
           those of configs/studies/ffn.py besides, token-choice is that of rivals.py.
"""

from moma_jax import recipes, shipped
from moma_jax.studies import Study, Sweep, Variant


def ruled(name: str, rule: str, ffn: str = "4t4i", **options) -> Variant:
    """A variant under a routing rule with its options."""
    options = {f"model.router.{option}": value for option, value in options.items()}
    return Variant(name, {"model.ffn": ffn, "model.router": rule, **options}, match="model.hidden")


def study() -> Study:
    """The study."""
    base = recipes.load(shipped.neighbour(__file__, "corpus_study"))
    own = {"model.attention_weights": "by_modality"}
    return Study(
        base=base,
        variants=(
            Variant("dense", {"model.ffn": "dense"}),
            Variant("1t1i", {"model.ffn": "1t1i"}),
            Variant("4t4i", {"model.ffn": "4t4i"}, match="model.hidden"),
            ruled("token-choice", "token_choice"),
            ruled("token-choice-bias", "token_choice", gates="sigmoid", balance=0.0, z=0.0, bias_rate=0.001),
            ruled("fine-grained", "token_choice", ffn="16t16i+1x", top=3, gates="sigmoid", normalise=True),
            ruled("top-p", "top_p", ffn="8t8i", mean=2.0),
            ruled("remoe", "remoe"),
            ruled("null", "null", top=2, zero=4),
            Variant("dense-mot", {"model.ffn": "dense", **own}),
            Variant("1t1i-mot", {"model.ffn": "1t1i", **own}),
            Variant("4t4i-mot", {"model.ffn": "4t4i", **own}, match="model.hidden"),
        ),
        seeds=(0, 1, 2),
        tokens=base.train.tokens,
        budgets=(0.5, 0.71, 1.41, 2.0, 2.83),
        sweep=Sweep("optimizer.peak_lr", (5e-3, 1e-2, 2e-2, 4e-2), share=0.3),
        dir="runs/study",
        records="docs/results/studies/runs",
    )
