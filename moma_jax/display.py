"""One line of progress: a bar on a terminal, plain lines elsewhere, nothing where nothing shall be shown."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Where rich would end the process in silence."""
        raise BrokenPipeError


def _stop_printing() -> None:
    """Nobody reads standard output any more, as in `moma train ... | head`; work goes on, and says so."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print("moma: nobody reads the output any more; going on without it", file=sys.stderr)


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
        try:
            self._console.print(line, markup=False)
        except BrokenPipeError:
            self._shown = self.live = False
            _stop_printing()

    def close(self) -> None:
        """Gives the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_) -> None:
        self.close()
