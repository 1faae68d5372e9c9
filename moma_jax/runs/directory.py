"""A run's directory: where its files are, written whole or not at all, by one process at a time.

Of the processes of one run all may read, and process 0 writes; what the others write is dropped.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import IO

from moma_jax import hosts
from moma_jax.addresses import without_credentials
from moma_jax.errors import InputError
from moma_jax.storage.directory import Directory
from moma_jax.storage.lease import Lease

PACKAGES = ("moma_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy")


SECONDS_TO_LOCK = (0.0, 0.1, 0.4)
"""Waits before each attempt: somebody who only looks whether a directory is locked holds it for a moment."""


HOLDER = re.compile(rb"process \d+ of [\w.-]+")
"""What a lock's file says."""


def _own(path: str, flags: int) -> int:
    """Opens a lock's file, never one that a link of somebody else's stands for."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _taken(file: IO, wait: float) -> bool:
    """Whether the file could be locked after some seconds; then it says by whom."""
    time.sleep(wait)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    with contextlib.suppress(OSError):  # the lock holds on a full disk as well
        file.truncate(0)
        file.write(f"process {os.getpid()} of {platform.node()}".encode())
    return True


class RunDir(Directory):
    """A run's directory: files by relative name, each written whole or not at all."""

    _lease: Lease | None = None

    def require_writer(self) -> None:
        """Raises LeaseLost where another process became the writer of a directory that this one had `locked`."""
        if self._lease is not None:
            self._lease.require()

    def write(self, name: str, content: bytes) -> None:
        """Writes a file in one atomic step, on process 0; raises InputError where that is not allowed."""
        if hosts.is_first():
            self.require_writer()
            super().write(name, content)

    def delete(self, name: str) -> None:
        """Removes a file, on process 0."""
        if hosts.is_first():
            self.require_writer()
            super().delete(name)

    def clear(self, name: str) -> None:
        """Deletes a subdirectory with everything in it."""
        self.require_writer()
        super().clear(name)

    @contextlib.contextmanager
    def locked(self):
        """Holds the directory for this run, on process 0; InputError where another run trains in it.

        A local lock ends with the process, however it ends; on an object store a lease does, after some seconds
        (`storage.lease`). A local directory that is new here is removed again where an InputError shows that no run can
        begin in it; never one in which a run began.
        """
        if not hosts.is_first():
            yield self
            return
        if self.local is None:
            with self._leased():
                yield self
            return
        new = not os.path.exists(self.local)
        try:
            os.makedirs(self.local, exist_ok=True)
            file = open(self.join(".lock"), "ab+", buffering=0, opener=_own)  # noqa: SIM115
        except OSError as error:
            raise InputError(f"run.dir: cannot write to {self.path} ({error.strerror})") from error
        with file:
            if not any(map(functools.partial(_taken, file), SECONDS_TO_LOCK)):
                file.seek(0)
                told = HOLDER.fullmatch(file.read(300))
                holder = told[0].decode() if told else "another process"
                raise InputError(f"run.dir: {self.path}: {holder} is writing here; stop it, or use another directory")
            try:
                yield self
            except InputError:
                if new and self.read("status.json") is None:
                    self._remove_if_empty()
                raise
            finally:
                with contextlib.suppress(OSError):
                    file.truncate(0)

    @contextlib.contextmanager
    def _leased(self):
        lease = Lease(self)
        lease.take()
        self._lease = lease
        try:
            yield
        finally:
            lease.release()
            self._lease = None

    def _remove_if_empty(self) -> None:
        """Removes what is written before a run begins, and the directory if nothing else is in it."""
        for name in (".lock", "config.json"):
            Path(self.join(name)).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is in it
            for path in (self.join("checkpoints"), self.local):
                if os.path.exists(path):
                    os.rmdir(path)


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of the packages that a run's numbers depend on."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@functools.cache
def processor() -> str:
    """This machine's cores and their name, such as "2 x AMD EPYC"."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return f"{os.cpu_count()} x {names[0]}"
    return f"{os.cpu_count()} x {platform.processor() or platform.machine()}"


def command() -> str:
    """The command line of this process; `moma` for this package's own, wherever it is installed; no credentials."""
    program = Path(sys.argv[0])
    own = program.name == "moma" or program.parts[-2:] == ("moma_jax", "__main__.py")
    return without_credentials(shlex.join(["moma" if own else sys.argv[0], *sys.argv[1:]]))


@functools.cache
def commit() -> str | None:
    """Git commit of this package's source as it was at the first call; None outside git.

    "-dirty" is added where tracked files differ from it.
    """
    home = str(Path(__file__).resolve().parents[1])

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", home, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # installed inside another project's tree: not its commit
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
