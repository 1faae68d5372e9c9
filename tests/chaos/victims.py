"""Processes that faults are injected into: forks of this one, which has everything imported, or fresh interpreters.

A fork saves the seconds of importing, which are most of a tiny run; it is the command line's own `main`, in a session
and a directory of its own, with its own standard streams and exit code.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

IMPORTED = (
    "moma_jax.__main__", "moma_jax.commands.codec", "moma_jax.commands.generate", "moma_jax.commands.prepare",
    "moma_jax.commands.routers", "moma_jax.commands.study", "moma_jax.commands.train", "moma_jax.data.prepare",
    "moma_jax.generation", "moma_jax.studies.running", "moma_jax.training.codec.stage", "moma_jax.training.pretrain",
)  # fmt: skip
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
LOOK = 0.003
"""Seconds between two looks at a process."""


def import_all() -> None:
    """Imports what the commands need, once for all forks; no thread may have begun by then."""
    for name in IMPORTED:
        importlib.import_module(name)
    warnings.filterwarnings("ignore", message="os.fork")  # JAX has not started yet, so there is nothing to break
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    others = [name for name in names[1:] if not name.startswith("jemalloc_bg")]  # jemalloc knows what to do in a fork
    if others:
        raise SystemExit(f"threads run after importing, so forks would be unsafe: {others}")


class Victim:
    """A process with its output files; `code` is its exit code, negative for a signal, None while it lives."""

    def __init__(self, pid: int, out: Path, err: Path, process: subprocess.Popen | None = None):
        self.pid, self.out, self.err, self.code = pid, out, err, None
        self._process = process

    def alive(self) -> bool:
        """Whether it has not ended; its exit code is kept once it has."""
        if self.code is None and self._process is not None:
            self.code = self._process.poll()
        elif self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def signal(self, number: int) -> None:
        """Sends a signal, if it lives."""
        if self.alive():
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        end = time.monotonic() + seconds
        while self.alive() and time.monotonic() < end:
            time.sleep(LOOK)
        return not self.alive()

    def end(self) -> None:
        """Kills it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(10)

    def says(self) -> str:
        """Standard output so far."""
        return self.out.read_text(errors="replace")

    def complaint(self) -> str:
        """Standard error so far."""
        return self.err.read_text(errors="replace")


def start(
    words: Sequence[str], place: Path, log: Path, environment: Mapping[str, str] = {}, fresh: Sequence[str] = ()
) -> Victim:
    """`moma WORDS` in the directory `place`; output goes to LOG.out and LOG.err. `fresh`: options of a new Python, such
    as ("-m", "moma_jax"), in place of a fork."""
    if fresh:
        return spawn([sys.executable, *fresh, *words], place, log, environment)

    def work() -> None:
        from moma_jax.__main__ import program

        sys.argv = ["moma", *words]
        program()

    return fork(work, place, log, environment)


def spawn(words: Sequence[str], place: Path, log: Path, environment: Mapping[str, str] = {}) -> Victim:
    """Any program."""
    out, err = _files(log)
    with out.open("w") as to, err.open("w") as complaints:
        files = {"stdin": subprocess.DEVNULL, "stdout": to, "stderr": complaints}
        environment = os.environ | environment
        process = subprocess.Popen(list(words), cwd=place, env=environment, start_new_session=True, **files)
    return Victim(process.pid, out, err, process)


def fork(work: Callable[[], None], place: Path, log: Path, environment: Mapping[str, str] = {}) -> Victim:
    """A function in a copy of this process."""
    out, err = _files(log)
    if pid := os.fork():
        return Victim(pid, out, err)
    code = 1
    try:
        _settle(place, out, err, environment)
        work()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:  # as an interpreter ends; nothing of the campaign's own stack may run here
        with contextlib.suppress(BaseException):
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _settle(place: Path, out: Path, err: Path, environment: Mapping[str, str]) -> None:
    """Makes a fork a process of its own."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody goes on in a place that a later fault gets
    os.setsid()
    os.chdir(place)
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for path, number, mode in ((os.devnull, 0, os.O_RDONLY), (out, 1, os.O_WRONLY), (err, 2, os.O_WRONLY)):
        os.dup2(os.open(path, mode), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))


def _files(log: Path) -> tuple[Path, Path]:
    found = log.with_suffix(".out"), log.with_suffix(".err")
    for path in found:
        path.write_text("")
    return found
