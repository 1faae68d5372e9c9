"""What the tests of sources share."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from moma_jax.config import PrepareConfig
from moma_jax.data.documents import Broken, Document, content_hash
from moma_jax.data.sources import open_source


def png(shade=0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def everything(source):
    """All documents and all broken rows, after checking that a second reading gives the same."""
    items = [item for unit in range(source.units()) for item in source.read(unit)]
    again = [item for unit in reversed(range(source.units())) for item in reversed(list(source.read(unit)))][::-1]
    assert [i.id for i in items] == [i.id for i in again]
    documents = [i for i in items if isinstance(i, Document)]
    assert [content_hash(d) for d in documents] == [content_hash(d) for d in again if isinstance(d, Document)]
    return documents, {i.id: i.reason for i in items if isinstance(i, Broken)}


def opened(source, kind="auto", modalities=(), **settings):
    return open_source(PrepareConfig(source=str(source), kind=kind, **settings), modalities)


def write_lines(path, rows):
    lines = (row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows)
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))


def write_parquet(path, columns, **options):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
