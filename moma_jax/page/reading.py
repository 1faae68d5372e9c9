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
from moma_jax.config import Config
from moma_jax.config_json import from_json
from moma_jax.data.store import Store, open_store
from moma_jax.errors import InputError
from moma_jax.evaluation.telemetry import FOLDER, ROW, TABLE
from moma_jax.late import pa, pq
from moma_jax.runs.directory import RunDir
from moma_jax.runs.journal import SHEETS, records_of
from moma_jax.studies.curves import Run, read_run

MOST_SHEETS = 6
"""Of one name of samples, the newest."""
FILE = re.compile(r"(?P<name>.+)-(?P<step>\d+)\.(?:row\.)?(?:parquet|png)")


@dataclass(frozen=True)
class Seen:
    """A run.

    Attributes:
      name: how the page calls it. run: its curves. config: None where it cannot be read by this version.
      records: all of metrics.jsonl.
      experts: rows of the newest telemetry (`evaluation.telemetry.COLUMNS`), with its "step"; () without.
      row: its packed row, token by token.
      sheets: the newest pictures by name and step. store: for decoding; None where it is not there.
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
        config = from_json(written)
    except InputError:
        config = None
    records = records_of(home) or []
    return Seen(
        name or path.rstrip("/").rpartition("/")[2],
        read_run(name or path, "", None, path),
        config,
        records,
        _newest(home, TABLE, config, records),
        _newest(home, ROW, config, records),
        _sheets(home),
        _store(config),
    )


def _steps(home: RunDir, folder: str, end: str) -> dict[str, dict[int, str]]:
    """Names of files by their name and step."""
    found: dict[str, dict[int, str]] = {}
    for path in home.names(folder):
        match = FILE.fullmatch(path.removeprefix(folder))
        if match and path.endswith(end) and (end == ROW or not path.endswith(ROW)):
            found.setdefault(match["name"], {})[int(match["step"])] = path
    return found


def _newest(home: RunDir, end: str, config: Config | None, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the newest file of the first evaluation set, of steps that the records know."""
    found, last = _steps(home, FOLDER, end), max((r["step"] for r in records), default=0)
    order = [eval_set.name for eval_set in config.train.eval_sets] if config is not None else []
    for name in sorted(found, key=lambda name: order.index(name) if name in order else len(order)):
        steps = {step: path for step, path in found[name].items() if step <= last}
        if not steps:
            continue
        path = steps[max(steps)]
        try:
            rows = pq.read_table(io.BytesIO(home.read(path))).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{home.path}/{path}: is damaged ({error}); remove it") from error
        return [row | {"step": max(steps)} for row in rows]
    return []


def _sheets(home: RunDir) -> dict[str, dict[int, Image.Image]]:
    return {
        name: {step: Image.open(io.BytesIO(home.read(path))) for step, path in sorted(steps.items())[-MOST_SHEETS:]}
        for name, steps in _steps(home, SHEETS, ".png").items()
    }


def _store(config: Config | None) -> Store | None:
    if config is None or config.data.kind != "store":
        return None
    try:
        return open_store(config.data.stores[0].path)
    except InputError:
        return None
