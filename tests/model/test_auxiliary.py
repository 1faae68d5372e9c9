"""Auxiliary routers: their loss and counts, and that a model never changes for their sake."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from tiers import long_but
from tiny import tiny

import moma_jax
from moma_jax import sharding
from moma_jax.data.stream import open_stream
from moma_jax.geometry import layer_of
from moma_jax.model import moe
from moma_jax.model.auxiliary import count_pairs, cross_entropy, taken_pairs
from moma_jax.model.decoder import first_routing_state
from moma_jax.model.parameters import ExpertWeights
from moma_jax.router import Selection
from moma_jax.routers.choice import Choice
from moma_jax.routers.threshold import Threshold
from moma_jax.training.load import auxiliary_params
from moma_jax.training.step import abstract_params, compile_step, create_state, make_program, put


def updates(config, number, repeat=False):
    """Reports and the state after some updates; the same batch every time if `repeat`."""
    program = make_program(config)
    reports, batches = [], iter(open_stream(config))
    with sharding.use_mesh(program.mesh):
        state = create_state(program, first_routing_state(config))
        step, batch = compile_step(program, state), next(batches).batch
        for _ in range(number):
            state, report = step(state, put(batch, program.mesh))
            reports.append(jax.device_get(report))
            batch = batch if repeat else next(batches).batch
    return reports, jax.device_get(state)


# The parts ------------------------------------------------------------------------------------------------------------


def random_pairs(seed, tokens=24, experts=3, modalities=2):
    """Predicted logits, a Selection and each token's modality, the last tokens padding."""
    rng = np.random.default_rng(seed)
    modality_T = rng.integers(0, modalities, tokens)
    modality_T[-4:] = -1
    predicted_TE = rng.normal(0, 3, (tokens, experts)).astype(np.float32)
    index_EC = np.stack([rng.permutation(np.flatnonzero(modality_T == 0))[:4] for _ in range(experts)])
    filled_EC = rng.random(index_EC.shape) < 0.7
    return predicted_TE, Selection(index_EC, filled_EC.astype(np.float32), filled_EC), modality_T


def taken_by_loop(selection, tokens):
    taken_TE = np.zeros((tokens, len(selection.index_EC)), bool)
    for e, (index_C, filled_C) in enumerate(zip(selection.index_EC, selection.filled_EC, strict=True)):
        for token, filled in zip(index_C, filled_C, strict=True):
            taken_TE[token, e] |= filled
    return taken_TE


def test_predictions_are_the_papers_two_layers():
    rng = np.random.default_rng(0)
    x_ND, in_DA, out_AE = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 8), (8, 4), (4, 3)))
    inner_NA = x_ND @ in_DA
    right = (inner_NA * oracles.sigmoid(inner_NA)) @ out_AE
    predict, weights = Choice().predict, {"in_DA": in_DA, "out_AE": out_AE}
    assert {name: own.shape for name, own in Choice().auxiliary_parameters(8, 3).items()} == {
        name: weight.shape for name, weight in weights.items()
    }
    np.testing.assert_allclose(predict(jnp.asarray(x_ND), weights), right, rtol=2e-5, atol=1e-5)
    assert predict(jnp.asarray(x_ND, jnp.bfloat16), weights).dtype == jnp.float32
    gradient = jax.grad(lambda x: predict(x, weights).sum())(jnp.asarray(x_ND))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("seed", range(3))
def test_cross_entropy_and_counts_are_those_of_a_loop(seed):
    predicted_TE, selection, modality_T = random_pairs(seed)
    tokens, experts = predicted_TE.shape
    taken_TE = taken_by_loop(selection, tokens)
    np.testing.assert_array_equal(taken_pairs(selection, tokens), taken_TE)
    eligible_T = modality_T == 0
    nats, count_M4 = [], np.zeros((2, 4), int)
    for t in np.flatnonzero(eligible_T):
        for e in range(experts):
            probability = oracles.sigmoid(float(predicted_TE[t, e]))
            nats.append(-np.log(probability if taken_TE[t, e] else 1 - probability))
            said, took = predicted_TE[t, e] > 0, taken_TE[t, e]
            count_M4[modality_T[t]] += [said and took, said, took, 1]
    np.testing.assert_allclose(cross_entropy(predicted_TE, taken_TE, eligible_T), np.mean(nats), rtol=1e-5)
    counted_M4 = count_pairs(jnp.asarray(predicted_TE), jnp.asarray(taken_TE), eligible_T, jnp.asarray(modality_T), 2)
    np.testing.assert_array_equal(counted_M4, count_M4)
    assert count_M4[0].all() and not count_M4[1].any()


def test_cross_entropy_of_nothing_and_of_certainty():
    taken_TE = np.array([[True, False]])
    assert cross_entropy(np.zeros((1, 2)), taken_TE, np.array([False])) == 0
    sure_TE = np.array([[1e4, -1e4]])
    assert cross_entropy(sure_TE, taken_TE, np.array([True])) == 0
    assert np.isfinite(cross_entropy(-sure_TE, taken_TE, np.array([True])))


# Beside the model -----------------------------------------------------------------------------------------------------


MODELS = {
    "choice": (Choice(), {"train_steps": 100, "optimizer_warmup_steps": 0}),
    "threshold": (Threshold(gumbel=True, warmup=2), {"model_ffn": "2t1i+1x", "train_accumulate": 2}),
}


