"""How far `moma prepare` is."""

from __future__ import annotations

import time

from moma_jax.display import Display

LINE_SECONDS = 10.0
"""Seconds between plain lines."""


class PrepareProgress(Display):
    """Counts units of work, documents and broken documents of one stage after another, and shows them on stderr."""

    def __init__(self, show: bool):
        super().__init__(show, stderr=True)
        self.begin("", 0)

    def begin(self, stage: str, units: int) -> None:
        """Starts a stage of that many units."""
        self._stage, self._total, self._done = stage, units, 0
        self._documents = self._broken = 0
        self._began = self._printed = time.monotonic()

    def look(self, done: int, total: int) -> None:
        """So many of the stage's units are done, in a stage that may need fewer than it has."""
        self._total = total
        self._show(done)

    def advance(self, documents: int, broken: int, units: int) -> None:
        """So many more documents, the broken ones among them, and units that are done."""
        self._documents += documents
        self._broken += broken
        self._show(self._done + units)

    def say(self, line: str) -> None:
        """Prints a line."""
        super().say(f"prepare: {line}")

    def _show(self, done: int) -> None:
        self._done, now = done, time.monotonic()
        left = (now - self._began) / max(done, 1) * (self._total - done)
        label = f"{self._stage}, {done / max(self._total, 1):.0%}"
        text = f"{self._counts(now)}{left:.0f} s left"
        self.update(done, self._total, label, text)
        due = now - self._printed >= LINE_SECONDS or (done == self._total and self._documents)
        if due and not self.live:
            self._printed = now
            self.say(f"{label} {text}")

    def _counts(self, now: float) -> str:
        if not self._documents:
            return ""
        rate = self._documents / max(now - self._began, 1e-9)
        broken = f", {self._broken:,} broken" if self._broken else ""
        return f"{self._documents:,} documents, {rate:,.0f}/s{broken}, "
