"""Thresholds by the final weights: pooled quantiles, where they are kept, and experts that have their share."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny

import moma_jax
from moma_jax import sharding
from moma_jax.data.stream import open_stream
from moma_jax.errors import InputError
from moma_jax.router import Quota, Routed, Score
from moma_jax.routers import choice
from moma_jax.routers.choice import Choice, best_of
from moma_jax.training.calibrate import Counting, thresholds_of
from moma_jax.training.step import put, run_decoder

FIELDS = {"train_steps": 4, "data_group_rows": 4, "optimizer_peak_lr": 5e-2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Its logits drift: few updates at a high learning rate, in which thresholds have not found their place yet."""
    config = tiny(tmp_path_factory.mktemp("run"), model_ffn="mod+2t2i", **FIELDS)
    moma_jax.train(config, quiet=True)
    return config.run.dir


def loads(model) -> dict[str, np.ndarray]:
    """Passing over taken tokens under a loaded model's thresholds, by layer and expert, as training reckons them."""
    found = []
    with sharding.use_mesh(model.program.mesh):

        def step(params, state, batch):
            group_G = jnp.arange(batch.token_BS.shape[0] // model.config.data.group_rows)
            return run_decoder(model.program, params, batch, jnp.int32(0), group_G, state, False).routing_state

        stream, step = iter(open_stream(model.config)), jax.jit(step)
        for _ in range(8):
            state = step(model.params, model.routing_state, put(next(stream).batch, model.program.mesh))
            found.append({name: np.asarray(choice.loads(own)) for name, own in state.items()})
    return jax.tree.map(lambda *each: np.mean(each, axis=0), *found)


def test_loads_are_near_one_after_calibration(run):
    """At the end of training, and by the command; what a checkpoint holds stays."""
    state = moma_jax.load(run, calibrated=False)
    before = loads(state)
    off = {name: np.abs(own - 1).max() for name, own in before.items()}
    assert max(off.values()) > 0.25 and "depth_image" in off, "there was something to mend"
    near_one(loads(moma_jax.load(run)))
    found = moma_jax.calibrate(run, batches=8)
    for name, expected in before.items():
        np.testing.assert_allclose(found["load_before"][name], expected, atol=0.05)
    near_one(loads(moma_jax.load(run)))
    jax.tree.map(np.testing.assert_array_equal, moma_jax.load(run, calibrated=False).routing_state, state.routing_state)


def near_one(loads):
    for own in loads.values():
        assert np.all((own > 0.8) & (own < 1.25))


def test_the_last_evaluation_of_a_run_is_under_calibrated_thresholds(run, tmp_path):
    recorded = json.loads(Path(run, "summary.json").read_text())["eval"]["heldout"]["threshold"]
    moma_jax.calibrate(run)
    loaded = moma_jax.evaluate(run, routing=("threshold",))["threshold"]
    with_those_of_training = moma_jax.train(
        dataclasses.replace(
            (config := moma_jax.load(run).config),
            train=dataclasses.replace(config.train, calibrate=0),
            run=dataclasses.replace(config.run, dir=str(tmp_path / "as-trained")),
        ),
        quiet=True,
    )["eval"]["heldout"]["threshold"]
    assert recorded["loss"] == pytest.approx(loaded["loss"], rel=1e-6)
    assert recorded["loss"] != pytest.approx(with_those_of_training["loss"], rel=1e-6)


def test_thresholds_are_pooled_quantiles():
    """Groups of unequal numbers of tokens, and logits that no bin's edge meets."""
    rng = np.random.default_rng(0)
    rule, quota = Counting(), Quota(64, Counting().capacity(4, None))
    state, logits, taken = jax.tree.map(jnp.asarray, rule.state(4)), [], 0
    for count in (64, 5, 33):
        logit_TE = (3 * rng.normal(size=(64, 4)) + 1).astype(np.float32)
        score = Score(*3 * (jnp.asarray(logit_TE),))
        state = rule.select(score, jnp.arange(64) < count, quota, state, None).state
        logits.append(logit_TE[:count])
        taken += quota.take(count)
    pooled_ET, found_E = np.sort(np.concatenate(logits).T)[:, ::-1], thresholds_of(**jax.device_get(state))
    np.testing.assert_array_equal(state["taken_E"], taken)
    for logit_T, found in zip(pooled_ET, found_E, strict=True):
        assert logit_T[taken] - 0.02 < found < logit_T[taken - 1] + 0.02


def test_a_router_without_tokens_lets_nobody_in():
    counts = Counting().state(2)
    assert np.all(thresholds_of(**counts) > 1e38)


def test_thresholds_of_another_checkpoint_are_not_taken(run, caplog):
    state, found = moma_jax.load(run, calibrated=False), moma_jax.calibrate(run, batches=1)
    path = f"{run}/thresholds.json"
    for change, said in (({"step": 3}, "set for step 3"), ({"model": "another"}, "set for another model")):
        with open(path, "w") as file:
            json.dump(found | change, file)
        jax.tree.map(np.testing.assert_array_equal, moma_jax.load(run).routing_state, state.routing_state)
        assert said in caplog.text
    for damaged in ({"text": [[0.0]]}, {"text": [[10**400]]}, None, {"text": "low"}, {"other": []}):
        with open(path, "w") as file:
            json.dump(found | {"thresholds": damaged}, file)
        with pytest.raises(InputError, match=r"thresholds.json: does not fit the run's routers; remove it"):
            moma_jax.load(run)
    moma_jax.calibrate(run, batches=1)


@dataclasses.dataclass(frozen=True)
class Counts(Choice):
    """Expert choice that keeps something else than thresholds."""

    def state(self, experts):
        return {"seen": np.float32(0)}

    def select(self, score, eligible_T, quota, state, key):
        return Routed(best_of(score, eligible_T, quota), state)

    def lacks(self, routing, state):
        return "no thresholds" if routing == "threshold" else super().lacks(routing, state)


def test_a_rule_of_another_state_ends_without_calibration(tmp_path):
    config = tiny(tmp_path, train_steps=1, model_router=Counts())
    moma_jax.train(config, quiet=True)
    assert not (tmp_path / "thresholds.json").exists()
    with pytest.raises(InputError, match="keeps no such thresholds"):
        moma_jax.calibrate(config.run.dir, router=Counts)


def test_what_has_no_thresholds_is_refused(tmp_path):
    config = tiny(tmp_path / "dense", model_ffn="dense", train_steps=1)
    moma_jax.train(config, quiet=True)
    with pytest.raises(InputError, match="nothing to calibrate: model.ffn dense has no router"):
        moma_jax.calibrate(config.run.dir)
    with pytest.raises(InputError, match="--batches: 0; give 1 or more"):
        moma_jax.calibrate(dataclasses.replace(config.run).dir, batches=0)
