"""A bucket for a command to write to: a server of Google's protocol (helpers/gcs_server.py) that faults can disturb."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from buckets import SERVER, known_as_google, serving
from loopback import free_port


class Bucket:
    """The server, and what lies there."""

    def __init__(self, url: str, process: subprocess.Popen):
        self.url, self._process = url, process

    def signal(self, number: int) -> None:
        """SIGSTOP, SIGCONT; SIGUSR1: it closes connections without an answer, and the next time it answers again;
        SIGUSR2: it answers well from now on."""
        self._process.send_signal(number)

    def fetch(self, name: str, place: Path) -> None:
        """Copies the folder `name` of the bucket to `place`, a run's records as a local run has them."""
        shutil.rmtree(place / name, ignore_errors=True)
        for inner in sorted(self._names(f"{name}/")):
            path = place / inner
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._get(f"/storage/v1/b/bucket/o/{urllib.parse.quote(inner, safe='')}?alt=media"))
        segments = place / name / "metrics"
        if segments.exists():
            lines = b"".join(path.read_bytes() for path in sorted(segments.iterdir()))
            (place / name / "metrics.jsonl").write_bytes(lines)
            shutil.rmtree(segments)

    def _names(self, prefix: str) -> list[str]:
        names, token = [], ""
        while token is not None:
            asked = urllib.parse.urlencode({"prefix": prefix, **({"pageToken": token} if token else {})})
            found = json.loads(self._get(f"/storage/v1/b/bucket/o?{asked}"))
            names += [item["name"] for item in found.get("items", [])]
            token = found.get("nextPageToken")
        return names

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()


@contextlib.contextmanager
def bucket(*options: str) -> Iterator[Bucket]:
    """A bucket that this process, and those that it starts meanwhile, know as gs://bucket."""
    port, before = free_port(), dict(os.environ)
    with serving(port, SERVER, port, *options) as process:
        os.environ |= known_as_google(port)
        try:
            yield Bucket(os.environ["STORAGE_EMULATOR_HOST"], process)
        finally:
            os.environ.clear()
            os.environ |= before
