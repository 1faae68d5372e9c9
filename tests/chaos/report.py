"""The campaign's page."""

from __future__ import annotations

from pathlib import Path


def write_report(out: Path, seed: int) -> None:
    """Writes OUT.md beside the folder."""
