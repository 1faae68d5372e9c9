"""`moma train` where a device's memory is not enough: one line with what takes it, and what helps."""

import dataclasses
import json
import re

import jax
import pytest
from command_line import run as command
from tiny import tiny

from moma_jax.config import MeshConfig
from moma_jax.config_json import to_json
from moma_jax.plan import exhausted as exhausted_lib
from moma_jax.plan.exhausted import exhausted
from moma_jax.plan.memory import arithmetic_bytes, with_mesh
from moma_jax.process import is_exhausted
from moma_jax.training.pretrain import Pretraining

OF_A_STEP = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."
OF_A_COMPILER = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G "
    "hbm. Exceeded hbm capacity by 4.75G."
)


@pytest.fixture
def recipe(tmp_path):
    """A run's config.json, elsewhere than its directory."""
    (tmp_path / "recipe.json").write_text(json.dumps(to_json(tiny(tmp_path / "run"))))
    return tmp_path / "recipe.json"


@pytest.mark.parametrize(("complaint", "asked"), [(OF_A_STEP, "16.00 GiB were asked"), (OF_A_COMPILER, "needs 20.50")])
@pytest.mark.parametrize("where", ["compiling", "a step"])
def test_one_line_and_exit_1(recipe, tmp_path, capsys, monkeypatch, complaint, asked, where):
    def fails(*_):
        raise jax.errors.JaxRuntimeError(complaint)

    monkeypatch.setattr(Pretraining, "compile_step", fails if where == "compiling" else lambda *_: fails)
    code, _, err = command(capsys, "train", recipe)
    assert code == 1 and err.count("\n") == 1 and err.startswith("moma: out of memory on a device") and asked in err
    for name in ("parameters", "optimizer", "gradients", "activations", "temporaries", "logits"):
        assert re.search(rf"{name} [\d.,]+ [GM]iB", err), name
    assert "what helps: --model.remat dots" in err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_a_real_one(recipe, capsys):
    """The operating system refuses terabytes to the CPU's allocator, too."""
    code, _, err = command(capsys, "train", recipe, "--model.hidden", str(1 << 34))
    assert code == 1 and err.count("\n") == 1 and "out of memory on a device" in err and "--mesh.fsdp" in err


def test_other_errors_of_jax_stay_as_they_are(recipe, capsys, monkeypatch):
    def fails(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(Pretraining, "compile_step", fails)
    code, _, err = command(capsys, "train", recipe)
    assert code == 1 and "Traceback" in err and "INTERNAL: something else" in err
    assert not is_exhausted(RuntimeError("RESOURCE_EXHAUSTED"))


def test_the_largest_comes_first_with_what_makes_it_smaller(monkeypatch):
    monkeypatch.setattr(exhausted_lib, "_device_memory", lambda: 16 << 30)
    error = jax.errors.JaxRuntimeError(OF_A_STEP)
    config = dataclasses.replace(tiny(), mesh=MeshConfig(data=jax.device_count()))
    wide = dataclasses.replace(
        config, model=dataclasses.replace(config.model, ffn="8t8i", hidden=1 << 20, remat="full")
    )
    line = exhausted(wide, error)
    sizes = arithmetic_bytes(with_mesh(wide, jax.device_count(), "here"))
    order = re.findall(r"(\w+) [\d.,]+ [GM]iB[,;]", line.partition("by arithmetic it holds")[2].partition(": ")[2])
    assert [sizes[name] for name in order] == sorted(sizes.values(), reverse=True) and len(order) == len(sizes)
    assert order[0] == "optimizer" and "what helps: more devices of --mesh.fsdp than 1" in line
    assert "which has 16.00 GiB" in line
    long = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_rows=1 << 14))
    line = exhausted(long, error)
    assert re.search(r"by arithmetic it holds [\d.,]+ [GM]iB: activations", line)
    assert "what helps: --model.remat dots; --train.accumulate 2;" in line
    again = dataclasses.replace(long, model=dataclasses.replace(long.model, remat="full"))
    assert "--model.remat" not in exhausted(again, error)
