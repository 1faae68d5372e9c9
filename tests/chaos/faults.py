"""What is done to a command. A fault is an object with three moments: before the start, its strike, and its mending.

A further kind is a further class and a line in KINDS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stores import Bucket
from subjects import FAR_DEADLINE, Subject
from victims import Victim

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
DISK = "32M"
SLEEPS_BY_SELECT = """
import select, time
time.sleep = lambda seconds: select.select([], [], [], seconds)  # faketime 0.9.10 refuses the deadline of time.sleep
from moma_jax.__main__ import program
program()
"""


@dataclass
class Scene:
    """One fault's stage: a command in a place of its own, and what is drawn for it.

    Attributes:
      draw: everything random comes from it. words: the command line; a remedy may change it.
      settings: of `victims.start`, while the fault lasts. victims: its processes. halfway: a checkpoint to begin at.
      told: what was drawn, for the record. bucket: what it writes to, where that is one; server: options of its server.
    """

    subject: Subject
    home: Path
    place: Path
    draw: random.Random
    words: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    victims: list[Victim] = field(default_factory=list)
    halfway: int | None = None
    told: dict[str, Any] = field(default_factory=dict)
    bucket: Bucket | None = None
    server: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """What the command makes."""
        return self.place / self.subject.makes


class Fault:
    """One kind of fault; most need only `strike`.

    Attributes:
      kind: its name in the report. deaths: exit codes below 0 that it may lead to.
      restarts: it is there before the command goes on from a checkpoint, and does not wait for a moment.
      disk: it needs a file system of its own. own: it damages inputs, which are copied. layout: the restart has other
      devices, so losses are nearly equal only. deadline: seconds in which a command must end under it.
    """

    kind = ""
    deaths: frozenset[int] = frozenset()
    restarts = disk = own = layout = False
    deadline = 0.0

    def arrange(self, scene: Scene) -> None:
        """Before the command starts."""

    def strike(self, scene: Scene) -> None:
        """At the moment."""

    def mend(self, scene: Scene) -> None:
        """After the command has ended, before it is run again."""


# Signals --------------------------------------------------------------------------------------------------------------


def _one_of(scene: Scene) -> Victim:
    index = scene.draw.randrange(len(scene.victims))
    scene.told["process"] = index
    return scene.victims[index]


class Kill(Fault):
    kind, deaths = "SIGKILL", frozenset({-9})

    def strike(self, scene: Scene) -> None:
        _one_of(scene).signal(signal.SIGKILL)


class Terminate(Fault):
    kind, deaths = "SIGTERM", frozenset({-15})

    def strike(self, scene: Scene) -> None:
        _one_of(scene).signal(signal.SIGTERM)


class Pause(Fault):
    """SIGSTOP for up to three seconds, rarely for thirty; then it may go on."""

    kind = "SIGSTOP"

    def strike(self, scene: Scene) -> None:
        seconds = 30.0 if scene.draw.random() < 0.05 else scene.draw.uniform(0.2, 3)
        scene.told["seconds"] = round(seconds, 2)
        victim = _one_of(scene)
        victim.signal(signal.SIGSTOP)
        time.sleep(seconds)
        victim.signal(signal.SIGCONT)


# Disks ----------------------------------------------------------------------------------------------------------------


def mount(home: Path, place: Path) -> None:
    """A small ext4 of its own at the place."""
    image, fresh = home / "disk.img", home / "disk-fresh.img"
    if not fresh.exists():
        subprocess.run(["truncate", "-s", DISK, fresh], check=True)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", fresh], check=True)
    subprocess.run(["cp", "--sparse=always", fresh, image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)


def unmount(place: Path) -> None:
    """Takes the file system away, if there is one."""
    for _ in range(50):
        if not os.path.ismount(place) or not subprocess.run(["umount", place], capture_output=True).returncode:
            return
        time.sleep(0.1)
    subprocess.run(["umount", "-l", place], check=True)


def can_mount(home: Path) -> bool:
    """Whether this user may; without it, faults of disks are limits on the size of files."""
    place = home / "try"
    place.mkdir(exist_ok=True)
    try:
        mount(home, place)
    except (OSError, subprocess.CalledProcessError):
        return False
    unmount(place)
    return True


class FullDisk(Fault):
    """Something else fills the disk but for some bytes; the mending deletes it."""

    kind, disk = "disk full", True

    def strike(self, scene: Scene) -> None:
        left = scene.draw.choice((0, 4096, 16384, 65536))
        scene.told["left"] = left
        found = os.statvfs(scene.place)
        size = found.f_bavail * found.f_frsize - left
        with open(scene.place / ".ballast", "wb") as file:
            for less in range(0, size, 4096):  # the file system may want some blocks for itself, and the command writes
                with contextlib.suppress(OSError):
                    os.posix_fallocate(file.fileno(), 0, size - less)
                    return

    def mend(self, scene: Scene) -> None:
        (scene.place / ".ballast").unlink(missing_ok=True)


class ReadOnlyDisk(Fault):
    """The file system gives up, as after an error of the disk: files in use cannot be written any more, and what was
    not synchronised is lost. The mending checks it and mounts it again."""

    kind, disk = "disk read-only", True

    def strike(self, scene: Scene) -> None:
        subprocess.run(["mount", "-o", "remount,abort", scene.place], check=True)

    def mend(self, scene: Scene) -> None:
        unmount(scene.place)
        image = scene.home / "disk.img"
        if subprocess.run(["e2fsck", "-p", image], capture_output=True).returncode > 1:
            raise RuntimeError("e2fsck: could not repair the file system")
        subprocess.run(["mount", "-o", "loop", image, scene.place], check=True)


class FileLimit(Fault):
    """No file may grow beyond some kilobytes (RLIMIT_FSIZE)."""

    kind = "size limit"

    def strike(self, scene: Scene) -> None:
        limit = scene.draw.randrange(4096, 65536)
        scene.told["bytes"] = limit
        for victim in scene.victims:
            if victim.alive():
                resource.prlimit(victim.pid, resource.RLIMIT_FSIZE, (limit, limit))


# Memory, clocks, numbers ----------------------------------------------------------------------------------------------


class MemoryLimit(Fault):
    """The process may have little more memory than it has (RLIMIT_AS). The C++ libraries end it when they get none."""

    kind, deaths = "memory limit", frozenset({-6, -9, -11})

    def strike(self, scene: Scene) -> None:
        more = scene.draw.choice((1, 16, 64, 256)) << 20
        scene.told["more_bytes"] = more
        victim = scene.victims[0]
        if victim.alive():
            pages = int(Path(f"/proc/{victim.pid}/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + more
            resource.prlimit(victim.pid, resource.RLIMIT_AS, (limit, limit))


class Clock(Fault):
    """The clock is a day off, from the start or from a moment on (Debian's faketime, under which waits with an end
    spin)."""

    kind, deadline = "clock", FAR_DEADLINE

    def arrange(self, scene: Scene) -> None:
        self._file = scene.home / "clock"
        self._file.write_text("+0\n")
        environment = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(self._file)}
        environment |= {"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        scene.settings |= {"environment": environment, "fresh": ("-c", SLEEPS_BY_SELECT)}

    def strike(self, scene: Scene) -> None:
        scene.told["off"] = scene.draw.choice(("+1d", "-1d"))
        self._file.write_text(scene.told["off"] + "\n")


class NotANumber(Fault):
    """A learning rate that explodes, with train.on_nan=stop; the mending begins a new run, as the line says."""

    kind, restarts = "NaN", True

    def arrange(self, scene: Scene) -> None:
        scene.halfway = None
        scene.told["peak_lr"] = f"1e{scene.draw.randrange(12, 31)}"
        scene.words += ["--optimizer.peak-lr", scene.told["peak_lr"]]

    def mend(self, scene: Scene) -> None:
        scene.words = list(scene.subject.words)
        shutil.rmtree(scene.folder, ignore_errors=True)


class OtherLayout(Fault):
    """A restart on another number of devices or processes."""

    restarts = layout = True

    def __init__(self, devices: int = 1, processes: int = 1):
        others = f"on {devices} devices" if devices > 1 else f"with {processes} process{'es' * (processes > 1)}"
        self.kind = f"restart {others}"
        self._devices, self._processes = devices, processes

    def arrange(self, scene: Scene) -> None:
        scene.subject = dataclasses.replace(scene.subject, processes=self._processes)
        if self._devices > 1:
            flags = f"--xla_force_host_platform_device_count={self._devices}"
            scene.settings["environment"] = {"XLA_FLAGS": flags}


# Damage ---------------------------------------------------------------------------------------------------------------


class Flip(Fault):
    """A byte of a file is another one when the command is run: of the newest `checkpoint`, of the run's `records`, or
    of the `store` that it reads."""

    own, restarts = True, True

    def __init__(self, what: str):
        self.kind, self._what = f"flipped byte: {what}", what

    def arrange(self, scene: Scene) -> None:
        files = sorted(self._files(scene))
        path = scene.draw.choice(files)
        content = bytearray(path.read_bytes())
        at, flipped = scene.draw.randrange(len(content)), 1 << scene.draw.randrange(8)
        content[at] ^= flipped
        path.write_bytes(content)
        scene.told |= {"file": str(path.relative_to(scene.place)), "at": at, "bit": flipped}

    def _files(self, scene: Scene) -> Iterator[Path]:
        run = scene.place / ("run" if (scene.place / "run").exists() else scene.subject.makes)
        if self._what == "store":
            folder = scene.place / "store"
        elif self._what == "checkpoint":
            folder = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
        else:
            folder = None
            yield from (run / name for name in ("metrics.jsonl", "status.json", "config.json"))
        if folder is not None:
            yield from (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


# Stores ---------------------------------------------------------------------------------------------------------------


class StoppedStore(Fault):
    """The store gives no answer for some seconds."""

    kind = "store stopped"
    signals = signal.SIGSTOP, signal.SIGCONT

    def strike(self, scene: Scene) -> None:
        begin, end = self.signals
        scene.told["seconds"] = round(scene.draw.uniform(2, 40), 1)
        scene.bucket.signal(begin)
        time.sleep(scene.told["seconds"])
        scene.bucket.signal(end)


class GoneStore(StoppedStore):
    """Connections to the store break for some seconds."""

    kind = "store gone"
    signals = signal.SIGUSR1, signal.SIGUSR1


class FailingStore(Fault):
    """One of twenty requests is answered with 503, and one of fifty answers is cut off, all the time."""

    kind = "store 503 and cut"

    def arrange(self, scene: Scene) -> None:
        scene.told["server"] = scene.draw.randrange(1000)
        scene.server = ("--unavailable", "0.05", "--cut", "0.02", "--seed", str(scene.told["server"]))

    def mend(self, scene: Scene) -> None:
        scene.bucket.signal(signal.SIGUSR2)


KINDS = {
    fault.kind: fault
    for fault in (
        Kill(), Terminate(), Pause(), FullDisk(), ReadOnlyDisk(), FileLimit(), MemoryLimit(), Clock(), NotANumber(),
        OtherLayout(devices=8), OtherLayout(processes=2), OtherLayout(processes=1), Flip("checkpoint"), Flip("records"),
        Flip("store"), StoppedStore(), GoneStore(), FailingStore(),
    )
}  # fmt: skip
