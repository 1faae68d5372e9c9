"""One small file for each finished run of a study, to be kept under version control: a zip of what reports read.

A run's directory holds checkpoints, which are large, and lives where it was trained. Its record holds the run's config,
status, summary, metrics, ancestry and losses by document, byte by byte, and is enough for every report. Where a run's
directory is missing its record is unpacked there, so that a study begun on one machine goes on on another.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from moma_jax.config import Config
from moma_jax.errors import InputError
from moma_jax.evaluation.documents import DOCUMENTS
from moma_jax.runs.directory import RunDir
from moma_jax.runs.journal import METRICS
from moma_jax.runs.status import read_status
from moma_jax.storage.directory import Directory
from moma_jax.studies.jobs import Job, require_same_config

FILES = ("config.json", "summary.json", METRICS, "ancestry.json", DOCUMENTS, "status.json")
"""What a record may hold, in the order in which it is unpacked: a run is known by its status, so that comes last."""
MOST_BYTES = 64 << 20
"""Of one file, unpacked; metrics of a study's run have a few hundred thousand."""
PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Those of which unpacking takes little memory; an LZMA file says itself how much it wants."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The date of everything in a record: equal runs have equal records."""


def record_path(folder: str, config: Config) -> Path:
    """Where the record of a run is kept: by the last part of its directory."""
    return Path(folder) / f"{Path(config.run.dir).name}.zip"


def keep(folder: str, job: Job) -> None:
    """Writes the records of a finished job's runs that have none yet, whole or not at all, a seed run's first.

    Raises:
      InputError: there is a record of that name of another run; it stays.
    """
    for config in job.runs:
        path, run = record_path(folder, config), RunDir(config.run.dir)
        if path.exists():
            require_same_config(read_record(path)["config.json"], config, str(path), "records")
            continue
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as record:
            for name in FILES:
                if (found := run.read(name)) is not None:
                    record.writestr(zipfile.ZipInfo(name, EPOCH), found, zipfile.ZIP_DEFLATED, 9)
        Directory(folder).write(path.name, content.getvalue())


def unpack(folder: str, job: Job) -> None:
    """Puts the recorded runs of a job where their directories have none.

    A seed run is unpacked for the report alone, beside the run that grew from it: its weights are not in its record.

    Raises:
      InputError: a record is damaged, or holds a run of another config; nothing was unpacked of it.
    """
    if not (record_path(folder, job.config).is_file() or read_status(job.config.run.dir)):
        return
    for config in job.runs:
        path = record_path(folder, config)
        if path.is_file() and not read_status(config.run.dir):
            content = read_record(path)
            require_same_config(content["config.json"], config, str(path), "records")
            write_run(content, config.run.dir)


def write_run(content: dict[str, bytes], where: str) -> None:
    """Writes a record's files into a directory, the status last."""
    home = Directory(where)
    for name in FILES:
        if name in content:
            home.write(name, content[name])


def read_record(path: str | Path) -> dict[str, Any]:
    """A record's files by name; InputError where it is damaged, too large, or holds anything else."""
    content = {}
    try:
        with zipfile.ZipFile(path) as record:
            for entry in record.infolist():
                if entry.filename not in FILES:
                    raise InputError(f"{path}: holds {entry.filename!r}, which is no part of a run's record")
                if entry.filename in content or entry.compress_type not in PACKINGS:
                    raise InputError(f"{path}: {entry.filename} is doubled or packed as no record is; restore it")
                if entry.file_size > MOST_BYTES:
                    raise InputError(f"{path}: {entry.filename} has {entry.file_size:,} bytes; no record is so large")
                with record.open(entry) as file:
                    content[entry.filename] = file.read(MOST_BYTES)
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, struct.error) as error:
        raise InputError(f"{path}: is damaged or no record ({error}); restore it") from error
    if missing := next((name for name in ("config.json", METRICS, "status.json") if name not in content), None):
        raise InputError(f"{path}: has no {missing}; restore it, or remove it and train the run again")
    return content
