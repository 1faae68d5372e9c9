"""The command: help pages, exit codes, one clear line for bad input, and the Python functions of the same names."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run
from paths import ROOT

import moma_jax
from moma_jax import commands, recipes
from moma_jax.commands import COMMANDS
from moma_jax.errors import InputError

CONFIGS = ROOT / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.py"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resolves(name):
    config = moma_jax.recipe(CONFIGS / f"{name}.py")
    assert config.run.dir == f"runs/{name}"
    hidden = recipes.load(CONFIGS / f"{name}.py").model.hidden
    assert hidden is None or hidden % 128, "derived fields are None in a recipe"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "name a recipe first"),
        (["train", "nowhere.py"], "nowhere.py: no such recipe"),
        (
            ["train", CONFIGS / "quickstart.py", "--model.fnn", "8x"],
            "--model.fnn: no such option; did you mean --model.ffn",
        ),
        (["train", CONFIGS / "quickstart.py", "--model.layers", "many"], "--model.layers"),
        (["train", CONFIGS / "quickstart.py", "--model.heads", "3"], "model.heads: 3 heads do not divide"),
        (["cost", CONFIGS / "quickstart.py", "--model.ffn", "4t4z"], "modality 'z', which has no quota"),
        (["eval", "nowhere"], "nowhere"),
        (["prepare", "scenes"], "--out"),
        (["prepare", "scenes", "--out", "x", "--part", "3/2"], "'3/2' is not K/N"),
        (["bench"], "moma bench: expected one of {step, generate, data, ffn}"),
        (["bench", "stop"], "stop: no such command; moma bench has step, generate, data, ffn"),
        (["frain"], "frain: no such command"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert code == 2 and out == ""
    assert message in err and err.startswith("moma: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing is half-written"


@pytest.mark.parametrize("command", [*COMMANDS, "bench step", "bench data", "bench ffn", "routers fit", "fit-routers"])
def test_every_command_explains_its_options(capsys, command):
    code, out, _ = run(capsys, *command.split(), "--help")
    assert code == 0 and f"usage: moma {command.replace('fit-routers', 'routers fit')}" in out
    if command in ("train", "cost", "plan", "upcycle", "bench step"):
        assert "--train.checkpoint-every" in out and "Steps between checkpoints" in out and "--options" in out


def test_the_page_of_all_commands_fits_a_screen(capsys):
    assert {path.stem for path in Path(commands.__file__).parent.glob("*.py")} == {*COMMANDS, "__init__"}
    code, out, _ = run(capsys, "--help")
    assert code == 0 and run(capsys)[1] == out and len(out.splitlines()) < 24
    assert [name for line in out.splitlines() for name in line.split()[1:2] if name in COMMANDS] == list(COMMANDS)


def test_what_needs_no_jax_starts_without_it():
    words = [["--help"], ["cost", str(CONFIGS / "quickstart.py")], ["recipes", str(CONFIGS)], ["train", "--help"]]
    code = f"""
import contextlib, sys
from moma_jax.__main__ import main
for words in {words}:
    with contextlib.suppress(SystemExit):
        main(words)
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_help_shows_the_recipes_own_values(capsys):
    _, out, _ = run(capsys, "train", CONFIGS / "paper_1b4.py", "--help")
    assert "120000" in out


def test_cost_prints_the_papers_parameters(capsys):
    code, out, _ = run(capsys, "cost", CONFIGS / "paper_1b4.py", "--model.ffn", "4t4i", "--json")
    assert code == 0
    assert json.loads(out)["parameters"]["total"] == pytest.approx(7.1e9, rel=0.025)
    assert json.loads(out) == moma_jax.cost(moma_jax.recipe(CONFIGS / "paper_1b4.py", {"model.ffn": "4t4i"}))


