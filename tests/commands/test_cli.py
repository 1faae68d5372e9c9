"""The command: help pages, exit codes, one clear line for bad input, and the Python functions of the same names."""

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
from command_line import run
from paths import ROOT

import moma_jax
from moma_jax import __main__, commands, recipes
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
        (["bench"], "moma bench: expected one of {step, study, generate, data, ffn, codec, prepare, suite}"),
        (["bench", "stop"], "stop: no such command; moma bench has step, study, generate, data, ffn"),
        (["frain"], "frain: no such command"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert code == 2 and out == ""
    assert message in err and err.startswith("moma: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing is half-written"


SUBCOMMANDS = ("bench step", "bench data", "bench ffn", "routers fit", "fit-routers", "codec train", "codec eval")


@pytest.mark.parametrize("command", [*COMMANDS, *SUBCOMMANDS])
def test_every_command_explains_its_options(capsys, command):
    code, out, _ = run(capsys, *command.split(), "--help")
    assert code == 0 and f"usage: moma {command.replace('fit-routers', 'routers fit')}" in out
    if command in ("train", "cost", "plan", "upcycle", "bench step"):
        assert "--train.checkpoint-every" in out and "Steps between checkpoints" in out and "--options" in out


def test_the_page_of_all_commands_fits_a_screen(capsys):
    assert {path.stem for path in Path(commands.__file__).parent.glob("*.py")} == {*COMMANDS, "__init__"}
    code, out, _ = run(capsys, "--help")
    assert code == 0 and run(capsys)[1] == out and len(out.strip().splitlines()) <= 25
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


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 bytes"),
    ],
)
def test_memory_that_ends_is_one_line(capsys, monkeypatch, error):
    def fails(words):
        raise error

    monkeypatch.setattr("moma_jax.commands.run", fails)
    code, _, err = run(capsys, "train", "quickstart")
    assert code == 1 and err.startswith("moma: out of memory (") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("said", "shown"), [("Event loop is closed", 0), ("Encountered error while reading array index: ()", 0), ("x", 1)]
)
def test_what_orbax_stopped_waiting_for_leaves_no_stack(monkeypatch, said, shown):
    seen = []
    monkeypatch.setattr(sys, "__unraisablehook__", seen.append)
    __main__._unraisable(types.SimpleNamespace(exc_value=RuntimeError(said)))
    assert len(seen) == shown


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
        "--model.router.gumbel",
        "True",
        "--data.modalities.1.quota",
        "0.957",
    ]
    named = {"model.ffn": "1t1i", "train.tokens": 1e6, "model.router.gumbel": True, "data.modalities.1.quota": 0.957}
    quickstart = CONFIGS / "quickstart.py"
    assert moma_jax.recipe(quickstart, words) == moma_jax.recipe(quickstart, named)
    assert moma_jax.recipe(quickstart, named).model.router.gumbel is True


def test_one_training_length_takes_the_place_of_another():
    config = moma_jax.recipe(CONFIGS / "quickstart.py", {"train.steps": 7})
    assert (config.train.steps, config.train.tokens, config.train.flops) == (7, None, None)
    with pytest.raises(InputError, match="exactly one"):
        moma_jax.recipe(CONFIGS / "quickstart.py", {"train.steps": 7, "train.tokens": 5.0})


