"""Parquet sources: what is read from which columns, and what is named as broken."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from paths import ROOT
from reading import everything, opened, png, write_parquet

from moma_jax.data.documents import Broken, Picture, Text
from moma_jax.data.sources import parquet
from moma_jax.errors import InputError

CORPUS = Path(os.environ.get("MOMA_CORPUS", ROOT.parent / "shared" / "data"))
needs_corpus = pytest.mark.skipif(not CORPUS.is_dir(), reason=f"no corpus at {CORPUS}; set MOMA_CORPUS")


def small_corpus(folder):
    """Two pairs in each split, one text, and one interleaved document in each split."""
    for split in ("train", "validation"):
        write_parquet(
            folder / "pairs" / f"{split}-00000-of-00001.parquet",
            {
                "id": [f"{split}/0", f"{split}/1"],
                "source": ["drawings", None],
                "caption": ["a dot", "a spot"],
                "group": ["g", None],
                "image": [png(1), png(2)],
            },
        )
        segments = [
            {"kind": "text", "text": "First", "image_id": None},
            {"kind": "image", "text": None, "image_id": f"{split}/1"},
            {"kind": "image", "text": None, "image_id": f"{split}/0"},
        ]
        broken = [{"kind": "image", "text": None, "image_id": "train/0" if split == "validation" else "nowhere"}]
        write_parquet(
            folder / "interleaved" / f"{split}-00000-of-00001.parquet",
            {"id": [f"{split}/story", f"{split}/lost", f"{split}/none"], "segments": [segments, broken, None]},
        )
    write_parquet(folder / "text" / "train.parquet", {"text": ["a word", "", None], "id": ["t0", "t1", None]})


def test_parquet_reads_pairs_text_and_interleaved(tmp_path):
    small_corpus(tmp_path)
    documents, broken = everything(opened(tmp_path))
    by_id = {d.id: d for d in documents}
    assert set(by_id) == {"train/0", "train/1", "validation/0", "validation/1", "train/story", "validation/story", "t0"}
    pair = by_id["train/0"]
    assert (pair.collection, pair.split, pair.group, pair.source) == ("pairs", "train", "g", "drawings")
    assert pair.segments[0] == Text("a dot") and pair.segments[1].image == png(1)
    assert by_id["train/1"].source == tmp_path.name
    story = by_id["validation/story"]
    assert (story.collection, story.split) == ("interleaved", "validation")
    assert [getattr(s, "image", None) for s in story.segments] == [None, png(2), png(1)]
    assert (by_id["t0"].collection, by_id["t0"].split) == ("text", "train")
    assert "no pair of the split train" in broken["train/lost"]
    assert "no pair of the split validation" in broken["validation/lost"]
    assert {"train/none", "t1", "text/train.parquet:2"} <= set(broken)


def test_parquet_rows_that_are_broken_do_not_hide_the_others(tmp_path):
    captions = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 2, 4], "<i4")), pa.py_buffer(b"\xff\xfeok"))
    image = [{"bytes": png(), "path": "a.png"}] * 2
    write_parquet(tmp_path / "a.parquet", {"id": ["bad", "good"], "caption": captions, "image": image})
    documents, broken = everything(opened(tmp_path / "a.parquet"))
    assert [d.id for d in documents] == ["good"]
    assert documents[0].segments[1].image == png()
    assert list(broken) == ["bad"]


def test_a_damaged_row_group_counts_every_row(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, {"text": [f"{i} {'x' * 50}" for i in range(600)]}, row_group_size=300, compression="zstd")
    content = bytearray(path.read_bytes())
    content[20:400] = bytes(380)
    path.write_bytes(content)
    source = opened(path)
    documents, broken = everything(source)
    assert source.units() == 4
    assert len(broken) == 300 and len(documents) == 300


def test_units_cut_row_groups_and_read_each_column_once(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", {"text": [str(i) for i in range(1000)]}, row_group_size=600)
    source = opened(tmp_path)
    reads = []
    plain = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a, **k: reads.append(a) or plain(*a, **k))
    texts = [d.segments[0].text for unit in range(source.units()) for d in source.read(unit)]
    assert texts == [str(i) for i in range(1000)]
    assert (source.units(), len(reads)) == (5, 2)


def test_the_cache_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "CACHE_BYTES", 100)
    write_parquet(tmp_path / "a.parquet", {"text": [str(i) * 20 for i in range(40)]}, row_group_size=10)
    source = opened(tmp_path)
    assert len([d for unit in range(source.units()) for d in source.read(unit)]) == 40
    assert len(source._cache) == 1


@pytest.mark.parametrize(
    ("name", "columns", "word"),
    [
        ("a.parquet", {"number": [1]}, "columns number"),
        ("a.parquet", {"text": [1]}, "columns text"),
        ("a.parquet", {"segments": ["text"]}, "segments holds string"),
        ("test-00000-of-00001.parquet", {"text": ["a"]}, "split test"),
        ("pages.parquet", {"segments": [[{"text": "a", "image_id": None}]]}, "call all files train-"),
    ],
)
def test_parquet_that_is_something_else_is_refused(tmp_path, name, columns, word):
    write_parquet(tmp_path / name, columns)
    with pytest.raises(InputError, match=word):
        opened(tmp_path)


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no readable Parquet"):
        opened(tmp_path)


@needs_corpus
def test_the_corpus_is_read_whole():
    documents, broken = [], 0
    source = opened(CORPUS)
    assert source.units() > 50
    pictures = {}
    for unit in range(source.units()):
        for item in source.read(unit):
            broken += isinstance(item, Broken)
            documents.append((item.collection, item.split))
            pictures[item.split] = pictures.get(item.split, 0) + sum(isinstance(s, Picture) for s in item.segments)
    assert not broken
    counts = {key: documents.count(key) for key in set(documents)}
    assert counts == {
        ("pairs", "train"): 7764,
        ("pairs", "validation"): 401,
        ("text", "train"): 24482,
        ("text", "validation"): 1297,
        ("interleaved", "train"): 2804,
        ("interleaved", "validation"): 160,
    }
    assert pictures == {"train": 7764 + 11958, "validation": 401 + 609}


def test_ids_of_pairs_that_interleaved_documents_name_must_be_unique(tmp_path):
    """Shards that each count from 0 would give documents the picture of another shard."""
    small_corpus(tmp_path)
    write_parquet(
        tmp_path / "pairs" / "train-00001-of-00002.parquet",
        {"id": ["train/0"], "image": [png(9)], "caption": ["another"]},
    )
    with pytest.raises(InputError, match="two pairs have the id 'train/0', the second in pairs/train-00001"):
        everything(opened(tmp_path))
