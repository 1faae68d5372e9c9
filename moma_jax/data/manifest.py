"""What the small files of a token store hold, which everything else about it is read by."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from moma_jax.data.parts import COLLECTIONS, COLUMNS, FORMAT_VERSION, SPLITS
from moma_jax.errors import InputError, require
from moma_jax.fields import Count, Facts, read_file
from moma_jax.storage.directory import Directory

MOST_PARTS = 10**6
"""Each is looked for."""
READABLE = range(1, FORMAT_VERSION + 1)
CollectionName = Literal[tuple(f"{collection}-{split}" for collection in COLLECTIONS for split in SPLITS)]
ArrayName = Literal[("tokens", *COLUMNS)]


class Hashes(TypedDict):
    """What must be equal in two stores whose tokens are to be mixed."""

    vocabulary: str
    tokenizer: str
    image_codec: str | None


class Described(TypedDict):
    """vocabulary.json."""

    layout: dict[str, Any]
    hashes: Hashes


class Collection(TypedDict):
    """The documents of one collection and split of a part; `kept` is the checksum of the array of those that count."""

    documents: Count
    tokens_M: list[Count]
    checksums: dict[ArrayName, str]
    kept: NotRequired[str]


class Part(TypedDict):
    """One part."""

    sources: list[str]
    collections: dict[CollectionName, Collection]


class Entry(TypedDict):
    """A document that is broken, and why."""

    id: str
    reason: str


class WrittenPart(Part):
    """part.json, from which the manifest is put together."""

    format_version: int
    documents: Count
    broken: Count
    filtered: Count
    listed: list[Entry]
    left_out: dict[str, Count]
    own_split: bool


class Settings(TypedDict):
    """settings.json."""

    format_version: int
    source: str
    settings: dict[str, Any]
    parts: Annotated[int, Facts(least=1, most=MOST_PARTS)]


class Counted(TypedDict):
    """The documents of one collection and split of all parts."""

    documents: Count
    tokens: dict[str, Count]


class Manifest(TypedDict):
    """manifest.json, as far as it is read."""

    format_version: int
    hashes: Hashes
    modalities: list[str]
    parts: list[Part]
    documents: NotRequired[Count]
    broken: NotRequired[Count]
    counts: NotRequired[dict[str, Counted]]


def read_manifest(directory: Directory) -> Manifest:
    """The manifest of a store; InputError where there is no complete store of a known format, or it is damaged."""
    path, found = directory.path, directory.read_json("manifest.json")
    if found is None:
        if directory.read("settings.json") is not None:
            raise InputError(f"{path}: unfinished; run the same `moma prepare` again (--merge after --part)")
        raise InputError(f"{path}: no store here; make it with `moma prepare SOURCE --out {path}`")
    version = found.get("format_version")
    if type(version) is int and version not in READABLE:
        raise InputError(
            f"{path}: store format {version}; this version of moma_jax reads 1 to {FORMAT_VERSION}: "
            "prepare the store again"
        )
    where = f"{path}/manifest.json"
    manifest = read_file(Manifest, found, where)
    for part in manifest["parts"]:
        for name, collection in part["collections"].items():
            told, modalities = len(collection["tokens_M"]), len(manifest["modalities"])
            require(
                told == modalities,
                f"{where}: {name} has tokens of {told} modalities, not {modalities}; restore the file, it is damaged",
            )
    return manifest


def read_settings(directory: Directory) -> Settings | dict[str, Any] | None:
    """What a store is made from, None where none was begun; of another format version as it is, unread."""
    found = directory.read_json("settings.json")
    if found is None or found.get("format_version") != FORMAT_VERSION:
        return found
    return read_file(Settings, found, f"{directory.path}/settings.json")