def test_a_recipe_that_is_no_recipe(tmp_path):
    for text, message in (
        ("x = 1", r"has no config\(\)"),
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


# Whole fields and files of options ------------------------------------------------------------------------------------

QUICKSTART = CONFIGS / "quickstart.py"


def test_a_field_of_several_parts_is_given_whole():
    stores = [{"name": "a", "path": "stores/a", "share": {"text": 1.0}}, {"name": "b", "path": "stores/b"}]
    whole = moma_jax.recipe(QUICKSTART, {"data.stores": stores, "train.eval_sets": []})
    assert [store.name for store in whole.data.stores] == ["a", "b"] and whole.train.eval_sets == ()
    words = ["--data.stores", json.dumps(stores), "--train.eval-sets=[]"]
    assert moma_jax.recipe(QUICKSTART, words) == whole
    assert moma_jax.recipe(QUICKSTART, {"data.stores": whole.data.stores, "train.eval_sets": ()}) == whole
    later = moma_jax.recipe(QUICKSTART, [*words, "--data.stores.1.path", "c", "--data.prepare", "None"])
    assert later.data.stores[1].path == "c" and later.data.prepare is None


def test_a_file_of_options_says_what_a_recipe_can(tmp_path):
    file = tmp_path / "options.json"
    fields = {"train.steps": 9, "model": {"ffn": "1t1i", "dropout": 0.1}, "data": {"stores": [], "kind": "synthetic"}}
    file.write_text(json.dumps(fields))
    config = moma_jax.recipe(QUICKSTART, ["--model.ffn", "dense", "--options", str(file)])
    assert config == moma_jax.recipe(QUICKSTART, {**fields, "model": {"ffn": "dense", "dropout": 0.1}})
    assert (config.train.steps, config.train.tokens, config.model.ffn) == (9, None, "dense")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.stores", "["], "--data.stores: '[' is not JSON"),
        (["--data.stores"], "--data.stores: a value is missing"),
        (["--data.stores", '[{"nam": "a"}]'], "data.stores.0.nam: no such field"),
        (["--options", "{}"], "{}: not JSON"),
        (["--options", "list.json"], "list.json: not a JSON object"),
        (["--options", "typo.json"], "model.fnn: no such field; did you mean model.ffn?"),
    ],
)
def test_what_cannot_be_read_is_named(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    Path("typo.json").write_text('{"model": {"fnn": "8x"}}')
    code, out, err = run(capsys, "cost", QUICKSTART, *words)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_a_recipe_is_ordinary_python(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("ROWS = 16\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from neighbour_of_mine import ROWS\n"
        "from moma_jax.config import Config, DataConfig, TrainConfig\n"
        "@dataclass\nclass Options:\n    rows: int = ROWS\n"
        "def config() -> Config:\n"
        "    return Config(data=DataConfig(kind='synthetic'), train=TrainConfig(steps=2, batch_rows=Options().rows))\n"
    )
    assert moma_jax.recipe(tmp_path / "mine.py").train.batch_rows == 16
    assert str(tmp_path) not in sys.path


# Lists and glances ----------------------------------------------------------------------------------------------------


def test_recipes_are_listed_without_being_run(capsys, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.py").write_text('"""What it is.\n\nMore."""\n1 / 0\ndef config(): ...\n')
    (tmp_path / "b.py").write_text('"""No recipe."""\n')
    code, out, _ = run(capsys, "recipes", tmp_path, "--json")
    assert code == 0 and json.loads(out) == [{"name": str(tmp_path / "sub" / "a.py"), "about": "What it is."}]
    assert "quickstart.py" in run(capsys, "recipes", CONFIGS)[1] and run(capsys, "recipes", "nowhere")[0] == 2


def test_show_tells_how_far_a_run_is(capsys, tmp_path):
    from moma_jax.config_json import to_json

    assert run(capsys, "show", tmp_path)[0] == 2
    (tmp_path / "config.json").write_text(json.dumps(to_json(moma_jax.recipe(QUICKSTART))))
    assert "not begun" in run(capsys, "show", tmp_path)[1]
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    (tmp_path / "checkpoints" / "100" / "x").write_text("")
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "step": 120, "total": 170, "updated": 0}))
    shared = {"schema": 1, "time": 0, "loss_text": 1.25}
    records = [{"kind": "train", "step": step, "loss": step / 100, "tokens_per_second": 5e3} for step in (110, 120)]
    records += [{"kind": "eval", "step": 100, "eval_set": "heldout", "routing": "threshold", "loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record | shared) + "\n" for record in records))
    found = json.loads(run(capsys, "show", tmp_path, "--json")[1])
    assert (found["state"], found["step"], found["checkpoints"], found["config"]["ffn"]) == (
        "running",
        120,
        [100],
        "4t4i",
    )
    assert found["train"]["step"] == 120 and [record["loss"] for record in found["eval"]] == [0.5]
    out = run(capsys, "show", tmp_path)[1]
    assert "running, step 120 of 170" in out and "checkpoints: 100" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["train", "120", "1.2000", "1.2500", "-", "5,000"] in rows
    assert ["heldout", "threshold", "100", "0.5000", "1.2500", "-", "-"] in rows


def test_show_of_damaged_files_is_one_line(capsys, tmp_path):
    from moma_jax.config_json import to_json

    (tmp_path / "config.json").write_text(json.dumps(to_json(moma_jax.recipe(QUICKSTART))))
    for content, refusal in [
        ('{"state": "running", "step": "3", "total": 9}', "status.json: step: expected int, found '3'; restore"),
        ('{"state": "running", "step": 3}', "status.json: total: is missing; restore"),
        ('{"state": "running", "step": 3, "total": 9, "updated": 1e300}', "status.json: updated: must be"),
    ]:
        (tmp_path / "status.json").write_text(content)
        code, _, err = run(capsys, "show", tmp_path)
        assert code == 2 and refusal in err and err.count("\n") == 1
    (tmp_path / "status.json").unlink()
    strange = {"kind": "eval", "step": 1, "eval_set": "[/]\ud800", "routing": "[red]", "loss": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(strange) + "\n")
    shown = subprocess.run([sys.executable, "-m", "moma_jax", "show", tmp_path], capture_output=True, check=True).stdout
    assert b"[/]\\ud800" in shown and b"[red]" in shown  # neither markup nor the end of the command


def test_routing_rules_are_the_files_of_their_folder(capsys):
    pytest.importorskip("moma_jax.routers")
    code, out, _ = run(capsys, "routers", "list", "--json")
    rules = {rule["name"]: rule for rule in json.loads(out)}
    files = {path.stem for path in (ROOT / "moma_jax/routers").glob("*.py")} - {"__init__"}
    assert code == 0 and set(rules) == files and all(rule["about"] and rule["paper"] for rule in rules.values())
    assert rules["token_choice"]["options"]["top"] == 1 and rules["token_choice"]["losses"] == ["balance", "z"]
    code, table, _ = run(capsys, "routers", "list", "--markdown")
    page = (ROOT / "docs/routers.md").read_text()
    assert code == 0 and page.partition("<!-- rules -->\n")[2].partition("<!-- end -->")[0] == table
    code, out, err = run(capsys, "routers", "list", "--markdown", "--json")
    assert (code, out) == (2, "") and "one or the other" in err
