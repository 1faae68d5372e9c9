"""Memory of a conversion there and back: the largest tensor and at most 1 GiB, whatever the model's size.

`python tests/convert/test_conversion_memory.py DIR` prints the figures of docs/convert.md.
"""

import sys
import threading
import time
from pathlib import Path

import languages
import pytest
from processes import output, spawn
from small_codecs import small_codec

from moma_jax.codec.folder import write_codec
from moma_jax.convert import from_language_model, to_language_model

pytestmark = pytest.mark.long  # a checkpoint of 0.9 GB, some minutes on a slow disk
LARGEST_GB = 1024 * 4096 * 4 * 8 / 1e9
"""The table of ids, float32: 32,768 x 1,024."""


def folder_of(root: Path) -> Path:
    """A Qwen3 of 430 million parameters, bfloat16."""
    sizes = {"WIDTH": 1024, "HIDDEN": 4096, "LAYERS": 24, "IDS": 32768, "HEADS": 16, "KEYS": 4}
    for name, size in sizes.items():
        setattr(languages, name, size)
    languages.WIDTHS["qwen3"], languages.OWN["qwen3"] = 64, {**languages.OWN["qwen3"], "head_dim": 64}
    write_codec(str(root / "codec"), small_codec())
    return languages.write(root / "folder", "qwen3", vocab_size=32768)


def anonymous_gb() -> float:
    """What this process holds that no file does."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["RssAnon"].split()[0]) / 1e6


def measured(run) -> tuple[float, float]:
    """Gigabytes beyond those before, at most, and seconds."""
    before, seen, done = anonymous_gb(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.02):
            seen[0] = max(seen[0], anonymous_gb())

    thread, start = threading.Thread(target=watch), time.monotonic()
    thread.start()
    run()
    done.set()
    thread.join()
    return seen[0] - before, time.monotonic() - start


def test_memory_is_bounded(tmp_path):
    folder_of(tmp_path)
    for way in ("there", "back"):
        grown, _ = map(float, output(spawn(__file__, tmp_path, way)).split())
        assert 0 < grown < LARGEST_GB + 1.074, way


if __name__ == "__main__":
    root = Path(sys.argv[1])
    if len(sys.argv) < 3:
        folder_of(root)
    folder, run, codec = (str(root / name) for name in ("folder", "run", "codec"))
    ways = {
        "there": lambda: from_language_model("qwen3", folder, run, codec=codec, quiet=True),
        "back": lambda: to_language_model("qwen3", run, str(root / "back"), quiet=True),
    }
    for way in sys.argv[2:] or ways:
        print(*(f"{figure:.3f}" for figure in measured(ways[way])))
