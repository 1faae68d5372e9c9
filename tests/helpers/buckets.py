"""Servers that speak the protocols of object stores, in processes of their own."""

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path

from loopback import free_port

HELPERS = Path(__file__).parent
SERVER = HELPERS / "gcs_server.py"


@contextlib.contextmanager
def serving(port, *words):
    """The process of a server, once it listens."""
    process = subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def known_as_google(port):
    """The environment in which gs:// is the server of `port`."""
    url = f"http://127.0.0.1:{port}"
    return {
        "TENSORSTORE_GCS_HTTP_URL": url,
        "STORAGE_EMULATOR_HOST": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "GOOGLE_CLOUD_PROJECT": "p",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


@contextlib.contextmanager
def google(*faults):
    """The environment in which gs:// is a server here."""
    port = free_port()
    with serving(port, SERVER, port, *faults):
        yield known_as_google(port) | {"PYTHONPATH": f"{HELPERS}:{HELPERS.parents[1]}"}