def test_cost_charges_padding_to_the_executed_flops(capsys):
    words = ("cost", CONFIGS / "quickstart.py", "--json")
    plain, padded = (json.loads(run(capsys, *words, *more)[1]) for more in ((), ("--padding", "0.2")))
    flops, executed = plain["flops_per_token"], padded["flops_per_token"]["executed"]
    assert executed == pytest.approx(flops["executed"] / 0.8) and executed > flops["executed"]
    code, _, err = run(capsys, *words, "--padding", "1.5")
    assert code == 2 and "padding: 1.5" in err


def test_eval_prints_what_is_no_number_as_null(capsys, monkeypatch):
    losses = {"loss": 2.0, "loss_image": None, "loss_image_given_text": float("nan"), "tokens": 3000}
    causal = losses | {"perplexity": 7.389, "perplexity_image": None, "tokens_image": 0, "tokens_image_given_text": 5}
    costs = {"experts_per_token": 1.25, "seconds": 3.0}
    result = {"choice": losses | costs, "causal": causal | costs, "gap_percent": {"causal": {"loss": 1.5}}}
    result["unigram"] = losses
    monkeypatch.setattr(moma_jax, "evaluate", lambda *_, **__: result, raising=False)
    _, out, _ = run(capsys, "eval", "runs/a", "--json")
    read = json.loads(out, parse_constant=pytest.fail)
    assert read["choice"] == losses | costs | {"loss_image_given_text": None} and list(read) == list(result)
    _, out, _ = run(capsys, "eval", "runs/a")
    rows = [line.split() for line in out.splitlines()]
    assert ["loss", "choice", "causal", "gap", "unigram"] in rows
    assert ["all", "2.0000", "2.0000", "+1.50%", "2.0000"] in rows and ["image", "-", "-", "-", "-"] in rows
    assert ["all", "7.389", "3,000"] in rows and ["image", "given", "text", "-", "5"] in rows
    assert ["experts", "per", "token", "1.250", "1.250"] in rows and "choice sees the future" in out


def test_overrides_by_dictionary_and_by_words():
    words = [
        "--model.ffn",
        "1t1i",
        "--train.tokens",
        "1e6",
        "--model.gumbel",
        "True",
        "--data.modalities.1.quota",
        "0.957",
    ]
    named = {"model.ffn": "1t1i", "train.tokens": 1e6, "model.gumbel": True, "data.modalities.1.quota": 0.957}
    quickstart = CONFIGS / "quickstart.py"
    assert moma_jax.recipe(quickstart, words) == moma_jax.recipe(quickstart, named)
    assert moma_jax.recipe(quickstart, named).model.gumbel is True


def test_one_training_length_takes_the_place_of_another():
    config = moma_jax.recipe(CONFIGS / "quickstart.py", {"train.steps": 7})
    assert (config.train.steps, config.train.tokens, config.train.flops) == (7, None, None)
    with pytest.raises(InputError, match="exactly one"):
        moma_jax.recipe(CONFIGS / "quickstart.py", {"train.steps": 7, "train.tokens": 5.0})


def test_a_recipe_that_is_no_recipe(tmp_path):
    for text, message in (
        ("x = 1", "AttributeError"),
        ("def config(): return 3", "returned int"),
        ("1/", "SyntaxError"),
    ):
        path = tmp_path / "r.py"
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            recipes.load(path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        recipes.load(tmp_path)


def test_a_runs_config_is_a_recipe(tmp_path):
    from moma_jax.config_json import to_json

    config = moma_jax.recipe(CONFIGS / "quickstart.py")
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    assert moma_jax.recipe(tmp_path / "config.json") == config
    moved = moma_jax.recipe(tmp_path)
    assert moved.run.dir == str(tmp_path), "a run that was moved goes on where it is now"
    assert dataclasses.replace(moved, run=config.run) == config


def test_the_functions_stay_functions_after_their_modules_are_loaded():
    code = (
        "import moma_jax, moma_jax.training.pretrain, moma_jax.data.prepare, moma_jax.cost\n"
        "assert all(callable(getattr(moma_jax, name)) for name in moma_jax.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moma_jax.nothing
