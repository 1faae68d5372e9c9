"""Make a token store from pictures and text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

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
    out: str | None = None,
    part: str | None = None,
    merge: bool = False,
    workers: int = 1,
    engine: Literal["process", "ray"] = "process",
    ray_address: str | None = None,
    dry_run: bool = False,
) -> None:
    """Make a token store, `moma prepare SOURCE --out DIR`: fit the tokenizer and the palette, write the tokens.

    Args:
      out: The store's directory: local, gs:// or s3://.
      part: K/N: write only part K of N (an array job); --merge afterwards.
      merge: Publish the manifest of parts that were written one by one.
      workers: Processes that write parts side by side; with --engine ray: actors, 0 for one on each device.
      engine: process: on this machine; ray: on a Ray cluster (extra [ray]).
      ray_address: Of the cluster; left out, Ray runs on this machine alone.
      dry_run: Say what would be read, files, columns, splits and the first documents, and write nothing.
    """
    if dry_run:
        from moma_jax.data.preview import preview

        for line in preview(source.options):
            print(line)
        return
    if out is None:
        raise InputError("--out: say where the store shall be, or --dry-run to see what would be read")
    numbers = None
    if part is not None:
        words = part.split("/")
        if len(words) != 2 or not all(n.isdigit() for n in words) or not 1 <= int(words[0]) <= int(words[1]):
            raise InputError(f"--part: {part!r} is not K/N with 1 <= K <= N, such as 3/16")
        numbers = (int(words[0]), int(words[1]))
    engines = {"workers": workers, "engine": engine, "ray_address": ray_address}
    moma_jax.prepare(source.options, out, part=numbers, merge=merge, **engines)
