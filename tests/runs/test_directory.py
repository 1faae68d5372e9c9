"""What a run directory survives, and which ones are refused before anything in them is touched."""

import json
import shutil
import sys
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from runs import changed_batches, my_choice
from tiny import tiny

import moma_jax
from moma_jax.config_json import to_json
from moma_jax.errors import InputError, RunError
from moma_jax.runs.checkpoint import Checkpoints
from moma_jax.runs.directory import RunDir, command


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The directory of a complete run."""
    path = tmp_path_factory.mktemp("complete")
    moma_jax.train(tiny(path), quiet=True)
    return path


@pytest.fixture
def copy(complete, tmp_path):
    """A copy of it, to damage."""
    return Path(shutil.copytree(complete, tmp_path / "copy"))


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_input_that_fails_while_training_leaves_the_run(tmp_path, monkeypatch):
    def lose(number, batch):
        if number == 5:
            raise InputError("runs/store/tokens: the file is gone")
        return batch

    changed_batches(monkeypatch, lose)
    run = tmp_path / "run"
    with pytest.raises(RunError, match=r"step 4: .*gone; last good checkpoint: .*/run/checkpoints/3"):
        moma_jax.train(tiny(run), quiet=True)
    status = RunDir(run).read_json("status.json")
    assert (status["state"], status["step"]) == ("failed", 4)
    # The record of what the save cost is written when it has ended: before the failure or not at all.
    measured = [r["kind"] for r in moma_jax.read_metrics(run) if r["kind"] in ("train", "eval")]
    assert Checkpoints(RunDir(run)).steps() == [3] and len(measured) == 4


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    save = ocp.CheckpointManager.save

    def full(self, step, **arguments):
        if step == 6:
            raise ValueError('RESOURCE_EXHAUSTED: Error writing "a/b": file 16: No space left on device [code=28]')
        return save(self, step, **arguments)

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(RunError) as error:
        moma_jax.train(tiny(tmp_path), quiet=True)
    path = f"{tmp_path}/checkpoints"
    assert str(error.value).startswith(
        f"step 6: {path}: cannot be written: No space left on device; last good checkpoint: {path}/3; "
    )


def test_a_save_that_fails_while_a_run_ends_by_something_else_is_told_of(tmp_path, monkeypatch):
    def data_end(number, batch):
        if number == 5:  # step 3 is being saved
            monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", full)
            raise RunError("the data ended")
        return batch

    def full(self):
        monkeypatch.undo()
        raise ValueError('RESOURCE_EXHAUSTED: Error writing "a/b": file 16: No space left on device [code=28]')

    changed_batches(monkeypatch, data_end)
    with pytest.raises(RunError, match="the data ended"):
        moma_jax.train(tiny(tmp_path), quiet=True)
    events = [record["event"] for record in moma_jax.read_metrics(tmp_path) if record["kind"] == "event"]
    assert events == ["checkpoint of step 3 not written, to be tried again: No space left on device"]


def test_nothing_that_was_there_is_removed(tmp_path):
    run = RunDir(tmp_path / "run")
    with pytest.raises(InputError, match="no"), run.locked():
        raise InputError("no")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="no"), run.locked():
        run.write_json("store/manifest.json", {})
        raise InputError("no")
    assert set(files(tmp_path / "run")) == {"store/manifest.json"}


def test_a_complete_run_without_checkpoints_answers_for_its_own_config_only(copy):
    shutil.rmtree(copy / "checkpoints")
    assert moma_jax.train(tiny(copy), quiet=True)["steps"] == 6
    with pytest.raises(InputError, match="train.seed: 0 -> 1"):
        moma_jax.train(tiny(copy, train_seed=1), quiet=True)
    with pytest.raises(InputError, match="choice.*-> .*runs:my_choice"):
        moma_jax.train(tiny(copy), select=my_choice, quiet=True)
    with pytest.raises(InputError, match="no checkpoint yet; train it"):
        moma_jax.load(copy)


def test_the_checkpoints_config_counts_where_config_json_is_missing(copy):
    for name in ("config.json", "status.json"):
        (copy / name).unlink()
    before = files(copy)
    with pytest.raises(InputError, match="train.seed: 0 -> 1"):
        moma_jax.train(tiny(copy, train_seed=1), quiet=True)
    assert files(copy) == before


def test_a_checkpoint_that_is_not_whole_is_named(copy):
    shutil.rmtree(copy / "checkpoints" / "6" / "meta")
    with pytest.raises(InputError, match=r"checkpoints/6: no checkpoint of moma, or damaged .*move it away") as error:
        moma_jax.train(tiny(copy), quiet=True)
    assert "\n" not in str(error.value)


OURS = json.dumps(to_json(tiny()))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"config.json": '{"architectures": ["Other"]}'}, "holds no run of this moma_jax"),
        ({"config.json": "[1]"}, "holds no run of this moma_jax"),
        ({"config.json": "{"}, "not JSON"),
        ({"metrics.jsonl": '{"step": 3, "loss": 1.0}'}, "has metrics.jsonl but no run of moma"),
        ({"metrics.jsonl": "step,loss"}, "has metrics.jsonl but no run of moma"),
        ({"status.json": "{}"}, "has status.json but no run of moma"),
        ({"config.json": OURS, "metrics.jsonl": '{"loss": 1.0}'}, "metrics.jsonl: line 1: kind: is missing"),
    ],
)
def test_another_programs_directory_is_left_alone(tmp_path, contents, message):
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    before = files(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        moma_jax.train(tiny(tmp_path), quiet=True)
    assert files(tmp_path) == before and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("program", "shown"),
    [
        ("/env/bin/moma", "moma"),
        ("/src/moma_jax/__main__.py", "moma"),
        ("mine.py", "mine.py"),
        ("/x/__main__.py", "/x/__main__.py"),
    ],
)
def test_the_command_is_what_others_would_type(monkeypatch, program, shown):
    monkeypatch.setattr(sys, "argv", [program, "train", "a b.py"])
    assert command() == f"{shown} train 'a b.py'"
