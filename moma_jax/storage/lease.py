"""One writer of a directory on an object store, which knows no locks: a lease, an object in the directory.

Whoever writes the object on the condition that it is still as it was read has the lease. It is renewed while the holder
lives; where it was not for STALE seconds, another takes it over. Clocks of hosts need not agree: each looks twice, by
its own. A holder that was stopped for long, or cut off, finds out before it writes again.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import sys
import threading
import time
from typing import Any, NamedTuple

from moma_jax.errors import InputError
from moma_jax.storage.directory import Directory

FILE = "lease.json"
BEAT, STALE = 5.0, 20.0
"""Seconds between renewals, and without one until the holder is taken for dead."""


class LeaseLost(InputError):
    """Another process writes here now; this one may write nothing more."""


class Seen(NamedTuple):
    """The lease at one moment: its generation in the store (also where there is none), and what it says."""

    generation: bytes
    holder: dict[str, Any] | None

    @property
    def who(self) -> str:
        """The holder in words."""
        return "process {pid} of {host}".format_map({"pid": "?", "host": "an unknown host"} | (self.holder or {}))


class Lease:
    """A directory's lease, for one process; `take` it, ask `require` before every write, `release` it."""

    def __init__(self, directory: Directory, *, beat: float = BEAT, stale: float = STALE):
        self._directory, self._beat, self._stale = directory, beat, stale
        self._me = {"id": secrets.token_hex(8), "host": platform.node(), "pid": os.getpid()}
        self._generation, self._beats = b"", 0
        self._writing, self._stopped = threading.Lock(), threading.Event()

    def take(self) -> None:
        """Takes the lease; where somebody has it, waits for STALE seconds whether that one lives.

        Raises:
          InputError: it does, and is named; or the store cannot be written.
        """
        seen = self._look()
        if seen.holder is not None:
            words = f"{self._directory.path}: {seen.who} has been writing here; waiting {self._stale:.0f} s for a sign"
            print(f"moma: {words} of it", file=sys.stderr)
            seen = self._wait(seen)
        if not self._put(seen.generation):
            raise self._refused(self._look())
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def _wait(self, seen: Seen) -> Seen:
        """The lease once it is given back or stale; InputError where it is renewed."""
        end = time.monotonic() + self._stale
        while time.monotonic() < end:
            time.sleep(min(self._beat / 5, 1.0))
            now = self._look()
            if now.holder is None:
                return now
            if now.generation != seen.generation:
                raise self._refused(now)
        return seen

    def _refused(self, seen: Seen) -> InputError:
        return InputError(f"{self._directory.path}: {seen.who} is writing here; stop it, or use another directory")

    def require(self) -> None:
        """Raises LeaseLost where this process does not have the lease any more."""
        with self._writing:
            seen = self._look()  # which may be of a renewal whose answer never came
            self._generation = seen.generation if self._generation and self._is_mine(seen) else b""
            if self._generation:
                return
        happened = f"{seen.who} took over, as this process gave no sign of life for {self._stale:.0f} s"
        happened = f"its {FILE} is gone" if seen.holder is None else happened
        raise LeaseLost(f"{self._directory.path}: {happened}; no more records, status or checkpoints are written")

    def release(self) -> None:
        """Gives the lease back, if this process still has it."""
        self._stopped.set()
        with self._writing, contextlib.suppress(ValueError):
            if self._generation and self._is_mine(seen := self._look()):
                self._directory.write_if(FILE, None, seen.generation)
            self._generation = b""

    def _renew(self) -> None:
        """Writes the lease anew, beat by beat, until it is lost or given back; a store that fails is tried again."""
        while not self._stopped.wait(self._beat):
            with self._writing, contextlib.suppress(ValueError):
                if not self._generation or not self._put(self._generation):
                    self._generation = b""
                    return

    def _look(self) -> Seen:
        content, generation = self._directory.read_generation(FILE)
        try:
            holder = None if content is None else json.loads(content)
        except ValueError:
            holder = {}
        return Seen(generation, holder if isinstance(holder, dict | None) else {})

    def _is_mine(self, seen: Seen) -> bool:
        return (seen.holder or {}).get("id") == self._me["id"]

    def _put(self, generation: bytes) -> bool:
        """Writes the lease where its generation is this one; returns whether it was."""
        self._beats += 1  # so that every renewal is another content, and another generation
        content = json.dumps(self._me | {"beats": self._beats}, sort_keys=True).encode()
        if not (after := self._directory.write_if(FILE, content, generation)):
            seen = self._look()  # an earlier write of ours may have come through although it seemed to fail
            after = seen.generation if self._is_mine(seen) else b""
        self._generation = after or self._generation
        return bool(after)
