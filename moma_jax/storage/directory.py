"""A directory on a local disk or in an object store, reached through TensorStore's key-value drivers.

Paths are local, `gs://bucket/...`, `s3://bucket/...` or `memory://...` (this process only; for tests). Writes of one
file are atomic on all of them. Local disks can rename a directory as well, object stores cannot.

This is the one place that says which library reads what: TensorStore all files but those of checkpoints, which Orbax
writes, to local disks and `gs://` alone (runs/checkpoint.py).
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from typing import Any

import tensorstore as ts

from moma_jax.addresses import require_no_credentials
from moma_jax.errors import InputError

# Contexts of readers inherit from this one, so that every part of a process sees the same memory:// files.
CONTEXT = ts.Context({"memory_key_value_store": {}})
ANSWER_SECONDS = 120
"""How long an object store may say nothing about one file. TensorStore tries again meanwhile."""
LISTED, LISTING_SECONDS = ".listed-", 60
"""What marks of `await_listing` are called, which are no files of anybody's; how long one is waited for."""
PIECE = 64 << 20
"""Bytes of a large file that are held at a time."""


class Directory:
    """One directory. `name` arguments are relative paths in it, made by this package and never read from data.

    Attributes:
      path: as the user wrote it.
      local: the absolute path on a local disk, None elsewhere.
    """

    def __init__(self, path: str):
        """Names a directory; raises InputError for an unknown scheme, a bad bucket or credentials. Touches nothing."""
        self.path = str(path)
        self._written: set[str] = set()
        require_no_credentials(self.path)
        scheme, separator, rest = self.path.partition("://")
        self.local = None
        if not separator or scheme == "file":
            self.local = os.path.abspath(os.path.expanduser(rest if separator else self.path))
            self._base = {"driver": "file", "path": self.local.rstrip("/") + "/"}
        elif scheme in ("gs", "s3"):
            bucket, _, prefix = rest.partition("/")
            prefix = prefix.strip("/")
            self._base = {"bucket": bucket, "path": prefix + "/" if prefix else "", **_driver(scheme)}
        elif scheme == "memory":
            self._base = {"driver": "memory", "path": rest.strip("/") + "/"}
        else:
            raise InputError(f"{path}: unknown scheme {scheme}://; use a local path, gs:// or s3://")
        try:
            self._kv = ts.KvStore.open(self._base, context=CONTEXT).result()
        except ValueError as error:
            raise InputError(f"{path}: {first_line(error)}") from error

    @property
    def endpoint(self) -> str:
        """The address of the object store, in words."""
        google = os.environ.get("TENSORSTORE_GCS_HTTP_URL") if self._base["driver"] == "gcs" else None
        return self._base.get("endpoint") or google or f"{self.path.partition('://')[0]}://"

    def kvstore(self, name: str) -> dict[str, Any]:
        """TensorStore's JSON for the subdirectory `name`."""
        return {**self._base, "path": f"{self._base['path']}{name}/"}

    def join(self, name: str) -> str:
        """The full path or URL of a file."""
        return f"{(self.local or self.path).rstrip('/')}/{name}"

    def names(self, prefix: str) -> list[str]:
        """Names of the files that begin with `prefix`, sorted; raises InputError where they cannot be listed.

        A listing of a store may be seconds old: what was written through this object is among them nevertheless.
        """
        written = {name for name in self._written if name.startswith(prefix)}
        return sorted(name for name in self._listed(prefix) | written if not name.startswith(LISTED))

    def _listed(self, prefix: str) -> set[str]:
        keys = self._answer(prefix, self._kv.list(ts.KvStore.KeyRange(prefix, prefix + "\x7f")))
        return {key.decode() for key in keys}

    def await_listing(self) -> None:
        """Returns once listings show all that anybody wrote before; raises InputError where they do not, in a minute.

        One that shows the object that was written last shows the earlier ones. Those of disks, and of today's GCS and
        S3, always do.
        """
        if self.local is not None:
            return
        name, end = f"{LISTED}{secrets.token_hex(4)}", time.monotonic() + LISTING_SECONDS
        self._answer(name, self._kv.write(name, b"moma asks whether listings show this; this file can be deleted\n"))
        try:
            while name not in self._listed(name):
                if time.monotonic() > end:
                    raise InputError(f"{self.path}: listings of {self.endpoint} are over {LISTING_SECONDS} s old")
                time.sleep(0.5)
        finally:
            self._answer(name, self._kv.write(name, None))

    def read(self, name: str) -> bytes | None:
        """The content of a file, None where there is none; raises InputError where it cannot be read."""
        return self.read_generation(name)[0]

    def read_generation(self, name: str) -> tuple[bytes | None, bytes]:
        """The content of a file, None where there is none, and what the store calls this state of it; as `read`."""
        result = self._answer(name, self._kv.read(name))
        return bytes(result.value) if result.state == "value" else None, result.stamp.generation

    def pieces(self, name: str) -> Iterator[bytes]:
        """The content of a file, PIECE bytes at a time; nothing where there is none; raises InputError as `read`."""
        if self.local is not None:
            try:
                with open(self.join(name), "rb") as file:
                    yield from iter(functools.partial(file.read, PIECE), b"")
            except FileNotFoundError:
                pass
            except OSError as error:
                raise InputError(f"{self.path}/{name}: cannot be read: {error.strerror}") from error
            return
        start, piece = 0, b"?" * PIECE
        while len(piece) == PIECE:
            try:
                result = self._answer(name, self._kv.read(name, byte_range=slice(start, start + PIECE)))
            except InputError as error:
                if "OUT_OF_RANGE" not in str(error.__cause__):
                    raise
                result = self._answer(name, self._kv.read(name, byte_range=slice(start, None)))  # less than a piece
            piece = bytes(result.value)
            start += len(piece)
            yield piece

    def write(self, name: str, content: bytes) -> None:
        """Writes a file in one atomic step; raises InputError where that is not allowed."""
        self._answer(name, self._kv.write(name, content))
        if self.local is None:
            self._written.add(name)

    def write_if(self, name: str, content: bytes | None, generation: bytes) -> bytes:
        """Writes a file (None: deletes it) where its state is still that of `read_generation`; b"" where it is not.

        Raises InputError where the store cannot be reached, or refuses.
        """
        return self._answer(name, self._kv.write(name, content, if_equal=generation)).generation

    def delete(self, name: str) -> None:
        """Removes a file, if there is one; raises InputError where that is not allowed."""
        self._written.discard(name)
        self._answer(name, self._kv.write(name, None))

    def _answer(self, name: str, future: ts.Future) -> Any:
        """What the store says about a file; InputError where it refuses, or says nothing for ANSWER_SECONDS."""
        try:
            return future.result(timeout=None if self.local is not None else ANSWER_SECONDS)
        except TimeoutError as error:
            raise InputError(
                f"{self.path}/{name}: no answer from {self.endpoint} in {ANSWER_SECONDS} s; is the address right, and "
                "are there credentials? moma doctor"
            ) from error
        except (ValueError, LookupError, RuntimeError, OSError) as error:  # which depends on the store's status code
            raise InputError(f"{self.path}/{name}: {first_line(error)}") from error

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
        self.write(name, json_bytes(value))

    def clear(self, name: str) -> None:
        """Deletes the subdirectory `name` and everything in it."""
        if self.local is not None:
            shutil.rmtree(os.path.join(self.local, name), ignore_errors=True)
        else:
            self._written -= {each for each in self._written if each.startswith(f"{name}/")}
            self._answer(name, self._kv.delete_range(ts.KvStore.KeyRange(f"{name}/", f"{name}0")))  # "0" follows "/"


def _driver(scheme: str) -> dict[str, str]:
    """TensorStore's driver of an object store, at the address that the cloud's own tools would take.

    Google's is set by TensorStore from TENSORSTORE_GCS_HTTP_URL. Amazon's AWS_ENDPOINT_URL it does not know.
    """
    if scheme == "gs":
        return {"driver": "gcs"}
    if (url := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")) is None:
        return {"driver": "s3"}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return {"driver": "s3", "endpoint": url.rstrip("/"), "aws_region": region}


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


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def first_line(error: Exception) -> str:
    """The first line of an exception without the source locations that TensorStore appends."""
    return str(error).partition("\n")[0].partition(" [")[0]
