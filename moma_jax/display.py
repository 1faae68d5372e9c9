"""One line of progress: a bar on a terminal, plain lines elsewhere, nothing where nothing shall be shown."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Where rich would end the process in silence."""
        raise BrokenPipeError(errno.EPIPE, "nobody reads")


def _silence(stream: Any) -> None:
    """Sends what is still written to a stream nowhere; one without a file of its own is left alone."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Display:
    """Prints lines, and below them, on a terminal, a bar that moves; a context manager.

    Attributes:
      live: whether there is a bar, so that progress needs no lines.
    """

    def __init__(self, shown: bool, *, stderr: bool = False):
        """Args: whether to show anything, and whether on stderr."""
        self._console = _Console(stderr=stderr, highlight=False, soft_wrap=True)
        self._shown = shown
        self.live = shown and self._console.is_terminal
        self._bar = self._task = None

    def update(self, done: int, total: int, label: str, text: str) -> None:
        """Moves the bar to `done` of `total`, between a label and what else there is to say."""
        if not self.live:
            return
        with self._unread():
            self._move_bar(done, total, label, text)

    def _move_bar(self, done: int, total: int, label: str, text: str) -> None:
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=self._console)
            self._task = self._bar.add_task(label, total=total, text=text)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total, description=label, text=text)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if not self._shown:
            return
        with self._unread():
            self._console.print(line, markup=False)

    def close(self) -> None:
        """Gives the terminal back."""
        if self._bar is not None:
            with self._unread():
                self._bar.stop()

    @contextlib.contextmanager
    def _unread(self) -> Iterator[None]:
        """Where nobody reads any more (`moma train ... | head`, a closed terminal), work goes on and says so."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self._shown = self.live = False
            self._bar = None
            _silence(self._console.file)
            try:
                print("moma: nobody reads the output any more; going on without it", file=sys.stderr, flush=True)
            except OSError:
                _silence(sys.stderr)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_) -> None:
        self.close()
