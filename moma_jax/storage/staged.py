"""A subdirectory that is written by one process, and shows whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from typing import Any

from moma_jax.errors import InputError
from moma_jax.storage.contents import write_contents
from moma_jax.storage.directory import Directory, json_bytes
from moma_jax.storage.lease import Lease

LEASES = "leases"
"""Where the leases of subdirectories lie on an object store; a lease in the subdirectory itself would be cleared."""


class Staged:
    """A subdirectory that is being written.

    On a local disk it has a temporary name until it is published by a rename. In an object store it is written in
    place and counts as published by its last file, which is therefore written last. What an earlier attempt left is
    deleted first. Of two processes that write the same one, the second is refused.

    Attributes:
      name: where to write, a subdirectory of the directory.
    """

    _lease: Lease | None = None

    def __init__(self, directory: Directory, name: str):
        self._directory, self._final, self._lock = directory, name, None
        if directory.local is None:
            self.name = name
            self._lease = Lease(Directory(directory.join(f"{LEASES}/{name}")))
            self._lease.take()
            directory.clear(name)
            return
        parent, _, last = name.rpartition("/")
        self.name = f"{parent}/.writing-{last}".lstrip("/")
        path = self._local(self.name)
        try:
            os.makedirs(path, exist_ok=True)
            self._lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        try:  # two processes writing the same part would mix their files
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise InputError(f"{self._local(name)}: another process is writing it; wait for it or stop it") from error
        for entry in os.scandir(path):
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)

    def publish(self, last_name: str, value: Any) -> None:
        """Lists what was written, writes the last file, JSON, and makes the whole appear under its name in one step."""
        content = json_bytes(value)
        write_contents(Directory(self._directory.join(self.name)), coming={last_name: content})
        if self._lease is not None:
            self._lease.require()
        self._directory.write(f"{self.name}/{last_name}", content)
        if self._directory.local is not None:
            try:
                os.rename(self._local(self.name), self._local(self._final))
            except OSError:
                if not os.path.exists(self._local(f"{self._final}/{last_name}")):
                    raise
                self._directory.clear(self.name)  # another process published the same bytes meanwhile
        self.close()

    def close(self) -> None:
        """Lets go of an unfinished subdirectory; the next attempt deletes its files."""
        if self._lease is not None:
            self._lease.release()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _local(self, name: str) -> str:
        return os.path.join(self._directory.local, name)
