"""docs/results/pictures.py on a store of scenes, with models that know the answer or do not answer."""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

import moma_jax
from moma_jax.config import Config, DataConfig, ModelConfig, PrepareConfig, StoreConfig
from moma_jax.data import scenes
from moma_jax.data.prepare import prepare
from moma_jax.errors import InputError
from moma_jax.evaluation.judge_scenes import Count, Score

SCRIPT = ROOT / "docs" / "results" / "pictures.py"
spec = importlib.util.spec_from_file_location("pictures", SCRIPT)
pictures = sys.modules["pictures"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pictures)

SUMMARY = {"steps": 1234, "final": {"tokens": 5_000_000}, "wall_seconds": 1200.4, "commit": "abc"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory, as far as the script reads it, and its config."""
    home = tmp_path_factory.mktemp("run")
    settings = PrepareConfig(source="scenes", documents=600, text_size=400, image_side=16, colours=16, parts=2)
    prepare(settings, f"{home}/store", progress=False)
    (home / "summary.json").write_text(json.dumps(SUMMARY))
    data = DataConfig(stores=(StoreConfig("text", "nowhere", "text"), StoreConfig("scenes", f"{home}/store")))
    return home, Config(model=ModelConfig(ffn="1t1i"), data=data)


@pytest.fixture(scope="module")
def truth():
    """Caption to picture of the held-out pairs, drawn once more."""
    documents = [scenes.document(0, "validation", index, 16) for index in range(60)]
    return {d.segments[0].text: np.asarray(d.segments[1].image) for d in documents if d.collection == "pairs"}


class Model:
    """Knows every answer under causal routing, and answers nothing under threshold routing."""

    routings = ("causal", "threshold")

    def __init__(self, truth):
        self.picture = truth
        self.caption = {pixels.tobytes(): text for text, pixels in truth.items()}
        self.calls = []

    def under(self, routing):
        if routing not in self.routings:
            raise InputError(f"routing: no {routing}")

    def generate(self, prompts, *, mode, routing, seed, **options):
        self.calls.append((mode, routing, len(prompts), seed, options))
        if routing == "threshold":
            return [types.SimpleNamespace(images=[], text="") for _ in prompts]
        if mode == "image":
            made = [Image.fromarray(self.picture[text]) for (text,) in prompts]
            return [types.SimpleNamespace(images=[picture], text="") for picture in made]
        made = [self.caption[np.asarray(pixels).tobytes()] for (pixels,) in prompts]
        return [types.SimpleNamespace(images=[], text=f" {text}") for text in made]


def test_held_out_pairs_are_the_documents_of_the_store(run, truth):
    _, config = run
    pairs = [p for kind in ("text-first", "image-first") for p in pictures.held_out_pairs(config, kind, 12, 0)]
    assert len({pair.text for pair in pairs}) > 20
    for pair in pairs:
        np.testing.assert_array_equal(pair.pixels_NN3, truth[pair.text])
    again = pictures.held_out_pairs(config, "text-first", 12, 1)
    assert [p.text for p in again] != [p.text for p in pairs[:12]]


def test_a_model_that_knows_is_right_one_that_is_silent_is_wrong(run, truth, tmp_path, monkeypatch, capsys):
    home, config = run
    model = Model(truth)
    monkeypatch.setattr(moma_jax, "recipe", lambda path: config, raising=False)
    monkeypatch.setattr(moma_jax, "load", lambda path: model, raising=False)
    words = [str(home), "--count", "12", "--batch", "8", "--seed", "3", "--out", str(tmp_path), "--routing", "causal"]
    words += ["threshold", "--image", "temperature=0.5", "--text", "top_k=4", "--guidance", "3"]
    assert pictures.main(words) == 0
    written = (tmp_path / "pictures.md").read_text()
    assert "1,234 steps, 5,000,000 tokens" in written and written.strip() in capsys.readouterr().out
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in written.splitlines() if line.startswith("| ")}
    for name in ("drawn, causal", "the true picture, through the codec", "written, causal", "the true caption"):
        cells = rows[f"| {name}"]
        assert len(cells) == 5 and all(cell.startswith("100.0%") for cell in cells), (name, cells)
        assert cells[-1].startswith("100.0% (12/12)")
    for name in ("drawn, threshold", "written, threshold"):
        assert all(cell.startswith(("0.0%", "-")) for cell in rows[f"| {name}"])
    for name in ("chance: the picture of another caption", "chance: the caption of another picture"):
        assert rows[f"| {name}"][-1].startswith("0.0% (0/12)")
        assert not rows[f"| {name}"][0].startswith(("0.0%", "100.0%"))
    assert [call[:3] for call in model.calls[:4]] == [(m, "causal", n) for m in ("image", "text") for n in (8, 4)]
    assert len({call[3] for call in model.calls[:2]}) == 2
    assert model.calls[0][4]["image"].temperature == 0.5 and model.calls[0][4]["guidance"].text == 3
    assert model.calls[2][4]["text"].top_k == 4 and "guidance" not in model.calls[2][4]
    with Image.open(tmp_path / "pictures.png") as sheet:
        assert min(sheet.size) > 600
    # What people wrote stays.
    with (tmp_path / "pictures.md").open("a") as file:
        file.write("\n## What it says\n\nMuch.\n")
    assert pictures.main(words) == 0
    again = (tmp_path / "pictures.md").read_text()
    assert again.endswith("\n## What it says\n\nMuch.\n") and again.count("## ") == written.count("## ") + 1


def test_no_guidance_is_not_guidance_of_0(run, truth):
    home, config = run
    for words, written in (([], "guidance off;"), (["--guidance", "0"], "guidance 0.0;")):
        lines = pictures.facts_of(pictures.parse([str(home), *words]), config, SUMMARY, {}, "cpu")
        assert written in "".join(lines)


def test_what_lacks_is_said_before_anything_is_generated(run, truth, tmp_path, monkeypatch, capsys):
    home, config = run
    model = Model(truth)
    model.routings = ("causal",)
    monkeypatch.setattr(moma_jax, "recipe", lambda path: config, raising=False)
    monkeypatch.setattr(moma_jax, "load", lambda path: model, raising=False)
    words = ["--count", "12", "--out", str(tmp_path / "out"), "--routing", "causal", "threshold"]
    assert pictures.main([str(home), *words]) == 2 and "no threshold" in capsys.readouterr().err
    assert pictures.main([str(tmp_path), *words]) == 2 and "no summary.json here" in capsys.readouterr().err
    assert not model.calls and not list(tmp_path.iterdir())


def test_bad_input_is_one_line(run, truth, tmp_path, monkeypatch, capsys):
    home, config = run
    monkeypatch.setattr(moma_jax, "recipe", lambda path: config, raising=False)
    monkeypatch.setattr(moma_jax, "load", lambda path: Model(truth), raising=False)
    assert pictures.main([str(home), "--count", "500", "--out", str(tmp_path)]) == 2
    assert "hold out" in capsys.readouterr().err and not list(tmp_path.iterdir())
    for words in (
        ["--count", "1"],
        ["--image", "top_k"],
        ["--text", "top=4"],
        ["--text", "top_k=x"],
        ["--routing", "choice"],
    ):
        with pytest.raises(SystemExit) as stopped:
            pictures.main([str(home), *words])
        assert stopped.value.code == 2


def test_chance_pairs_each_with_another():
    for count in (2, 3, 50):
        for seed in range(5):
            partner = pictures.others(count, seed)
            assert sorted(partner) == list(range(count)) and all(i != other for i, other in enumerate(partner))


def test_the_table_gives_shares_and_counts():
    score = Score(Count(3, 4), Count(1, 3), Count(2, 2), Count(), Count(0, 1))
    assert pictures.table({"drawn": score}).splitlines() == [
        "| | colours | shapes | relations | background | all |",
        "|---|---|---|---|---|---|",
        "| drawn | 75.0% (3/4) | 33.3% (1/3) | 100.0% (2/2) | - | 0.0% (0/1) |",
    ]
