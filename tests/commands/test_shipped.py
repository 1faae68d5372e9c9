"""Recipes by name, wherever the package is; and what `moma doctor` says of a machine."""

import json
from importlib import metadata
from pathlib import Path

import pytest
from command_line import run

import moma_jax
from moma_jax import doctor as doctor_lib
from moma_jax import recipes, shipped
from moma_jax.config_json import to_json
from moma_jax.errors import InputError
from moma_jax.studies import load_study

CONFIGS = Path(__file__).parents[2] / "configs"


def test_every_recipe_and_study_has_a_name_that_loads_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "recipes", "--json")
    listed = {row["name"]: row["about"] for row in json.loads(out)}
    files = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.py")}
    assert code == 0 and set(listed) == files and all(listed.values())
    for name in files:
        folder = name.partition("/")[0]
        if folder == "studies":
            assert load_study(name).dir == "runs/study"
        elif folder != "codec":
            assert recipes.load(name) == recipes.load(CONFIGS / f"{name}.py") and moma_jax.recipe(name)
    assert "codec/corpus_f8" in files and recipes.load("quickstart").run.dir == "runs/quickstart"


def test_an_existing_path_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()  # a folder that is no run hides nothing
    assert recipes.load("quickstart") == recipes.load(CONFIGS / "quickstart.py")
    Path("quickstart/config.json").write_text(json.dumps(to_json(recipes.load("paper_90m"))))
    assert recipes.load("quickstart").model == recipes.load("paper_90m").model
    for outside in ("../quickstart", "/quickstart", "nothing", "long" * 100):
        with pytest.raises(InputError, match="no such recipe; give a .py file, .*a name of `moma recipes`"):
            recipes.load(outside)
    with pytest.raises(InputError, match="no such study"):
        load_study("long" * 100)


def test_a_copy_works_where_it_is_put(capsys, tmp_path, monkeypatch):
    """One that builds on another, which does not lie beside the copy until somebody puts it there."""
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "recipes", "--copy", "paper_90m_mod", "mine.py")[:2] == (0, "mine.py\n")
    assert run(capsys, "recipes", "--copy", "studies/ffn", "my_study.py")[0] == 0
    assert recipes.load("mine.py").model == recipes.load("paper_90m_mod").model
    assert load_study("my_study.py").base.model == load_study("studies/ffn").base.model
    changed = (CONFIGS / "paper_90m.py").read_text().replace("heads=", "heads=2 * ")
    Path("paper_90m.py").write_text(changed)
    assert recipes.load("mine.py").model.heads == 2 * recipes.load("paper_90m_mod").model.heads
    for words, message in (
        (("quickstart", "mine.py"), "is there already"),
        (("quickstart", "no/mine.py"), "there is no folder"),
        (("quickstrat", "yours.py"), "there is no recipe quickstrat"),
        (("long" * 100, "yours.py"), "there is no recipe long"),
    ):
        code, _, error = run(capsys, "recipes", "--copy", *words)
        assert code == 2 and message in error
    assert shipped.found("quickstart") == shipped.folder() / "quickstart.py"


# Doctor ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A machine on which measuring takes no time."""
    figures = {"product_flops_per_second": 1e11, "bytes_per_second": 1e10, "of_peak": None, "spread": {}}
    monkeypatch.setattr("moma_jax.bench.chip.measure_chip", lambda *_, **__: figures)


def test_the_doctor_tells_no_secrets(capsys, tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home" / "someone")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA-secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "also-secret")
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={tmp_path}/home/someone/dump")
    others = f"--x={tmp_path}/home/someone2 --y=/mnt{tmp_path}/home/someone"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{others} --z=gs://bucket/someone/cache")
    code, out, _ = run(capsys, "doctor", "--report", "doctor.txt")
    assert code == 0 and Path("doctor.txt").read_text() == out
    assert "secret" not in out and "bucket" not in out and "--xla_dump_to=~/dump" in out
    assert f"{others} --z=gs://..." in out, "other folders are no home of this person"
    assert "$AWS_ACCESS_KEY_ID" in out and "gs://" in out and "JAX computes on the CPU" in out
    assert run(capsys, "doctor", "--report", "doctor.txt")[0] == 2
    found = json.loads(run(capsys, "doctor", "--json")[1])
    assert found["devices"]["platform"] == "cpu" and found["packages"]["jax"]["within"]
    assert found["recipes"]["quickstart"] * 3600 * 1e11 * found["devices"]["count"] == pytest.approx(9.196e12, rel=0.01)


def test_the_doctor_names_what_is_not_as_tested(monkeypatch, small):
    needs = ["numpy>=99", "orbax-checkpoint", "nowhere-to-be-found>=1,<2", 'ray>=1; extra == "ray"']
    original = metadata.requires
    monkeypatch.setattr(metadata, "requires", lambda name: needs if name == "moma_jax" else original(name))
    monkeypatch.setattr(doctor_lib, "LEAST_DISK", 1 << 60)
    advice = "\n".join(doctor_lib.doctor()["advice"])
    assert 'tested is >=99: pip install "numpy>=99"' in advice and "orbax" not in advice
    assert 'nowhere-to-be-found is missing, tested is <2,>=1: pip install "nowhere-to-be-found<2,>=1"' in advice
    assert "are free on this disk" in advice


def test_a_machine_without_working_devices_is_told_of(capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("Unknown backend cuda")

    monkeypatch.setattr("moma_jax.bench.chip.measure_chip", broken)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "devices" in out and "none: Unknown backend cuda" in out
    assert "JAX_PLATFORMS=cuda asks for what is not here; unset it" in out
