"""One line of progress: a bar on a terminal, plain lines elsewhere, nothing where nothing shall be shown."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Display:
    """Prints lines, and below them, on a terminal, a bar that moves; a context manager.

    Attributes:
      live: whether there is a bar, so that progress needs no lines.
    """

    def __init__(self, shown: bool, *, stderr: bool = False):
        """Args: whether to show anything, and whether on stderr."""
        self._console = Console(stderr=stderr, highlight=False, soft_wrap=True)
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
        if self._shown:
            self._console.print(line, markup=False)

    def close(self) -> None:
        """Gives the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_) -> None:
        self.close()
