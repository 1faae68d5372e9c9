"""Several real processes over loopback: the same curve, an agreed stop, and an end in bounded time when one dies."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from loopback import STEPS, Processes, config_of
from paths import ROOT
from runs import parameters, records

import moma_jax
from moma_jax import hosts
from moma_jax.config import HostsConfig
from moma_jax.errors import InputError
from moma_jax.runs.checkpoint import Checkpoints
from moma_jax.runs.directory import RunDir

# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def two(folder):
    """An undisturbed run of two processes; their first one makes the store."""
    config = config_of(folder, "two", mesh_data=2)
    codes, outputs = Processes(config, 2).ended()
    assert codes == [0, 0], outputs
    return config, outputs


@pytest.fixture(scope="module")
def alone(folder, two):
    """The same run in one process."""
    config = config_of(folder, "alone")
    moma_jax.train(config, quiet=True)
    return config


def assert_same_figures(run, other, kinds=("train", "eval")):
    """Records are equal to 1e-5, but for passes over the stores, which are those of process 0's lanes."""
    both = [[record for record in records(directory) if record["kind"] in kinds] for directory in (run, other)]
    for mine, theirs in zip(*both, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, float) and not name.startswith(("epoch_", "gap_percent")):
                assert mine[name] == pytest.approx(value, rel=1e-5, abs=1e-7), (name, theirs["step"])
            elif not isinstance(value, float):
                assert mine[name] == value


def cursor_of(run):
    checkpoints = Checkpoints(RunDir(run))
    return checkpoints.saved(checkpoints.latest()).cursor


@pytest.mark.slow
def test_two_processes_train_as_one(two, alone):
    config, outputs = two
    assert_same_figures(config.run.dir, alone.run.dir)
    for name, value in cursor_of(alone.run.dir).items():
        np.testing.assert_array_equal(value, cursor_of(config.run.dir)[name])
    assert "step 12/12" in outputs[0] and "step" not in outputs[1]
    assert RunDir(config.run.dir).read_json("summary.json")["device"] == {"kind": "cpu", "count": 2}


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_one_step_and_one_goes_on(folder, alone):
    """Process 2 gets SIGTERM."""
    config = config_of(folder, "four", mesh_data=2, mesh_fsdp=2, train_eval_sets=())
    codes, outputs = Processes(config, 4, blow=(2, 6, signal.SIGTERM)).ended()
    assert codes == [143] * 4, outputs
    status = RunDir(config.run.dir).read_json("status.json")
    assert status["state"] == "stopped" and 6 <= status["step"] <= 8
    assert Checkpoints(RunDir(config.run.dir)).latest() == status["step"]
    moma_jax.train(config_of(folder, "four", train_eval_sets=()), quiet=True)
    assert_same_figures(config.run.dir, alone.run.dir, ("train",))


@pytest.mark.slow
def test_one_is_killed_and_the_restart_ends_as_if_nothing_had_happened(folder, two):
    config, step = config_of(folder, "killed", mesh_data=2), random.Random(4).randrange(7, STEPS)
    processes = Processes(config, 2, blow=(1, step, signal.SIGKILL))
    assert processes.each[1].wait(timeout=180) == -signal.SIGKILL
    died = time.monotonic()
    processes.each[0].wait(timeout=60)
    print(f"the other process ended {time.monotonic() - died:.1f} s later")
    codes, outputs = processes.ended()
    assert codes[0] not in (0, 143), outputs
    assert Checkpoints(RunDir(config.run.dir)).latest() == 5
    codes, outputs = Processes(config, 2).ended()
    assert codes == [0, 0] and "goes on from step 5" in outputs[0], outputs
    assert records(config.run.dir) == records(two[0].run.dir)
    for a, b in zip(*map(leaves, (config.run.dir, two[0].run.dir)), strict=True):
        np.testing.assert_array_equal(a, b)


def leaves(run):
    import jax

    return jax.tree.leaves(parameters(run))


