"""Whether a directory can be used at all, before an hour of work shows that it cannot."""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
import threading
from collections.abc import Callable

from moma_jax.errors import InputError
from moma_jax.storage.directory import Directory, first_line

SECONDS = 60.0
"""How long a store has for each way."""
CONTENT = b"moma asks whether it may write here; this file can be deleted\n"


def require_usable(path: str, *, checkpoints: bool, seconds: float = SECONDS) -> None:
    """Writes, reads, lists and deletes a small file in an object store, in the ways in which it will be used.

    Args:
      path: a directory; on a local disk nothing is done.
      checkpoints: whether Orbax will write there, too.

    Raises:
      InputError: an extra, a bucket, credentials, a permission or an answer is missing; the line says what to do.
    """
    directory = Directory(path)
    if directory.local is not None:
        return
    scheme = path.partition("://")[0]
    if checkpoints:
        _require_orbax(path, scheme)
    _within(seconds, directory, lambda: _by_tensorstore(directory))
    if checkpoints and scheme == "gs":
        _within(seconds, directory, lambda: _by_epath(path))


def _require_orbax(path: str, scheme: str) -> None:
    if scheme == "s3":
        raise InputError(
            f"{path}: checkpoints cannot be written to s3://, as Orbax takes that for a folder of the local disk; name "
            "a local directory or gs:// (stores of tokens may lie on s3://)"
        )
    if scheme == "gs" and importlib.util.find_spec("gcsfs") is None:
        raise InputError(f'{path}: checkpoints on gs:// need gcsfs; pip install "moma_jax[gcs]"')


def _by_tensorstore(directory: Directory) -> None:
    name = f"probe-{secrets.token_hex(4)}"
    directory.write(name, CONTENT)
    if directory.read(name) != CONTENT:
        raise InputError(f"{directory.path}: what was written is not there when it is read; is this a store?")
    directory.names("probe-")  # whether that is allowed: a listing may be seconds old
    directory.delete(name)


def _by_epath(path: str) -> None:
    from etils import epath  # what Orbax writes with

    file = epath.Path(path) / f"probe-{secrets.token_hex(4)}"
    file.write_bytes(CONTENT)
    if file.read_bytes() != CONTENT:
        raise InputError(f"{path}: what gcsfs wrote is not there when it is read; is this a store?")
    with contextlib.suppress(FileNotFoundError):  # a listing that is old has no such folder
        list(file.parent.iterdir())
    file.unlink()


def _within(seconds: float, directory: Directory, work: Callable[[], None]) -> None:
    """Does the work; InputError where it fails, or is not done in time (its thread is left behind)."""
    failures: list[Exception] = []

    def attempt() -> None:
        try:
            work()
        except Exception as error:  # libraries raise what they like, in several layers
            failures.append(error)

    thread = threading.Thread(target=attempt, name="probe", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise InputError(
            f"{directory.path}: {directory.endpoint} gave no answer in {seconds:.0f} s; is the address right, and does "
            "the network reach it? moma doctor"
        )
    if failures:
        raise InputError(_remedy(directory, failures[0])) from failures[0]


REMEDIES = (
    (("404", "NOT_FOUND", "NoSuchBucket", "notFound"), "there is no such bucket; make it, or name another"),
    (("401", "UNAUTHENTICATED", "InvalidAccessKeyId", "SignatureDoesNotMatch", "credentials"),
     "no valid credentials; for gs:// gcloud auth application-default login, for s3:// AWS_ACCESS_KEY_ID or a profile"),
    (("403", "PERMISSION_DENIED", "AccessDenied", "Forbidden"),
     "these credentials may not write, read, list and delete here; docs/storage.md names the least permissions"),
    (("UNAVAILABLE", "Connect", "resolve", "CURL", "refused"), "cannot be reached; is the address right?"),
)  # fmt: skip
"""What errors of stores have in them, in the order of looking, and what helps."""


def _remedy(directory: Directory, error: Exception) -> str:
    words = first_line(error)
    found = (remedy for signs, remedy in REMEDIES if any(sign.lower() in str(error).lower() for sign in signs))
    return f"{directory.path}: {next(found, 'cannot be used')} ({directory.endpoint}: {type(error).__name__} {words})"
