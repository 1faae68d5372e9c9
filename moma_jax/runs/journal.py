"""The run's records: flat dictionaries that go to a metrics file, TensorBoard and the terminal through one `write`.

Kinds of records: `train` (every `train.log_every` steps; losses and norms are means over the steps since the last such
record), `eval` (one per evaluation set and routing; `eval_set`, `routing`), `checkpoint` (one that was written: of
`of_step`, in `seconds`, `bytes`) and `event` (`event` says what). Losses are
in nats, token-weighted, without z-loss; `tokens` and `flops` are cumulative and leave padding out; all are those of all
processes but `epoch_<store>`, passes over a store, which are those of the lanes that process 0 reads. The journal of
`moma routers fit`, RUN/routers, has `routers` in place of `train` and `routers_eval` of `eval` (router_step.py); that
of `moma codec train` `codec` and `codec_eval` (training/codec/stage.py), with contact sheets beside it, in sheets/.

A local run keeps `metrics.jsonl`. An object store cannot append, so there records go to segments
`metrics/FIRST-LAST.jsonl` (steps FIRST+1..LAST) that are written when a checkpoint is; LAST-LAST has what was told
after the last one. A run that goes on from a checkpoint first cuts its records back to that checkpoint's step. Each
line ends with `crc32c`, the CRC-32C of the record without it; lines that have none (of earlier versions, or written by
hand) are taken as they are.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NotRequired, TypedDict

import google_crc32c
import numpy as np
from PIL import Image

from moma_jax import hosts
from moma_jax.codec.pictures import png_of
from moma_jax.errors import InputError, require
from moma_jax.fields import Count, leaves, read_file, shown
from moma_jax.late import pq
from moma_jax.runs.directory import RunDir
from moma_jax.runs.figures import figures_of

SCHEMA = 1
METRICS = "metrics.jsonl"
SEGMENTS = "metrics/"
SHEETS = "sheets/"
SUM = b', "crc32c": "%08x"}'
"""The end of a line. A text: a number under a damaged name would be one more figure."""
SKIPPED = "update skipped: loss or gradient not finite"
"""An event."""


def sheet_file(name: str, step: int, end: str = ".png") -> str:
    """Where a run keeps a sheet, and what belongs to it."""
    return f"{SHEETS}{name}-{step:08d}{end}"


def read_metrics(run: str) -> list[dict[str, Any]]:
    """All records of a run, in the order in which they were written.

    Args:
      run: a run directory, local or on an object store.

    Raises:
      InputError: there are none.
    """
    records = records_of(RunDir(run))
    if records is None:
        raise InputError(f"{run}: no {METRICS} here; give a run directory")
    return records


def records_of(run: RunDir) -> list[dict[str, Any]] | None:
    """All records of a run, None where it has no file of them; InputError where a file holds something else."""
    names = [METRICS] if run.local else _segments(run)
    contents = {name: run.read(name) for name in names}
    found = [_parse(content, f"{run.path}/{name}") for name, content in contents.items() if content is not None]
    return [record for records in found for record in records] if found else None


class Record(TypedDict):
    """What every record has; further fields are numbers, or null for one that is not finite."""

    kind: str
    step: Count
    eval_set: NotRequired[str]
    routing: NotRequired[str]
    event: NotRequired[str]


NEEDED = {"eval": ("eval_set", "routing"), "event": ("event",)}
"""Fields that records of a kind have, too."""


def _parse(content: bytes, where: str) -> list[dict[str, Any]]:
    """Records of a file; a last line that a kill cut short is left out."""
    *lines, tail = content.split(b"\n")
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(tail)
        lines.append(tail)
    return [_record(line, f"{where}: line {number}") for number, line in enumerate(lines, 1)]


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({str(error)[:80]}); restore the file, or remove the line") from error
    if isinstance(value, dict) and "crc32c" in value:
        del value["crc32c"]
        line = line.rstrip(b"\r")  # an editor's
        plain = line[: -len(SUM % 0)] + b"}"
        whole = line.endswith(SUM % google_crc32c.value(plain))
        require(whole, f"{where}: not as it was written, by its crc32c; restore the file, or remove line or sum")
    record = read_file(Record, value, where)
    for name in NEEDED.get(record["kind"], ()):
        require(name in record, f"{where}: no {name}; restore the file, it is damaged")
    for name, value in record.items():
        number = value is None or (isinstance(value, (int, float)) and abs(value) <= sys.float_info.max)
        if not number and name not in Record.__annotations__:
            raise InputError(f"{where}: {name[:40]!r} is no number: {shown(value)}; restore the file, it is damaged")
    return record


def finite(value: Any) -> Any:
    """Plain values with None in place of numbers that are not finite, which JSON cannot say."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case _:
            return value


