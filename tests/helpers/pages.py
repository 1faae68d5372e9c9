"""What README.md and the pages of docs/ hold: links, code blocks, and the commands of those that are marked `sh`."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
"""Measurements, in docs/results, are apart."""
BLOCK = re.compile(r"^```(?P<kind>\w*)(?P<mark>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S)
NEEDS = re.compile(r' title="needs .+"')
"""Marks a block whose commands need hardware, a cloud or data that tests have not."""


class Block(NamedTuple):
    """A fenced block: its language, what else stands behind the fence, its lines."""

    kind: str
    mark: str
    code: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    return [Block(**found.groupdict()) for found in BLOCK.finditer(page.read_text())]


def python_of(name: str) -> list[str]:
    """The Python blocks of a page of docs/."""
    return [block.code for block in blocks(ROOT / "docs" / name) if block.kind == "python"]


def commands_of(page: Path) -> list[list[str]]:
    """Words of every command that can be tried here, in the page's order; those of marked blocks are left out."""
    shells = [block for block in blocks(page) if block.kind == "sh" and not NEEDS.fullmatch(block.mark)]
    lines = [line for block in shells for line in block.code.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]
