"""Sources: what they read, what they name as broken, and that they read the same every time."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from pyarrow import fs
from reading import everything, opened, png, write_lines, write_parquet

from moma_jax.data import sources
from moma_jax.data.documents import Codes, Document, Picture, Text, content_hash, is_held_out
from moma_jax.data.sources.files import Folder, splits
from moma_jax.errors import InputError

# Documents ------------------------------------------------------------------------------------------------------------


def test_content_hash_sees_content_and_order_alone():
    def of(*segments, id="a"):
        return content_hash(Document(id, "s", "interleaved", list(segments)))

    assert of(Text("ab"), Text("c")) == of(Text("ab"), Text("c"), id="b")
    pixels = np.zeros((2, 3, 3), np.uint8)
    different = [
        of(Text("ab"), Text("c")),
        of(Text("a"), Text("bc")),
        of(Text("abc")),
        of(Picture(b"abc")),
        of(Picture(pixels)),
        of(Picture(pixels.reshape(3, 2, 3))),
        of(Codes("image", np.array([1, 2]))),
        of(Codes("audio", np.array([1, 2]))),
        of(Codes("image", np.array([2, 1]))),
    ]
    assert len(set(different)) == len(different)
    assert of(Codes("image", np.array([1], np.int64))) == of(Codes("image", np.array([1], np.uint8)))


def test_held_out_follows_split_then_group_then_content():
    def held(text="t", **known):
        return is_held_out(Document("a", "s", "text", [Text(text)], **known), 0.5)

    assert held(split="validation", group="g") and not held(split="train", group="g")
    assert len({held(str(i), group="g") for i in range(50)}) == 1
    assert 20 < sum(held(group=str(i)) for i in range(100)) < 80
    assert 20 < sum(held(str(i)) for i in range(100)) < 80


# Folders of pictures --------------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_and_captions(tmp_path):
    outside = tmp_path / "outside"
    folder = tmp_path / "pictures"
    for path in (outside, folder / "deep" / "er"):
        path.mkdir(parents=True)
    for path, caption in (("a.png", "an a"), ("deep/train.JPG", "a b\n"), ("deep/er/..c.webp", "\ufeffa c")):
        (folder / path).write_bytes(png())
        (folder / path).with_suffix(".txt").write_text(caption, encoding="utf-8")
    (outside / "secret.png").write_bytes(png())
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "link.txt").write_text("a secret")
    (folder / "inner.png").symlink_to(folder / "a.png")
    (folder / "inner.txt").write_text("a link within")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "gone.txt").write_text("gone")
    os.mkfifo(folder / "pipe.png")
    (folder / "pipe.txt").write_text("a pipe")
    (folder / "lone.png").write_bytes(png())
    (folder / "empty.png").write_bytes(png())
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.png").write_bytes(png())
    (folder / "latin.txt").write_bytes(b"caf\xe9")

    (folder / "up").symlink_to(outside)
    with pytest.raises(InputError, match="up: a link to a folder, which is not followed"):
        opened(folder)
    assert len(everything(opened(folder / "a.png"))[0]) == 1, "what lies beside one file is not entered"
    (folder / "up").unlink()
    documents, broken = everything(opened(folder))
    found = {d.id: d.segments[0].text for d in documents}
    assert found == {"a.png": "an a", "inner.png": "a link within", "deep/train.JPG": "a b", "deep/er/..c.webp": "a c"}
    assert {d.split for d in documents} == {None}, "a picture's own name says nothing of its split"
    assert all(d.collection == "pairs" and d.segments[1].image == png() for d in documents)
    assert set(broken) == {"link.png", "gone.png", "lone.png", "empty.png", "latin.png", "pipe.png"}
    assert "leads out of the folder" in broken["link.png"]


def test_splits_are_read_from_names_at_any_depth():
    """One rule for every kind of source; only a picture's own name is no evidence."""
    assert splits(["train/a.png", "birds/Validation/b.png", "birds/dev/train.png"], names=False) == {
        "train/a.png": "train",
        "birds/Validation/b.png": "validation",
        "birds/dev/train.png": "validation",
    }
    assert splits(["train.png", "b.png"], names=False) == {"train.png": None, "b.png": None}
    names = ["text/train-00000-of-00001.parquet", "valid.parquet", "val_0.parquet", "a/dev.b.parquet"]
    assert list(splits(names, names=True).values()) == ["train", "validation", "validation", "validation"]
    names = ["cc3m-train-0.tar", "cc3m-validation-0.tar", "train2017/a.png", "val2017/b.png", "split=val/c.parquet"]
    assert list(splits(names, names=True).values()) == ["train", "validation", "train", "validation", "validation"]
    for paths, word in [
        (["train-0.parquet", "other.parquet"], "train-0.parquet names its split, other.parquet does not; name every"),
        (["train/a.parquet", "test-0.parquet"], "test-0.parquet is of the split test, .*; move it out"),
        (["train/validation-0.parquet"], "names both train and validation"),
    ]:
        with pytest.raises(InputError, match=word):
            splits(paths, names=True)


