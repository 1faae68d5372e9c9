"""Running thresholds, selections that a token decides by itself, and thresholds as the training rule."""

import dataclasses
import json
import math
import os
import signal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from processes import output, spawn
from runs import changed_batches, records
from tiny import tiny

import moma_jax
from moma_jax import sharding
from moma_jax.data.stream import open_stream
from moma_jax.model.decoder import first_routing_state
from moma_jax.model.moe import position_order
from moma_jax.model.routing import score_of
from moma_jax.router import Quota, Score, take_entering
from moma_jax.routers.choice import GAIN, Choice, best_of, follow, loads, thresholds
from moma_jax.routers.threshold import Threshold
from moma_jax.training.step import compile_step, create_state, make_program, put, run_decoder

ROWS, SEQUENCE, EXPERTS = 3, 8, 2
TOKENS = ROWS * SEQUENCE
QUOTA = Quota(TOKENS, Fraction(1, EXPERTS))
ORDER_T = position_order(ROWS, TOKENS)


def fresh(threshold=0.0, updates=0.0):
    """A state of one layer, of which the latest update says nothing."""
    state = Choice().state(EXPERTS)
    return state | {"threshold_E": state["threshold_E"] + np.float32(threshold), "updates": np.float32(updates)}


def drawn(rng, noise=0.0, eligible=0.7):
    """A Score with noise in logit and rank, and who is eligible."""
    plain_TE = rng.normal(0, 2, (TOKENS, EXPERTS)).astype(np.float32)
    logit_TE = plain_TE + rng.normal(0, 1, plain_TE.shape).astype(np.float32) * np.float32(noise)
    rank_TE = logit_TE + rng.random(plain_TE.shape).astype(np.float32) * np.float32(1e-3)
    score = Score(jnp.asarray(logit_TE), jnp.asarray(rank_TE), jnp.asarray(plain_TE), order_T=ORDER_T)
    return score, rng.random(TOKENS) < eligible


def slots_by_loop(passes_TE, slots):
    """Each expert's tokens in the order of their positions, of several rows row by row; the latest are dropped."""
    taken = []
    for e in range(passes_TE.shape[1]):
        tokens = [r * SEQUENCE + s for s in range(SEQUENCE) for r in range(ROWS) if passes_TE[r * SEQUENCE + s, e]]
        taken.append(tokens[:slots])
    return taken


def filled(selection):
    """Tokens of each expert's filled slots, in the order of slots."""
    return [i[f].tolist() for i, f in zip(*map(np.asarray, (selection.index_EC, selection.filled_EC)), strict=True)]


