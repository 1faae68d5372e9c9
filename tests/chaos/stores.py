"""A bucket for a command to write to: a server of Google's protocol (helpers/gcs_server.py) that faults can disturb."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

SERVER = Path(__file__).resolve().parents[1] / "helpers" / "gcs_server.py"
SETTLED = {
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
    "GOOGLE_CLOUD_PROJECT": "p",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
}


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, str(SERVER), str(port), *options], **quiet)
    url, before = f"http://127.0.0.1:{port}", dict(os.environ)
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        os.environ |= SETTLED | {"TENSORSTORE_GCS_HTTP_URL": url, "STORAGE_EMULATOR_HOST": url}
        yield Bucket(url, process)
    finally:
        os.environ.clear()
        os.environ |= before
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
