"""`moma prepare`: a source becomes a token store. Killed at any moment and run again, it goes on and ends the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from moma_jax.codec.folder import hash_of
from moma_jax.config import Modality, PrepareConfig
from moma_jax.data.directory import Directory
from moma_jax.data.encode import Encoder
from moma_jax.data.fit import fit_codecs, ordered_map, require_modalities
from moma_jax.data.parts import FORMAT_VERSION, PartWriter, part_name
from moma_jax.data.progress import PrepareProgress
from moma_jax.data.sources import open_source
from moma_jax.data.store import Codecs, image_codec, open_store, read_codecs, text_codec
from moma_jax.errors import InputError, RunError
from moma_jax.fields import read

MOST_BROKEN = 0.05
"""Share of broken documents above which a source is not used."""
LISTED_IN_PART, LISTED_IN_REPORT = 1000, 10_000
"""Broken documents that are named, at most; all are counted."""
ELSEWHERE = ("source", "kind", "tokenizer", "codec", "vocabulary", "parts")
"""Fields of PrepareConfig that are recorded by what they lead to (fingerprint, hashes), not as they were written."""


def prepare(
    config: PrepareConfig,
    out: str,
    *,
    part: tuple[int, int] | None = None,
    merge: bool = False,
    modalities: Sequence[Modality] | None = None,
    progress: bool = True,
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
    directory = Directory(out)
    if merge:
        _require_version(directory, directory.read_json("settings.json"))
        with PrepareProgress(progress) as bar:
            return _told(bar, directory, _publish(directory))
    layout = () if config.vocabulary is None else open_store(config.vocabulary).vocabulary.modalities
    source = open_source(config, modalities if modalities is not None else layout)
    content = _made_from(config, source, n)
    with PrepareProgress(progress) as bar:
        codecs, encoder = read_codecs(directory) if _is_claimed(directory, content) else None, None
        if codecs is None:
            bar.begin("fitting the vocabulary", source.units())
            codecs = fit_codecs(source, config, modalities, bar.look)
            encoder = _encoder(codecs, config)
            # Nothing is written before the input is known to be sound; another process may have begun meanwhile.
            if not _is_claimed(directory, content):
                directory.write_json("settings.json", content)
            codecs.write(directory)
        require_modalities(codecs.vocabulary, modalities)
        belongs = _belongs(directory, codecs)
        missing = [k for k in wanted if _read_part(directory, k, n, belongs) is None]
        if missing and encoder is None:
            encoder = _encoder(codecs, config)
        bar.begin("writing", sum(len(_units(source, k, n)) for k in missing))
        for k in missing:
            _write_part(directory, config, source, codecs, encoder, k, n, bar)
        result = _publish(directory) if part is None else _read_part(directory, part[0], n, belongs)
        return _told(bar, directory, result)


def _told(bar: PrepareProgress, directory: Directory, result: dict[str, Any]) -> dict[str, Any]:
    """`result`, after the lines that close the work."""
    bar.say(f"{directory.path}: {result['documents']:,} documents, {result['broken']:,} broken")
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


def _made_from(config: PrepareConfig, source, parts: int) -> dict[str, Any]:
    """The content of settings.json."""
    return {
        "format_version": FORMAT_VERSION,
        "source": config.source,
        "settings": _settings(config),
        "fingerprint": source.fingerprint(),
        "parts": parts,
        "units": source.units(),
    }


def _is_claimed(directory: Directory, content: dict[str, Any]) -> bool:
    """Whether settings.json is there and says `content`; raises InputError where the directory holds something else."""
    found = directory.read_json("settings.json")
    if found is not None:
        _require_version(directory, found)
        _require_same(directory, content["settings"], found.get("settings", {}), "prepare.")
        _require_same(directory, {name: content[name] for name in ("fingerprint", "parts", "units")}, found, "")
        return True
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
    settings = {k: v for k, v in directory.read_json("settings.json").items() if k != "source"}
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
    return Encoder(codecs.vocabulary, text_codec(codecs), image, config.held_out)


def _write_part(
    directory: Directory, config: PrepareConfig, source, codecs: Codecs, encoder: Encoder, k: int, n: int, bar
) -> None:
    seen, broken, listed = 0, 0, []
    with PartWriter(directory, k, n, codecs.vocabulary, config.shard_bytes, config.chunk_tokens) as writer:
        for unit in ordered_map(lambda number: encoder.encode(source.read(number)), _units(source, k, n)):
            writer.append(unit.documents)
            seen += len(unit.documents) + len(unit.broken)
            broken += len(unit.broken)
            room = max(0, LISTED_IN_PART - len(listed))
            listed += [{"id": name[:200], "reason": reason[:200]} for name, reason in unit.broken[:room]]
            bar.advance(len(unit.documents) + len(unit.broken), len(unit.broken))
        counts = {"documents": seen - broken, "broken": broken, "listed": listed}
        writer.finish({**_belongs(directory, codecs), **counts})


def _read_part(directory: Directory, k: int, n: int, belongs: dict[str, Any]) -> dict | None:
    """A part's part.json, None where it is not written yet; raises InputError where it does not belong here."""
    part = directory.read_json(f"{part_name(k, n)}/part.json")
    if part is not None and any(part.get(name) != value for name, value in belongs.items()):
        raise InputError(
            f"{directory.path}/{part_name(k, n)}: from another source, settings or vocabulary than the rest; "
            f"delete it and write it again with --part {k}/{n}"
        )
    return part


# The manifest ---------------------------------------------------------------------------------------------------------


def _publish(directory: Directory) -> dict[str, Any]:
    """Writes report.json and, where the parts are complete and sound enough, manifest.json."""
    settings, codecs = directory.read_json("settings.json"), read_codecs(directory)
    n = settings["parts"]
    belongs = {} if codecs is None else _belongs(directory, codecs)
    parts = {k: None if codecs is None else _read_part(directory, k, n, belongs) for k in range(1, n + 1)}
    missing = [k for k, part in parts.items() if part is None]
    if missing:
        names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise InputError(
            f"{directory.path}: parts not written yet: {names} of {n}; write them with --part {missing[0]}/{n} etc."
        )
    documents, broken = (sum(part[name] for part in parts.values()) for name in ("documents", "broken"))
    seen = documents + broken
    listed = [entry for part in parts.values() for entry in part.pop("listed")][:LISTED_IN_REPORT]
    directory.write_json("report.json", {"documents": seen, "broken": broken, "listed": listed})
    if broken > MOST_BROKEN * seen:
        raise RunError(
            f"{broken} of {seen} documents are broken, more than {MOST_BROKEN:.0%}: see {directory.path}/report.json; "
            "mend the source and prepare into another directory"
        )
    if not documents:
        raise InputError(f"prepare.source: {settings['source']} has no documents")
    for part in parts.values():
        for name in ("hashes", "made_from", "format_version"):
            del part[name]
    manifest = {
        **settings,
        "hashes": codecs.hashes,
        "token_dtype": codecs.vocabulary.token_dtype,
        "modalities": [m.name for m in codecs.vocabulary.modalities],
        "documents": documents,
        "broken": broken,
        "counts": _counts(list(parts.values()), [m.name for m in codecs.vocabulary.modalities]),
        "parts": list(parts.values()),
    }
    directory.write_json("manifest.json", manifest)
    return manifest


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
