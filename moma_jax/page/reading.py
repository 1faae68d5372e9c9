"""What a page knows of a run: records, telemetry, samples, and what its ids mean where the store is there."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from moma_jax.codec import Codec
from moma_jax.codec.pictures import MAX_PIXELS
from moma_jax.config import Config
from moma_jax.config_json import from_json
from moma_jax.data.store import Store, open_store
from moma_jax.errors import InputError
from moma_jax.evaluation.telemetry import COLUMNS, FOLDER, ROW, TABLE, hashes_in
from moma_jax.late import pa, pq
from moma_jax.runs.directory import RunDir
from moma_jax.runs.journal import SHEETS, records_of
from moma_jax.studies.curves import Run, read_run
from moma_jax.training.load import with_stores

MOST_SHEETS = 6
"""Of one name of samples, the newest."""
COLUMNS_OF = {TABLE: COLUMNS.keys(), ROW: {"routing", "token", "document", "modality", "place", "experts"}}
NAMES = ("routing", "group")
"""Their columns of words; the others hold numbers."""
FILE = re.compile(r"(?P<name>.+)-(?P<step>\d+)\.(?:row\.)?(?:parquet|png)")


@dataclass(frozen=True)
class Seen:
    """A run.

    Attributes:
      name: how the page calls it. run: its curves. config: None where it cannot be read by this version.
      records: all of metrics.jsonl.
      experts: rows of the newest telemetry (`evaluation.telemetry.COLUMNS`), with its "step"; () without.
      row: its packed row, token by token.
      sheets: the newest pictures by name and step. store: for decoding; None where it is not
        there, or no longer the one whose ids the telemetry counted.
    """

    name: str
    run: Run
    config: Config | None
    records: list[dict[str, Any]]
    experts: list[dict[str, Any]]
    row: list[dict[str, Any]]
    sheets: dict[str, dict[int, Image.Image]]
    store: Store | None

    @property
    def train(self) -> list[dict[str, Any]]:
        """The train records."""
        return [r for r in self.records if r["kind"] == "train"]

    @property
    def evaluated(self) -> list[dict[str, Any]]:
        """The eval records."""
        return [r for r in self.records if r["kind"] == "eval"]

    @property
    def unread(self) -> bool:
        """Whether ids have a meaning that cannot be looked up."""
        return self.store is None and (self.config is None or self.config.data.kind == "store")

    @cached_property
    def codec(self) -> Codec | None:
        """The store's image codec."""
        return None if self.store is None else self.store.image_codec()

    @cached_property
    def name_of_id(self) -> Callable[[int], str]:
        """What an id is in words."""
        if self.store is None:
            return lambda token: f"#{token}"
        vocabulary, text = self.store.vocabulary, self.store.text_codec()
        code_V, owner_V = vocabulary.code_V, vocabulary.modality_V

        def name(token: int) -> str:
            modality = vocabulary.modalities[owner_V[token]]
            return f"{modality.name} {code_V[token]}" if modality.span else text.decode([token]) or f"#{token}"

        return name


def read_seen(path: str, name: str | None = None) -> Seen:
    """Reads a run directory; InputError where there is none, or a file of it is damaged."""
    home = RunDir(path)
    if (written := home.read_json("config.json")) is None:
        raise InputError(f"{path}: no config.json here; give a run directory")
    try:
        config = with_stores(from_json(written), home)
    except InputError:
        config = None
    records = records_of(home) or []
    experts, hashes = _newest(home, TABLE, config, records)
    row, _ = _newest(home, ROW, config, records)
    return Seen(
        name or path.rstrip("/").rpartition("/")[2],
        read_run(name or path, "", None, path),
        config,
        records,
        experts,
        row,
        _sheets(home),
        _store(config, hashes),
    )


def _steps(home: RunDir, folder: str, end: str) -> dict[str, dict[int, str]]:
    """Names of files by their name and step."""
    found: dict[str, dict[int, str]] = {}
    for path in home.names(folder):
        match = FILE.fullmatch(path.removeprefix(folder))
        if match and path.endswith(end) and (end == ROW or not path.endswith(ROW)):
            found.setdefault(match["name"], {})[int(match["step"])] = path
    return found


def _newest(home: RunDir, end: str, config: Config | None, records: list[dict[str, Any]]) -> tuple[list, dict | None]:
    """Rows of the newest file of the first evaluation set, of steps that the records know, and its hashes."""
    found, last = _steps(home, FOLDER, end), max((r["step"] for r in records), default=0)
    order = [eval_set.name for eval_set in config.train.eval_sets] if config is not None else []
    for name in sorted(found, key=lambda name: order.index(name) if name in order else len(order)):
        steps = {step: path for step, path in found[name].items() if step <= last}
        if not steps:
            continue
        path = steps[max(steps)]
        try:
            table = pq.read_table(io.BytesIO(home.read(path)))
            rows = table.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{home.path}/{path}: is damaged ({error}); remove it") from error
        if rows and (lacks := COLUMNS_OF[end] - rows[0].keys()):
            raise InputError(f"{home.path}/{path}: has no column {min(lacks)}; remove it, another version wrote it")
        for field in table.schema:  # which the page shows as they are
            if field.name not in NAMES and not _of_numbers(field.type):
                raise InputError(f"{home.path}/{path}: {field.name} holds {field.type}, no numbers; remove the file")
        return [row | {"step": max(steps)} for row in rows], hashes_in(table.schema.metadata)
    return [], None


def _of_numbers(kind: pa.DataType) -> bool:
    """Whether a column holds numbers, or lists of them, or nothing."""
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    number = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    return any(test(kind) for test in number)


def _sheets(home: RunDir) -> dict[str, dict[int, Image.Image]]:
    return {
        name: {step: _picture(home, path) for step, path in sorted(steps.items())[-MOST_SHEETS:]}
        for name, steps in _steps(home, SHEETS, ".png").items()
    }


def _picture(home: RunDir, path: str) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(home.read(path)), formats=("PNG",))
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels, more than {MAX_PIXELS}")
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises on damage
        raise InputError(f"{home.path}/{path}: is damaged ({error}); remove it") from error
    return picture


def _store(config: Config | None, hashes: dict[str, str | None] | None) -> Store | None:
    """The first store, where it is still the one of these hashes; None: of an older run, which does not say."""
    if config is None or config.data.kind != "store":
        return None
    try:
        store = open_store(config.data.stores[0].path)
    except InputError:
        return None
    return store if hashes is None or hashes.items() <= store.codecs.hashes.items() else None