@pytest.mark.parametrize("routing", long_but("choice", of=list(MODELS)))
def test_the_model_trains_the_same_with_auxiliary_routers(routing):
    router, fields = MODELS[routing]
    plain, state = updates(tiny(**fields, model_router=router), 4)
    beside, other = updates(tiny(**fields, model_router=dataclasses.replace(router, auxiliary=True)), 4)
    assert auxiliary_params(other.params) and not auxiliary_params(state.params)
    ffn = other.params["layers"]["ffn"]
    kept = {name: weights for name, weights in ffn.items() if name not in auxiliary_params(ffn)}
    other_params = other.params | {"layers": other.params["layers"] | {"ffn": kept}}
    jax.tree.map(np.testing.assert_array_equal, other_params, state.params)
    jax.tree.map(np.testing.assert_array_equal, other.routing_state, state.routing_state)
    for one, two in zip(plain, beside, strict=True):
        for name in ("sums", "taken_M3", "grad_norm", "grad_norm_router"):
            jax.tree.map(np.testing.assert_array_equal, getattr(one, name), getattr(two, name))
        assert not one.predicted_M4.any() and two.predicted_M4.any() and set(two.routing_losses) == {"auxiliary"}


def test_routers_begin_undecided_and_learn():
    config = tiny(model_router=Choice(auxiliary=True), train_steps=100, optimizer_warmup_steps=0)
    reports, _ = updates(config, 80, repeat=True)
    first, last = reports[0], reports[-1]
    losses = config.model.layers * 2  # two groups of experts
    np.testing.assert_allclose(first.routing_losses["auxiliary"], losses * np.log(2), rtol=1e-5)
    assert last.routing_losses["auxiliary"] < 0.7 * first.routing_losses["auxiliary"]
    assert not first.predicted_M4[:, :2].any(), "0 is not above 0"
    right_M, predicted_M, taken_M, all_M = last.predicted_M4.T
    assert (all_M == config.model.layers * 2 * last.tokens_M).all() and (2 * taken_M == all_M).all()
    assert (right_M > 0.8 * taken_M).all() and (right_M > 0.8 * predicted_M).all()


def test_routers_beside_noise_let_in_what_the_quiet_experts_take():
    """Random tokens of one group under noise that stays; the auxiliary routers alone are trained. Judged against noisy
    selections, which no token's activations tell, they would let in few."""
    rule, width = Choice(gumbel=True, gumbel_until=None, auxiliary=True), 8
    shape = layer_of(tiny(model_width=width, model_heads=2, model_ffn="4t4i", model_router=rule))
    routing = moe.layer_routing(tiny(model_router=rule).model, shape, 2, None, True)
    own, x_GTD = routing.groups[0], jax.random.normal(jax.random.key(0), (16, 32, width))
    modality_GT = jnp.tile(jnp.arange(32) % 2, (16, 1))
    zero_GT = jnp.zeros((16, 32), jnp.int32)
    tokens = moe.RoutingTokens(modality_GT, zero_GT.astype(jnp.uint32), zero_GT, zero_GT, jnp.arange(16), {})
    state = {group.group.name: rule.state(4) for group in routing.groups}
    router = {"router_DE": jax.random.normal(jax.random.key(1), (width, 4)) / width**0.5}
    first = {"in_DA": jax.random.normal(jax.random.key(2), (width, 64)), "out_AE": jnp.zeros((64, 4))}

    def answer(auxiliary, step):
        weights = {group.group.name: ExpertWeights(router=router, auxiliary=auxiliary) for group in routing.groups}
        keys = moe.RoutingKeys(jnp.uint32(0), jax.random.key(step))
        result, _ = moe.select(x_GTD, tokens, keys, state, weights, routing)
        return result.losses["auxiliary"], result.predicted_M4

    @jax.jit
    def train(auxiliary):
        def update(step, carried):
            auxiliary, moments = carried
            grads = jax.grad(answer, has_aux=True)(auxiliary, step)[0]
            changes, moments = optimizer.update(grads, moments)
            return optax.apply_updates(auxiliary, changes), moments

        optimizer = optax.adam(1e-2)
        return jax.lax.fori_loop(0, 400, update, (auxiliary, optimizer.init(auxiliary)))[0]

    right, predicted, taken, _ = answer(train(first), 401)[1][0].tolist()
    assert taken == 16 * 4 * own.quota.take(16)
    assert 0.9 < predicted / taken < 1.1 and right > 0.8 * taken


@pytest.mark.slow
def test_a_run_with_auxiliary_routers_records_them_and_is_causal(tmp_path):
    moma_jax.train(tiny(tmp_path, train_steps=2, model_router=Choice(auxiliary=True)), quiet=True)
    record = next(r for r in moma_jax.read_metrics(tmp_path) if r["kind"] == "train")
    names = {f"{figure}_{m}" for figure in ("precision", "recall", "accuracy", "load") for m in ("text", "image")}
    assert names | {"routing_auxiliary"} <= set(record)
    assert "causal" in moma_jax.load(str(tmp_path)).routings


@pytest.mark.parametrize("ffn", ["dense", "1t1i"])
def test_without_routers_there_is_nothing_to_predict(ffn):
    config = tiny(model_ffn=ffn, model_router=Choice(auxiliary=True))
    program = make_program(config)
    assert not auxiliary_params(abstract_params(program, first_routing_state(config)))
