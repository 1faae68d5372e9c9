"""MoMa 90M behind a mixture of depths, the paper's MoD recipe (arXiv 2407.21770, section 2.3, Table 1).

Command:   moma train configs/paper_90m_mod.py   (--model.ffn mod+dense, mod+1t1i, mod+4t4i)
           moma cost configs/paper_90m_mod.py    (--model.depth-by all: the paper's ranking, and its slots)
Data:      as configs/paper_90m.py, from which it differs by the model alone: more layers, of which every second is
           entered by a quarter of the tokens, so that FLOPs per token are the dense model's (within 2%).
Losses:    not run here.
"""

import dataclasses

from moma_jax import recipes, shipped
from moma_jax.config import Config, RunConfig


def config() -> Config:
    """The recipe."""
    base = recipes.load(shipped.neighbour(__file__, "paper_90m"))
    model = dataclasses.replace(base.model, ffn="mod+4t4i", layers=14)
    return dataclasses.replace(base, model=model, run=RunConfig())