@pytest.mark.slow
def test_an_error_of_one_ends_all(folder, two):
    config = config_of(folder, "ended", mesh_data=2, model_ffn="dense", train_eval_sets=())
    processes = Processes(config, 2, blow=(1, 3, 0))
    assert processes.each[1].wait(timeout=180) == 1
    processes.each[0].wait(timeout=60)
    codes, outputs = processes.ended()
    assert codes[0] not in (0, 143) and "moma: step 2: the training data ended" in outputs[1]


@pytest.mark.slow
def test_what_is_refused_is_refused_by_all(two):
    codes, outputs = Processes(dataclasses.replace(two[0], train=dataclasses.replace(two[0].train, seed=1)), 2).ended()
    assert codes == [2, 2]
    assert all("moma: run.dir" in output and "train.seed: 0 -> 1" in output for output in outputs)


# Joining --------------------------------------------------------------------------------------------------------------

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a[1-4]", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "4"}


@pytest.fixture
def asked(monkeypatch):
    """What jax.distributed is asked for; the environment is that of a lone machine without a TPU."""
    calls = []
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda **settings: calls.append(settings))
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "TPU", "MEGASCALE", "JAX_COORDINATOR", "JOB_COMPLETION")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    return calls


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({name: value for name, value in SLURM.items() if "STEP" not in name}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "WARNING: not found, set it"}, False),  # what libtpu sets where there is no TPU
        ({"JOB_COMPLETION_INDEX": "3", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ],
)
def test_the_environment_says_whether_there_are_others(asked, monkeypatch, environment, joins):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hosts.join(HostsConfig(start="off"))
    assert not asked
    hosts.join(HostsConfig())
    assert bool(asked) == joins
    if joins:
        assert asked[0]["coordinator_address"] is asked[0]["cluster_detection_method"] is None
        assert asked[0]["local_device_ids"] == ([] if "SLURM_NTASKS" in environment else None)


def test_fields_say_who_the_others_are(asked):
    hosts.join(HostsConfig(coordinator="a:1", count=4, index=0, heartbeat_seconds=7))
    (call,) = asked
    assert (call["coordinator_address"], call["num_processes"], call["process_id"]) == ("a:1", 4, 0)
    assert (call["heartbeat_timeout_seconds"], call["cluster_detection_method"]) == (7, "deactivate")


def test_a_lone_tpu_whose_devices_are_in_use_stays_alone(asked, monkeypatch):
    def refuse(**settings):
        raise RuntimeError("jax.distributed.initialize() must be called before any JAX calls that might initialise")

    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    monkeypatch.setattr(hosts.jax.distributed, "initialize", refuse)
    before = hosts.jax.config.jax_platforms
    hosts.jax.config.update("jax_platforms", None)
    try:
        hosts.join(HostsConfig())
    finally:
        hosts.jax.config.update("jax_platforms", before)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")  # here there are others, so none may go on alone
    with pytest.raises(InputError, match="pip install kubernetes"):
        hosts.join(HostsConfig())


def test_on_needs_to_know_who_the_others_are():
    code = """
from moma_jax import hosts
from moma_jax.config import HostsConfig
hosts.join(HostsConfig("on"))
"""
    with pytest.raises(InputError, match="hosts: cannot join .* give hosts.coordinator"):
        hosts.join(HostsConfig("on"))  # devices are in use here
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "InputError: hosts: cannot join the other processes (coordinator_address should be defined" in done.stderr


def test_others_that_do_not_come_are_not_awaited_for_ever():
    code = """
from moma_jax import hosts
from moma_jax.config import HostsConfig
hosts.JOIN_SECONDS = 1
hosts.join(HostsConfig("on", "127.0.0.1:1", 2, 1))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == hosts.NOBODY_CAME
    assert "moma: hosts.coordinator: not all processes met at 127.0.0.1:1 within 1 seconds" in done.stderr
