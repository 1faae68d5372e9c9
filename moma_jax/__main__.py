"""The `moma` command: exit codes, and one line on standard error for what went wrong."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
import time
import traceback
from typing import NoReturn

from moma_jax import commands
from moma_jax.errors import InputError, RunError
from moma_jax.process import is_exhausted, keep_freed_memory

LINGER = 10.0
"""Seconds in which a process that failed may end by itself."""


def main(arguments: list[str] | None = None) -> None:
    """Runs one command and exits: 0 done, 1 the run failed, 2 the input is at fault, 143 stopped by SIGTERM."""
    words = sys.argv[1:] if arguments is None else arguments
    keep_freed_memory()
    sys.unraisablehook = _unraisable
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())  # the same
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a file holds must not end the command that shows it
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        commands.run(words)
    except InputError as error:
        _leave(_complain(error, 2))
    except RunError as error:
        _leave(_complain(error, 1))
    except KeyboardInterrupt:
        _leave(_complain("interrupted", 130))
    except BrokenPipeError:  # `moma cost ... | head` is no failure of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if _out_of_memory(error):
            cause = " ".join(str(error).split())[:200] or "allocating"
            _leave(_complain(f"out of memory ({cause}); give it more, or smaller batches, and run it again", 1))
        traceback.print_exc()
        _leave(1)


def program() -> None:
    """`main` as a process of its own. Where that failed, it ends although a library's threads still wait for something:
    those of Orbax do, after a save that failed."""
    try:
        main()
    except SystemExit as left:
        if left.code:
            with contextlib.suppress(RuntimeError):  # no memory for it
                threading.Thread(target=_end, args=(left.code,), name="end", daemon=True).start()
        raise


def _end(code: int) -> None:
    time.sleep(LINGER)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _leave(code: int) -> NoReturn:
    """Ends the process; one of several does not wait for the others, who may wait for it."""
    if "moma_jax.hosts" in sys.modules:  # not needed by commands that need no JAX
        sys.modules["moma_jax.hosts"].leave(code)
    sys.exit(code)


def _out_of_memory(error: Exception) -> bool:
    """Whether Python, the system or XLA had no memory left."""
    return isinstance(error, MemoryError) or str(error) == "can't start new thread" or is_exhausted(error)


def _unraisable(unraisable) -> None:
    """As usual, but for what reads and writes say that Orbax stopped waiting for when one of them failed."""
    if not str(unraisable.exc_value).startswith(("Event loop is closed", "Encountered error while reading array")):
        sys.__unraisablehook__(unraisable)


def _complain(message: object, code: int) -> int:
    print(f"moma: {' '.join(str(message).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    program()
