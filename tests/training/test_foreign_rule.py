"""A routing rule that lies in a file outside the repository goes through everything that a built-in one does."""

import json
import shutil

import jax
import numpy as np
import pytest
from command_line import run as moma
from paths import ROOT
from processes import output, spawn
from runs import records

import moma_jax
from moma_jax.config_json import from_json
from moma_jax.errors import InputError
from moma_jax.rules import Unloaded

RECIPE = """
import dataclasses

from tiny import tiny

from moma_jax.config import Modality, PrepareConfig, StoreConfig

PREPARE = PrepareConfig(documents=80, text_size=300, image_side=4, colours=8, parts=1)
MODALITIES = (Modality("text", "t", size=300, quota=1.0), Modality("image", "i", size=8, span=16, quota=1.0))


def config():
    stores = (StoreConfig("scenes", "store"),)
    data = {"kind": "store", "modalities": MODALITIES, "stores": stores, "sequence": 32, "prepare": PREPARE, "lanes": 8}
    model = {"ffn": "4t2i", "router": "my_rule.py:TopTwo"}
    fields = {f"data_{key}": value for key, value in data.items()} | {f"model_{key}": v for key, v in model.items()}
    return tiny(None, train_batch_rows=16, train_steps=8, train_checkpoint_every=3, **fields)
"""
KILLED = """
import os, signal, sys
import moma_jax
from moma_jax.training import token_stage
original = token_stage.open_stream

def stream(*arguments, **options):
    for number, packed in enumerate(original(*arguments, **options)):
        if number == 4:
            while not os.path.exists("runs/killed/checkpoints/3"):
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        yield packed

token_stage.open_stream = stream
moma_jax.train(moma_jax.recipe("mine.py", {"run.dir": "runs/killed"}), quiet=True)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the rule, a recipe that names it, and a run that was trained with it."""
    folder = tmp_path_factory.mktemp("mine")
    shutil.copy(ROOT / "tests" / "helpers" / "top_two.py", folder / "my_rule.py")
    (folder / "mine.py").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        moma_jax.train(moma_jax.recipe("mine.py", {"run.dir": "runs/whole"}), quiet=True)
    return folder


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home)


def test_its_name_options_losses_state_and_metric_are_in_the_run(home):
    config = json.loads((home / "runs/whole/config.json").read_text())
    assert config["model"]["router"] == {
        "rule": "my_rule.py:TopTwo", "top": 2, "slack": 1.5, "balance": 0.01, "rate": 0.01,
    }  # fmt: skip
    assert json.loads((home / "runs/whole/summary.json").read_text())["router"] == "my_rule.py:TopTwo"
    last = [r for r in records("runs/whole") if r["kind"] == "train"][-1]
    # Over two layers and two groups of experts; each about 1 while loads are nearly even.
    assert last["routing_balance"] == pytest.approx(4 * 0.01, rel=0.2)
    assert 0 <= last["routing_token_drop_text"] < 1 and 0 <= last["routing_token_drop_image"] < 1
    state = jax.device_get(moma_jax.load("runs/whole", router="my_rule.py:TopTwo").routing_state)
    assert state["text"]["bias_E"].shape == (2, 4) and np.abs(state["text"]["bias_E"]).max() > 0.01


def test_killed_and_resumed_it_is_bit_for_bit_the_same(home):
    process = spawn("-c", KILLED)
    process.communicate(timeout=300)
    assert process.returncode == -9
    moma_jax.train(moma_jax.recipe("mine.py", {"run.dir": "runs/killed"}), quiet=True)
    assert records("runs/killed") == records("runs/whole")
    whole, killed = (moma_jax.load(f"runs/{n}", router="my_rule.py:TopTwo") for n in ("whole", "killed"))
    for one, other in ((whole.params, killed.params), (whole.routing_state, killed.routing_state)):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


