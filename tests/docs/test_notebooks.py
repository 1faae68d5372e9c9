"""The notebooks: as committed, with outputs; and from top to bottom, with a few training steps in place of many."""

import os
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
from paths import ROOT

nbclient = pytest.importorskip("nbclient", reason="needs the extra [notebooks]")
nbformat = pytest.importorskip("nbformat", reason="needs the extra [notebooks]")

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
MOST_BYTES = 1 << 20
LOCAL = re.compile(r"/(work|home|root|tmp|Users|content)/")
"""Beginnings of paths of one machine."""


class Telling(NamedTuple):
    """What a notebook must print, and how many pictures it shows at least."""

    words: tuple[str, ...]
    pictures: int


TELLING = {
    "first_run": Telling(("perplexity", "threshold", "colours", "parameters"), 2),
    "what_experts_choose": Telling(("kept since", "text expert 3:", "colour", "bits", "taken by no expert"), 1),
    "scaling_study": Telling(("FLOPs", "L = ", "predicted held-out loss", "trained", "off by", "the interval"), 1),
    "bring_your_pictures": Telling(("held out", "quotas", "times through the folder", "caption:", "described:"), 2),
}


def printed(outputs) -> str:
    """All text of outputs."""
    text = ("".join(output.get("text", "")) for output in outputs)
    return "".join(text) + "".join(str(output.get("data", {}).get("text/plain", "")) for output in outputs)


def require_telling(name, outputs) -> None:
    """The outputs of one notebook say and show what they should, and no error."""
    assert not [output for output in outputs if output.output_type == "error"]
    missing = [word for word in TELLING[name].words if word not in printed(outputs)]
    assert not missing
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= TELLING[name].pictures


def outputs_of(notebook):
    """Of all code cells, in order."""
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_every_notebook_is_asked_about():
    assert set(TELLING) == set(NOTEBOOKS)


@pytest.mark.parametrize("name", TELLING)
def test_outputs_of_a_full_run_are_committed(name):
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    require_telling(name, outputs_of(notebook))
    assert not [output for output in outputs_of(notebook) if output.get("name") == "stderr"]
    assert NOTEBOOKS[name].stat().st_size < MOST_BYTES
    assert not LOCAL.search(printed(outputs_of(notebook)))


def test_all_begin_with_the_same_installation():
    notebooks = [nbformat.read(path, as_version=4) for path in NOTEBOOKS.values()]
    first = {next(cell.source for cell in notebook.cells if cell.cell_type == "code") for notebook in notebooks}
    assert len(first) == 1 and "%pip install" in first.pop()


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_reads_notebooks_and_finds_nothing(command):
    files = [str(path) for path in NOTEBOOKS.values()]
    subprocess.run([sys.executable, "-m", "ruff", *command, "--force-exclude", *files], check=True, cwd=ROOT)
    shown = [sys.executable, "-m", "ruff", "check", "--show-files", "notebooks"]
    assert all(name in subprocess.run(shown, cwd=ROOT, text=True, capture_output=True).stdout for name in NOTEBOOKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", TELLING)
def test_a_notebook_runs_and_draws(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MOMA_NOTEBOOK_STEPS", "3")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    require_telling(name, outputs_of(notebook))


@pytest.mark.slow
def test_a_folder_of_ones_own_is_taken(tmp_path, monkeypatch):
    """Photographs of other sizes, with captions from a word to many: a row and quotas that fit are found."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    (tmp_path / "own").mkdir()
    for number in range(60):
        size = (int(random.integers(20, 90)), int(random.integers(20, 90)))
        pixels = random.integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "own" / f"{number}.jpg")
        caption = " ".join(random.choice(["kite", "sea", "a", "dog", "Küste"], int(random.integers(1, 80))))
        (tmp_path / "own" / f"{number}.txt").write_text(caption)
    monkeypatch.setenv("MOMA_PICTURES", str(tmp_path / "own"))
    test_a_notebook_runs_and_draws("bring_your_pictures", tmp_path, monkeypatch)
