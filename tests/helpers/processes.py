"""Python in processes of its own, with as many virtual devices as asked; tests/conftest.py sets how it compiles."""

import os
import subprocess
import sys


def spawn(*words, devices=1, cwd=None, **environment) -> subprocess.Popen:
    """Starts `python words...`; its input and outputs are pipes of text."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)} | environment
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], env=environment, cwd=cwd, **pipes)


def output(process: subprocess.Popen) -> str:
    """What it printed, once it has ended well."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return out
