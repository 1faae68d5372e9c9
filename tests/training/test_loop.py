"""A run from its first step to its summary, and what stops it."""

import dataclasses
import gzip
import json
import os
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from runs import changed_batches, my_choice, parameters, records
from tiny import tiny

import moma_jax
from moma_jax.batch import batch_of
from moma_jax.cost import flops_per_token
from moma_jax.errors import InputError, RunError
from moma_jax.routers.token_choice import TokenChoice
from moma_jax.runs.checkpoint import Checkpoints
from moma_jax.runs.directory import RunDir
from moma_jax.runs.profiler import profile_warnings
from moma_jax.training import loop, pretrain
from moma_jax.training.step import masked_in


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run, with TensorBoard."""
    config = tiny(tmp_path_factory.mktemp("whole"), run_tensorboard=True, train_keep_every=3)
    return config, moma_jax.train(config, quiet=True)


def test_a_run_leaves_its_files(whole):
    config, summary = whole
    run = RunDir(config.run.dir)
    names = {name.split("/")[0] for name in run.names("")}
    assert names == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "documents.parquet",
        "routing",
        "thresholds.json",
        "status.json",
        "summary.json",
        "tensorboard",
        "checkpoints",
    }
    assert run.read_json("summary.json") == json.loads(json.dumps(summary))
    assert moma_jax.recipe(config.run.dir) == config
    status = run.read_json("status.json")
    assert (status["state"], status["step"], status["total"], status["pid"]) == ("complete", 6, 6, os.getpid())
    assert {"jax", "optax"} <= set(summary["versions"]) and summary["device"] == {"kind": "cpu", "count": 1}
    evaluation = summary["eval"]["heldout"]
    assert set(evaluation) == {"choice", "threshold", "gap_percent", "unigram"}
    assert len({evaluation[name]["tokens"] for name in ("choice", "threshold", "unigram")}) == 1


def test_records_say_what_the_readme_promises(whole):
    found = records(whole[0].run.dir)
    assert [(r["kind"], r["step"]) for r in found] == [
        ("train", 2), ("train", 4), ("eval", 4), ("eval", 4), ("train", 6), ("eval", 6), ("eval", 6)
    ]  # fmt: skip
    train, choice, threshold = found[0], found[2], found[3]
    both = {"schema", "kind", "step", "loss", "loss_text", "loss_image"}
    conditions = {"image_given_text", "text_given_image", "interleaved"}
    measures = {"", "_text", "_image"} | {f"_{name}" for name in conditions}
    figures = {f"{what}{measure}" for what in ("loss", "tokens") for measure in measures}
    experts = {f"experts_per_token{group}" for group in ("", "_text", "_image")}
    assert set(choice) == both | figures | {"eval_set", "routing"} | experts
    assert set(threshold) == set(choice) | {f"perplexity{measure}" for measure in measures} | {"gap_percent"}
    assert (choice["routing"], threshold["routing"]) == ("choice", "threshold")
    assert threshold["perplexity"] == pytest.approx(np.exp(threshold["loss"]))
    assert threshold["gap_percent"] == pytest.approx(100 * (threshold["loss"] / choice["loss"] - 1))
    by_modality = {f"{n}_{m}" for n in ("tokens", "fill") for m in ("text", "image")}
    taken = {f"taken_{m}_{n}" for m in ("text", "image") for n in ("0", "1", "2plus")}
    more = {"z_loss", "masked", "grad_norm", "grad_norm_router", "learning_rate", "tokens", "flops"}
    more |= {
        f"{n}{g}{e}"
        for n, e in (("threshold_load_", ""), ("threshold_load_", "_least"), ("dropped_", ""))
        for g in ("text", "image")
    }
    assert set(train) - {k for k in train if k.startswith("epoch_")} == both | by_modality | taken | more
    assert train["tokens"] == train["tokens_text"] + train["tokens_image"] > 0
    assert found[1]["tokens"] >= 1.9 * train["tokens"]
    assert train["flops"] == pytest.approx(train["tokens"] * flops_per_token(whole[0]))
    assert sum(train[f"taken_text_{n}"] for n in ("0", "1", "2plus")) == pytest.approx(1)
    assert 0 < train["fill_text"] <= 1 and train["masked"] == 0
    assert {r["mfu"] for r in moma_jax.read_metrics(whole[0].run.dir) if r["kind"] == "train"} == {None}


def test_a_complete_run_is_left_alone(whole, capsys):
    before = RunDir(whole[0].run.dir).read("metrics.jsonl")
    assert moma_jax.train(whole[0]) == json.loads(json.dumps(whole[1]))
    assert "complete" in capsys.readouterr().out
    assert RunDir(whole[0].run.dir).read("metrics.jsonl") == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_exactly(whole, tmp_path, monkeypatch, number):
    def send(batch_number, batch):
        if batch_number == 2:
            os.kill(os.getpid(), number)
        return batch

    with monkeypatch.context() as patch:
        changed_batches(patch, send)
        with pytest.raises(SystemExit) as exit_:
            moma_jax.train(tiny(tmp_path), quiet=True)
    assert exit_.value.code == 128 + number
    stopped = RunDir(tmp_path).read_json("status.json")
    assert stopped["state"] == "stopped" and 0 < stopped["step"] < 6
    assert Checkpoints(RunDir(tmp_path)).latest() == stopped["step"]
    moma_jax.train(tiny(tmp_path), quiet=True)
    assert records(tmp_path) == records(whole[0].run.dir)
    jax.tree.map(np.testing.assert_array_equal, parameters(tmp_path), parameters(whole[0].run.dir))


def test_a_changed_config_is_refused_with_the_list(whole):
    with pytest.raises(InputError, match=r"train.seed: 0 -> 1.*run.dir") as error:
        moma_jax.train(tiny(whole[0].run.dir, train_seed=1, model_norm="pre", train_log_every=1))
    assert "model.norm: swin -> pre" in str(error.value) and "log_every" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_select_function_of_ones_own(whole, tmp_path, capsys):
    state = {name: {"calls": np.zeros(2, np.float32)} for name in ("text", "image")}
    config = tiny(tmp_path, train_steps=2)
    summary = moma_jax.train(config, select=my_choice, routing_state=state)
    assert "warning: optimizer.warmup_steps 2 is not below the run's 2 steps" in capsys.readouterr().out
    assert summary["router"] == "runs:my_choice" and summary["final"]["routing_pull"] > 0
    loaded = moma_jax.load(str(tmp_path), router=my_choice)
    assert loaded.routing_state["text"]["calls"].tolist() == [2, 2]
    with pytest.raises(InputError, match="my_choice.*-> .*choice"):
        moma_jax.train(config)
    with pytest.raises(InputError, match="choice.*-> .*my_choice"):
        moma_jax.train(whole[0], select=my_choice)


@pytest.mark.slow
def test_what_a_rule_learned_goes_on_with_anothers_weights(tmp_path):
    rule, states = TokenChoice(balance=0.0, bias_rate=0.01), []
    later = {"run_init_from": str(tmp_path / "one"), "train_steps": 1}
    unlike = {"model_router": dataclasses.replace(rule, bias_rate=0.02)}
    for name, more in (("one", {}), ("other", later), ("unlike", later | unlike)):
        moma_jax.train(tiny(tmp_path / name, **({"model_router": rule} | more)), quiet=True)
        states.append(moma_jax.load(str(tmp_path / name)).routing_state["text"])
    assert np.abs(states[0]["bias_E"]).max() > 0
    np.testing.assert_array_equal(states[1]["bias_E"], rule.moved(states[0])["bias_E"])
    assert not np.any(states[2]["bias_E"])  # other options, another rule: it begins anew


@pytest.mark.slow
def test_a_run_starts_from_anothers_weights(whole, tmp_path):
    config = tiny(tmp_path, run_init_from=whole[0].run.dir, train_steps=1, optimizer_peak_lr=1e-12, optimizer_end_lr=0)
    moma_jax.train(config, quiet=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), parameters(tmp_path), parameters(whole[0].run.dir)
    )
    with pytest.raises(InputError, match="init_from.*same model"):
        moma_jax.train(tiny(tmp_path / "b", run_init_from=whole[0].run.dir, model_ffn="1t1i"), quiet=True)
    with pytest.raises(InputError, match="no checkpoint"):
        moma_jax.train(tiny(tmp_path / "c", run_init_from=str(tmp_path / "nothing")), quiet=True)
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()


def poison(batch_number, batch):
    """Batch 4 has a weight that is not a number."""
    return batch._replace(weight_BS=batch.weight_BS * np.float32(np.nan if batch_number == 4 else 1))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    changed_batches(monkeypatch, poison)
    with pytest.raises(RunError, match=r"step 4: .*last good checkpoint: .*/checkpoints/3"):
        moma_jax.train(tiny(tmp_path), quiet=True)
    assert RunDir(tmp_path).read_json("status.json")["state"] == "failed"


@pytest.mark.parametrize("stopped", [False, True])
def test_or_the_update_is_skipped_from_the_start_or_once_it_stopped_there(tmp_path, monkeypatch, stopped):
    changed_batches(monkeypatch, poison)
    if stopped:
        with pytest.raises(RunError, match="step 4: .*go on with train.on_nan=skip"):
            moma_jax.train(tiny(tmp_path), quiet=True)
        poisoned = 4 - 3  # it goes on after checkpoint 3, with batch 4 as its first
        changed_batches(monkeypatch, lambda number, batch: poison(4 if number == poisoned else 0, batch))
    summary = moma_jax.train(tiny(tmp_path, train_on_nan="skip"), quiet=True)
    events = [r for r in records(tmp_path) if r["kind"] == "event"]
    assert [(e["step"], "skipped" in e["event"]) for e in events] == [(4, True)]
    assert summary["steps"] == 6 and np.isfinite(summary["final"]["loss"])


def test_an_update_of_nothing_but_masked_tokens_teaches_nothing(tmp_path, monkeypatch):
    def masked(number, batch):
        return batch._replace(weight_BS=batch.weight_BS * 0) if number in (3, 4) else batch

    changed_batches(monkeypatch, masked)
    summary = moma_jax.train(tiny(tmp_path), quiet=True)
    second = next(r for r in records(tmp_path) if (r["kind"], r["step"]) == ("train", 4))
    assert (second["loss"], second["masked"]) == (None, 1) and np.isfinite(summary["final"]["loss"])


def test_a_sink_receives_every_record(tmp_path):
    class Collected:
        def __init__(self):
            self.records = []

        def write(self, record):
            self.records.append(record)

    collected, listed = Collected(), []
    moma_jax.train(tiny(tmp_path / "a", train_steps=2), sink=collected, quiet=True)
    moma_jax.train(tiny(tmp_path / "b", train_steps=2), sink=listed.append, quiet=True)
    assert collected.records == moma_jax.read_metrics(tmp_path / "a")
    assert [record["kind"] for record in collected.records] == ["train", "eval", "eval", "checkpoint"]
    assert collected.records[-1]["of_step"] == 2 and collected.records[-1]["bytes"] > 10_000
    assert listed == moma_jax.read_metrics(tmp_path / "b")
    with pytest.raises(InputError, match="sink: 3 takes no records; give an object with write"):
        moma_jax.train(tiny(tmp_path / "c"), sink=3, quiet=True)
    assert not (tmp_path / "c").exists()


def profiled_steps(run):
    """Numbers of the steps in the one profile of a run, which is removed."""
    (trace,), (planes,) = (list((run / "profile").rglob(name)) for name in ("perfetto_trace.json.gz", "*.xplane.pb"))
    assert trace.parent == planes.parent == next((run / "profile" / "plugins" / "profile").iterdir())
    assert planes.stat().st_size > 0
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    shutil.rmtree(run / "profile")
    return sorted(int(event["args"]["step_num"]) for event in events if event.get("name") == "train")


@pytest.mark.slow
def test_steps_are_profiled_also_where_a_run_ends_or_goes_on_among_them(tmp_path, monkeypatch):
    def send(batch_number, batch):
        if batch_number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    with monkeypatch.context() as patch:
        changed_batches(patch, send)
        with pytest.raises(SystemExit):
            moma_jax.train(tiny(tmp_path, train_profile_steps=(2, 5)), quiet=True)
    stopped = RunDir(tmp_path).read_json("status.json")["step"]
    assert profiled_steps(tmp_path) == list(range(2, stopped + 1))
    moma_jax.train(tiny(tmp_path, train_profile_steps=(2, 90)), quiet=True)
    assert profiled_steps(tmp_path) == list(range(stopped + 1, 7))
    (late,) = profile_warnings((2, 7), step=8, total=9)
    assert "steps 2 to 7 are not among those to come, 9 to 9" in late and not profile_warnings((2, 9), 8, 9)


def test_a_profile_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(InputError, match="train.profile_steps: memory://x/run is not local"):
        moma_jax.train(tiny("memory://x/run", train_profile_steps=(1, 2)), quiet=True)
    for steps in ((4,), (0, 2), (3, 2), (1, 2, 3)):
        message = r"train.profile_steps(: give the first and the last step|.0: must be positive)"
        with pytest.raises(InputError, match=message):
            tiny(tmp_path, train_profile_steps=steps)


def test_saving_that_takes_more_than_its_share_is_told_of_once(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "WARN_AFTER", 0.0)
    moma_jax.train(tiny(tmp_path, run_save_share=1e-6), quiet=True)
    events = [r["event"] for r in moma_jax.read_metrics(tmp_path) if r["kind"] == "event"]
    assert len(events) == 1 and "of the time, more than 0%; raise train.checkpoint_every" in events[0]


def test_an_end_by_an_error_records_what_was_saved(tmp_path, monkeypatch):
    def end(number, batch):
        if number == 5:
            raise RunError("the data ended")
        return batch

    changed_batches(monkeypatch, end)
    with pytest.raises(RunError, match="the data ended"):
        moma_jax.train(tiny(tmp_path, train_log_every=3), quiet=True)
    assert [r["of_step"] for r in moma_jax.read_metrics(tmp_path) if r["kind"] == "checkpoint"] == [3]


def test_checkpoints_that_cannot_be_closed_are_one_line(tmp_path, monkeypatch):
    close = ocp.CheckpointManager.close

    def full(self):
        close(self)
        if not self._options.read_only:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "close", full)
    with pytest.raises(RunError, match="checkpoints: cannot be written: .*No space left on device; last good .*/6"):
        moma_jax.train(tiny(tmp_path), quiet=True)


def test_two_processes_cannot_share_a_run(tmp_path):
    with RunDir(tmp_path).locked(), pytest.raises(InputError, match=f"process {os.getpid()} of .* is writing here"):
        moma_jax.train(tiny(tmp_path), quiet=True)


def test_data_that_ends_fails_the_run(tmp_path, monkeypatch):
    def end(batch_number, batch):
        if batch_number == 2:
            raise StopIteration
        return batch

    changed_batches(monkeypatch, end)
    with pytest.raises(RunError, match="data ended"):
        moma_jax.train(tiny(tmp_path), quiet=True)


def test_evaluation_sets_without_documents_are_found_before_training(tmp_path, monkeypatch):
    def nothing(config):
        raise InputError(f"{config.train.eval_sets[0].name}: no held-out documents")

    monkeypatch.setattr(pretrain, "require_held_out", nothing)
    with pytest.raises(InputError, match="heldout: no held-out"):
        moma_jax.train(tiny(tmp_path / "a"), quiet=True)
    assert not (tmp_path / "a").exists()


def test_masked_tokens_are_those_that_follow_and_have_no_weight():
    """Not the first of a document, which nothing predicts, nor padding; a target has its weight one place before."""
    segment_BS = np.array([[1, 1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    weight_BS = np.array([[0, 0, 1, 0, 0.5, 0, 0, 0], [1, 1, 1, 0, 1, 1, 1, 0]], np.float32)
    other = np.zeros((2, 8), np.int32)
    batch = batch_of(other, other, segment_BS, other, weight_BS, np.zeros(1, np.int8))
    assert masked_in(batch).tolist() == [3, 11]


def test_a_run_does_not_go_on_from_a_checkpoint_of_which_a_byte_changed(tmp_path):
    moma_jax.train(config := tiny(tmp_path, train_steps=4, train_checkpoint_every=2), quiet=True)
    newest = tmp_path / "checkpoints" / "4"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(InputError, match=r"checkpoints/4: damaged \(state/.* its CRC-32C is another.*move it away"):
        moma_jax.train(config, quiet=True)
    shutil.move(newest, tmp_path / "moved")
    assert moma_jax.train(config, quiet=True)["steps"] == 4
