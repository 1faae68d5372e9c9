"""Runs of several processes over loopback."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tiny import tiny

from moma_jax import __main__ as command
from moma_jax.config import HostsConfig, Modality, PrepareConfig, StoreConfig
from moma_jax.config_json import to_json
from moma_jax.training import token_stage

STEPS, HEARTBEAT = 12, 10
MODALITIES = (Modality("text", "t", size=300, quota=1.0), Modality("image", "i", size=8, span=16, quota=1.0))


def config_of(folder, name, **fields):
    """A run on drawn scenes; the store is made by whichever run comes first."""
    prepare = PrepareConfig(documents=80, text_size=300, image_side=4, colours=8, parts=1)
    stores = (StoreConfig("scenes", str(folder / "store")),)
    data = {"kind": "store", "modalities": MODALITIES, "stores": stores, "sequence": 32, "prepare": prepare, "lanes": 8}
    settings = {f"data_{key}": value for key, value in data.items()}
    train = {"train_steps": STEPS, "train_checkpoint_every": 5, "train_eval_routings": ("choice",)}
    return tiny(folder / name, **(settings | train | fields))


def free_port():
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Processes:
    """The processes of one run, each with `devices` devices; `blow` (process, batch, signal) hits one of them.

    They run `script` with the config and `blow`.
    """

    def __init__(self, config, count, *, devices=1, blow=None, script=__file__):
        coordinator = f"127.0.0.1:{free_port()}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        self.each = []
        for index in range(count):
            given = HostsConfig("on", coordinator, count, index, HEARTBEAT)
            settings = json.dumps([to_json(dataclasses.replace(config, hosts=given)), blow])
            words = [sys.executable, script, settings]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            self.each.append(subprocess.Popen(words, env=environment, cwd=Path(__file__).parent, **pipes))

    def ended(self):
        """(exit codes, outputs) of all."""
        try:
            outputs = [process.communicate(timeout=180)[0] for process in self.each]
        finally:
            for process in self.each:
                process.kill()
        return [process.returncode for process in self.each], outputs


def main(content, blow):
    """One process: `moma train`, with a signal to itself before a batch."""
    original, folder = token_stage.open_stream, Path(content["run"]["dir"])

    def open_stream(*arguments, **settings):
        return Blown(iter(original(*arguments, **settings)), folder / "checkpoints" / "5", *blow[1:])

    if blow is not None and blow[0] == content["hosts"]["index"]:
        token_stage.open_stream = open_stream
    path = folder.parent / f"{folder.name}-{content['hosts']['index']}.json"
    path.write_text(json.dumps(content))
    command.main(["train", str(path)])


class Blown:
    """A stream that sends its process a signal before it hands out batch `at`, counted from 1; 0: it ends there.

    SIGKILL waits for `checkpoint`.
    """

    def __init__(self, stream, checkpoint, at, number):
        self.stream, self.checkpoint, self.at, self.number, self.count = stream, checkpoint, at, number, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        if self.count == self.at:
            if not self.number:
                raise StopIteration
            while self.number == signal.SIGKILL and not self.checkpoint.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), self.number)
        return next(self.stream)

    def close(self):
        self.stream.close()


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
