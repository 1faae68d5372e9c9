"""README.md and the pages of docs/: their Python runs, their commands can be read, the first hour works as printed."""

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from command_line import run as moma
from pages import NEEDS, PAGES, blocks, commands_of, python_of
from paths import ROOT

import moma_jax
from moma_jax import commands
from moma_jax.config_json import to_json

SHORT = {
    "train.steps": 12,
    "train.log_every": 4,
    "train.eval_every": 12,
    "data.prepare.documents": 1500,
    "optimizer.warmup_steps": 2,
    "model.layers": 2,
}

# Python ---------------------------------------------------------------------------------------------------------------


def test_pages_with_python_are_known():
    with_python = {page.name for page in PAGES if any(block.kind == "python" for block in blocks(page))}
    assert with_python == {"runs.md", "generating.md", "routing.md"}, "run the others' blocks here, too"
    assert all(len(python_of(name)) == 1 for name in with_python)


@pytest.mark.slow
def test_the_routing_function_trains_the_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    definition = python_of("routing.md")[0].split("\n\n\nconfig = ")[0]
    assert len(definition.split("def ")[1].splitlines()) <= 10
    scope = {}
    exec(compile(definition, "routing.md", "exec"), scope)
    config = moma_jax.recipe(ROOT / "configs" / "quickstart.py", {**SHORT, "run.dir": str(tmp_path / "run")})
    summary = moma_jax.train(config, select=scope["random_choice"], quiet=True)
    losses = [r["loss"] for r in moma_jax.read_metrics(tmp_path / "run") if r["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    assert "random_choice" in summary["router"]


@pytest.mark.slow
def test_the_session_runs(tmp_path):
    """Reading a run and generating, one after the other, with fewer steps and a smaller data set."""
    overrides = ", ".join(f"{name!r}: {value!r}" for name, value in SHORT.items())
    code = "\n".join(python_of("runs.md") + python_of("generating.md"))
    code = code.replace('"train.steps": 20', overrides).replace("configs/", f"{ROOT}/configs/")
    assert overrides in code
    code += "\nassert losses and model.params and model.vocabulary.size == 544 and all(o.ids.size for o in outputs)\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=environment, stdout=subprocess.DEVNULL)


# Links and blocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_points_to_exist(page):
    for target in re.findall(r"\]\(((?!http)[^)#\s]+)[^)\s]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page):
    text = page.read_text()
    assert len(blocks(page)) == len(re.findall(r"^```$", text, re.M)), "a block has no language, or no end"
    for block in blocks(page):
        assert block.kind in ("sh", "python", "text", "dockerfile"), block
        assert not block.mark or NEEDS.fullmatch(block.mark), block.mark
    assert not re.search(r"^    (moma|pip|python|launch/\S+) ", text, re.M), "commands stand in ```sh blocks"


# Commands -------------------------------------------------------------------------------------------------------------

FIRST_HOUR = ROOT / "docs" / "first_hour.md"
BY_SHELL = {"python3", ".", "sed"}
"""First words of commands of the first hour that are not ours."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder as pages assume it: the repository's files, a recipe and a rule of one's own."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("configs", "docs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "configs" / "quickstart.py", folder / "mine.py")
    shutil.copy(ROOT / "tests" / "helpers" / "top_two.py", folder / "my_rule.py")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=lambda page: page.name)
def test_every_command_can_be_read(page, home, monkeypatch):
    monkeypatch.chdir(home)
    for words in commands_of(page):
        match words[0]:
            case "moma":
                read_moma(words[1:])
            case "pip":
                assert words[1] == "install" and extras_of(words[-1]) <= known_extras(), words
            case "python":
                read_script(words[1:], monkeypatch)
            case launcher if launcher.startswith("launch/"):
                subprocess.run(dry(words), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            case other:
                assert page == FIRST_HOUR and other in BY_SHELL, words


def read_moma(words):
    """Reads a command up to the point of running it; a recipe becomes a config, checked."""
    for word in words:
        if word.startswith("configs/"):
            assert os.path.exists(word), word
        if word.startswith("runs/"):
            stand_in_for_a_run(Path(word.removesuffix("/config.json")))
    options = commands.parsed(words).keywords
    for option in options.values():
        if hasattr(option, "resolved"):
            option.resolved()


def stand_in_for_a_run(folder):
    """What reading a command needs of a run: its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_json(moma_jax.recipe("quickstart"))))


def extras_of(target):
    """Extras that a `pip install` asks for."""
    found = re.search(r"\[(.*)\]", target)
    return set(found[1].split(",")) if found and "moma_jax" in target or target.startswith(".[") else set()


def known_extras():
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


class Read(Exception):
    """A script's words were read."""


def read_script(words, monkeypatch):
    """Runs a script of the repository until it has read its words."""

    def parse_args(parser, args=None, namespace=None, parse=argparse.ArgumentParser.parse_args):
        parse(parser, args, namespace)
        raise Read

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", words)
        with pytest.raises(Read):
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def dry(words):
    return words if "--dry-run" in words else [words[0], "--dry-run", *words[1:]]


# The first hour -------------------------------------------------------------------------------------------------------

KINDS = {
    "doctor": ("machine ", "devices ", "products ", "quickstart ", "- JAX computes on the CPU"),
    "train quickstart": (
        *("prepare: stores/scenes: ", "runs/quickstart: starts at step 0", "compiled in ", "tokens/s", "samples: "),
        *("choice (sees the future)", "threshold routing", "unigram model", "perplexity", "gap "),
    ),
    "show runs/quickstart": ("complete, step 12 of 12", "checkpoints: 12"),
    "eval": ("unigram", "image given text", "text given image", "choice sees the future", "experts per token"),
    "generate": ("/generation.json",),
    "recipes": ("mine.py",),
    "train mine.py": ("runs/mine: starts at step 0",),
}
"""What the commands of the page print, by how they begin."""


@pytest.mark.slow
def test_the_first_hour_works_as_printed(tmp_path, monkeypatch, capsys):
    """Every command in an empty folder, training cut short; installing is left to .ci/smoke."""
    monkeypatch.chdir(tmp_path)
    ran = []
    for words in commands_of(FIRST_HOUR):
        if words[0] == "sed":
            subprocess.run(words, check=True)
        if words[0] != "moma":
            continue
        code, out, err = moma(capsys, *shortened(words[1:]))
        line = " ".join(words[1:])
        assert code == 0, (line, err)
        for kind in [text for start, texts in KINDS.items() if line.startswith(start) for text in texts]:
            assert kind in out + err or "--html" in line, (line, kind, out + err)
        ran.append(words[1])
    assert set(ran) == {"doctor", "train", "show", "eval", "generate", "recipes"}
    for name in ("quickstart.html", "both.html", "drawn/000-0.png", "told/generation.json"):
        assert (tmp_path / name).stat().st_size > 0
    assert list((tmp_path / "runs" / "quickstart" / "sheets").glob("samples-*.png"))
    ffn = [moma_jax.recipe(f"runs/{name}").model.ffn for name in ("quickstart", "mine")]
    assert ffn == ["4t4i", "1t1i"]


def shortened(words):
    """The words of a training with fewer updates, layers and documents."""
    if words[0] != "train":
        return words
    at = words.index("--train.steps") if "--train.steps" in words else len(words)
    fewer = {**SHORT, "train.eval_sets.0.rows": 16, "train.samples.0.prompts": "A red circle is above a blue square."}
    added = [word for name, value in fewer.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*words[:at], *words[at + 2 :], *added]
