"""The same bytes whoever writes a store, in whatever order, and whoever dies meanwhile; from every kind of source."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from small_stores import files_of, make_source, settings

from moma_jax.data import engines
from moma_jax.data.prepare import prepare
from moma_jax.errors import InputError, RunError


def jpeg(number) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def caption(number) -> str:
    return f"a picture, number {number}"


# Sources of 200 documents in two splits, of which 1% are broken -------------------------------------------------------


def tars(folder):
    for name, numbers in (("train-0", range(90)), ("train-1", range(90, 180)), ("val-0", range(180, 200))):
        with webdataset.TarWriter(str(folder / f"{name}.tar"), encoder=False) as writer:
            for n in numbers:
                picture = b"broken" if n % 100 == 50 else jpeg(n)
                writer.write({"__key__": f"{n:05}", "jpg": picture, "txt": caption(n).encode()})


def parquet(folder):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for name, numbers in (("train", range(180)), ("validation", range(180, 200))):
        images = [{"bytes": b"broken" if n % 100 == 50 else jpeg(n), "path": f"{n}.jpg"} for n in numbers]
        columns = {"image": pa.array(images, kind), "text": [caption(n) for n in numbers]}
        pq.write_table(pa.table(columns), folder / f"{name}-00000-of-00001.parquet", row_group_size=32)


def image_folder(folder):
    for name, numbers in (("train", range(180)), ("validation", range(180, 200))):
        (folder / name).mkdir()
        with open(folder / name / "metadata.jsonl", "w") as file:
            for n in numbers:
                (folder / name / f"{n}.jpg").write_bytes(b"broken" if n % 100 == 50 else jpeg(n))
                file.write(json.dumps({"file_name": f"{n}.jpg", "text": caption(n)}) + "\n")


def lines(folder):
    for name, numbers in (("train", range(180)), ("validation", range(180, 200))):
        with pa.output_stream(str(folder / f"{name}.jsonl.gz"), compression="gzip") as file:
            for n in numbers:
                file.write((("no json" if n % 100 == 50 else json.dumps({"text": caption(n)})) + "\n").encode())


def obelics(folder):
    (folder / "set").mkdir()
    (folder / "pictures").mkdir()
    with webdataset.TarWriter(str(folder / "pictures" / "0.tar"), encoder=False) as writer:
        for n in range(200):
            writer.write({"__key__": f"{n:05}", "jpg": jpeg(n)})
    pq.write_table(pa.table({"url": [f"u{n}" for n in range(200)], "key": [f"{n:05}" for n in range(200)]}),
                   folder / "pictures" / "0.parquet")  # fmt: skip
    for name, numbers in (("train", range(180)), ("validation", range(180, 200))):
        images = [["gone" if n % 100 == 50 else f"u{n}", None] for n in numbers]
        columns = {"images": images, "texts": [[None, caption(n)] for n in numbers]}
        pq.write_table(pa.table(columns), folder / "set" / f"{name}-0.parquet", row_group_size=32)


KINDS = {"tar": tars, "parquet": parquet, "folder": image_folder, "lines": lines, "obelics": obelics}


def source_of(kind, folder):
    """(settings of a source of a kind, which is made)."""
    folder.mkdir()
    KINDS[kind](folder)
    if kind == "obelics":
        return settings(str(folder / "set"), images=str(folder / "pictures"), parts=4)
    return settings(str(folder), parts=4)


def begun(config, out):
    """A process that prepares a store."""
    program = (
        "import sys\nfrom moma_jax.config import PrepareConfig\nfrom moma_jax.data.prepare import prepare\n"
        f"prepare({config!r}, {out!r}, progress=False)\n"
    )
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_with_splits_broken_members_and_a_kill(tmp_path, kind):
    config = source_of(kind, tmp_path / "source")
    manifest = prepare(config, str(tmp_path / "one"), progress=False)
    assert manifest["documents"] == 198 and manifest["broken"] == 2
    counts = manifest["counts"]
    assert sum(c["documents"] for name, c in counts.items() if name.endswith("-validation")) == 20
    process = begun(config, str(tmp_path / "two"))
    while process.poll() is None and not list(Path(tmp_path / "two").glob("parts/0*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "two" / "manifest.json").exists() or process.returncode == 0
    assert prepare(config, str(tmp_path / "two"), progress=False) == manifest
    first, second = ({n: h for n, h in files_of(tmp_path / s).items() if ".writing" not in n} for s in ("one", "two"))
    assert first == second


# Engines --------------------------------------------------------------------------------------------------------------


def test_workers_write_the_same_bytes(tmp_path):
    config = settings(make_source(tmp_path / "source", documents=120), parts=5)
    manifest = prepare(config, str(tmp_path / "one"), progress=False)
    assert prepare(config, str(tmp_path / "two"), workers=2, progress=False) == manifest
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


class Dies:
    """A writer that takes its process with it, the first times that it is asked for a part."""

    def __init__(self, folder, times, part=2):
        self.folder, self.times, self.part = folder, times, part

    def __call__(self):
        return self

    def write(self, part):
        """Says the part and its process."""
        tries = len(os.listdir(self.folder))
        if part == self.part and tries < self.times:
            (Path(self.folder) / str(tries)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"part": part}


class Fails:
    """A writer that finds something wrong."""

    def __call__(self):
        return self

    def write(self, part):
        """Raises."""
        raise InputError(f"part {part}: wrong")


def test_a_worker_that_dies_costs_its_part_alone(tmp_path):
    found = dict(engines.in_processes(Dies(tmp_path, 2), [1, 2, 3, 4], 2))
    assert found == {part: {"part": part} for part in (1, 2, 3, 4)}


def test_a_part_that_kills_its_workers_is_given_up(tmp_path):
    with pytest.raises(RunError, match="part 2: its worker died 3 times"):
        dict(engines.in_processes(Dies(tmp_path, 100), [1, 2, 3], 2))


def test_what_a_worker_finds_wrong_is_raised_here():
    with pytest.raises(InputError, match="part 1: wrong"):
        dict(engines.in_processes(Fails(), [1], 2))


# Ray ------------------------------------------------------------------------------------------------------------------


def test_ray_with_an_actor_that_is_killed_writes_the_same_bytes(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="the extra [ray] is not installed")
    config = settings(make_source(tmp_path / "source", documents=120), parts=5)
    manifest = prepare(config, str(tmp_path / "one"), progress=False)
    killed = []
    real = engines._dealt

    def dealt(ray, actor, make, crew, parts):
        assert len(crew) == 2
        os.kill(ray.get(crew[0].process.remote()), signal.SIGKILL)
        killed.append(crew[0])
        return real(ray, actor, make, crew, parts)

    monkeypatch.setattr(engines, "_dealt", dealt)
    assert prepare(config, str(tmp_path / "ray"), engine="ray", workers=2, progress=False) == manifest
    assert killed and files_of(tmp_path / "one") == files_of(tmp_path / "ray")


def test_ray_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    config = settings(make_source(tmp_path / "source", documents=20), parts=1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"Ray is not installed; install it with: pip install 'moma_jax\[ray\]'"):
        prepare(config, str(tmp_path / "store"), engine="ray", progress=False)
    with pytest.raises(InputError, match="--ray-address: only with --engine ray"):
        prepare(config, str(tmp_path / "store"), ray_address="x:1", progress=False)


def test_an_address_that_nobody_answers_is_one_line(tmp_path):
    pytest.importorskip("ray", reason="the extra [ray] is not installed")
    config = settings(make_source(tmp_path / "source", documents=20), parts=1)
    with pytest.raises(InputError, match=r"--ray-address: nobody answers at 127.0.0.1:9"):
        prepare(config, str(tmp_path / "store"), engine="ray", ray_address="127.0.0.1:9", progress=False)
