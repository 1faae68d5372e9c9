"""The JobSet that launch/gke_jobset.sh makes: its schema, and what Kubernetes makes of it."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from launchers import JOBSET, RECIPE, TPU, commands, play, run


def as_read(words):
    """Arguments of a container as Kubernetes hands them on: $$ is one dollar, $(NAME) a variable."""
    variables = {"JOB_COMPLETION_INDEX": "3", "HOME": "/root"}
    return [re.sub(r"\$(?:\$|\((\w+)\))", lambda at: variables[at[1]] if at[1] else "$", word) for word in words]


def render(*words):
    shown = run("gke_jobset.sh", *JOBSET, *words, "render", *RECIPE)
    assert shown.returncode == 0, shown.stderr
    return yaml.safe_load(shown.stdout)


def schema():
    checked = json.loads((Path(__file__).parent / "jobset_schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(checked)
    return jsonschema.Draft202012Validator(checked)


@pytest.mark.parametrize("words", [TPU, [*TPU, "--spot", "--slices", "2", "--restarts", "0"], ["--gpu", "nvidia-l4"]])
def test_jobset_keeps_the_schema(words):
    schema().validate(render(*words))


@pytest.mark.parametrize("mistake", ["maxRestart", "backOffLimit", "image"])
def test_the_schema_is_strict(mistake):
    jobset = render(*TPU)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    match mistake:
        case "maxRestart":
            jobset["spec"]["failurePolicy"]["maxRestart"] = jobset["spec"]["failurePolicy"].pop("maxRestarts")
        case "backOffLimit":
            job["backOffLimit"] = job.pop("backoffLimit")
        case "image":
            del job["template"]["spec"]["containers"][0]["image"]
    with pytest.raises(jsonschema.ValidationError):
        schema().validate(jobset)


def test_jobset_tpu():
    jobset = render(*TPU, "--slices", "2", "--spot", "--restarts", "9", "--notice", "25", "--service-account", "writer")
    assert jobset["metadata"]["name"] == "paper" and jobset["spec"]["failurePolicy"]["maxRestarts"] == 9
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert replicated["replicas"] == 2 and job["completions"] == job["parallelism"] == 16 and job["backoffLimit"] == 0
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["terminationGracePeriodSeconds"] == 25 and pod["serviceAccountName"] == "writer"
    assert as_read(container["args"]) == RECIPE and container["resources"]["limits"] == {"google.com/tpu": 4}


def test_jobset_gpu():
    pod = render("--gpu", "nvidia-h100-80gb")["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    hosts = ["--hosts.start", "on", "--hosts.coordinator", "paper-hosts-0-0.paper:8476", "--hosts.count", "16"]
    assert as_read(container["args"]) == [*RECIPE, *hosts, "--hosts.index", "3"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_jobset_arguments_arrive_as_they_are():
    words = ['a "b" \\ c', "@NAME@ & $(HOME): {x}", "# no comment", "yes", "a$$b", "$$(HOME)", "$$$", "$"]
    shown = run("gke_jobset.sh", *JOBSET, *TPU, "render", *words)
    pod = yaml.safe_load(shown.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert as_read(pod["containers"][0]["args"]) == words


def test_jobset_name_may_be_as_long_as_its_pods_allow():
    """The last pod's name may have 63 letters: NAME-hosts-0-15 and 6 more."""
    name = "n" * 46
    assert len(f"{name}-hosts-0-15-abcde") == 63
    assert render(*TPU, "--name", name)["metadata"]["name"] == name


def test_jobset_dry_run_is_what_is_applied(tmp_path):
    words = [*JOBSET, *TPU, "apply", *RECIPE]
    shown = run("gke_jobset.sh", "--dry-run", *words)
    first, *text, last = shown.stdout.splitlines()
    assert first == "kubectl apply -f - <<'JOBSET'" and last == "JOBSET"
    path = play(tmp_path, kubectl='#!/bin/sh\necho "$*"\ncat\n')
    assert run("gke_jobset.sh", *words, path=path).stdout.splitlines() == ["apply -f -", *text]
    shown = run("gke_jobset.sh", "--dry-run", "--name", "paper", "delete")
    assert commands(shown.stdout) == [["kubectl", "delete", "jobset", "paper"]]
