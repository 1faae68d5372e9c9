"""Weights & Biases, offline: one run there for one run here, whatever interrupts it."""

import json
from pathlib import Path

import pytest
from tiny import tiny

import moma_jax
from moma_jax.errors import InputError
from moma_jax.runs.directory import RunDir
from moma_jax.runs.wandb import WandbSink

pytest.importorskip("wandb")


@pytest.fixture
def told(monkeypatch):
    """What is logged and with which settings runs begin."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    begun, logged, original = [], [], wandb.init

    def init(**settings):
        begun.append(settings)
        run = original(**settings)
        log = run.log
        monkeypatch.setattr(run, "log", lambda figures, **more: (logged.append(figures), log(figures, **more)))
        return run

    monkeypatch.setattr(wandb, "init", init)
    return begun, logged


def test_records_go_there_and_training_goes_on_in_the_same_run(tmp_path, told):
    begun, logged = told
    moma_jax.train(tiny(tmp_path, train_steps=3, train_log_every=1, run_wandb="studies"), quiet=True)
    known = json.loads((tmp_path / "wandb.json").read_text())
    assert [r["update"] for r in logged if "train/loss" in r] == [1, 2, 3]
    assert any("eval/heldout/threshold/loss" in r for r in logged) and begun[0]["config"]["model"]["ffn"] == "2t2i"
    for name in ("summary.json", "status.json"):
        (tmp_path / name).unlink()
    sink = WandbSink(RunDir(str(tmp_path)), "studies", {})
    sink.write({"schema": 1, "kind": "event", "step": 3, "time": 0.0, "event": "something"})
    sink.close()
    assert [settings["id"] for settings in begun] == [known["id"]] * 2
    assert [settings["resume"] for settings in begun] == [None, "allow"]
    assert list(Path(tmp_path, "wandb").glob("offline-run-*"))


def test_what_cannot_be_is_one_line(monkeypatch):
    with pytest.raises(InputError, match="run.wandb: its files want a local run.dir"):
        WandbSink(RunDir("memory://bucket/run"), "studies", {})
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(InputError, match='pip install "moma_jax'):
        WandbSink(RunDir("memory://bucket/run"), "studies", {})