@pytest.mark.slow
def test_eight_devices_do_the_same(home):
    code = (
        "import moma_jax\nmesh = {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.expert': 2, 'run.dir': 'runs/mesh'}\n"
        "moma_jax.train(moma_jax.recipe('mine.py', mesh), quiet=True)"
    )
    output(spawn("-c", code, devices=8))
    for one, other in zip(records("runs/whole"), records("runs/mesh"), strict=True):
        for name, value in one.items():
            if isinstance(value, float) and name != "gap_percent":  # a difference of nearly equal losses
                np.testing.assert_allclose(other[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_it_is_evaluated_and_generates_causally(home, capsys):
    code, out, err = moma(capsys, "eval", "runs/whole", "--router", "my_rule.py:TopTwo", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert {"training", "causal", "gap_percent", "unigram"} == set(result) and "perplexity" in result["causal"]
    assert result["causal"]["experts_per_token"] == pytest.approx(2.0)
    words = ("--prompt", "A red", "--mode", "text", "--max-tokens", "4", "--out", "told")
    code, _, err = moma(capsys, "generate", "runs/whole", "--router", "my_rule.py:TopTwo", *words)
    assert code == 0 and json.loads((home / "told/generation.json").read_text()), err


def test_its_code_runs_only_where_it_is_named(home, capsys):
    assert isinstance(from_json(json.loads((home / "runs/whole/config.json").read_text())).model.router, Unloaded)
    for words in (("eval", "runs/whole"), ("generate", "runs/whole", "--out", "x"), ("cost", "runs/whole")):
        code, _, err = moma(capsys, *words)
        assert code == 2 and err.count("\n") == 1 and "my_rule.py:TopTwo" in err, err
    with pytest.raises(InputError, match="my_rule.py:TopTwo"):
        moma_jax.load("runs/whole", router="choice")
    code, out, _ = moma(capsys, "show", "runs/whole")
    assert code == 0 and "unknown parameters" in out  # its score network is its own
    code, out, _ = moma(capsys, "cost", "runs/whole", "--model.router", "my_rule.py:TopTwo", "--json")
    assert code == 0 and json.loads(out)


def test_cost_counts_what_it_takes(home):
    ours, theirs = (
        moma_jax.cost(moma_jax.recipe("mine.py", {"run.dir": "x", **more})) for more in ({}, {"model.router": "choice"})
    )
    experts = [each["flops_per_token"]["by_part"]["experts"] for each in (ours, theirs)]
    assert experts[0] == 2 * experts[1]  # every token enters two of its group's experts instead of one


@pytest.mark.long
def test_a_study_compares_it_from_the_command_line(home, capsys):
    (home / "routers.py").write_text(
        "from moma_jax import recipes\nfrom moma_jax.studies import Study, Variant\n\n\ndef study():\n"
        "    choice = Variant('choice', {'model.router': 'choice'})\n"
        "    top = Variant('top', {'model.router': 'my_rule.py:TopTwo', 'model.router.top': 1})\n"
        "    base = recipes.load('mine.py')\n"
        "    return Study(base, (choice, top), baseline='choice', tokens=4 * 16 * 32, tolerance=0.05)\n"
    )
    code, _, err = moma(capsys, "study", "routers.py")
    assert code == 0, err
    code, _, err = moma(capsys, "study", "routers.py", "--report")
    assert code == 0, err
    runs = (home / "runs/routers").rglob("config.json")
    rules = {json.loads(path.read_text())["model"]["router"]["rule"] for path in runs}
    assert rules == {"choice", "my_rule.py:TopTwo"}


@pytest.mark.slow
def test_the_short_form_is_named_too_and_says_that_it_is_not_causal(home, capsys):
    shutil.copy(ROOT / "tests" / "helpers" / "top_two.py", home / "short.py")
    words = ("--model.router", "short.py:first_come", "--run.dir", "runs/short", "--train.steps", "2")
    code, _, err = moma(capsys, "train", "mine.py", *words)
    assert code == 0, err
    code, _, err = moma(capsys, "eval", "runs/short", "--router", "short.py:first_come", "--routing", "causal")
    assert code == 2 and "no causal decision" in err and err.count("\n") == 1
