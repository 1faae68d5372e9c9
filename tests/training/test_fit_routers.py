"""The second stage: routers are fitted to a model that stays as it is."""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import spawn
from runs import changed_batches, my_choice, records
from tiny import tiny

import moma_jax
from moma_jax import sharding
from moma_jax.__main__ import main as moma
from moma_jax.config import RoutersConfig
from moma_jax.data.stream import open_stream
from moma_jax.errors import InputError, RunError
from moma_jax.runs.checkpoint import Checkpoints
from moma_jax.runs.directory import RunDir
from moma_jax.training import fit_routers as routers
from moma_jax.training import token_stage
from moma_jax.training.load import auxiliary_params, load
from moma_jax.training.router_step import compile_routers_step, first_state
from moma_jax.training.step import make_program, put

SETTINGS = RoutersConfig(steps=30, peak_lr=3e-2, end_lr=1e-3, warmup_steps=3, log_every=5, checkpoint_every=10)


def fit(run, **fields):
    return moma_jax.fit_routers(str(run), dataclasses.replace(SETTINGS, **fields), quiet=True)


def contents(directory):
    """Hash of every file."""
    files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def fitted(run):
    return jax.device_get(auxiliary_params(load(str(run)).params))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained run."""
    config = tiny(tmp_path_factory.mktemp("trained") / "run")
    moma_jax.train(config, quiet=True)
    return Path(config.run.dir)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, without routers."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """Routers that were fitted undisturbed, and what was there before."""
    path = Path(shutil.copytree(trained, tmp_path_factory.mktemp("whole") / "run"))
    before, params = contents(path), jax.device_get(load(str(path)).params)
    return path, before, params, fit(path)


def test_the_model_stays_as_it_is_bit_for_bit(whole):
    path, before, params, _ = whole
    after = contents(path)
    assert {name: after[name] for name in before} == before
    model = load(str(path))
    ffn = model.params["layers"]["ffn"]
    kept = {name: weights for name, weights in ffn.items() if name not in auxiliary_params(ffn)}
    jax.tree.map(
        np.testing.assert_array_equal, model.params | {"layers": model.params["layers"] | {"ffn": kept}}, params
    )
    assert "causal" in model.routings and "causal" not in load(str(path), fitted=False).routings
    saved = Checkpoints(RunDir(str(path / "routers")))._shapes(30)
    names = {"text_auxiliary", "image_auxiliary"}
    assert set(saved["params"]["layers"]["ffn"]) == names, "nothing of the model"
    assert set(saved["params"]) == {"layers"} and set(saved["params"]["layers"]) == {"ffn"}
    moments = [str(path) for path, leaf in jax.tree_util.tree_leaves_with_path(saved["opt_state"]) if leaf.shape]
    assert len(moments) == 8 and all(any(name in moment for name in names) for moment in moments)


def test_routers_learn_and_say_how_well_they_predict(whole):
    path, _, _, summary = whole
    found = [r for r in moma_jax.read_metrics(path / "routers") if r["kind"] != "checkpoint"]
    assert [(r["kind"], r["step"]) for r in found[:4]] == [
        ("routers", 5), ("routers", 10), ("routers_eval", 10), ("routers", 15)
    ]  # fmt: skip
    first, last = (r for r in (found[0], found[-2]))
    assert last["step"] == 30 and last["loss"] < 0.9 * np.log(2) < 1.05 * first["loss"]
    figures = {f"{f}_{m}" for f in ("precision", "recall", "accuracy", "load") for m in ("text", "image")}
    figures |= {f"{figure}_layer_{layer:02d}" for figure in figures for layer in range(2)}
    more = {"learning_rate", "tokens", "tokens_per_second", "loss", "step", "grad_norm"}
    assert figures | more <= set(first)
    by_layer = np.mean([last["accuracy_text_layer_00"], last["accuracy_text_layer_01"]])
    assert last["accuracy_text"] == pytest.approx(by_layer) and last["accuracy_text"] > 0.6
    assert first["learning_rate"] > last["learning_rate"] == pytest.approx(1e-3, rel=1e-4)
    judged = summary["eval"]["heldout"]
    assert figures | {"loss"} == set(judged) and judged["loss"] < np.log(2)
    assert summary["model_step"] == 6 and summary["steps"] == 30
    assert json.loads((path / "routers" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    settings = json.loads((path / "routers" / "config.json").read_text())["routers"]
    assert settings == dataclasses.asdict(dataclasses.replace(SETTINGS, batch_rows=8))


@pytest.mark.slow
def test_the_data_go_on_where_training_ended(whole, run, monkeypatch):
    config, seen = moma_jax.recipe(run), []

    def note(number, batch):
        seen.append(batch)
        return batch

    changed_batches(monkeypatch, note)
    fit(run, steps=2)
    every = [packed.batch for _, packed in zip(range(8), open_stream(config), strict=False)]
    for batch, right in zip(seen[:2], every[6:], strict=True):
        np.testing.assert_array_equal(batch.token_BS, right.token_BS)


def test_a_finished_stage_is_left_alone(whole, capsys):
    before = contents(whole[0])
    assert moma_jax.fit_routers(str(whole[0]), SETTINGS) == json.loads(json.dumps(whole[3]))
    assert "complete" in capsys.readouterr().out and contents(whole[0]) == before


# Interruptions --------------------------------------------------------------------------------------------------------


def test_a_signal_saves_and_the_stage_goes_on_exactly(whole, run, monkeypatch):
    def send(number, batch):
        if number == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    with monkeypatch.context() as patch:
        changed_batches(patch, send)
        with pytest.raises(SystemExit) as stopped:
            fit(run)
    assert stopped.value.code == 143
    assert json.loads((run / "routers" / "status.json").read_text())["state"] == "stopped"
    assert 0 < Checkpoints(RunDir(str(run / "routers"))).latest() < 30
    fit(run)
    assert records(run / "routers") == records(whole[0] / "routers")
    jax.tree.map(np.testing.assert_array_equal, fitted(run), fitted(whole[0]))


@pytest.mark.slow
def test_a_kill_loses_nothing(whole, run):
    killed = spawn(__file__, run)
    _, err = killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL, err[-3000:]
    assert Checkpoints(RunDir(str(run / "routers"))).latest() == 10
    assert json.loads((run / "routers" / "status.json").read_text())["state"] == "running"
    fit(run)
    assert records(run / "routers") == records(whole[0] / "routers")
    jax.tree.map(np.testing.assert_array_equal, fitted(run), fitted(whole[0]))


def test_an_update_that_is_not_finite_stops_the_stage(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(routers, "load", lambda *a, **k: _poisoned(load(*a, **k)))
        with pytest.raises(RunError, match="step 1: the cross-entropy .*lower routers.peak_lr"):
            fit(run)


def _poisoned(model):
    return dataclasses.replace(model, params=_broken(model.params))


def _broken(params):
    return params | {"embedding": jax.tree.map(lambda x: x * np.nan, params["embedding"])}


@pytest.mark.slow
def test_or_the_update_is_skipped(run, monkeypatch):
    config, numbers, received = json.loads((run / "config.json").read_text()), itertools.count(1), []
    config["train"]["on_nan"] = "skip"
    (run / "config.json").write_text(json.dumps(config))

    def compile_with_a_bad_third_step(*arguments):
        step = compile_routers_step(*arguments)
        return lambda state, params, *rest: step(state, _broken(params) if next(numbers) == 3 else params, *rest)

    monkeypatch.setattr(routers, "compile_routers_step", compile_with_a_bad_third_step)
    settings = dataclasses.replace(SETTINGS, steps=4, log_every=1)
    summary = moma_jax.fit_routers(str(run), settings, sink=received.append, quiet=True)
    assert received == moma_jax.read_metrics(run / "routers")
    assert [(r["kind"], r["step"]) for r in received if r["kind"] != "checkpoint"] == [
        ("routers", 1), ("routers", 2), ("event", 3), ("routers", 3), ("routers", 4), ("routers_eval", 4)
    ]  # fmt: skip
    assert "update skipped" in received[2]["event"]
    assert [r["loss"] is None for r in received if r["kind"] == "routers"] == [False, False, True, False]
    assert received[3]["precision_text"] is received[3]["recall_image_layer_01"] is None
    assert summary["steps"] == 4 and np.isfinite(summary["eval"]["heldout"]["loss"])


# Microbatches ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_microbatches_change_nothing(trained):
    model = load(str(trained))
    stage = routers.stage_of(model.config, SETTINGS)
    parts = dataclasses.replace(stage, train=dataclasses.replace(stage.train, accumulate=4))
    results = []
    for config in (stage, parts):
        program = make_program(config)
        with sharding.use_mesh(program.mesh):
            state = first_state(program, model.routing_state)
            step = compile_routers_step(program, state, model.params, model.routing_state)
            batch = put(next(iter(open_stream(config))).batch, program.mesh)
            state, report = step(state, model.params, model.routing_state, batch)
            results.append(jax.device_get((report.loss, report.grad_norm, report.tokens_M, report.predicted_LM4)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4)


def test_a_microbatch_holds_no_more_than_in_training():
    config = tiny(train_batch_rows=8, train_accumulate=2)
    for rows, accumulate in ((8, 2), (4, 1), (2, 1), (6, 3), (32, 8)):
        stage = routers.stage_of(config, dataclasses.replace(SETTINGS, batch_rows=rows))
        assert (stage.train.batch_rows, stage.train.accumulate) == (rows, accumulate)


# What is refused ------------------------------------------------------------------------------------------------------


def refused(capsys, *words):
    """The one line that the command says when it exits with 2."""
    with pytest.raises(SystemExit) as stopped:
        moma(["fit-routers", *map(str, words)])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_ffn": "dense"}, "nothing to fit: model.ffn dense has no router; its routing is causal already"),
        ({"model_ffn": "1t1i"}, "model.ffn 1t1i has no router; its routing is causal already"),
        ({"router_auxiliary": True}, "nothing to fit: its auxiliary routers were trained beside the model"),
    ],
)
def test_where_there_is_nothing_to_fit(capsys, tmp_path, fields, message):
    from moma_jax.config_json import to_json

    RunDir(str(tmp_path)).write_json("config.json", to_json(tiny(tmp_path, **fields)))
    assert message in refused(capsys, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_wrong_questions(capsys, run, tmp_path):
    assert "name a run first" in refused(capsys)
    assert "no config.json here" in refused(capsys, tmp_path / "nowhere")
    assert "--stepz: no such option" in refused(capsys, run, "--stepz", "3")
    assert "routers.batch_rows: 3 rows are not whole routing groups of 2 rows; use 4" in refused(
        capsys, run, "--batch-rows", "3"
    )
    assert "routers.steps: must be positive" in refused(capsys, run, "--steps", "0")
    with pytest.raises(InputError, match="choice, not runs:my_choice"):
        moma_jax.fit_routers(str(run), SETTINGS, router=my_choice, quiet=True)
    assert not (run / "routers").exists()


def test_other_settings_and_another_step_are_refused_until_told(capsys, whole, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    words = ["--peak-lr", "0.03", "--end-lr", "0.001", "--warmup-steps", "3"]
    line = refused(capsys, run, *words, "--steps", "31")
    assert "routers.steps: 30 -> 31" in line and f"remove {run}/routers to fit anew" in line
    assert "log_every" not in line and "peak_lr" not in line
    model = Checkpoints(RunDir(str(run)), write=True)
    shutil.rmtree(run / "checkpoints" / "6")
    model.close()
    line = refused(capsys, run, *words, "--steps", "30")
    assert "fitted to the model of step 6, and the run is at step 3" in line and "to fit anew" in line
    with pytest.raises(
        InputError, match="fitted at step 6, not 3; use that step, or remove .*routers and fit them again"
    ):
        load(str(run)).under("causal")
    shutil.rmtree(run / "routers")
    assert fit(run, steps=1)["model_step"] == 3
    assert "causal" in load(str(run)).routings


@pytest.mark.slow
def test_routers_of_another_model_are_not_used(whole, capsys, tmp_path):
    path = tmp_path / "run"
    moma_jax.train(tiny(path, train_seed=5), quiet=True)
    shutil.copytree(whole[0] / "routers", path / "routers")
    assert "causal" not in load(str(path)).routings
    with pytest.raises(InputError, match="fitted to another model; remove them and fit again: moma routers fit"):
        load(str(path)).under("causal")
    words = ["--steps", "30", "--peak-lr", "0.03", "--end-lr", "0.001", "--warmup-steps", "3"]
    assert "fitted to another model; remove" in refused(capsys, path, *words)


def test_a_stage_that_is_not_complete_is_not_used(whole, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    (run / "routers" / "summary.json").unlink()
    assert "causal" not in load(str(run)).routings
    with pytest.raises(InputError, match="fitted in part, up to step 30; go on with: moma routers fit"):
        load(str(run)).under("causal")


def test_the_command_takes_the_runs_own_settings(run, monkeypatch):
    called = []
    monkeypatch.setattr(moma_jax, "fit_routers", lambda *arguments, **_: called.append(arguments), raising=False)
    moma(["fit-routers", str(run), "--steps", "3", "--schedule", "cosine"])
    own = moma_jax.recipe(run).routers
    assert called == [(str(run), dataclasses.replace(own, steps=3, schedule="cosine"))]


def main(run):
    """Kills itself when the first checkpoint is written and later updates are under way."""
    original = token_stage.open_stream

    def killing(*arguments, **settings):
        stream = original(*arguments, **settings)

        class Killing:
            number = 0

            def __iter__(self):
                return self

            def __next__(self):
                self.number += 1
                while self.number == 15 and not (Path(run) / "routers" / "checkpoints" / "10").exists():
                    time.sleep(0.01)
                if self.number == 15:
                    os.kill(os.getpid(), signal.SIGKILL)
                return next(stream)

            def close(self):
                stream.close()

        return Killing()

    token_stage.open_stream = killing
    fit(run)


if __name__ == "__main__":
    main(sys.argv[1])
