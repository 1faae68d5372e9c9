"""One update: microbatches, devices, the guard."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import output, spawn
from tiers import long_but
from tiny import tiny

from moma_jax import sharding
from moma_jax.data.stream import open_stream
from moma_jax.evaluation.evaluate import make_eval_step
from moma_jax.routers.choice import best_of
from moma_jax.rules import as_rule
from moma_jax.training.step import (
    _mean_state,
    compile_step,
    create_state,
    make_program,
    put,
    replicate,
)


def start(config):
    """Program, state and batches of a config."""
    program = make_program(config)
    with sharding.use_mesh(program.mesh):
        state = create_state(program, {})
    return program, state, iter(open_stream(config))


def updates(config, number, change=lambda batch: batch):
    """Loss by modality and norm of each of some updates, and the parameters after them."""
    program, state, batches = start(config)
    rows = []
    with sharding.use_mesh(program.mesh):
        step = compile_step(program, state)
        for _ in range(number):
            state, report = step(state, put(change(next(batches).batch), program.mesh))
            sums = report.sums
            rows.append([*np.asarray(sums.cross_entropy_J / sums.weight_J), float(report.grad_norm)])
    return rows, jax.device_get(state.params)


def uneven(batch):
    """The batch with little weight in its first rows: a mean of the microbatches' means is not that of the tokens."""
    weight_BS = batch.weight_BS.copy()
    weight_BS[: len(weight_BS) // 4, 3:] = 0
    return batch._replace(weight_BS=weight_BS)


def test_microbatches_change_nothing():
    fields = {"model_ffn": "2t2i+1x", "router_gumbel": True, "model_dropout": 0.1}
    whole, whole_params = updates(tiny(**fields), 3, uneven)
    parts, parts_params = updates(tiny(**fields, train_accumulate=4), 3, uneven)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), parts_params, whole_params)


@pytest.mark.slow
def test_an_update_lowers_the_loss_of_its_own_batch():
    config = tiny(train_steps=100, optimizer_warmup_steps=0)
    program, state, batches = start(config)
    with sharding.use_mesh(program.mesh):
        step, batch = compile_step(program, state), put(next(batches).batch, program.mesh)
        losses = []
        for _ in range(20):
            state, report = step(state, batch)
            losses.append(float(report.sums.cross_entropy_J.sum() / report.sums.weight_J.sum()))
    assert losses[-1] < 0.8 * losses[0] and int(state.step) == 20


@pytest.mark.parametrize("poison", long_but(np.inf, of=[np.nan, np.inf]))
def test_an_update_that_is_not_finite_changes_only_the_step(poison):
    program, state, batches = start(tiny())
    batch = next(batches).batch
    broken = batch._replace(weight_BS=np.where(np.arange(16) == 3, poison, batch.weight_BS).astype(np.float32))
    with sharding.use_mesh(program.mesh):
        step = compile_step(program, state)
        state, report = step(state, put(batch, program.mesh))
        before = jax.device_get(state)
        state, bad_report = step(state, put(broken, program.mesh))
    assert report.finite and not bad_report.finite
    after = jax.device_get(state)
    assert after.step == before.step + 1
    for part in ("params", "opt_state", "routing_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))


def counting(score, eligible_T, quota, state, key):
    """Expert choice that counts its calls; from the second update on its loss is not a number, its gradient is."""
    return best_of(score, eligible_T, quota), state + 1, {"pull": jnp.where(state > 0, jnp.nan, 0.0)}


def test_the_state_keeps_its_types():
    before = {"count": np.int32(0), "flag": np.bool_(False), "mean": jnp.bfloat16(0)}
    total = {"count": jnp.int32(10), "flag": jnp.int32(4), "mean": jnp.bfloat16(6)}
    for accumulate, count, mean in ((1, 10, 6.0), (4, 2, 1.5)):
        state = _mean_state(total, accumulate, before)
        assert {name: value.dtype for name, value in state.items()} == {n: b.dtype for n, b in before.items()}
        assert (state["count"], bool(state["flag"]), state["mean"]) == (count, True, mean)


@pytest.mark.slow
def test_a_whole_number_state_stays_one_and_a_select_loss_is_guarded():
    config = tiny(train_accumulate=2, model_router=as_rule(counting))
    program = make_program(config)
    batches = iter(open_stream(config))
    with sharding.use_mesh(program.mesh):
        state = create_state(program, {name: np.zeros(2, np.int32) for name in ("text", "image")})
        step = compile_step(program, state)
        state, report = step(state, put(next(batches).batch, program.mesh))
        state, bad_report = step(state, put(next(batches).batch, program.mesh))
    assert report.finite and not bad_report.finite and np.isfinite(bad_report.grad_norm)
    assert all(n.dtype == np.int32 and n.tolist() == [1, 1] for n in state.routing_state.values())


def test_report_counts_real_tokens_and_routers():
    config = tiny()
    program, state, batches = start(config)
    batch = next(batches).batch
    segment_BS = np.array(batch.segment_BS)
    segment_BS[:, 10:] = 0
    batch = batch._replace(segment_BS=segment_BS, weight_BS=batch.weight_BS * (segment_BS > 0))
    with sharding.use_mesh(program.mesh):
        _, report = compile_step(program, state)(state, put(batch, program.mesh))
    modality_BS = batch.modality_BS
    tokens_M = [int(np.sum((modality_BS == m) & (segment_BS > 0))) for m in range(2)]
    assert report.tokens_M.tolist() == tokens_M
    assert report.taken_M3.sum(-1).tolist() == [2 * n for n in tokens_M]  # two layers
    assert 0 < float(report.grad_norm_router) < float(report.grad_norm)


def test_evaluation_does_not_depend_on_batches():
    program, state, batches = start(tiny())
    batch = next(batches).batch
    with sharding.use_mesh(program.mesh):
        step = make_eval_step(program)

        def nats(rows, first_group):
            part = type(batch)(*(np.asarray(x)[rows] for x in batch))
            return step(state.params, {}, put(part, program.mesh), replicate(first_group, program.mesh)).nats_BS

        whole_BS, first_BS, rest_BS = nats(slice(0, 8), 0), nats(slice(0, 4), 0), nats(slice(4, 8), 2)
    np.testing.assert_allclose(np.concatenate([first_BS, rest_BS]), whole_BS, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one():
    one, eight = spawn(__file__, 1), spawn(__file__, 2, devices=8)
    one, eight = json.loads(output(one)), json.loads(output(eight))
    assert (one["devices"], eight["devices"]) == (1, 8)
    np.testing.assert_allclose(eight["updates"], one["updates"], rtol=1e-5)
    np.testing.assert_allclose(eight["evaluation"], one["evaluation"], rtol=1e-5)


def main(accumulate):
    config = tiny(train_batch_rows=32, train_accumulate=accumulate, train_loss_chunk=16, router_gumbel=True)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.1))
    rows, _ = updates(config, 3)
    program, state, batches = start(config)
    batch = next(batches).batch
    batch = type(batch)(*(np.asarray(x)[:16] for x in batch))
    with sharding.use_mesh(program.mesh):
        report = make_eval_step(program)(state.params, {}, put(batch, program.mesh), replicate(0, program.mesh))
        evaluation = [*np.asarray(report.nats_BS).sum(-1).tolist(), int(report.entered)]
    rows = [list(map(float, row)) for row in rows]
    print(json.dumps({"devices": program.mesh.size, "updates": rows, "evaluation": evaluation}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