# Thresholds that follow -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_thresholds_move_until_as_many_pass_as_are_taken(noise):
    """By what the update before says of them: by logits without noise, and by nobody where nobody is eligible."""
    rng = np.random.default_rng(0)
    select, state = jax.jit(Choice(gumbel=noise > 0).select, static_argnums=2), fresh()
    right_E, step_E = np.zeros(EXPERTS), np.zeros(EXPERTS)
    for update in range(8):
        score, eligible_T = drawn(rng, noise, eligible=0.0 if update == 3 else 0.7)
        selection, after, losses, _ = select(score, eligible_T, QUOTA, state, None)
        assert filled(selection) == filled(best_of(score, eligible_T, QUOTA)) and losses == {}
        right_E += step_E
        plain_NE, k = np.asarray(score.plain_TE, np.float64)[eligible_T], math.ceil(eligible_T.sum() / EXPERTS)
        passed_E = (plain_NE >= right_E).sum(0)
        step_E = np.zeros(EXPERTS)
        if k:
            distance_E = np.abs(plain_NE - right_E).mean(0)
            step_E = GAIN * distance_E * np.clip(passed_E / k - 1, -1, 1)
        np.testing.assert_allclose(after["threshold_E"], right_E, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(thresholds(after), right_E + step_E, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(loads(after), passed_E / max(k, 1e-6), rtol=1e-6)
        assert after["updates"] == update + 1 and not np.any(after["dropped_E"])
        state = after


def test_routing_groups_count_by_their_tokens():
    """Of 30 eligible tokens in six routing groups, however they are dealt: as of one group that has them all."""
    rng, quota = np.random.default_rng(1), Quota(30, Fraction(1, EXPERTS))
    plain_TE = rng.normal(0.5, 2, (30, EXPERTS)).astype(np.float32)
    state, found = fresh(threshold=0.7, updates=4), []
    for counts in ((30,), (1, 0, 2, 17, 10, 0)):
        after = []
        for start, count in zip(np.cumsum((0, *counts)), counts, strict=False):
            own_TE = np.roll(plain_TE, -start, 0)
            score = Score(*3 * (jnp.asarray(own_TE),))
            after.append(follow(state, score, np.arange(30) < count, best_of(score, np.arange(30) < count, quota)))
        found.append(jax.tree.map(lambda *x: np.mean(x, 0), *after))
    one, six = found
    for name in ("passed_E", "distance_E", "eligible"):
        np.testing.assert_allclose(6 * np.asarray(six[name]), one[name], rtol=1e-6)
    assert 6 * six["taken_E"][0] == 1 + 1 + 9 + 5 and one["taken_E"][0] == 15, "each rounds its share up"


def test_logits_that_drift_and_change_their_scale_are_followed():
    """A quarter of the tokens pass after some updates, whatever the scale. Where logits move by a fiftieth of their
    deviation in every update, the threshold stays behind by a tenth of the load: GAIN * 0.9 * 0.1 = 0.02."""
    rng, quota, rule = np.random.default_rng(2), Quota(TOKENS, Fraction(1, 4)), Choice()
    select, everyone_T = jax.jit(rule.select, static_argnums=2), np.ones(TOKENS, bool)
    for scale, centre in ((1.0, 0.0), (0.01, 0.2), (300.0, -1000.0)):
        state, found = fresh(), []
        for update in range(200):
            drift = scale * 0.02 * update
            plain_TE = jnp.asarray(rng.normal(centre + drift, scale, (TOKENS, EXPERTS)), jnp.float32)
            state = select(Score(*3 * (plain_TE,)), everyone_T, quota, state, None).state
            found.append(loads(state))
        assert 1.0 < np.mean(found[60:]) < 1.15


def test_thresholds_of_runs_that_kept_averages_are_read():
    """Their share of the 0 that an average began with is divided out."""
    old = {"threshold_E": np.float32([0.5, 1.5, 0.0]), "unseen_E": np.float32([0.5, 0.0, 1.0])}
    np.testing.assert_allclose(thresholds(old), [1.0, 1.5, 0.0])


# Selections -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [TOKENS, 5, 1])
def test_whoever_passes_is_taken_in_the_order_of_positions(slots):
    rng = np.random.default_rng(slots)
    passes_TE, logit_TE = rng.random((TOKENS, EXPERTS)) < 0.5, rng.normal(size=(TOKENS, EXPERTS)).astype(np.float32)
    selection = take_entering(jnp.asarray(passes_TE), jax.nn.sigmoid(logit_TE), ORDER_T, slots)
    assert selection.index_EC.shape == (EXPERTS, slots)
    right = slots_by_loop(passes_TE, slots)
    assert filled(selection) == right
    for e, tokens in enumerate(right):
        np.testing.assert_allclose(selection.gate_EC[e, : len(tokens)], oracles.sigmoid(logit_TE[tokens, e]), rtol=1e-5)
        np.testing.assert_array_equal(selection.gate_EC[e, len(tokens) :], 0)


def test_nobody_passes_and_everybody_does():
    gate_TE = jnp.full((TOKENS, EXPERTS), 0.5)
    nobody = take_entering(gate_TE > 1, gate_TE, ORDER_T, 4)
    assert not nobody.filled_EC.any() and not nobody.gate_EC.any() and (nobody.index_EC == 0).all()
    everybody = take_entering(gate_TE < 1, gate_TE, ORDER_T, TOKENS)
    assert everybody.filled_EC.all() and filled(everybody)[0][:4] == [0, SEQUENCE, 2 * SEQUENCE, 1]


def test_a_threshold_that_is_reached_and_a_prediction_above_zero_let_pass():
    score, _ = drawn(np.random.default_rng(1))
    predicted_TE = np.random.default_rng(2).normal(size=(TOKENS, EXPERTS)).astype(np.float32)
    predicted_TE[0] = 0
    score = score._replace(predicted_TE=jnp.asarray(predicted_TE))
    state = fresh(threshold=score.plain_TE[3, 0], updates=1)
    enters_TE, gate_TE = Choice().decide(score, state, "threshold")
    np.testing.assert_array_equal(enters_TE, np.asarray(score.plain_TE) >= state["threshold_E"])
    assert enters_TE[3, 0]
    np.testing.assert_allclose(gate_TE, oracles.sigmoid(np.asarray(score.logit_TE)), rtol=1e-5)
    enters_TE, same_TE = Choice().decide(score, None, "causal")
    np.testing.assert_array_equal(enters_TE, predicted_TE > 0)
    np.testing.assert_array_equal(same_TE, gate_TE)


# As the training rule -------------------------------------------------------------------------------------------------

RULE = Threshold(warmup=3, slack=1.25)


def test_the_warm_up_is_expert_choice():
    score, eligible_T = drawn(np.random.default_rng(3))
    for updates in (0, 2):
        arguments = (score, eligible_T, QUOTA, fresh(threshold=9, updates=updates), None)
        selection, state, *_ = RULE.select(*arguments)
        chosen, followed, *_ = Choice().select(*arguments)
        assert filled(selection) == filled(chosen) and selection.index_EC.shape == (EXPERTS, 15)
        jax.tree.map(np.testing.assert_array_equal, state, followed)
    selection, *_ = RULE.select(score, eligible_T, QUOTA, fresh(threshold=9, updates=3), None)
    assert not selection.filled_EC.any()


def test_on_overflow_the_latest_positions_are_dropped_whatever_their_score():
    rng = np.random.default_rng(4)
    score, _ = drawn(rng)
    everyone_T, state = np.ones(TOKENS, bool), fresh(threshold=-9, updates=3)
    kept, after, *_ = RULE.select(score, everyone_T, QUOTA, state, None)
    first = sorted(range(TOKENS), key=lambda t: (t % SEQUENCE, t))[:15]
    assert filled(kept) == [first, first]
    np.testing.assert_allclose(after["dropped_E"], 1 - 15 / TOKENS, rtol=1e-6)
    shuffled = Score(*(x_TE[::-1] for x_TE in score[:3]), order_T=ORDER_T)
    assert filled(RULE.select(shuffled, everyone_T, QUOTA, state, None)[0]) == filled(kept)
    few_T = np.arange(TOKENS) < 10
    assert not np.any(RULE.select(score, few_T, QUOTA, state, None)[1]["dropped_E"])


def test_slots_are_never_more_than_tokens():
    score, eligible_T = drawn(np.random.default_rng(5))
    wide = dataclasses.replace(RULE, slack=100.0)
    assert wide.select(score, eligible_T, QUOTA, fresh(), None)[0].index_EC.shape == (EXPERTS, TOKENS)


def test_a_starved_expert_recovers():
    """Its threshold sinks though it takes nothing: it follows what the expert would choose."""

    def update(state, key):
        plain_TE = jax.random.normal(key, (TOKENS, EXPERTS))
        score = Score(plain_TE, plain_TE, plain_TE, order_T=ORDER_T)
        selection, state, *_ = RULE.select(score, jnp.ones(TOKENS, bool), QUOTA, state, None)
        return state, selection.filled_EC.sum(1)

    state = fresh(updates=50)
    state["threshold_E"] = np.array([100.0, 0.0], np.float32)
    _, taken_NE = jax.lax.scan(update, jax.tree.map(jnp.asarray, state), jax.random.split(jax.random.key(0), 150))
    taken_NE = np.asarray(taken_NE)
    assert not taken_NE[:10, 0].any(), "starved"
    share = TOKENS / EXPERTS
    np.testing.assert_allclose(taken_NE[100:].mean(0), share, rtol=0.1)
    assert taken_NE.max() <= 1.25 * share


# In training ----------------------------------------------------------------------------------------------------------

THRESHOLD = Threshold(warmup=2)


@pytest.mark.slow
def test_a_starved_expert_recovers_in_the_whole_model():
    config = tiny(train_steps=60, model_router=THRESHOLD)
    program = make_program(config)
    batches, found = iter(open_stream(config)), []
    with sharding.use_mesh(program.mesh):
        state = create_state(program, first_routing_state(config))
        high = jax.tree.map(lambda x: x, state.routing_state)
        high["text"]["threshold_E"] = high["text"]["threshold_E"].at[0, 1].set(40.0)
        high = {name: group | {"updates": group["updates"] + 30} for name, group in high.items()}
        state = dataclasses.replace(state, routing_state=high)
        step = compile_step(program, state)
        for _ in range(50):
            state, report = step(state, put(next(batches).batch, program.mesh))
            found.append(np.asarray(loads(state.routing_state["text"]))[0, 1])
            assert report.finite
    assert not any(found[:5])
    assert np.mean(found[-20:]) == pytest.approx(1, abs=0.25)


@pytest.mark.slow
def test_a_run_by_thresholds_goes_on_exactly(tmp_path, monkeypatch):
    """Stopped after the warm-up, with thresholds in the checkpoint that decide what comes."""

    def send(number, batch):
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    fields = {"model_router": dataclasses.replace(THRESHOLD, slack=1.0)}
    whole, parts = tiny(tmp_path / "whole", **fields), tiny(tmp_path / "parts", **fields)
    moma_jax.train(whole, quiet=True)
    with monkeypatch.context() as patch:
        changed_batches(patch, send)
        with pytest.raises(SystemExit):
            moma_jax.train(parts, quiet=True)
    moma_jax.train(parts, quiet=True)
    assert records(parts.run.dir) == records(whole.run.dir)
    one, two = (moma_jax.load(config.run.dir) for config in (parts, whole))
    jax.tree.map(np.testing.assert_array_equal, (one.params, one.routing_state), (two.params, two.routing_state))
    for state in one.routing_state.values():
        assert (np.asarray(state["updates"]) == 6).all() and np.asarray(state["threshold_E"]).all()
    dropped = [r["dropped_text"] for r in records(whole.run.dir) if r["kind"] == "train"]
    assert dropped[0] == 0 and max(dropped) > 0, "no slack: what passes beyond its share is dropped, and counted"
    assert "threshold" in one.routings


@pytest.mark.slow
def test_eight_devices_select_as_one():
    one, eight = (json.loads(output(p)) for p in [spawn(__file__, devices=n) for n in (1, 8)])
    assert (one["devices"], eight["devices"]) == (1, 8)
    assert one["selections"] == eight["selections"] and sum(map(len, one["selections"])) > 0
    np.testing.assert_allclose(eight["thresholds"], one["thresholds"], rtol=1e-5)
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-5)


def main():
    config = tiny(train_batch_rows=16, train_loss_chunk=16, model_router=THRESHOLD)
    program = make_program(config)
    batches, losses = iter(open_stream(config)), []
    with sharding.use_mesh(program.mesh):
        state = create_state(program, first_routing_state(config))
        step = compile_step(program, state)
        for _ in range(4):
            state, report = step(state, put(next(batches).batch, program.mesh))
            losses.append(float(report.sums.cross_entropy_J.sum()))
        groups = jnp.arange(config.train.batch_rows // config.data.group_rows)

        @jax.jit
        def select(params, routing_state, batch):
            arguments = (batch, jnp.int32(0), groups, routing_state, False)
            return run_decoder(program, params, *arguments, return_selections=True).selections

        given = state.routing_state  # the warm-up is over
        selections = jax.device_get(select(state.params, given, put(next(batches).batch, program.mesh)))
    chosen = [x[s.filled_EC].tolist() for s in selections.values() for x in [s.index_EC]]
    thresholds = [np.asarray(group["threshold_E"]).ravel().tolist() for group in given.values()]
    print(
        json.dumps(
            {"devices": program.mesh.size, "selections": chosen, "thresholds": sum(thresholds, []), "losses": losses}
        )
    )


if __name__ == "__main__":
    main()


def test_gates_of_thresholds_are_clean_beside_noise():
    """After the warm-up noise could only multiply gates: who enters is decided by the clean logit."""
    rule = Threshold(gumbel=True, warmup=1)
    logit_TE = jax.random.normal(jax.random.key(3), (64, 2))
    score = score_of(
        logit_TE, jnp.zeros(64, jnp.uint32), jnp.uint32(0), rule, (jax.random.key(4), 1.0), None, jnp.arange(64)
    )
    state = rule.state(2) | {"updates": np.float32(5)}
    chosen = rule.select(score, jnp.ones(64, bool), Quota(64, Fraction(1, 2)), state, jax.random.key(5)).selection
    gate_EC, index_EC, filled_EC = (np.asarray(x) for x in (chosen.gate_EC, chosen.index_EC, chosen.filled_EC))
    clean_EC = np.take_along_axis(np.asarray(jax.nn.sigmoid(logit_TE)).T, index_EC, axis=1)
    assert filled_EC.sum() > 30
    np.testing.assert_array_equal(gate_EC[filled_EC], clean_EC[filled_EC])