def test_a_folder_and_json_lines_follow_the_names(tmp_path):
    for path in ("birds/validation/a", "birds/train/b"):
        (tmp_path / "folder" / path).parent.mkdir(parents=True)
        (tmp_path / "folder" / f"{path}.png").write_bytes(png())
        (tmp_path / "folder" / f"{path}.txt").write_text("a bird")
    documents, _ = everything(opened(tmp_path / "folder"))
    assert {d.id: d.split for d in documents} == {
        "birds/train/b.png": "train",
        "birds/validation/a.png": "validation",
    }
    (tmp_path / "lines").mkdir()
    rows = [{"id": "a", "segments": [{"text": "a"}]}, {"id": "b", "split": "train", "segments": [{"text": "b"}]}]
    write_lines(tmp_path / "lines" / "valid.jsonl", rows)
    documents, _ = everything(opened(tmp_path / "lines"))
    assert [d.split for d in documents] == ["validation", "train"], "a line's own split goes first"


def test_large_files_are_not_read(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png() + bytes(2048))
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr("moma_jax.data.sources.files.MAX_FILE_BYTES", 1 << 10)
    _, broken = everything(opened(tmp_path))
    assert "larger than" in broken["a.png"]


def test_other_file_systems_are_read_alike(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png())
    (tmp_path / "sub" / "a.txt").write_text("an a")
    (tmp_path / "b.txt").write_text("no picture")
    remote = Folder(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "")
    local = Folder(fs.LocalFileSystem(), str(tmp_path), local=True)
    assert remote.files(".txt", ".png") == local.files(".txt", ".png")
    assert [name for name, _ in local.files(".png")] == ["sub/a.png"]
    assert remote.read("sub/a.txt") == local.read("sub/a.txt") == b"an a"
    for folder in (remote, local):
        for name in ("../a", "/etc/hostname", "sub/../../a", "a\0b", "..", "."):
            with pytest.raises((ValueError, OSError)):
                folder.read(name)


# JSON lines -----------------------------------------------------------------------------------------------------------


