"""The notebooks run from top to bottom, with a few training steps in place of many."""

import os

import pytest
from paths import ROOT

nbclient = pytest.importorskip("nbclient", reason="needs the extra [notebooks]")
nbformat = pytest.importorskip("nbformat", reason="needs the extra [notebooks]")

HOME = ROOT


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((HOME / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_draws(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MOMA_NOTEBOOK_STEPS", "3")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HOME), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    printed = "".join(output.get("text", "") for output in outputs)
    assert all(word in printed for word in ("perplexity", "threshold", "colours", "parameters"))
