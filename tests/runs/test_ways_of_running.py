"""Ways in which people run it that once lost a run: readers that go away, odd paths, other systems and folders."""

import dataclasses
import os
import subprocess
import sys

import pytest
from command_line import run as moma
from paths import ROOT
from processes import spawn
from small_stores import drawn_config
from tiny import tiny

import moma_jax
from moma_jax import process
from moma_jax.errors import InputError
from moma_jax.generation.prompts import language_of
from moma_jax.page.reading import read_seen
from moma_jax.runs.directory import RunDir

SPEAKER = """
import sys
from moma_jax.display import Display
with Display(True) as display:
    for number in range(50):
        display.say(f"{number} " + "x" * 5000)
print("an end that nobody reads")
print("done", file=sys.stderr)
"""


@pytest.mark.parametrize("stderr", [False, True])
def test_where_both_outputs_have_no_reader_work_goes_on(stderr, tmp_path):
    """`moma train 2>&1 | head`, and progress on stderr."""
    code = SPEAKER.replace("Display(True)", f"Display(True, stderr={stderr})")
    code = code.partition('print("an end')[0] + f"open({str(tmp_path / 'done')!r}, 'w')"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    speaker = subprocess.Popen([sys.executable, "-c", code], **pipes)
    assert speaker.stdout.readline().startswith("0 ")
    speaker.stdout.close()
    speaker.wait()
    assert (tmp_path / "done").exists()


def test_where_the_reader_goes_away_work_goes_on_and_says_so():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    speaker = subprocess.Popen([sys.executable, "-c", SPEAKER], **pipes)
    assert speaker.stdout.readline().startswith("0 ")
    speaker.stdout.close()
    told = speaker.stderr.read()
    assert speaker.wait() == 0 and told == "moma: nobody reads the output any more; going on without it\ndone\n"


@pytest.mark.parametrize("name", ["lr=[3e-3]", "what?", "all*"])
def test_a_path_that_checkpoints_cannot_be_read_from_is_refused_before_training(tmp_path, name):
    with pytest.raises(InputError, match="where checkpoints cannot be read again; name another directory"):
        moma_jax.train(tiny(tmp_path / name, train_steps=1), quiet=True)
    assert not (tmp_path / name).exists()


def test_a_system_that_does_not_tell_cores_has_all(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert process.cores() == os.cpu_count()
    users = [path.name for path in (ROOT / "moma_jax").rglob("*.py") if "sched_getaffinity" in path.read_text()]
    assert users == ["process.py"], "moma_jax.process.cores is the one place that asks"


def test_a_run_is_used_from_another_folder(tmp_path, monkeypatch, capsys):
    """Its stores' paths are relative to where it was started."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = drawn_config(tmp_path / "here", steps=1)
    store = dataclasses.replace(config.data.stores[0], path="store")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, stores=(store,)))
    moma_jax.train(config, quiet=True)
    monkeypatch.chdir(tmp_path / "there")
    loaded = moma_jax.load(config.run.dir)
    assert language_of(loaded).image is not None and read_seen(config.run.dir).store is not None
    assert moma_jax.evaluate(config.run.dir, routing=("threshold",))["threshold"]["loss"] > 0
    code, _, err = moma(capsys, "generate", config.run.dir, "--prompt", "A", "--max-tokens", "2", "--out", "told")
    assert code == 0, err
    assert RunDir(config.run.dir).read_json("config.json")["data"]["stores"][0]["path"] == "store"


def test_a_command_that_failed_ends_although_a_thread_waits():
    code = (
        "import sys, threading, time\nfrom moma_jax import __main__ as moma\nmoma.LINGER = 0.5\n"
        "def main():\n    threading.Thread(target=time.sleep, args=(300,)).start()\n    sys.exit(1)\n"
        "moma.main = main\nmoma.program()"
    )
    process = spawn("-c", code)
    process.communicate(timeout=100)
    assert process.returncode == 1
