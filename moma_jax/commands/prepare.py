"""Make a token store from pictures and text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import tyro

import moma_jax
from moma_jax.config import PrepareConfig
from moma_jax.errors import InputError


@dataclass(frozen=True)
class SourceOptions:
    """A source and how it is read."""

    options: Annotated[PrepareConfig, tyro.conf.arg(name="")] = PrepareConfig()
    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]] = ""
    """The source; as --source."""
    EXAMPLE: ClassVar[str | None] = None

    @classmethod
    def named(cls, path: str | None) -> SourceOptions:
        """What is read from `path`."""
        return cls(PrepareConfig(source=path), path) if path else cls()


def prepare(
    source: Annotated[SourceOptions, tyro.conf.arg(name="", help="")],
    out: str,
    part: str | None = None,
    merge: bool = False,
) -> None:
    """Make a token store, `moma prepare SOURCE --out DIR`: fit the tokenizer and the palette, write the tokens.

    Args:
      out: The store's directory: local, gs:// or s3://.
      part: K/N: write only part K of N (an array job); --merge afterwards.
      merge: Publish the manifest of parts that were written one by one.
    """
    numbers = None
    if part is not None:
        words = part.split("/")
        if len(words) != 2 or not all(n.isdigit() for n in words) or not 1 <= int(words[0]) <= int(words[1]):
            raise InputError(f"--part: {part!r} is not K/N with 1 <= K <= N, such as 3/16")
        numbers = (int(words[0]), int(words[1]))
    moma_jax.prepare(source.options, out, part=numbers, merge=merge)
