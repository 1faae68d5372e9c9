"""Mutated tars, Parquet files, lines and pictures under a memory limit: broken or refused, and nothing else."""

import io
import json
import multiprocessing
import random
import resource
import tarfile
import time
import traceback

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutations import mutated
from PIL import Image

from moma_jax.codec.pictures import BrokenPicture, read_picture
from moma_jax.config import PrepareConfig
from moma_jax.data.documents import Document
from moma_jax.data.sources import open_source
from moma_jax.errors import InputError

MEMORY, SECONDS, SAMPLES = 4 << 30, 10.0, 12
PICTURES = dict.fromkeys(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"))


def picture(number, kind="PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def tar(packed=False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if packed else "w") as archive:
        for number in range(SAMPLES):
            for suffix, content in (("png", picture(number)), ("txt", b"caption %d" % number)):
                header = tarfile.TarInfo(
                    f"{number:03}.{suffix}" if number % 4 else f"{'long' * 40}{number:03}.{suffix}"
                )
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def table() -> bytes:
    columns = {"image": [picture(n) for n in range(SAMPLES)], "text": [f"caption {n}" for n in range(SAMPLES)]}
    buffer = io.BytesIO()
    # Checksums of pages are what lets Parquet tell a changed byte; a reader without them cannot.
    pq.write_table(pa.table(columns), buffer, row_group_size=4, write_page_checksum=True)
    return buffer.getvalue()


def lines() -> bytes:
    return b"".join(json.dumps({"text": f"caption {n}"}).encode() + b"\n" for n in range(SAMPLES))


FILES = {"tar": ("a.tar", tar), "tar.gz": ("a.tar.gz", lambda: tar(True)), "parquet": ("a.parquet", table),
         "jsonl": ("a.jsonl", lines)}  # fmt: skip


def limited(function, *arguments):
    """What a function says in a process of its own with little memory; a fresh one, as JAX reserves more than that."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        process.join()
        return [f"the process died: exit code {process.exitcode}"]
    finally:
        process.join()


def _run(pipe, function, arguments):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        pipe.send(function(*arguments))
    except BaseException:
        pipe.send([traceback.format_exc()])


def read_mutants(kind, folder, count, seed):
    """What went wrong with so many mutants of a kind of file: lines, none where all is well."""
    name, make = FILES[kind]
    content, chance, wrong = make(), random.Random(seed), []
    allowed = {(f"caption {n}", picture(n) if kind != "jsonl" else None) for n in range(SAMPLES)}
    for number in range(count):
        path = folder / name
        mutant = mutated(content, chance)
        path.write_bytes(mutant)
        began = time.monotonic()
        try:
            source = open_source(PrepareConfig(source=str(path)))
            documents = [item for unit in range(source.units()) for item in source.read(unit)]
        except InputError as error:
            if "\n" in str(error):
                wrong.append(f"{number}: several lines: {error}")
            documents = []
        except Exception:
            wrong.append(f"{number}: {traceback.format_exc()}")
            continue
        if (taken := time.monotonic() - began) > SECONDS:
            wrong.append(f"{number}: {taken:.0f} s")
        for item in documents:
            if isinstance(item, Document):
                text = "".join(s.text for s in item.segments if hasattr(s, "text"))
                shown = next((s.image for s in item.segments if hasattr(s, "image")), None)
                as_it_was = (text, shown) in allowed
                # Bytes of a member that were changed within it cannot be told without a checksum; those of the others
                # must be what they were, and none may come from somewhere else.
                from_mutant = shown is None or shown in mutant or kind == "tar.gz"
                if not as_it_was and (kind in ("parquet", "tar.gz") or not from_mutant):
                    wrong.append(f"{number}: {item.id} became {text!r}")
        lost = SAMPLES - sum(isinstance(item, Document) for item in documents)
        if documents and lost and all(isinstance(item, Document) for item in documents) and kind != "jsonl":
            wrong.append(f"{number}: {lost} documents were lost without a word")
    return wrong


@pytest.mark.parametrize("kind", FILES)
def test_mutated_files(tmp_path, kind):
    assert limited(read_mutants, kind, tmp_path, 300, 0) == []


def read_pictures(count, seed):
    """What went wrong with mutated pictures."""
    chance, wrong = random.Random(seed), []
    for number in range(count):
        kind = chance.choice(list(PICTURES))
        began = time.monotonic()
        try:
            found = read_picture(mutated(picture(number % 5, kind), chance), 16, chance.choice(["whole", "random"]))
            assert found.pixels_HW3.shape == (16, 16, 3) and found.pixels_HW3.dtype == np.uint8
        except BrokenPicture as error:
            if "\n" in str(error):
                wrong.append(f"{number}: several lines: {error}")
        except Exception:
            wrong.append(f"{number} {kind}: {traceback.format_exc()}")
        if (taken := time.monotonic() - began) > SECONDS:
            wrong.append(f"{number} {kind}: {taken:.0f} s")
    return wrong


def test_mutated_pictures():
    assert limited(read_pictures, 1000, 0) == []
