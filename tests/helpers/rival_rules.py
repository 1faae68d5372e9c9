"""The built-in rules whose tokens choose, with options that leave nothing of them out, for two experts or more."""

from moma_jax.routers.hash import Hash
from moma_jax.routers.null import Null
from moma_jax.routers.random import Random
from moma_jax.routers.remoe import ReMoE
from moma_jax.routers.sinkhorn import Sinkhorn
from moma_jax.routers.token_choice import TokenChoice
from moma_jax.routers.top_p import TopP

RIVALS = {
    "token_choice": TokenChoice(),
    "deepseek": TokenChoice(top=2, gates="sigmoid", normalise=True, bias_rate=0.01, balance=0.0, z=0.0),
    "top_p": TopP(mean=1.5, share=0.6),
    "remoe": ReMoE(first=1e-3),
    "null": Null(zero=2, copy=2),
    "hash": Hash(),
    "random": Random(),
    "sinkhorn": Sinkhorn(),
}
