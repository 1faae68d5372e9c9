"""What every test shares: how programs are compiled and kept, where helpers are, how many processes run the tests.

Everything that JAX reads is set through the environment, so the processes that tests start compile as the tests do and
share their cache. One device is visible; a test of several starts a process that sees eight (helpers/processes.py).
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moma_jax" / "tests"
CACHE_BYTES = 2 << 30
PATHS = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "docs" / "results")]

assert "jax" not in sys.modules, "JAX was imported before its settings were made"
os.environ["JAX_PLATFORMS"] = "cpu"
# Shapes are tiny: compiling takes far longer than running. Further flags would save little, and equal arithmetic of
# different programs, on which some tests insist, would end there.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
os.environ.pop("XLA_FLAGS", None)
# Each program is compiled once, for all workers, subprocesses and later runs. JAX writes no entry twice; one that is
# read while it is being written, or that a killed process left half-written, is refused with a warning and compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*PATHS, *filter(None, inherited)]))


def pytest_configure(config):
    """The process that runs tests, not the one that hands them out, shares what it traced between them."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses"):
        from traced import share

        share()


def pytest_runtest_teardown(item, nextitem):
    """A process that runs hundreds of modules does not keep every program it ever compiled."""
    if nextitem is not None and nextitem.path != item.path:
        from traced import forget_excess

        forget_excess()


def pytest_xdist_auto_num_workers(config):
    """A worker per CPU this process may use; a single file runs right here, where -s and a debugger work."""
    if len(config.args) == 1 and ".py" in config.args[0]:
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def pytest_sessionstart(session):
    """Before any worker starts, forgets the oldest compiled programs where they have become too many."""
    if hasattr(session.config, "workerinput"):
        return
    folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    entries = sorted((entry.stat().st_mtime, entry.stat().st_size, entry) for entry in folder.glob("*-cache"))
    excess = sum(size for _, size, _ in entries) - CACHE_BYTES
    for _, size, entry in entries:
        if excess <= 0:
            break
        entry.unlink(missing_ok=True)
        excess -= size
