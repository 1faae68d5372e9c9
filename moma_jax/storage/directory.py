"""A directory on a local disk or in an object store, reached through TensorStore's key-value drivers.

Paths are local, `gs://bucket/...`, `s3://bucket/...` or `memory://...` (this process only; for tests). Writes of one
file are atomic on all of them. Local disks can rename a directory as well, object stores cannot.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from typing import Any

import tensorstore as ts

from moma_jax.addresses import require_no_credentials
from moma_jax.errors import InputError

# Contexts of readers inherit from this one, so that every part of a process sees the same memory:// files.
CONTEXT = ts.Context({"memory_key_value_store": {}})


class Directory:
    """One directory. `name` arguments are relative paths in it, made by this package and never read from data.

    Attributes:
      path: as the user wrote it.
      local: the absolute path on a local disk, None elsewhere.
    """

    def __init__(self, path: str):
        """Names a directory; raises InputError for an unknown scheme, a bad bucket or credentials. Touches nothing."""
        self.path = str(path)
        require_no_credentials(self.path)
        scheme, separator, rest = self.path.partition("://")
        self.local = None
        if not separator or scheme == "file":
            self.local = os.path.abspath(os.path.expanduser(rest if separator else self.path))
            self._base = {"driver": "file", "path": self.local.rstrip("/") + "/"}
        elif scheme in ("gs", "s3"):
            bucket, _, prefix = rest.partition("/")
            prefix = prefix.strip("/")
            driver = {"gs": "gcs", "s3": "s3"}[scheme]
            self._base = {"driver": driver, "bucket": bucket, "path": prefix + "/" if prefix else ""}
        elif scheme == "memory":
            self._base = {"driver": "memory", "path": rest.strip("/") + "/"}
        else:
            raise InputError(f"{path}: unknown scheme {scheme}://; use a local path, gs:// or s3://")
        try:
            self._kv = ts.KvStore.open(self._base, context=CONTEXT).result()
        except ValueError as error:
            raise InputError(f"{path}: {first_line(error)}") from error

    def kvstore(self, name: str) -> dict[str, Any]:
        """TensorStore's JSON for the subdirectory `name`."""
        return {**self._base, "path": f"{self._base['path']}{name}/"}

    def read(self, name: str) -> bytes | None:
        """The content of a file, None where there is none; raises InputError where it cannot be read."""
        return self.read_generation(name)[0]

    def write(self, name: str, content: bytes) -> None:
        """Writes a file in one atomic step; raises InputError where that is not allowed."""
        try:
            self._kv.write(name, content).result()
        except ValueError as error:
            raise InputError(f"{self.path}/{name}: {first_line(error)}") from error

    def read_generation(self, name: str) -> tuple[bytes | None, bytes]:
        """The content of a file, None where there is none, and what the store calls this state of it; as `read`."""
        try:
            result = self._kv.read(name).result()
        except ValueError as error:
            raise InputError(f"{self.path}/{name}: {first_line(error)}") from error
        return bytes(result.value) if result.state == "value" else None, result.stamp.generation

    def write_if(self, name: str, content: bytes | None, generation: bytes) -> bytes:
        """Writes a file (None: deletes it) where its state is still that of `read_generation`; b"" where it is not.

        Raises ValueError where the store cannot be reached, or refuses.
        """
        return self._kv.write(name, content, if_equal=generation).result().generation

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file, None where there is no file; raises InputError where it is damaged."""
        content = self.read(name)
        if content is None:
            return None
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}/{name}: not JSON ({error}); restore the file, it is damaged") from error
        if not isinstance(value, dict):
            raise InputError(f"{self.path}/{name}: not a JSON object; restore the file, it is damaged")
        return value

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file in one atomic step, keys sorted, so that equal values are equal bytes."""
        self.write(name, (json.dumps(value, sort_keys=True, indent=1) + "\n").encode())

    def clear(self, name: str) -> None:
        """Deletes the subdirectory `name` and everything in it."""
        if self.local is not None:
            shutil.rmtree(os.path.join(self.local, name), ignore_errors=True)
        else:
            self._kv.delete_range(ts.KvStore.KeyRange(f"{name}/", f"{name}0")).result()  # "0" follows "/"

    def stage(self, name: str) -> Staged:
        """Begins the subdirectory `name`, which does not exist yet; it shows when `Staged.publish` is called."""
        return Staged(self, name)


class Staged:
    """A subdirectory that is being written.

    On a local disk it has a temporary name until it is published by a rename. In an object store it is written in
    place and counts as published by its last file, which is therefore written last. What an earlier attempt left is
    deleted first.

    Attributes:
      name: where to write, a subdirectory of the directory.
    """

    def __init__(self, directory: Directory, name: str):
        self._directory, self._final, self._lock = directory, name, None
        if directory.local is None:
            self.name = name
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
        """Writes the last file, JSON, and makes the whole appear under its name in one step."""
        self._directory.write_json(f"{self.name}/{last_name}", value)
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
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _local(self, name: str) -> str:
        return os.path.join(self._directory.local, name)


def require_new_file(option: str, path: str) -> None:
    """InputError, naming the option, where a local file is there already or has no folder."""
    if os.path.lexists(path):
        raise InputError(f"{option}: {path} is there already; choose a new file")
    if not os.path.isdir(folder := os.path.dirname(os.path.abspath(path))):
        raise InputError(f"{option}: {path} cannot be written: there is no folder {folder}")


def write_file(path: str, content: bytes) -> None:
    """Writes a local file in one atomic step; raises InputError where that is not allowed."""
    folder, name = os.path.split(os.path.abspath(path))
    Directory(folder).write(name, content)


def first_line(error: Exception) -> str:
    """The first line of an exception without the source locations that TensorStore appends."""
    return str(error).partition("\n")[0].partition(" [")[0]