def test_jsonl_documents(tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.png").write_bytes(png())
    text, image = {"text": "hello"}, {"image": "img/a.png"}
    rows = [
        {"id": "story", "split": "validation", "group": 7, "segments": [text, image, text]},
        {"segments": [image, text]},
        {"id": "words", "segments": [text, {"text": ""}]},
        "",
        "{",
        "[1]",
        "[" * 100000,
        b"\xff",
        {"id": "b1", "segments": "x"},
        {"id": "b2", "segments": [{"picture": 1}]},
        {"id": "b3", "segments": []},
        {"id": "b4", "split": "test", "segments": [text]},
        {"id": "b5", "segments": [{"image": "../a.png"}]},
        {"id": "b6", "segments": [{"image": "img/none.png"}]},
        '{"id": "b7", "segments": [{"text": "\\ud800"}]}',
        {"id": "b8", "segments": [{"codes": [1]}]},
        {"id": "b9", "segments": [{"image": "/etc/hostname"}]},
        {"id": "b10", "segments": [{"text": 3}]},
        '{"id": "\\ud800", "group": "\\udfff", "segments": [{"text": "odd names"}]}',
    ]
    write_lines(tmp_path / "a.jsonl", rows)
    documents, broken = everything(opened(tmp_path / "a.jsonl"))
    story, pair, words, odd = documents
    assert (odd.id, odd.group) == ("?", "?")
    assert (story.id, story.collection, story.split, story.group) == ("story", "interleaved", "validation", "7")
    assert (pair.collection, pair.segments[0], pair.split) == ("pairs", Text("hello"), None)
    assert pair.id.startswith("a.jsonl:")
    assert (words.collection, words.segments) == ("text", [Text("hello")])
    assert {f"b{i}" for i in range(1, 11)} <= set(broken)
    assert len(broken) == 14
    assert all("\n" not in reason and reason for reason in broken.values())
    assert "leads out" in broken["b5"] and "leads out" in broken["b9"]


def test_each_line_belongs_to_one_unit(tmp_path):
    random = np.random.default_rng(0)
    texts = [f"{i} " + "x" * int(n) for i, n in enumerate(random.integers(0, 3000, 200))]
    texts[50] += "y" * 20000
    write_lines(tmp_path / "a.jsonl", [{"segments": [{"text": t}]} for t in texts[:120]])
    write_lines(tmp_path / "b.jsonl", [{"segments": [{"text": t}]} for t in texts[120:]])
    with open(tmp_path / "b.jsonl", "ab") as file:
        file.write(b'{"segments": [{"text": "no line end"}]}')
    source = opened(tmp_path)
    documents, broken = everything(source)
    assert source.units() > 30 and not broken
    assert [d.segments[0].text for d in documents] == [*texts, "no line end"]
    assert len({d.id for d in documents}) == 201


def test_a_line_starting_on_a_boundary_is_read_once(tmp_path):
    line = json.dumps({"segments": [{"text": "x" * 100}]}) + "\n"
    line = line.replace("x" * 100, "x" * (100 + 256 - len(line)))
    (tmp_path / "a.jsonl").write_text(line * 64)
    source = opened(tmp_path)
    assert len(line) == 256 and source.units() == 4
    assert len(everything(source)[0]) == 64


def test_a_line_that_is_too_long_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.jsonl, "MAX_LINE_BYTES", 500)
    write_lines(tmp_path / "a.jsonl", [{"segments": [{"text": t}]} for t in ("a", "b" * 9000, "c")])
    documents, broken = everything(opened(tmp_path))
    assert [d.segments[0].text for d in documents] == ["a", "c"]
    assert ["longer than" in reason for reason in broken.values()] == [True]


# Ready codes ----------------------------------------------------------------------------------------------------------

CODED = [
    {"id": "pair", "segments": [{"codes": [0, 1, 2, 7]}, {"text": "four"}]},
    {"id": "short", "segments": [{"codes": [0, 1, 2]}]},
    {"id": "range", "segments": [{"codes": [0, 1, 2, 8]}]},
    {"id": "negative", "segments": [{"codes": [0, 1, 2, -1]}]},
    {"id": "words", "segments": [{"text": "only text"}]},
]


def test_codes_as_json_lines(tmp_path):
    wrong = [
        {"id": "float", "segments": [{"codes": [0, 1, 2, 3.5]}]},
        {"id": "bool", "segments": [{"codes": [True, 1, 2, 3]}]},
        {"id": "other", "segments": [{"codes": [0, 1, 2, 3], "modality": "audio"}]},
        {"id": "list", "segments": [{"codes": [0, 1, 2, 3], "modality": ["image"]}]},
        {"id": "image", "segments": [{"image": "a.png"}]},
    ]
    write_lines(tmp_path / "a.jsonl", CODED + wrong)
    documents, broken = everything(opened(tmp_path, codebook=8, codes_per_image=4))
    pair, words = documents
    assert (pair.collection, pair.segments[0], pair.segments[1].modality) == ("pairs", Text("four"), "image")
    assert pair.segments[1].codes.tolist() == [0, 1, 2, 7] and pair.segments[1].codes.dtype == np.int32
    assert words.collection == "text"
    assert set(broken) == {"short", "range", "negative", "float", "bool", "other", "list", "image"}
    assert "3 codes of image, not 4" in broken["short"] and "outside 0..7" in broken["range"]


