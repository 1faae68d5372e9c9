"""What is written, on standard output: text as it comes, pictures as half blocks of colour."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata

from PIL import Image

from moma_jax.data.documents import Codes
from moma_jax.generation.output import Output, half_blocks

MOST_COLUMNS = 64
"""Characters that a picture is wide in the terminal, at most."""
STEERING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
"""Bidirectional classes of the characters that turn the order of what follows."""


class Terminal:
    """What standard output shows: of a single row all as it comes, of several each when all are complete."""

    def __init__(self, stream: bool):
        self._stream, self._tty = stream, sys.stdout.isatty()
        self._columns = min(shutil.get_terminal_size().columns, MOST_COLUMNS)
        self._at_start = True
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no failure

    def text(self, text: str) -> None:
        """Shows the next text."""
        if self._stream:
            self._print(text)

    def picture(self, picture: Image.Image | Codes) -> None:
        """Shows a picture, where there is a terminal; elsewhere a new line says that something stood there."""
        if self._stream:
            self._end_line()
            if self._tty and isinstance(picture, Image.Image):
                self._print(half_blocks(picture, self._columns) + "\n", plain=False)

    def finish(self, outputs: list[Output]) -> None:
        """Shows what was not yet, and ends the line."""
        if not self._stream:
            self._stream = True
            for number, output in enumerate(outputs):
                self._print(f"{number:03}: ")
                for segment in output.segments:
                    self.text(segment) if isinstance(segment, str) else self.picture(segment)
                self._end_line()
        self._end_line()

    def _end_line(self) -> None:
        if not self._at_start:
            self._print("\n")

    def _print(self, text: str, plain: bool = True) -> None:
        """Writes at once. A model may write what would steer the terminal: such characters are replaced there."""
        if plain and self._tty:
            text = "".join("\ufffd" if _steers(c) else c for c in text)
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has what it wanted; the files are still to be written
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        self._at_start = text.endswith("\n") if text else self._at_start


def _steers(character: str) -> bool:
    """Whether a character does something to a terminal other than show itself."""
    control = unicodedata.category(character) == "Cc" and character not in "\n\t"
    return control or unicodedata.bidirectional(character) in STEERING
