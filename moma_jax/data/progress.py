"""How far `moma prepare` is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_SECONDS = 10.0
"""Seconds between plain lines."""


class Progress:
    """Counts units of work, documents and broken documents of one stage after another; a context manager."""

    def __init__(self, show: bool):
        """Args: whether to show anything; it goes to stderr."""
        self._console = Console(stderr=True)
        self._show = show
        self._bar = None
        if show and self._console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[counts]}"),
                TimeRemainingColumn(),
            )
            self._bar = RichProgress(*columns, console=self._console)
        self._stage, self._total, self._done = "", 0, 0
        self._documents = self._broken = 0
        self._task = None
        self._began = self._printed = time.monotonic()

    def begin(self, stage: str, units: int) -> None:
        """Starts a stage of that many units."""
        self._stage, self._total, self._done = stage, units, 0
        self._documents = self._broken = 0
        self._began = self._printed = time.monotonic()
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(stage, total=units, counts="")

    def look(self, done: int, total: int) -> None:
        """So many of the stage's units are done, in a stage that may need fewer than it has."""
        self._total = total
        self._update(done)

    def advance(self, documents: int, broken: int) -> None:
        """One more unit, with that many documents, the broken ones among them."""
        self._documents += documents
        self._broken += broken
        self._update(self._done + 1)

    def say(self, line: str) -> None:
        """Prints a line."""
        if self._show:
            self._console.print(f"prepare: {line}", highlight=False, markup=False, soft_wrap=True)

    def _update(self, done: int) -> None:
        self._done = done
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self._total, counts=self._counts(now))
        elif self._show and (now - self._printed >= LINE_SECONDS or (done == self._total and self._documents)):
            self._printed = now
            left = (now - self._began) / done * (self._total - done)
            self.say(f"{self._stage}, {done / self._total:.0%} {self._counts(now)}, {left:.0f} s left")

    def _counts(self, now: float) -> str:
        if not self._documents:
            return ""
        rate = self._documents / max(now - self._began, 1e-9)
        broken = f", {self._broken:,} broken" if self._broken else ""
        return f"{self._documents:,} documents, {rate:,.0f}/s{broken}"

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()