def test_codes_as_parquet(tmp_path):
    segments = [[{"text": s.get("text"), "codes": s.get("codes")} for s in row["segments"]] for row in CODED]
    ids = [row["id"] for row in CODED]
    write_parquet(tmp_path / "a" / "Val_00000-of-00001.parquet", {"id": ids, "segments": segments})
    write_parquet(tmp_path / "a" / "train.parquet", {"caption": ["four", "short"], "codes": [[3, 3, 3, 3], [1]]})
    documents, broken = everything(opened(tmp_path, codebook=8, codes_per_image=4))
    assert [(d.id, d.collection, d.split) for d in documents] == [
        ("pair", "pairs", "validation"),
        ("words", "text", "validation"),
        ("a/train.parquet:0", "pairs", "train"),
    ]
    assert set(broken) == {"short", "range", "negative", "a/train.parquet:1"}


def test_codes_of_several_modalities(tmp_path):
    segments = [{"text": "a"}, {"codes": [1, 2]}, {"codes": [9, 9, 9], "modality": "audio"}]
    write_lines(tmp_path / "a.jsonl", [{"id": "x", "segments": segments}])
    modalities = [
        SimpleNamespace(name=name, size=size, span=span)
        for name, size, span in (("text", 300, 0), ("image", 4, 2), ("audio", 10, 0))
    ]
    documents, broken = everything(opened(tmp_path, "codes", modalities))
    assert not broken
    assert [(s.modality, s.codes.tolist()) for s in documents[0].segments[1:]] == [
        ("image", [1, 2]),
        ("audio", [9, 9, 9]),
    ]


def test_codes_need_their_sizes(tmp_path):
    write_lines(tmp_path / "a.jsonl", CODED)
    with pytest.raises(InputError, match="prepare.codebook"):
        opened(tmp_path)
    with pytest.raises(InputError, match="prepare.codes_per_image"):
        opened(tmp_path, codebook=8)


# Scenes, and what is not there ----------------------------------------------------------------------------------------


def test_scenes_have_a_tenth_more_for_the_held_out_split():
    source = opened("scenes", documents=60, image_side=8)
    documents, broken = everything(source)
    assert not broken and source.units() > 30
    assert [d.split for d in documents] == ["train"] * 60 + ["validation"] * 6
    assert len({d.id for d in documents}) == 66
    assert documents[0].segments[1].image.shape == (16, 16, 3)
    assert opened("scenes", documents=60, image_side=24).side == 24


def test_fingerprints_change_with_what_is_read(tmp_path):
    write_lines(tmp_path / "a.jsonl", CODED)
    settings = {"codebook": 8, "codes_per_image": 4}
    prints = [opened(tmp_path, **settings).fingerprint()]
    assert prints[0] == opened(tmp_path, **settings).fingerprint()
    prints.append(opened(tmp_path, codebook=9, codes_per_image=4).fingerprint())
    write_lines(tmp_path / "b.jsonl", CODED)
    prints.append(opened(tmp_path, **settings).fingerprint())
    prints += [opened("scenes", documents=10, seed=seed).fingerprint() for seed in (0, 1)]
    assert len(set(prints)) == len(prints)


def test_what_is_not_there_is_said_in_one_line(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    cases = [
        ({"source": tmp_path / "none"}, "does not exist"),
        ({"source": tmp_path}, "holds no Parquet"),
        ({"source": tmp_path, "kind": "folder"}, "holds no .png"),
        ({"source": tmp_path / "notes.md", "kind": "jsonl"}, "holds no .jsonl"),
        ({"source": "nosuch://bucket/x"}, "cannot reach"),
        ({"source": "scenes", "documents": 0}, "prepare.documents"),
    ]
    for settings, word in cases:
        with pytest.raises(InputError, match=word) as error:
            opened(**settings)
        assert "\n" not in str(error.value)
