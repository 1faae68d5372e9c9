"""The two ways a command fails: the user can mend it (exit 2), or the run went wrong (exit 1)."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input: one line that names the thing and the remedy. The command exits with 2, nothing half-written."""


class RunError(RuntimeError):
    """A run that failed after it began, such as a loss that is not a number. The command exits with 1."""


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts the file, or another place that bad input came from, before what an InputError says."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def require(condition: bool, message: str) -> None:
    """Raises InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)
