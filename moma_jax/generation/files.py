"""What was written, as files: pictures, and a record of everything, in a new directory."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorstore as ts
from PIL import Image

from moma_jax.codec.pictures import png_of
from moma_jax.data.documents import Codes
from moma_jax.errors import InputError
from moma_jax.generation.output import Output, enlarged
from moma_jax.storage.directory import CONTEXT, Directory, first_line

RECORD = "generation.json"
HELD = ".writing"
"""A file that is in the directory while a process writes there."""


@contextlib.contextmanager
def held(out: str) -> Iterator[Directory]:
    """The new or empty directory `out`. On a local disk it is made, and held against other processes until the end;
    where nothing came to lie in it, what was made is removed again.

    Raises:
      InputError: something lies there, or it cannot be written.
    """
    home = Directory(out)
    if home.local is None:
        if (name := _first_key(out)) is not None:
            raise InputError(f"--out: {out} holds {name}; choose a new directory")
        yield home
        return
    path, mine = Path(home.local), False
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / HELD).open("x").close()
            mine = True
            found = sorted(entry.name for entry in path.iterdir() if entry.name != HELD)
        except FileExistsError as error:
            what = f"is being written, or was left unfinished ({HELD})" if path.is_dir() else "is a file"
            raise InputError(f"--out: {out} {what}; choose a new directory") from error
        except OSError as error:
            raise InputError(f"--out: {out} cannot be written to ({error.strerror}); choose another one") from error
        if found:
            raise InputError(f"--out: {out} holds {found[0]}; choose a new directory")
        yield home
    finally:
        with contextlib.suppress(OSError):  # a directory with something in it cannot be removed, and shall not
            if mine:
                (path / HELD).unlink(missing_ok=True)
            for folder in missing:
                folder.rmdir()


def _first_key(out: str) -> str | None:
    """What lies below a place in an object store; None where nothing does."""
    scheme, _, rest = out.partition("://")
    parent, _, name = rest.strip("/").rpartition("/")
    if not parent:
        raise InputError(f"--out: {out} is a whole bucket; name a directory in it")
    try:
        store = ts.KvStore.open(Directory(f"{scheme}://{parent}").kvstore(name), context=CONTEXT).result()
        return min((key.decode(errors="replace") for key in store.list().result()), default=None)
    except ValueError as error:
        raise InputError(f"--out: {out}: {first_line(error)}") from error


def write(
    home: Directory, prompts: list[list[str | Path]], outputs: list[Output], record: dict[str, Any], scale: int | None
) -> dict[str, Any]:
    """Writes the pictures, and the record last: a directory without it is unfinished; returns the record.

    Raises:
      InputError: a file cannot be written, or one of its name has come meanwhile.
    """
    files: list[str] = []

    def put(name: str, content: bytes) -> None:
        if home.read(name) is not None:
            raise InputError(f"--out: {home.path.rstrip('/')}/{name} has come meanwhile; choose a new directory")
        home.write(name, content)

    def save(number: int) -> Callable[[Image.Image], str]:
        def save_one(picture: Image.Image) -> str:
            content = png_of(enlarged(picture, scale))
            files.append(f"{number:03}-{sum(f.startswith(f'{number:03}-') for f in files)}.png")
            put(files[-1], content)
            return files[-1]

        return save_one

    rows = [
        {
            "prompt": [{"image": str(part)} if isinstance(part, Path) else {"text": part} for part in prompt],
            "prompt_tokens": output.prompt_tokens,
            "seed": output.seed,
            "stopped": output.stopped,
            "text": output.text,
            "segments": [_described(segment, save(number)) for segment in output.segments],
            "ids": output.ids.tolist(),
        }
        for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]
    record = {**record, "outputs": rows, "files": files}
    put(RECORD, (json.dumps(record, sort_keys=True, indent=1) + "\n").encode())
    with contextlib.suppress(BrokenPipeError):
        for file in (*files, RECORD):
            print(f"{home.path.rstrip('/')}/{file}", file=sys.stderr)
    return record


def _described(segment: str | Image.Image | Codes, save: Callable[[Image.Image], str]) -> dict[str, Any]:
    """A segment as plain values; pictures are saved."""
    match segment:
        case str():
            return {"text": segment}
        case Codes():
            return {"modality": segment.modality, "codes": segment.codes.tolist()}
    return {"image": save(segment)}
