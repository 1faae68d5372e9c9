"""`moma prepare`: a source becomes a token store. Killed at any moment and run again, it goes on and ends the same."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moma_jax.codec.folder import hash_of
from moma_jax.config import Modality, PrepareConfig
from moma_jax.data.duplicates import settle
from moma_jax.data.encode import Block, Encoder
from moma_jax.data.engines import in_processes, on_ray
from moma_jax.data.fit import fit_codecs, ordered_map, require_modalities
from moma_jax.data.manifest import WrittenPart, read_settings
from moma_jax.data.parts import FORMAT_VERSION, PartWriter, part_name
from moma_jax.data.progress import PrepareProgress
from moma_jax.data.sources import Opened, open_source, open_with_rest
from moma_jax.data.store import Codecs, image_codec, open_store, read_codecs, text_codec
from moma_jax.errors import InputError, RunError
from moma_jax.fields import read, read_file
from moma_jax.storage.contents import FILE as CONTENTS
from moma_jax.storage.contents import write_contents
from moma_jax.storage.directory import Directory, json_bytes
from moma_jax.storage.probe import require_usable
from moma_jax.storage.staged import LEASES

MOST_BROKEN = 0.05
"""Share of broken documents above which a source is not used."""
SUMMED = ("documents", "broken", "filtered")
"""Counts of a part: documents that were written, that could not be, and that were not wanted."""
LISTED_IN_PART, LISTED_IN_REPORT = 1000, 10_000
"""Broken documents that are named, at most; all are counted."""
PICTURES_TOLD = {
    "dropped_duplicates": "dropped: {:,} pairs that show a picture of another",
    "dropped_held_out": "dropped: {:,} held-out documents that show a picture which is trained on",
}
BLOCK = 256
"""Documents that are encoded at once; a unit may be a tar of ten thousand."""
ELSEWHERE = ("source", "kind", "tokenizer", "codec", "vocabulary", "parts", "images", "image_map")
"""Fields of PrepareConfig that are recorded by what they lead to (fingerprint, hashes), not as they were written."""


def prepare(
    config: PrepareConfig,
    out: str,
    *,
    part: tuple[int, int] | None = None,
    merge: bool = False,
    modalities: Sequence[Modality] | None = None,
    progress: bool = True,
    workers: int = 1,
    engine: str = "process",
    ray_address: str | None = None,
) -> dict[str, Any]:
    """Writes the store `out`, or what is missing of it.

    Each part is a fixed share of the source's units and is published whole, so the work may stop anywhere. The same
    source and settings give the same bytes, in one go, in several, or part by part on many machines.

    Args:
      config: what to read and how.
      out: the store's directory: local, gs:// or s3://.
      part: (k, n) writes part k of n alone, k from 1; n replaces config.parts. `merge` afterwards.
      merge: publishes the manifest of parts that were written one by one; looks at nothing else, `config` neither.
      modalities: the id layout that the store must have (config.data.modalities); None: as the source needs.
      progress: shows documents/s and time left on stderr.
      workers: processes that write parts side by side; 1: this one. With Ray: actors, 0: as many as there are devices.
      engine: "process", or "ray": see engines.py. ray_address: of the cluster, None: Ray on this machine alone.

    Returns:
      The manifest, or with `part` the content of that part's part.json.

    Raises:
      InputError: the source or the settings cannot be used, or `out` holds something else.
      RunError: more than 5% of the documents are broken; report.json names them.
    """
    config = read(PrepareConfig, config, "prepare")
    n = config.parts if part is None else part[1]
    wanted = range(1, n + 1) if part is None else [part[0]]
    if not (n >= 1 and all(1 <= k <= n for k in wanted)) or (part is not None and merge):
        raise InputError("prepare.parts: at least 1, K of --part K/N from 1 to N, and --merge without --part")
    if engine not in ("process", "ray") or workers < 0 or (engine == "process" and not workers):
        raise InputError("prepare: --engine is process or ray, --workers at least 1 (0 with ray: one for each device)")
    if ray_address is not None and engine != "ray":
        raise InputError("--ray-address: only with --engine ray")
    directory = Directory(out)
    require_usable(out, checkpoints=False)
    if merge:
        _require_version(directory, read_settings(directory))
        with PrepareProgress(progress) as bar:
            return _told(bar, directory, _publish(directory))
    layout = () if config.vocabulary is None else open_store(config.vocabulary).vocabulary.modalities
    layout = tuple(modalities) if modalities is not None else tuple(layout)
    opened = open_with_rest(config, layout)
    source, content = opened.source, _made_from(config, opened, n)
    with PrepareProgress(progress) as bar:
        for note in opened.notes:
            bar.say(note)
        codecs, encoder = _codecs(directory, config, source, content, modalities, bar)
        belongs = _belongs(directory, codecs)
        missing = [k for k in wanted if _read_part(directory, k, n, belongs) is None]
        if part is None and not missing and (manifest := directory.read_json("manifest.json")) is not None:
            return _told(bar, directory, manifest)  # someone may be reading it
        bar.begin("writing", sum(len(_units(source, k, n)) for k in missing))
        if missing and engine == "process" and workers == 1:
            writer = Parts(config, out, n, layout, source, codecs, encoder, bar.advance)
            for k in missing:
                writer.write(k)
        elif missing:
            make = functools.partial(Parts, config, out, n, layout)
            ray = engine == "ray"
            done = on_ray(make, missing, workers, ray_address) if ray else in_processes(make, missing, workers)
            for k, told in done:
                bar.advance(told["documents"] + told["broken"], told["broken"], len(_units(source, k, n)))
        result = _publish(directory) if part is None else _read_part(directory, part[0], n, belongs)
        return _told(bar, directory, result)


def _codecs(directory: Directory, config: PrepareConfig, source, content: dict, modalities, bar):
    """(the store's codecs: read, or fitted and written; what encodes by them, None where it was not needed)."""
    codecs, encoder = read_codecs(directory) if _is_claimed(directory, content) else None, None
    if codecs is None:
        bar.begin("fitting the vocabulary", source.units())
        codecs = fit_codecs(source, config, modalities, bar.look)
        encoder = _encoder(codecs, config)
        # Nothing is written before the input is known to be sound; another process may have begun meanwhile.
        if not _is_claimed(directory, content):
            found, generation = directory.read_generation("settings.json")
            if found is not None or not directory.write_if("settings.json", json_bytes(content), generation):
                _is_claimed(directory, content)
        codecs.write(directory)
    require_modalities(codecs.vocabulary, modalities)
    return codecs, encoder


def _told(bar: PrepareProgress, directory: Directory, result: dict[str, Any]) -> dict[str, Any]:
    """`result`, after the lines that close the work."""
    bar.say(f"{directory.path}: {result['documents']:,} documents, {result['broken']:,} broken")
    for name, number in result.get("left_out", {}).items():
        bar.say(f"left out: {number:,} {name}")
    pictures = result.get("pictures", {})
    for name, line in PICTURES_TOLD.items():
        if number := pictures.get(name, 0):
            bar.say(line.format(number))
    if pictures.get("on_both_sides", 0) and not pictures["dropped_held_out"]:
        bar.say(
            f"warning: {pictures['on_both_sides']:,} pictures are both trained on and held out, as the source's own "
            "split has it; --drop-duplicates takes such held-out documents out"
        )
    counts = result.get("counts", {})
    if counts and not any(name.endswith("-validation") for name in counts):
        bar.say(
            f"warning: {directory.path} has no held-out documents, so nothing can be evaluated on it; raise "
            "--held-out, or give the source a validation split, and prepare into another directory"
        )
    return result


# What a store is made from --------------------------------------------------------------------------------------------


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """The settings that decide a store's content, the source's apart."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ELSEWHERE}
    settings["tokenizer"] = settings["vocabulary"] = None
    if config.codec is not None:  # left out where there is none, as stores were begun before it existed
        settings["codec"] = hash_of(config.codec)
    if config.vocabulary is not None:
        settings["vocabulary"] = open_store(config.vocabulary).manifest["hashes"]
    elif config.tokenizer is not None:
        try:
            with open(config.tokenizer, "rb") as file:
                settings["tokenizer"] = hashlib.sha256(file.read()).hexdigest()
        except OSError as error:
            raise InputError(f"prepare.tokenizer: {config.tokenizer}: {error.strerror}") from error
    return settings


def _made_from(config: PrepareConfig, opened: Opened, parts: int) -> dict[str, Any]:
    """The content of settings.json."""
    return {
        "format_version": FORMAT_VERSION,
        "source": config.source,
        "settings": _settings(config),
        "fingerprint": opened.source.fingerprint(),
        "images": None if opened.lookup is None else opened.lookup.fingerprint(),
        "parts": parts,
        "units": opened.source.units(),
    }


def _is_claimed(directory: Directory, content: dict[str, Any]) -> bool:
    """Whether settings.json is there and says `content`; raises InputError where the directory holds something else."""
    found = read_settings(directory)
    if found is not None:
        _require_version(directory, found)
        _require_same(directory, content["settings"], found.get("settings", {}), "prepare.")
        _require_same(
            directory, {name: content[name] for name in ("fingerprint", "images", "parts", "units")}, found, ""
        )
        return True
    if directory.local is not None and os.path.lexists(directory.local) and not os.path.isdir(directory.local):
        raise InputError(f"{directory.path}: is a file; choose a new directory")
    if directory.local is not None and os.path.isdir(directory.local):
        others = [name for name in sorted(os.listdir(directory.local)) if not name.startswith("settings.json")]
        if others:
            raise InputError(f"{directory.path}: holds {others[0]} and is no store; choose a new directory")
    return False


def _require_version(directory: Directory, found: dict | None) -> None:
    """Raises InputError where settings.json is missing or of another format."""
    if found is None:
        raise InputError(f"{directory.path}: no store was begun here; run `moma prepare SOURCE --out {directory.path}`")
    if found.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{directory.path}: written by another version of moma_jax; prepare into another directory")


def _require_same(directory: Directory, wanted: dict, found: dict, prefix: str) -> None:
    """Raises InputError naming the first setting that differs from those that a directory was begun with."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise InputError(
                f"{directory.path}: begun with {prefix}{name} {_short(found.get(name))}, now {_short(value)}; "
                "prepare into another directory, or delete this one"
            )