def _segments(directory: RunDir) -> list[str]:
    """Names of the closed segments, in order (their numbers have a fixed width)."""
    return [name for name in directory.names(SEGMENTS) if name.endswith(".jsonl")]


class Journal:
    """Writes every record to every sink. A sink has `write(record)`, `seal(step)` and `close()`."""

    def __init__(self, *sinks: Any):
        self._sinks = sinks

    def write(self, record: dict[str, Any]) -> None:
        """Adds schema and time, and hands the record on; numbers that are not finite become None."""
        record = finite({"schema": SCHEMA, **record, "time": time.time()})
        for sink in self._sinks:
            sink.write(record)

    def draw(self, name: str, step: int, picture: Image.Image) -> None:
        """Hands a picture to the sinks that can keep one."""
        for sink in self._sinks:
            if hasattr(sink, "draw"):
                sink.draw(name, step, picture)

    def experts(self, name: str, step: int, content: bytes) -> None:
        """Hands telemetry of an evaluation set (`evaluation.telemetry`, Parquet) to the sinks that show it."""
        for sink in self._sinks:
            if hasattr(sink, "experts"):
                sink.experts(name, step, content)

    def seal(self, step: int) -> None:
        """A checkpoint of `step` is being written: what was recorded so far belongs to it."""
        for sink in self._sinks:
            sink.seal(step)

    def close(self) -> None:
        """Ends all sinks."""
        for sink in self._sinks:
            sink.close()


def open_journal(
    run: RunDir,
    *,
    step: int,
    tensorboard: bool,
    wandb: str | None = None,
    config: Any = None,
    sinks: Sequence[Any] = (),
) -> Journal:
    """The journal of a run that stands at `step`: later records are cut off, then writing goes on.

    Of several processes only process 0 records anything. `sinks` are further ones, which come last. `wandb` is a
    project of Weights & Biases, which is told the `config`, plain values.
    """
    if not hosts.is_first():
        return Journal()
    own = [FileSink(run, step) if run.local else SegmentSink(run, step)]
    if tensorboard:
        own.append(TensorBoardSink(run.join("tensorboard"), step, config))
    if wandb is not None:
        from moma_jax.runs.wandb import WandbSink  # an extra

        own.append(WandbSink(run, wandb, config))
    return Journal(*own, *sinks)


class RunSink:
    """What keeps its records in the run's own directory keeps pictures there, too."""

    _run: RunDir

    def draw(self, name: str, step: int, picture: Image.Image) -> None:
        """Writes the picture, as RUN/sheets/NAME-STEP.png."""
        self._run.write(sheet_file(name, step), png_of(picture))


