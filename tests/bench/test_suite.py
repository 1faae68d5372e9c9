"""The suite of one accelerator, at toy shapes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from moma_jax.bench import suite
from moma_jax.bench.suite import bench_suite, parts, table
from moma_jax.errors import InputError, RunError


def test_a_part_that_kills_its_process_costs_itself_alone(tmp_path, monkeypatch):
    """A child that stands for the real one: it does parts until one kills it."""
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "from moma_jax.bench import suite\n"
        "from moma_jax.errors import RunError\n"
        "def fail(): raise RunError('out of memory')\n"
        "made = {'a': lambda: {'x': 1}, 'b': lambda: os.abort(), 'c': fail, 'd': lambda: {'x': 2}}\n"
        "suite.parts = lambda toy: [suite.Part(n, f) for n, f in made.items()]\n"
        "suite.work(pathlib.Path(sys.argv[1]), True, float(sys.argv[2]))\n"
    )
    monkeypatch.setattr(suite, "parts", lambda toy: [suite.Part(name, None) for name in "abcd"])
    real = subprocess.Popen

    def child(words, **options):
        return real([sys.executable, str(script), words[4], words[6]], **options)

    monkeypatch.setattr(suite.subprocess, "Popen", child)
    found = bench_suite(str(tmp_path / "out"), 1.0, True)
    assert found["parts"]["a"]["x"] == 1 and found["parts"]["d"]["x"] == 2 and found["left"] == []
    assert "ended with -6" in found["parts"]["b"]["failed"] and found["parts"]["c"]["failed"] == "out of memory"
    assert "- b: its process ended" in (tmp_path / "out" / "suite.md").read_text()


def test_a_child_that_does_nothing_is_said(tmp_path, monkeypatch):
    real = subprocess.Popen
    monkeypatch.setattr(
        suite.subprocess, "Popen", lambda words, **o: real([sys.executable, "-c", "raise SystemExit(3)"])
    )
    with pytest.raises(RunError, match="ends with 3 before any part"):
        bench_suite(str(tmp_path / "out"), 1.0, True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out"):
        bench_suite(str(tmp_path / "file"), 1.0, True)


@pytest.mark.parametrize("text", ["[]", '{"parts": []}', '{"parts": {"step toy dense": {"x": 1}}}'])
def test_a_file_of_another_form_is_refused(tmp_path, text):
    (tmp_path / "suite.json").write_text(text)
    with pytest.raises(InputError, match="none of this suite"):
        bench_suite(str(tmp_path), 1.0, True)


def test_figures_of_another_machine_are_not_mixed_in(tmp_path):
    (tmp_path / "suite.json").write_text(json.dumps({"device": "NVIDIA H100", "parts": {}}))
    with pytest.raises(InputError, match="another machine"):
        bench_suite(str(tmp_path), 5.0, True)
    with pytest.raises(InputError, match="--minutes"):
        bench_suite(str(tmp_path), 0.0, True)


def test_tables_of_what_there_is():
    step = {"tokens_per_second": 1000.0, "spread": 0.01, "mfu": 0.5, "mfu_causal": 0.45, "compile_seconds": 30.0,
            "bytes": {"arguments": 2**30, "temporary": 2**30}, "rows": 6}  # fmt: skip
    page = table({"device": "A", "devices": 1, "parts": {
        "step 435m dense": step, "step 435m 8x": step | {"tokens_per_second": 900.0}, "data": {"failed": "no grain"}
    }})  # fmt: skip
    assert "| 435m | 8x | 900 | 0.900 | 1.0% | 50.0% | 45.0% | 30 | 2.0 | 6 |" in page and "- data: no grain" in page


@pytest.mark.long
def test_the_whole_suite_killed_in_the_middle_and_run_again(tmp_path):
    words = [sys.executable, "-m", "moma_jax.bench.suite", "--out", str(tmp_path), "--toy"]
    process = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL)
    path, done = tmp_path / "suite.json", {}
    while len(done) < 3:
        assert process.poll() is None
        time.sleep(0.2)
        done = json.loads(path.read_text())["parts"] if path.exists() else {}
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = json.loads(path.read_text())["parts"]
    assert list(kept)[:3] == ["chip", "step toy dense", "step toy 8x"]
    assert not any("failed" in part for part in kept.values())
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    found = json.loads(path.read_text())["parts"]
    assert list(found) == [part.name for part in parts(True)]
    assert not [part["failed"] for part in found.values() if "failed" in part]
    assert found["step toy dense"] == kept["step toy dense"], "what was done is not done again"
    assert found["attention toy"]["ways"]["written"]["largest_difference"] < 1e-5
    assert "## Decoding" in (tmp_path / "suite.md").read_text()
