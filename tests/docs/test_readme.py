"""The README's Python is run as it stands there."""

import os
import re
import subprocess
import sys

import pytest
from paths import ROOT

import moma_jax

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
SHORT = {
    "train.steps": 12,
    "train.log_every": 4,
    "train.eval_every": 12,
    "data.prepare.documents": 1500,
    "optimizer.warmup_steps": 2,
    "model.layers": 2,
}


@pytest.mark.slow
def test_the_readmes_routing_function_trains_the_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    definition = BLOCKS[2].split("\n\n\nconfig = ")[0]
    assert len(definition.split("def ")[1].splitlines()) <= 10, "the README promises ten lines"
    scope = {}
    exec(compile(definition, "README.md", "exec"), scope)
    config = moma_jax.recipe(ROOT / "configs" / "quickstart.py", {**SHORT, "run.dir": str(tmp_path / "run")})
    summary = moma_jax.train(config, select=scope["random_choice"], quiet=True)
    losses = [r["loss"] for r in moma_jax.read_metrics(tmp_path / "run") if r["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    assert "random_choice" in summary["router"]


@pytest.mark.slow
def test_the_readmes_session_runs(tmp_path):
    """The first two Python blocks, with fewer steps and a smaller data set."""
    overrides = ", ".join(f"{name!r}: {value!r}" for name, value in SHORT.items())
    code = "\n".join(BLOCKS[:2]).replace('"train.steps": 20', overrides).replace("configs/", f"{ROOT}/configs/")
    assert overrides in code
    code += "\nassert losses and model.params and model.vocabulary.size == 544 and all(o.ids.size for o in outputs)\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=environment, stdout=subprocess.DEVNULL)


def test_files_that_the_readme_points_to_exist():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