class FileSink(RunSink):
    """metrics.jsonl, a line at a time, each handed to the operating system at once."""

    def __init__(self, run: RunDir, step: int):
        kept = [r for r in records_of(run) or [] if r["step"] <= step and step > 0]
        run.write(METRICS, b"".join(_line(record) for record in kept))
        self._run, self._path = run, run.join(METRICS)
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115

    def write(self, record: dict[str, Any]) -> None:
        """Appends the record; InputError where the disk refuses it."""
        line = _line(record)
        try:
            written = self._file.write(line)
        except OSError as error:
            raise InputError(f"{self._path}: cannot be written: {error.strerror}") from error
        if written != len(line):
            raise InputError(f"{self._path}: cannot be written: the disk is full")

    def seal(self, step: int) -> None:
        """Makes sure that the records survive a crash of the machine, as the checkpoint will."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class SegmentSink(RunSink):
    """Segments on an object store, one per checkpoint, and one of what was told after a run's last one."""

    def __init__(self, run: RunDir, step: int):
        self._run, self._first, self._lines = run, step, []
        for name in _segments(run):
            if int(name.removesuffix(".jsonl").rpartition("-")[2]) > step or step == 0:
                run.delete(name)  # its checkpoint was never finished

    def write(self, record: dict[str, Any]) -> None:
        """Keeps the record until the next checkpoint."""
        self._lines.append(_line(record))

    def seal(self, step: int) -> None:
        """Writes the segment that ends at `step`."""
        if self._lines:
            name = f"{SEGMENTS}{self._first:012d}-{step:012d}.jsonl"
            told = self._run.read(name) or b"" if self._first == step else b""  # by one that was killed before its end
            self._run.write(name, told + b"".join(self._lines))
        self._first, self._lines = step, []

    def close(self) -> None:
        """Drops what no checkpoint covers: the run that goes on will record it again."""
        self._lines = []


def _line(record: dict[str, Any]) -> bytes:
    """The record and its sum."""
    plain = json.dumps(record, allow_nan=False).encode()
    return plain[:-1] + SUM % google_crc32c.value(plain) + b"\n"


class TensorBoardSink:
    """Scalars under kind/name (and kind/eval_set/routing/name), for TensorBoard; its config as hparams."""

    def __init__(self, path: str, step: int, config: Any = None):
        from tensorboardX import SummaryWriter  # slow to import, and off in many runs
        from tensorboardX.summary import hparams

        self._writer = SummaryWriter(path, purge_step=step + 1 if step else None)
        if config is not None and not step:
            plain = (bool, int, float, str)  # what TensorBoard takes
            told = {name: v if isinstance(v, plain) else json.dumps(v) for name, v in leaves(config) if v != {}}
            for part in hparams(told, {"train/loss": 0.0}):
                self._writer.file_writer.add_summary(part)

    def write(self, record: dict[str, Any]) -> None:
        """Adds every number of the record."""
        for name, value in figures_of(record).items():
            self._writer.add_scalar(name, value, record["step"], walltime=record["time"])

    def draw(self, name: str, step: int, picture: Image.Image) -> None:
        """Adds the picture."""
        self._writer.add_image(f"sheets/{name}", np.asarray(picture), step, dataformats="HWC")

    def experts(self, name: str, step: int, content: bytes) -> None:
        """Adds a histogram of gates for every routing, group of experts and layer."""
        counted: dict[str, np.ndarray] = {}
        for row in pq.read_table(io.BytesIO(content), columns=["routing", "group", "layer", "gates"]).to_pylist():
            key = f"gates/{name}/{row['routing']}/{row['group']}/{row['layer']}"
            counted[key] = counted.get(key, 0) + np.array(row["gates"])
        ends = np.linspace(0.1, 1, 10)
        for key, count in counted.items():
            middle = ends - 0.05
            sums = float((count * middle).sum()), float((count * middle**2).sum())
            limits = (0.0, 1.0, int(count.sum()), *sums, ends.tolist(), count.tolist())
            self._writer.add_histogram_raw(key, *limits, global_step=step)

    def seal(self, step: int) -> None:
        """Writes out what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Ends the event file."""
        self._writer.close()


class UserSink:
    """Hands every record to a function."""

    def __init__(self, write: Callable[[dict[str, Any]], Any]):
        self.write = write

    def seal(self, step: int) -> None:
        """Nothing to do: the user has the records."""

    def close(self) -> None:
        """Nothing to do: what the user opened is the user's to close."""


def user_sinks(sink: Any) -> list[UserSink]:
    """The sinks for `sink` of `train`: an object with `write(record)`, a function of a record, or None."""
    if sink is None:
        return []
    write = getattr(sink, "write", sink)
    if not callable(write):
        raise InputError(f"sink: {sink!r} takes no records; give an object with write(record), or a function")
    return [UserSink(write)]
