"""`moma codec train` and `moma codec eval`."""

import json

import numpy as np
import pytest
from command_line import run as moma
from paths import ROOT
from PIL import Image
from small_codecs import small_codec
from small_pictures import write_pictures
from small_stores import make_source, settings

from moma_jax.codec.folder import write_codec
from moma_jax.codec.quality import Quality
from moma_jax.data.prepare import prepare
from moma_jax.training.codec.config import load, resolve

RECIPE = """
from small_pictures import small_training

def config():
    return small_training({source!r}, train=dict(steps=2, eval_every=2))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "source")


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    path = tmp_path_factory.mktemp("codec") / "small"
    write_codec(str(path), small_codec())
    return path


def test_every_recipe_resolves():
    names = [path.stem for path in (ROOT / "configs" / "codec").glob("*.py")]
    assert "corpus_f8" in names
    for name in names:
        assert resolve(load(ROOT / "configs" / "codec" / f"{name}.py")).run.dir == f"runs/{name}"


def test_eval_judges_held_out_pictures(codec, folder, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    code, out, err = moma(capsys, "codec", "eval", codec, "--data", folder, "--json", "--sheet", sheet)
    assert code == 0, err
    small, judged = small_codec(), Quality(32)
    truth = np.stack([small.read(path.read_bytes()) for path in sorted((folder / "validation").iterdir())])
    codes = small.encode(list(truth))
    judged.add(truth, np.stack(small.decode(codes)), codes)
    assert json.loads(out) == {**judged.figures(), "side": 16, "codebook": 32, "codes_per_picture": 64}
    assert Image.open(sheet).size == (6 * 20 + 4, 42)
    code, out, _ = moma(capsys, "codec", "eval", codec, "--data", folder, "--pictures", "2")
    assert code == 0 and out.startswith("2 pictures of 16 x 16 pixels\n")


def test_eval_compares_the_palette_of_a_store_at_any_size(folder, tmp_path, capsys):
    prepare(settings(make_source(tmp_path / "source")), str(tmp_path / "store"), progress=False)
    code, out, err = moma(capsys, "codec", "eval", tmp_path / "store", "--data", folder, "--side", "32", "--json")
    assert code == 0, err
    assert json.loads(out)["side"] == 32 and json.loads(out)["psnr"] > 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{codec}", "--data", "{folder}", "--pictures", "0"), "--pictures: 0; give at least 1"),
        (("{codec}", "--data", "{folder}", "--sheet", "there.png"), "--sheet: there.png is there already"),
        (("nowhere", "--data", "{folder}"), "nowhere: no codec.json here"),
        (("blind", "--data", "{folder}"), "blind: it has no decoder"),
        (("{codec}", "--data", "{folder}", "--held-out", "2"), "--held-out: 2.0; give a share from 0 to below 1"),
        (("{codec}", "--data", "nowhere"), "--data: nowhere does not exist"),
        (("begun", "--data", "{folder}"), "begun: no codec.json here; it is written when"),
        (("{codec}",), "--data"),
    ],
)
def test_bad_input_of_eval_is_one_line(codec, folder, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").write_text("mine")
    write_codec("blind", small_codec(decoder=False))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    code, _, err = moma(capsys, "codec", "eval", *(word.format(codec=codec, folder=folder) for word in words))
    assert code == 2 and err.count("\n") == 1 and message in err
    assert (tmp_path / "there.png").read_text() == "mine"


def test_a_recipe_becomes_a_codec_that_prepare_takes(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(RECIPE.format(source=str(folder)))
    code, out, err = moma(capsys, "codec", "train", "mine.py", "--network.codebook", "8", "--loss.codebook", "average")
    assert code == 0, err
    assert "runs/mine: starts at step 0" in out and "held out, heldout:" in out
    code, _, err = moma(capsys, "codec", "train", "mine.py", "--loss.codebook", "average")
    assert code == 2 and "network.codebook: 8 -> 16" in err
    source = make_source(tmp_path / "source", documents=60)
    config = settings(source, codec="runs/mine", image_side=4, colours=8)
    manifest = prepare(config, "store", progress=False)
    assert manifest["broken"] == 0
    code, out, _ = moma(capsys, "codec", "eval", "store", "--data", folder, "--json")
    assert code == 0 and json.loads(out)["codebook"] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere.py",), "nowhere.py: no such recipe"),
        (("mine.py", "--network.side", "18"), "codec.side: 18 pixels cannot be halved"),
        (("mine.py", "--network.sied", "18"), "--network.sied: no such option; did you mean --network.side"),
        (("mine.py", "--data.source", "nowhere"), "nowhere does not exist"),
        (("mine.py", "--loss.perceptual", "lpips"), "loss.perceptual: lpips"),
        ((str(ROOT / "configs" / "quickstart.py"),), "config() returned Config"),
        (("mine.py", "--loss.adversarial", "0.5", "--loss.critic-layers", "4"), "loss.critic_layers: 4 halve pictures"),
        (("mine.py", "--train.profile-steps", "5"), "train.profile_steps: give the first and the last step"),
        (("mine.py", "--loss.perceptual", "json:dumps"), "loss.perceptual: json:dumps of (drawn, truth) raises TypeE"),
        (("mine.py", "--network.lowest", "1"), "network.lowest: must be below 1"),
        ((), "name a recipe first"),
    ],
)
def test_bad_input_of_train_is_one_line(folder, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(RECIPE.format(source=str(folder)))
    code, _, err = moma(capsys, "codec", "train", *words)
    assert code == 2 and err.count("\n") == 1 and message in err
    assert not list(tmp_path.glob("runs/*")), "nothing is half-written"


def test_a_training_does_not_begin_in_the_folder_of_something_else(folder, codec, tmp_path, monkeypatch, capsys):
    """A codec that was imported, or a store, would be overwritten."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(RECIPE.format(source=str(folder)))
    for name in ("codec.json", "manifest.json"):
        (tmp_path / name[:5]).mkdir()
        (tmp_path / name[:5] / name).write_text("{}")
        code, _, err = moma(capsys, "codec", "train", "mine.py", "--run.dir", name[:5])
        assert code == 2 and f"has {name} but no run of moma" in err
        assert [p.name for p in (tmp_path / name[:5]).iterdir()] == [name]


def test_a_codec_that_was_lost_is_written_again(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(RECIPE.format(source=str(folder)))
    assert moma(capsys, "codec", "train", "mine.py")[0] == 0
    made = (tmp_path / "runs" / "mine" / "codec.json").read_bytes()
    for name in ("codec.json", "codec.safetensors", "summary.json"):
        (tmp_path / "runs" / "mine" / name).unlink()
    assert moma(capsys, "codec", "train", "mine.py")[0] == 0
    assert (tmp_path / "runs" / "mine" / "codec.json").read_bytes() == made


def test_a_training_is_no_run_of_moma_train(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(RECIPE.format(source=str(folder)))
    assert moma(capsys, "codec", "train", "mine.py")[0] == 0
    for command in ("train", "show", "eval"):
        code, _, err = moma(capsys, command, "runs/mine")
        assert code == 2 and err.count("\n") == 1, err
