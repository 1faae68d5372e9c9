"""Stores and runs in buckets, by servers that speak the real protocols: equal to those on a disk, also under faults."""

import hashlib
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from buckets import HELPERS, google, serving
from loopback import config_of, free_port
from processes import output, spawn
from tiers import long_but

import moma_jax
from moma_jax.config_json import to_json
from moma_jax.storage import lease
from moma_jax.storage.directory import Directory

pytestmark = pytest.mark.slow
DIGEST = """
import hashlib, json, sys
import jax, moma_jax
from moma_jax.storage.directory import Directory
from runs import records
place, = sys.argv[1:]
parameters = jax.tree.leaves(jax.device_get(moma_jax.load(f"{place}/run").params))
home = Directory(place)
drop = ("settings.json", "contents.json", "manifest.json", "generation.json")  # which name the place, or the first one
contents = {name: hashlib.sha256(home.read(name)).hexdigest() for name in home.names("")
            if name.startswith(("store/", "drawn/")) and not name.endswith(drop)}
losses = {routing: {k: v for k, v in result.items() if k.startswith("loss")}
          for routing, result in moma_jax.evaluate(f"{place}/run").items()}
every = [r for r in records(f"{place}/run") if r["kind"] != "event"]  # which tell of saves that were tried again
print(json.dumps({"parameters": [p.ravel().tolist() for p in parameters], "records": every,
                  "contents": contents, "eval": losses}))
"""


def begin(place, folder, environment, *hosts):
    """Starts `moma train` of a small run with all paths at `place`; `hosts`: options of one process of several."""
    config = to_json(config_of(Path("/"), "run"))
    config["run"]["dir"], config["data"]["stores"][0]["path"] = f"{place}/run", f"{place}/store"
    recipe = folder / f"{hashlib.sha256(place.encode()).hexdigest()[:8]}.json"
    recipe.write_text(json.dumps(config))
    return spawn("-m", "moma_jax", "train", recipe, *hosts, **environment)


def digest(place, environment):
    """Parameters, records, held-out losses, and the files of the store and of a picture that the run draws."""
    words = ("generate", f"{place}/run", "--mode", "image", "--out", f"{place}/drawn")
    output(spawn("-m", "moma_jax", *words, **environment))
    return json.loads(output(spawn("-c", DIGEST, place, **environment)).splitlines()[-1])


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    environment = {"PYTHONPATH": f"{HELPERS}:{HELPERS.parents[1]}"}
    output(begin(str(folder), folder, environment))
    return digest(str(folder), environment)


FAULTS = [f"--unavailable 0.05 --cut 0.02 --seed {seed}" for seed in range(10)] + ["--hidden 5"]


@pytest.mark.parametrize("faults", long_but("", of=["", *FAULTS]))
def test_a_run_in_a_bucket_equals_one_on_a_disk(faults, on_disk, tmp_path, monkeypatch):
    with google(*faults.split()) as environment:
        output(begin("gs://bucket/a", tmp_path, environment))
        time.sleep(6 if "hidden" in faults else 0)  # what lists the files here waits until they show
        assert digest("gs://bucket/a", environment) == on_disk
        if not faults:
            told = output(spawn("-m", "moma_jax", "verify", "gs://bucket/a/run", "gs://bucket/a/store", **environment))
            assert told.count("whole: ") == 5 and "not in the list" not in told
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            saves = [r["of_step"] for r in moma_jax.read_metrics("gs://bucket/a/run") if r["kind"] == "checkpoint"]
            assert saves == [5, 10, 12]  # the last one ends after the records were sealed for it


def test_a_run_in_a_bucket_that_is_killed_goes_on_exactly_and_lets_nobody_in(on_disk, tmp_path, monkeypatch):
    with google() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        first = begin("gs://bucket/a", tmp_path, environment)
        for line in first.stdout:
            if line.startswith("step 12/"):  # that of step 5 is there, as the next one was begun
                break
        first.send_signal(signal.SIGSTOP)  # so that it does not end meanwhile
        second = begin("gs://bucket/a", tmp_path, environment)
        while "waiting 20 s" not in second.stderr.readline():
            assert second.poll() is None
        run = Directory("gs://bucket/a/run")
        before = run.read(lease.FILE)
        time.sleep(lease.BEAT)
        first.send_signal(signal.SIGCONT)  # its beat is overdue: the next one comes at once
        while run.read(lease.FILE) == before:
            assert first.poll() is None
            time.sleep(0.02)
        first.send_signal(signal.SIGSTOP)
        _, err = second.communicate(timeout=300)
        assert second.returncode == 2 and f"process {first.pid} of " in err and "is writing here" in err, err
        first.kill()
        first.wait()
        output(begin("gs://bucket/a", tmp_path, environment))
        assert digest("gs://bucket/a", environment) == on_disk


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_in_a_bucket_and_one_that_goes_on(count, on_disk, tmp_path):
    """The store is the same, the parameters but for the order of sums."""
    with google() as environment:
        options = ("--hosts.start", "on", "--hosts.coordinator", f"127.0.0.1:{free_port()}", "--hosts.count", count)
        each = [begin("gs://bucket/a", tmp_path, environment, *options, "--hosts.index", n) for n in range(count)]
        for line in each[0].stdout:
            if line.startswith("step 12/"):
                break
        for process in each:
            process.kill()
            process.wait()
        out = output(begin("gs://bucket/a", tmp_path, environment))
        assert "goes on from step" in out
        found = digest("gs://bucket/a", environment)
    of_store = lambda contents: {n: d for n, d in contents.items() if n.startswith("store/")}  # noqa: E731
    assert of_store(found["contents"]) == of_store(on_disk["contents"])
    assert [r["tokens"] for r in found["records"]] == [r["tokens"] for r in on_disk["records"]]
    for mine, other in zip(found["parameters"], on_disk["parameters"], strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5)


def test_a_store_on_s3_is_that_of_a_disk(tmp_path, monkeypatch):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = ("prepare", "scenes", "--documents", 40, "--text-size", 300, "--parts", 2, "--out")
    secrets = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_ENDPOINT_URL": url}
    with serving(port, "-m", "moto.server", "-p", port):
        for name, value in (secrets | {"AWS_EC2_METADATA_DISABLED": "true"}).items():
            monkeypatch.setenv(name, value)
        import boto3

        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")
        for out in ("s3://bucket/store", tmp_path / "store"):
            output(spawn("-m", "moma_jax", *words, out))
        there, here = Directory("s3://bucket/store"), Directory(str(tmp_path / "store"))
        assert there.names("") == here.names("") != []
        assert all(there.read(name) == here.read(name) for name in here.names(""))
        refused = spawn("-m", "moma_jax", "train", "quickstart", "--run.dir", "s3://bucket/run")
        _, err = refused.communicate(timeout=300)
        assert "checkpoints cannot be written to s3://" in err
        assert refused.returncode == 2
