"""What a command left behind, as a flat dictionary: a name for everything that must be equal, and its hash."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import tensorstore as ts
from runs import TIMINGS

SAVED_EVERY = 3
"""Steps between the checkpoints of all runs here."""
TIMED = {"updated", "pid", "folder", "command", "processor", "commit", "crc32c", "mfu", "pictures_per_second"} | TIMINGS
"""Values that clocks, process numbers, directories and the commit decide."""
OF_RUN = ("metrics.jsonl", "status.json", "summary.json", ".lock")
"""Files of a run that are compared by themselves."""
SAYING = ("generation.json", "thresholds.json")
"""Files that are compared by what they say, which a commit is part of."""
NOT_WRITTEN = re.compile(r"checkpoint of step (\d+) not written, to be tried again")
"""An event; the next checkpoint is of a later step."""
SHARE = "saving took "
"""The beginning of an event that clocks decide."""
GONE = " was not written, as a record says"


def plain(value: Any) -> Any:
    """A JSON value without what clocks say."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in TIMED and not k.startswith("spent_")}
    return [plain(each) for each in value] if isinstance(value, list) else value


def _hash(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def _json(path: Path) -> str:
    return _hash(json.dumps(plain(json.loads(path.read_text())), sort_keys=True))


def _file(path: Path) -> str:
    return _hash(path.read_bytes())


def _table(path: Path) -> str:
    """A table but for what it says of an evaluation before, which is not known after a start."""
    table = pq.read_table(path)
    return _hash(repr(table.drop_columns([name for name in ("kept",) if name in table.column_names]).to_pylist()))


def of_files(folder: Path) -> dict[str, str]:
    """Every file, byte for byte."""
    found = {}
    for base, _, names in os.walk(folder):
        for name in names:
            path = Path(base, name)
            hashed = _json if name in SAYING else _table if name.endswith(".parquet") else _file
            found[f"file {path.relative_to(folder)}"] = hashed(path)
    return found


def of_run(folder: Path) -> dict[str, str]:
    """A run: records, every checkpoint's arrays and cursor, and all other files but TensorBoard's and the lock."""
    found: dict[str, str] = {}
    every, unwritten = _records(folder)
    found |= {f"checkpoint {step}{GONE}": "" for step in unwritten}
    for number, record in enumerate(every):
        told = json.dumps(plain(record), sort_keys=True)
        found[f"record {number}: {record['kind']} of step {record['step']}"] = _hash(told)
    for checkpoint in _checkpoints(folder):
        found |= _of_checkpoint(checkpoint)
    for name in ("status.json", "summary.json"):
        found[name] = _json(folder / name) if (folder / name).exists() else "missing"
    for name, value in of_files(folder).items():
        inner = name.removeprefix("file ")
        if not inner.startswith(("checkpoints/", "tensorboard/", "routers/")) and inner not in OF_RUN:
            found[name] = value
    return found


def _checkpoints(folder: Path) -> list[Path]:
    """Those that the undisturbed run has, too: SIGTERM saves one more, at its own step."""
    every = (folder / "checkpoints").iterdir()
    return [path for path in every if not path.name.isdigit() or int(path.name) % SAVED_EVERY == 0]


def _of_checkpoint(folder: Path) -> dict[str, str]:
    name = f"checkpoint {folder.name}"
    if not folder.name.isdigit():
        return {f"{name} is left over": "there"}
    base = {"driver": "file", "path": f"{folder}/state/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = sorted(store.list().result())
    found = {f"{name}, {key.decode()}": _hash(bytes(store.read(key).result().value)) for key in keys}
    return found | {f"{name}, cursor": _hash((folder / "cursor" / "metadata").read_bytes())}


def _records(folder: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """A run's records but those of saves, which stand where the clock has them; steps whose saves are said to fail."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    failed = [NOT_WRITTEN.match(record.get("event", "")) for record in records]
    apart = lambda record: record["kind"] == "checkpoint" or record.get("event", "").startswith(SHARE)  # noqa: E731
    kept = [record for record, found in zip(records, failed, strict=True) if not (found or apart(record))]
    return kept, {found[1] for found in failed if found}


def of_runs(folder: Path) -> dict[str, str]:
    """The runs of a study."""
    runs = sorted(path.parent for path in folder.glob("*/config.json"))
    return {f"{run.name}: {name}": value for run in runs for name, value in of_run(run).items()}


def loosely(folder: Path) -> dict[str, Any]:
    """What a run on other devices must share with the reference: steps of its records, cursors, and losses nearly."""
    found: dict[str, Any] = {}
    for number, record in enumerate(_records(folder)[0]):
        found[f"record {number}: {record['kind']} of step {record['step']}"] = record.get("loss")
    for checkpoint in _checkpoints(folder):
        found[f"checkpoint {checkpoint.name}, cursor"] = _hash((checkpoint / "cursor" / "metadata").read_bytes())
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any], near: float = 0.0) -> list[str]:
    """Names of what differs; numbers may by the share `near`. A checkpoint may be missing that a record says so of."""

    def same(a: Any, b: Any) -> bool:
        numbers = isinstance(a, float) and isinstance(b, float)
        return abs(a - b) <= near * abs(b) if numbers else a == b

    missing, excused = object(), {name.removesuffix(GONE) for name in found if name.endswith(GONE)}
    found = {name: value for name, value in found.items() if not name.endswith(GONE)}
    excused -= {name.partition(",")[0] for name in found}  # one that is there must be whole
    wanted = {name: value for name, value in wanted.items() if name in found or name.partition(",")[0] not in excused}
    return [n for n in sorted(found.keys() | wanted.keys()) if not same(found.get(n, missing), wanted.get(n, missing))]