def _short(value: object) -> str:
    return text if len(text := json.dumps(value)) <= 24 else text[:20] + "..."


def _belongs(directory: Directory, codecs: Codecs) -> dict[str, Any]:
    """What every part of a store must say of itself: hashes of settings.json (the source's path apart, which may differ
    between machines) and of the codecs."""
    settings = {k: v for k, v in read_settings(directory).items() if k != "source"}
    made_from = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return {"made_from": made_from, "hashes": codecs.hashes}


# Parts ----------------------------------------------------------------------------------------------------------------


def _units(source, k: int, n: int) -> range:
    """The units of part k of n: dealt out like cards, so that parts are alike."""
    return range(k - 1, source.units(), n)


def _encoder(codecs: Codecs, config: PrepareConfig) -> Encoder:
    """What makes documents tokens, compiled once for all parts; InputError where the image codec lost its weights."""
    try:
        image = image_codec(codecs)
    except InputError as error:
        where = config.vocabulary or config.codec
        raise InputError(f"{where}: {error}" if where else str(error)) from error
    return Encoder(codecs.vocabulary, text_codec(codecs), image, config)


class Parts:
    """Writes parts of one store, one after the other: the source, codecs and encoder are opened once."""

    def __init__(
        self,
        config: PrepareConfig,
        out: str,
        n: int,
        modalities: tuple = (),
        source: Any = None,
        codecs: Codecs | None = None,
        encoder: Encoder | None = None,
        advance: Callable[[int, int, int], None] = lambda documents, broken, units: None,
    ):
        """Args: config, out: of a store that was begun. n: its parts. modalities: of ready codes. source, codecs,
        encoder: where they are open already. advance: told of documents, broken ones, and finished units."""
        self._config, self._n, self._directory, self._advance = config, n, Directory(out), advance
        self._source = open_source(config, modalities) if source is None else source
        self._codecs = read_codecs(self._directory) if codecs is None else codecs
        self._encoder = _encoder(self._codecs, config) if encoder is None else encoder

    def write(self, k: int) -> dict[str, Any]:
        """Writes and publishes part k; returns what its part.json says."""
        layout = self._config.shard_bytes, self._config.chunk_tokens
        broken, counts = [], Counter(documents=0, broken=0, filtered=0)
        left_out, own_split = Counter(), True
        with PartWriter(self._directory, k, self._n, self._codecs.vocabulary, *layout) as writer:
            for block, units in ordered_map(self._encoded, _blocks(self._source, _units(self._source, k, self._n))):
                writer.append(block.documents)
                seen = len(block.documents) + len(block.broken)
                counts.update(documents=len(block.documents), broken=len(block.broken), filtered=block.filtered)
                left_out += block.left_out
                own_split &= block.own_split
                room = max(0, LISTED_IN_PART - len(broken))
                broken += [{"id": name[:200], "reason": reason[:200]} for name, reason in block.broken[:room]]
                self._advance(seen, len(block.broken), units)
            told = {"listed": broken, "left_out": dict(sorted(left_out.items())), "own_split": own_split}
            return writer.finish({**_belongs(self._directory, self._codecs), **counts, **told})

    def _encoded(self, block: tuple[list, int]) -> tuple[Block, int]:
        items, units = block
        return self._encoder.encode(items), units


