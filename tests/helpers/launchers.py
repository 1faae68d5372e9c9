"""Launch scripts, run with tools that are played by scripts."""

import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from paths import ROOT

LAUNCH = ROOT / "launch"
RECIPE = ["configs/my recipe.py", "--run.dir", "gs://bucket/it's $HOME"]
"""Words that only come through whole where every layer of quoting is right."""
POD = ["--name", "pod", "--zone", "us-east5-a", "--type", "v5p-128", "--runtime", "v2-alpha-tpuv5"]
JOBSET = ["--name", "paper", "--image", "eu.gcr.io/mine/moma:1", "--hosts", "16"]
TPU = ["--tpu", "tpu-v5p-slice", "--topology", "4x4x4"]


@functools.cache
def plain_tools():
    """A directory with what the launchers may always use and no more: here gcloud is nowhere, wherever it is."""
    directory = tempfile.TemporaryDirectory()
    for name in ("awk", "bash", "cat", "dirname", "env", "head", "readlink", "sed", "sh", "sleep", "tar"):
        os.symlink(shutil.which(name), Path(directory.name) / name)
    return directory  # removed with the process


def run(name, *words, path=None, **environment):
    """Runs a launcher that finds the plain tools and those in `path`."""
    paths = [str(path), plain_tools().name] if path else [plain_tools().name]
    environment = {"PATH": os.pathsep.join(paths), "HOME": "/nowhere", **environment}
    return subprocess.run([LAUNCH / name, *words], env=environment, capture_output=True, text=True, timeout=60)


def play(directory, **scripts):
    """Executable scripts by name, in a directory for PATH."""
    for name, text in scripts.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    return directory


def commands(output):
    """The words of every command that a dry run printed; comments are none."""
    return [words for line in output.splitlines() if (words := shlex.split(line, comments=True))]
