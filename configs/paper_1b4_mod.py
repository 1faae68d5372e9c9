"""MoMa 1.4B behind a mixture of depths, the paper's MoD recipe (arXiv 2407.21770, section 2.3, Table 1).

Command:   moma train configs/paper_1b4_mod.py   (--model.ffn mod+dense, mod+1t1i, mod+4t4i)
           moma cost configs/paper_1b4_mod.py    (--model.depth-by all: the paper's ranking, and its slots)
Data:      as configs/paper_1b4.py, from which it differs by the model alone: more layers, of which every second is
           entered by a quarter of the tokens, so that FLOPs per token are the dense model's (within 2%).
Losses:    not run here.
"""

import dataclasses

from moma_jax import recipes, shipped
from moma_jax.config import Config, RunConfig


def config() -> Config:
    """The recipe."""
    base = recipes.load(shipped.neighbour(__file__, "paper_1b4"))
    model = dataclasses.replace(base.model, ffn="mod+4t4i", layers=32, width=2304, heads=18, ffn_width=9216)
    return dataclasses.replace(base, model=model, run=RunConfig())
