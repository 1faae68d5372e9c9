"""Samples while a run trains: sheets and texts where they are promised, by the model of that step."""

import dataclasses
import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_stores import drawn_config
from tiny import tiny

import moma_jax
from moma_jax import checks
from moma_jax.config import SampleConfig
from moma_jax.errors import InputError
from moma_jax.generation import Sampling, generate
from moma_jax.runs.journal import read_metrics
from moma_jax.runs.progress import time_shares
from moma_jax.training.load import Loaded

DRAWN = SampleConfig(("A red circle", "a blue square"), name="drawn", every=2)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Pictures of 16 x 16 in two small rows, a store of its own."""
    config = drawn_config(tmp_path_factory.mktemp("drawn"))
    return dataclasses.replace(config, run=dataclasses.replace(config.run, tensorboard=True))


def asked(config, *samples, **train):
    train = dataclasses.replace(config.train, samples=samples, **train)
    return checks.resolve(dataclasses.replace(config, train=train))


def picture_of(config):
    return f"{config.run.dir}/picture.png"


@pytest.fixture(scope="module")
def ran(config):
    """A run that draws at two steps and writes at the end; its summary."""
    os.makedirs(config.run.dir, exist_ok=True)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(picture_of(config))
    written = SampleConfig(
        ("what is <image>?",), (picture_of(config),), "written", "text", max_tokens=6, temperature=0.0
    )
    return moma_jax.train(asked(config, DRAWN, written), quiet=True)


def test_sheets_and_texts_of_the_steps_that_were_asked_for(config, ran):
    sheets = Path(config.run.dir, "sheets")
    assert {path.stem for path in sheets.iterdir()} == {"drawn-00000002", "drawn-00000003", "written-00000003"}
    sheet = Image.open(sheets / "drawn-00000003.png")
    assert sheet.width > 2 * 208 and sheet.height > 208
    found = json.loads((sheets / "drawn-00000003.json").read_bytes())
    assert [s["pictures"] for s in found["samples"]] == [1, 1] and found["step"] == 3
    assert [s["prompt"] for s in found["samples"]] == list(DRAWN.prompts)
    events = [r["event"] for r in read_metrics(config.run.dir) if r["kind"] == "event"]
    assert [e for e in events if ".png" in e][:2] == [f"drawn: {sheets}/drawn-0000000{n}.png" for n in (2, 3)]
    assert ran["final"]["spent_samples"] > 0 and {"spent_data", "spent_compile"} <= ran["final"].keys()
    assert time_shares(ran["final"]).startswith("time: ") and "samples" in time_shares(ran["final"])


def test_the_last_samples_are_what_the_finished_run_makes(config, ran):
    """By the checkpoint's weights, with calibrated thresholds."""
    prompt, greedy = ["what is", Image.open(picture_of(config)), "?"], Sampling(temperature=0.0)
    (again,) = generate(moma_jax.load(config.run.dir), [prompt], mode="text", max_tokens=6, text=greedy)
    found = json.loads(Path(config.run.dir, "sheets", "written-00000003.json").read_bytes())
    assert again.text == found["samples"][0]["text"]


def test_samples_change_nothing_of_training(config, ran, tmp_path):
    run = dataclasses.replace(config.run, dir=str(tmp_path), tensorboard=False)
    moma_jax.train(asked(dataclasses.replace(config, run=run)), quiet=True)
    with_samples, without = (
        [r["loss"] for r in read_metrics(each.run.dir) if r["kind"] in ("train", "eval")]
        for each in (config, dataclasses.replace(config, run=run))
    )
    assert with_samples == without


def test_the_model_of_that_moment_is_asked(config, tmp_path, monkeypatch):
    """Parameters, thresholds and step are those of the state, not of a checkpoint."""
    models = []

    def draw(loaded, asked):
        models.append((loaded.step, float(jnp.sum(loaded.params["unembedding"]["kernel_DV"]))))
        assert isinstance(loaded, Loaded) and "threshold" in loaded.routings
        return Image.new("RGB", (1, 1)), {}

    monkeypatch.setattr("moma_jax.generation.samples.draw_samples", draw)
    run = dataclasses.replace(config.run, dir=str(tmp_path), tensorboard=False)
    moma_jax.train(asked(dataclasses.replace(config, run=run), dataclasses.replace(DRAWN, every=1)), quiet=True)
    assert [step for step, _ in models] == [1, 2, 3] and len({total for _, total in models}) == 3


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ((dataclasses.replace(DRAWN, prompts=()),), "drawn: give 1 to 64 prompts"),
        ((dataclasses.replace(DRAWN, prompts=("<image>",)),), "1 times <image> in its prompts, and 0 images"),
        ((dataclasses.replace(DRAWN, name="../x"),), "is no name for files"),
        ((dataclasses.replace(DRAWN, routing="choice"),), "routing is one of causal, threshold"),
        ((dataclasses.replace(DRAWN, routing="causal"),), "causal cannot be, as the run has no auxiliary routers"),
        ((DRAWN, DRAWN), "two have the same name"),
        ((dataclasses.replace(DRAWN, every=0),), "train.samples.0.every"),
    ],
)
def test_what_cannot_be_meant_is_refused(config, samples, message):
    with pytest.raises(InputError, match=message):
        asked(config, *samples)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (SampleConfig(("A <image>",), ("nowhere.png",)), "nowhere.png: cannot be read"),
        (SampleConfig(("A red circle", "\ud800")), "prompt 1, part 0: the tokenizer maps .* to nothing"),
    ],
)
def test_prompts_are_read_before_training_begins(config, tmp_path, samples, message):
    run = dataclasses.replace(config.run, dir=str(tmp_path / "run"))
    with pytest.raises(InputError, match=f"train.samples: samples: {message}"):
        moma_jax.train(asked(dataclasses.replace(config, run=run), samples), quiet=True)
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_random_tokens_are_told_to_draw_nothing(tmp_path, capsys):
    moma_jax.train(tiny(tmp_path, train_steps=1, train_samples=(DRAWN,)))
    assert "warning: train.samples: random tokens are no text" in capsys.readouterr().out
    assert not (tmp_path / "sheets").exists()


def test_samples_that_cannot_be_drawn_cost_no_update(tmp_path, monkeypatch):
    """The checkpoint is written first, and the run ends as ever."""

    def sampled(self, state, step, last):
        raise InputError("no such picture")

    monkeypatch.setattr("moma_jax.training.pretrain.Pretraining.sampled", sampled)
    moma_jax.train(tiny(tmp_path, train_steps=1), quiet=True)
    events = [r["event"] for r in read_metrics(str(tmp_path)) if r["kind"] == "event"]
    assert "train.samples: nothing was drawn: no such picture" in events
