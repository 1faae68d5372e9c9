"""What a directory holds: a list of every file's size and CRC-32C, and whether the files still are what it says.

    contents.json   {"objects": {"tokens/zarr.json": [size, crc], ...}, "crc32c": of the objects as JSON}

The list is made from what is read back, not from what was meant to be written. It is there before the file that
publishes the directory (part.json, manifest.json, a checkpoint's commit), which it names too, from the bytes that are
about to be written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import google_crc32c

from moma_jax.errors import InputError, require
from moma_jax.storage.directory import Directory

FILE = "contents.json"
AT_ONCE = 8
"""Files that are read side by side; of each at most Directory.PIECE bytes are held."""
DAMAGED = "its CRC-32C is another than when it was written"


class Damage(NamedTuple):
    """A file, by its name in the directory, and what is wrong with it."""

    name: str
    what: str


class Verified(NamedTuple):
    """What reading everything showed: files and bytes that are as they were, those that are not, and names of files
    that the list does not know."""

    objects: int
    bytes: int
    damages: list[Damage]
    unlisted: list[str]


def write_contents(
    directory: Directory,
    *,
    coming: Mapping[str, bytes] | None = None,
    belongs: Callable[[str], bool] = lambda name: True,
) -> int:
    """Lists the files of a directory in its contents.json; returns their bytes.

    Args:
      coming: files that are written next, which are listed as if they were there.
      belongs: whether a file that is there is to be listed.
    """
    directory.await_listing()
    names = [name for name in directory.names("") if name != FILE and belongs(name)]
    objects = {name: [len(content), google_crc32c.value(content)] for name, content in (coming or {}).items()}
    objects = dict(sorted((_measured(directory, set(names) - objects.keys()) | objects).items()))
    directory.write_json(FILE, {"objects": objects, "crc32c": _own_crc(objects)})
    return sum(size for size, _ in objects.values())


def read_contents(directory: Directory) -> dict[str, tuple[int, int]] | None:
    """Size and CRC-32C by name, as listed; None where there is no list, InputError where it is damaged."""
    listed = directory.read_json(FILE)
    if listed is None:
        return None
    try:
        objects = {str(name): (int(size), int(crc)) for name, (size, crc) in listed["objects"].items()}
        whole = listed["crc32c"] == _own_crc(listed["objects"])
    except (AttributeError, KeyError, TypeError, ValueError):
        whole, objects = False, {}
    require(whole, f"{directory.path}/{FILE}: damaged; move it away, what it lists is then not checked")
    return objects


def verify(directory: Directory, belongs: Callable[[str], bool] = lambda name: True) -> Verified | None:
    """Reads all files of a directory and holds them against its list; None where it has none.

    Args:
      belongs: whether a file that is there and not listed is to be named.

    Raises:
      InputError: the directory cannot be read.
    """
    try:
        objects = read_contents(directory)
    except InputError:
        return Verified(0, 0, [Damage(FILE, "the list itself is damaged")], [])
    if objects is None:
        return None
    there = set(directory.names(""))
    found = _measured(directory, there & objects.keys())
    damages = [Damage(name, what) for name, what in _compared(objects, found)]
    bad = {damage.name for damage in damages}
    good = [size for name, (size, _) in objects.items() if name not in bad]
    return Verified(len(good), sum(good), damages, sorted(filter(belongs, there - objects.keys() - {FILE})))


def _compared(objects: Mapping[str, tuple[int, int]], found: Mapping[str, list[int]]) -> Iterator[tuple[str, str]]:
    for name, (size, crc) in objects.items():
        if name not in found:
            yield name, "is gone"
        elif found[name][0] != size:
            yield name, f"has {found[name][0]:,} bytes in place of {size:,}"
        elif found[name][1] != crc:
            yield name, DAMAGED


def _measured(directory: Directory, names: set[str]) -> dict[str, list[int]]:
    """Size and CRC-32C of files, as they are read back, but for those that a listing shows and nobody can read."""

    def measure(name: str) -> list[int] | None:
        size, crc = 0, 0
        for piece in directory.pieces(name):
            size, crc = size + len(piece), google_crc32c.extend(crc, piece)
        return [size, crc] if size or directory.read(name) is not None else None

    ordered = sorted(names)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        measured = zip(ordered, pool.map(measure, ordered), strict=True)
        return {name: found for name, found in measured if found is not None}


def _own_crc(objects: object) -> int:
    return google_crc32c.value(json.dumps(objects, sort_keys=True).encode())