def _blocks(source, units: range) -> Iterator[tuple[list, int]]:
    """Documents of units, so many at a time, and how many units end with them."""
    for unit in units:
        items = iter(source.read(unit))
        block = list(itertools.islice(items, BLOCK))
        while following := list(itertools.islice(items, BLOCK)):
            yield block, 0
            block = following
        yield block, 1


def _read_part(directory: Directory, k: int, n: int, belongs: dict[str, Any]) -> dict | None:
    """A part's part.json, None where it is not written yet; raises InputError where it does not belong here."""
    part = directory.read_json(file := f"{part_name(k, n)}/part.json")
    part = None if part is None else read_file(WrittenPart, part, f"{directory.path}/{file}")
    if part is not None and bool(part["listed"]) != bool(part["broken"]):
        raise InputError(
            f"{directory.path}/{file}: lists no broken documents, or ones that it does not count; restore it"
        )
    if part is not None and any(part.get(name) != value for name, value in belongs.items()):
        raise InputError(
            f"{directory.path}/{part_name(k, n)}: from another source, settings or vocabulary than the rest; "
            f"delete it and write it again with --part {k}/{n}"
        )
    return part


# The manifest ---------------------------------------------------------------------------------------------------------


def _publish(directory: Directory) -> dict[str, Any]:
    """Writes report.json and, where the parts are complete and sound enough, manifest.json."""
    settings, codecs = read_settings(directory), read_codecs(directory)
    n = settings["parts"]
    belongs = {} if codecs is None else _belongs(directory, codecs)
    parts = {k: None if codecs is None else _read_part(directory, k, n, belongs) for k in range(1, n + 1)}
    missing = [k for k, part in parts.items() if part is None]
    if missing:
        names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise InputError(
            f"{directory.path}: parts not written yet: {names} of {n}; write them with --part {missing[0]}/{n} etc."
        )
    documents, broken, filtered = (sum(part[name] for part in parts.values()) for name in SUMMED)
    seen = documents + broken + filtered
    listed = [entry for part in parts.values() for entry in part.pop("listed")][:LISTED_IN_REPORT]
    left_out = sum((Counter(part.pop("left_out")) for part in parts.values()), Counter())
    own_splits = [part.pop("own_split") for part in parts.values()]
    own_split = all(own_splits)
    pictures = settle(directory, list(parts.values()), settings["settings"]["drop_duplicates"], own_split)
    documents = sum(c["documents"] for part in parts.values() for c in part["collections"].values())
    report = {"documents": seen, "broken": broken, "filtered": filtered, "left_out": left_out, "pictures": pictures}
    directory.write_json("report.json", {**report, "listed": listed})
    if broken > MOST_BROKEN * seen:
        raise RunError(
            f"{broken} of {seen} documents are broken, more than {MOST_BROKEN:.0%}, such as {listed[0]['id']}: "
            f"{listed[0]['reason']}; see {directory.path}/report.json, mend the source and prepare into another "
            "directory"
        )
    if not documents:
        most = "".join(f"; left out: {number:,} {name}" for name, number in left_out.most_common(1))
        raise InputError(f"prepare.source: no document of {settings['source']} is left{most}; delete {directory.path}")
    for part in parts.values():
        for name in ("hashes", "made_from", "format_version"):
            del part[name]
    manifest = {
        **settings,
        "hashes": codecs.hashes,
        "token_dtype": codecs.vocabulary.token_dtype,
        "modalities": [m.name for m in codecs.vocabulary.modalities],
        **report,
        "documents": documents,
        "own_split": own_split,
        "counts": _counts(list(parts.values()), [m.name for m in codecs.vocabulary.modalities]),
        "parts": list(parts.values()),
    }
    content = json_bytes(manifest)
    write_contents(directory, coming={"manifest.json": content}, belongs=belongs_to_store)
    directory.write("manifest.json", content)
    return manifest


def belongs_to_store(name: str) -> bool:
    """Whether a store's own list names a file: of a part its two lists, which name the rest."""
    outside = not name.startswith(("parts/", f"{LEASES}/", "."))
    return outside or (name.endswith(("/part.json", f"/{CONTENTS}")) and "/." not in name)


def _counts(parts: list[dict], names: list[str]) -> dict[str, dict]:
    """Documents, and tokens of each modality, by collection and split."""
    counts: dict[str, dict] = {}
    for part in parts:
        for collection, description in part["collections"].items():
            count = counts.setdefault(collection, {"documents": 0, "tokens": dict.fromkeys(names, 0)})
            count["documents"] += description["documents"]
            for name, tokens in zip(names, description["tokens_M"], strict=True):
                count["tokens"][name] += tokens
    return counts
