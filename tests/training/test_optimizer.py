"""Schedule, decay mask, clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny

from moma_jax.config import OptimizerConfig
from moma_jax.training.optimizer import decay_mask, make_optimizer, make_schedule, router_norm


@pytest.mark.parametrize("schedule, middle", [("linear", 0.55), ("cosine", 0.55)])
def test_schedule_meets_its_ends(schedule, middle):
    settings = OptimizerConfig(peak_lr=1.0, end_lr=0.1, schedule=schedule, warmup_steps=10)
    rate = make_schedule(settings, total=110)
    for update, expected in {1: 0.1, 5: 0.5, 10: 1.0, 60: middle, 110: 0.1, 200: 0.1}.items():
        np.testing.assert_allclose(rate(update), expected, rtol=1e-6)
    assert (schedule == "cosine") == bool(rate(30) > 0.1 + 0.9 * 0.81)


@pytest.mark.parametrize("warmup, total", [(0, 5), (10, 5)])
def test_schedule_without_or_beyond_warmup_is_finite(warmup, total):
    rate = make_schedule(OptimizerConfig(peak_lr=1.0, end_lr=0.0, warmup_steps=warmup), total)
    assert all(0 <= float(rate(n)) <= 1 for n in range(1, total + 1))


def test_norms_and_biases_are_not_decayed():
    params = {
        "embedding": {"kernel_VD": 0.0},
        "layers": {"attention": {"query": {"scale_HK": 0.0, "bias_HK": 0.0}, "project_D3HK": 0.0},
                   "ffn": {"text": {"router_DE": 0.0, "expand_ED2F": 0.0}}},
        "final_norm": {"scale_D": 0.0},
    }  # fmt: skip
    mask = decay_mask(params)
    assert jax.tree.leaves(mask["layers"]["attention"]["query"]) == [False, False]
    assert not mask["final_norm"]["scale_D"]
    assert sum(jax.tree.leaves(mask)) == 4


def test_one_update_is_adamw_with_clipping():
    config = tiny(optimizer_clip_norm=0.5, optimizer_weight_decay=0.1)
    optimizer = make_optimizer(config)
    params, grads = {"kernel_DV": jnp.array([[1.0, -2.0]])}, {"kernel_DV": jnp.array([[3.0, 4.0]])}
    state = optimizer.transformation.init(params)
    direction, _ = optimizer.transformation.update(grads, state, params)
    clipped = grads["kernel_DV"] * 0.5 / 5
    expected = clipped / (jnp.abs(clipped) + config.optimizer.epsilon) + 0.1 * params["kernel_DV"]
    np.testing.assert_allclose(direction["kernel_DV"], expected, rtol=1e-5)


def test_router_norm_sees_routers_alone():
    grads = {"ffn": {"router_DE": jnp.array([3.0, 4.0]), "expand_ED2F": jnp.array([100.0])}}
    np.testing.assert_allclose(router_norm(grads), 5.0)
    assert router_norm({"expand_ED2F": jnp.ones(3)}) is None
    assert optax.tree.norm(grads) > 100
