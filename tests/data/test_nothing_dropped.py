"""What a source holds and a store would lack, or a split it would not follow: refused, told, or counted as broken."""

import io
import json
import os
import tarfile

import pyarrow as pa
import pytest
from reading import everything, opened, png, write_lines, write_parquet
from small_stores import settings

from moma_jax.config import PrepareConfig
from moma_jax.data.prepare import prepare
from moma_jax.data.preview import preview
from moma_jax.data.sources import open_with_rest
from moma_jax.errors import InputError, RunError


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


# Splits ---------------------------------------------------------------------------------------------------------------


def test_folders_within_a_tar_say_the_split(tmp_path):
    members = {}
    for n, folder in enumerate(("train2017/n01", "val/test", "test/n01", "other/n01")):
        members |= {f"{folder}/a.jpg": png(n), f"{folder}/a.txt": b"a caption"}
    write_tar(tmp_path / "a.tar", members)
    documents, broken = everything(opened(tmp_path))
    assert [d.split for d in documents] == ["train", "validation"]
    assert "split test" in broken["a.tar:test/n01/a"] and "says no split" in broken["a.tar:other/n01/a"]
    os.rename(tmp_path / "a.tar", tmp_path / "a-train.tar")
    documents, broken = everything(opened(tmp_path))
    assert [d.split for d in documents] == ["train"] * 4 and not broken, "the tar's name goes before"


def test_classes_called_as_splits_are_not_taken_for_them(tmp_path):
    members = {}
    for n, folder in enumerate(("apple", "test_tube", "train")):
        members |= {f"{folder}/a.jpg": png(n), f"{folder}/a.txt": b"a caption"}
    write_tar(tmp_path / "a.tar", members)
    documents, broken = everything(opened(tmp_path))
    assert [d.split for d in documents] == [None, None] and "says a split" in broken["a.tar:train/a"]


@pytest.mark.parametrize(("key", "value"), [("Split", "VAL"), ("SPLIT", "Validation"), ("split", "dev")])
def test_capitals_do_not_hide_what_a_row_says(tmp_path, key, value):
    row = {"text": "t", key: value, "Weight": 0.5, "ID": "one", "Group": ""}
    (tmp_path / "lines").mkdir()
    write_lines(tmp_path / "lines" / "a.jsonl", [row])
    write_parquet(tmp_path / "table" / "a.parquet", {key: [cell] for key, cell in row.items()})
    for folder in ("lines", "table"):
        (document,), broken = everything(opened(tmp_path / folder))
        assert (document.id, document.split, document.group) == ("one", "validation", None) and not broken
        assert document.segments[0].weight == 0.5


def test_a_column_like_a_split_must_be_called_so(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"text": ["t", "u"], "set": ["train", "val"], "subset": ["x", "y"]})
    _, broken = everything(opened(tmp_path))
    assert all("set is" in reason and "call it split" in reason for reason in broken.values()) and len(broken) == 2


def test_a_source_called_as_a_split_is_told(tmp_path):
    (tmp_path / "val").mkdir()
    write_lines(tmp_path / "val" / "a.jsonl", [{"text": "t"}])
    assert "called val" in open_with_rest(PrepareConfig(source=str(tmp_path / "val"))).notes[0]


def test_one_row_with_a_split_does_not_open_the_held_out_side(tmp_path):
    """Held-out pictures that are trained on go, where any document is split by hash."""
    (tmp_path / "source").mkdir()
    same = [[1, 2, 3, 4], [4, 3, 2, 1]] * 30
    rows = [{"text": f"text {n}", "codes": codes, "group": str(n)} for n, codes in enumerate(same)]
    write_lines(tmp_path / "source" / "a.jsonl", [{**rows[0], "split": "train"}, *rows[1:]])
    config = settings(str(tmp_path / "source"), codebook=10, codes_per_image=4)
    manifest = prepare(config, str(tmp_path / "store"), progress=False)
    assert manifest["pictures"]["on_both_sides"] == 2 and manifest["pictures"]["dropped_held_out"] > 3
    assert set(manifest["counts"]) == {"pairs-train"} and not manifest["own_split"]


def test_ready_codes_are_duplicates_too(tmp_path):
    (tmp_path / "source").mkdir()
    rows = [{"text": f"text {n}", "codes": [n % 7, 0, 0, 1]} for n in range(70)]
    write_lines(tmp_path / "source" / "a.jsonl", rows)
    config = settings(str(tmp_path / "source"), codebook=10, codes_per_image=4, drop_duplicates=True, held_out=0.0)
    manifest = prepare(config, str(tmp_path / "store"), progress=False)
    assert (manifest["pictures"]["distinct"], manifest["pictures"]["dropped_duplicates"]) == (7, 63)


# Pictures where none are expected -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"text": ["t"], "pictures": [[[b"x"]]]}, "holds bytes within"),
        ({"text": ["t"], "shown": [{"img": b"x"}]}, "holds bytes within"),
        ({"text": ["t"], "shown": pa.array([[("a", b"x")]], pa.map_(pa.string(), pa.binary()))}, "holds bytes within"),
        ({"text": ["t"], "image_path": ["a.png"]}, "image_path stands for pictures"),
        ({"text": ["t"], "jpg": ["/9j/4AAQ"]}, "jpg stands for pictures"),
        ({"TEXT": ["t"], "URL": ["http://a/b"]}, "URL is the address of a picture"),
        ({"caption": ["t"], "url": ["http://a/b"]}, "url is the address of a picture"),
        ({"text": ["t"], "image_url": ["http://a/b"]}, "image_url stands for pictures"),
        ({"caption": ["t"], "filename": ["my cat.jpg"]}, "filename names a picture"),
        ({"text": ["t"], "shown": [{"path": "a.avif"}]}, "shown names a picture"),
        ({"text": ["t"], "segments": [[{"image": "a.png"}]]}, "segments holds list"),
        ({"texts": [["t"]], "images": [[None]], "shown": [[b"x"]]}, "holds bytes within"),
        ({"texts": ['["t"]'], "images": ["[null]"]}, "not lists; unpack"),
    ],
)
def test_columns_that_stand_for_pictures_are_refused(tmp_path, columns, line):
    write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(InputError) as caught:
        opened(tmp_path)
    assert line in str(caught.value)
    if "--caption-column" in str(caught.value):  # the text is meant to stand alone
        caption = next(name for name in columns if name.lower() in ("text", "caption"))
        assert len(everything(opened(tmp_path, caption_column=caption))[0]) == 1
        write_lines(tmp_path / "a.jsonl", [{key: cells[0] for key, cells in columns.items()}])
        _, broken = everything(opened(tmp_path / "a.jsonl"))
        assert "--caption-column where the" in broken["a.jsonl:0"] or "there is no file" in broken["a.jsonl:0"]
        if "image_path" not in columns:  # which names one in lines
            assert len(everything(opened(tmp_path / "a.jsonl", caption_column=caption))[0]) == 1


def test_a_column_of_pictures_is_passed_over_where_another_is_named(tmp_path):
    shown = {name: [{"bytes": png(n), "path": name}] for n, name in enumerate(("image", "conditioning"))}
    write_parquet(tmp_path / "a.parquet", {"text": ["t"], **shown})
    with pytest.raises(InputError, match="say which with --image-column"):
        opened(tmp_path)
    source = opened(tmp_path, image_column="image")
    assert everything(source)[0][0].segments[1].image == png(0)
    assert "not read: conditioning" in source.describe()[0]


@pytest.mark.parametrize(
    "more",
    [{"timestamp": "now", "similarity": 0.5}, {"images": [], "photos": 3}, {"id": "a.png", "meta": {"width": 3}}],
)
def test_columns_about_texts_are_not(tmp_path, more):
    row = {"text": "t", "url": "http://a/b", **more}
    write_parquet(tmp_path / "table" / "a.parquet", {key: [cell] for key, cell in row.items()})
    write_lines(tmp_path / "a.jsonl", [row])
    for source in ("table", "a.jsonl"):
        assert len(everything(opened(tmp_path / source))[0]) == 1


def test_lines_that_name_pictures_under_other_keys(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    write_lines(tmp_path / "a.jsonl", [{"image": "a.png", "text": "first"}, {"shot": "a.png", "text": "second"}])
    documents, broken = everything(opened(tmp_path))
    assert len(documents) == 1 and "shot names a picture" in next(iter(broken.values()))
    write_lines(tmp_path / "a.jsonl", [{"shot": "a.png", "text": "second"}])
    documents, _ = everything(opened(tmp_path, image_column="shot"))
    assert documents[0].collection == "pairs" and documents[0].segments[1].image == png()
    write_lines(tmp_path / "a.jsonl", [{"Image": "a.png", "Caption": "t"}])
    (document,), _ = everything(opened(tmp_path))
    assert document.collection == "pairs", "in capitals"
    write_lines(tmp_path / "a.jsonl", [{"images": ["a.png", "a.png"], "text": "t"}])
    _, broken = everything(opened(tmp_path, kind="jsonl"))
    assert "images stands for pictures" in broken["a.jsonl:0"]


def test_pictures_beside_lines_of_text_are_two_kinds(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    write_lines(tmp_path / "a.jsonl", [{"caption": "t", "views": 3}])
    with pytest.raises(InputError, match="several kinds"):
        opened(tmp_path)
    found = open_with_rest(PrepareConfig(source=str(tmp_path), kind="jsonl"))
    assert found.notes == ["not read: 1 .png, such as a.png"]


# Captions -------------------------------------------------------------------------------------------------------------


def test_a_tar_with_two_captions_of_one_picture(tmp_path):
    about = json.dumps({"caption": "in the object"}).encode()
    write_tar(tmp_path / "a.tar", {"b.jpg": png(), "b.txt": b"b", "c.jpg": png(), "c.txt": b"a file", "c.json": about})
    documents, broken = everything(opened(tmp_path))
    assert len(documents) == 1 and "captions in .txt and another in .json" in broken["a.tar:c"]
    for caption, text in (("txt", "a file"), ("caption", "in the object")):
        documents, _ = everything(opened(tmp_path, caption_column=caption))
        assert documents[-1].segments[0].text == text


def test_captions_that_differ_from_line_to_line(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("train/a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    rows = [{"file_name": "b.png", "caption": "one", "split": "train"}, {"file_name": "b.png", "caption": "two"}]
    write_lines(tmp_path / "metadata.jsonl", rows)
    os.rename(tmp_path / "train", tmp_path / "deep")
    _, broken = everything(opened(tmp_path))
    assert "differ in split" in broken["b.png"] and "no line" in broken["deep/a.png"]
    write_lines(tmp_path / "metadata.jsonl", [rows[0], {"file_name": "deep/a.png", "caption": "outer"}])
    write_lines(tmp_path / "deep" / "metadata.jsonl", [{"file_name": "a.png", "caption": "inner"}])
    with pytest.raises(InputError, match=r"both speak of deep/a.png"):
        opened(tmp_path)


def test_captions_that_would_be_lost(tmp_path):
    about = json.dumps({"captions": ["one", "two"]}).encode()
    write_tar(tmp_path / "a.tar", {"a.jpg": png(), "a.txt": b"one", "a.json": about, "b.jpg": png(), "b.txt": b"b"})
    assert list(everything(opened(tmp_path / "a.tar"))[1]) == ["a.tar:a"]
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.png", "c.png"):
        (folder / name).write_bytes(png())
    (folder / "a.txt").write_text("small")
    (folder / "a.TXT").write_text("large")
    with pytest.raises(InputError, match="has a twin but for capitals"):
        opened(folder)
    for name in ("a.txt", "a.TXT"):
        os.remove(folder / name)
    (folder / "b.txt").write_text("of no picture")
    (folder / "metadata.csv").write_text("file_name,text\na.png,a\nc.png,c\n")
    assert open_with_rest(PrepareConfig(source=str(folder))).notes == ["not read: 1 .txt, such as b.txt"]


def test_what_macos_leaves_is_no_content(tmp_path):
    write_tar(tmp_path / "a.tar", {"._a.jpg": b"x", "a.jpg": png(), "._a.txt": b"x", "a.txt": b"a"})
    documents, broken = everything(opened(tmp_path / "a.tar"))
    assert len(documents) == 1 and not broken
    (tmp_path / "folder" / "__MACOSX").mkdir(parents=True)
    for name in ("a.png", "._a.png", "__MACOSX/b.png"):
        (tmp_path / "folder" / name).write_bytes(png())
    (tmp_path / "folder" / "a.TXT").write_text("in capitals")
    (tmp_path / "folder" / "._a.txt").write_text("x")
    documents, broken = everything(opened(tmp_path / "folder"))
    assert [d.segments[0].text for d in documents] == ["in capitals"] and not broken


def test_a_picture_without_caption_says_so(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    assert everything(opened(tmp_path))[1] == {"a.png": "has no caption: there is no a.txt"}


def test_cells_of_csv(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(png())
    long = "x" * 200_000
    lines = f'file_name,text,weight,split,group,artist\na.png,one,0,,,x\nb.png,"{long}",,val,,y\nc.png,three,2,,g,z\n'
    (tmp_path / "metadata.csv").write_text(lines + "d.png,four,,Train,,z\n")
    source = opened(tmp_path)
    documents, broken = everything(source)
    assert [d.segments[0].weight for d in documents] == [0, 1, 2, 1] and not broken
    assert [(d.split, d.group) for d in documents] == [(None, None), ("validation", None), (None, "g"), ("train", None)]
    assert "not read: artist" in source.describe()[0]
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,one, two\n")
    with pytest.raises(InputError, match="more cells than the first"):
        opened(tmp_path)


def test_line_separators_within_a_caption(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    row = json.dumps({"file_name": "a.png", "text": "one\u2028two\u0085three"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(row + "\n", encoding="utf-8")
    documents, _ = everything(opened(tmp_path))
    assert documents[0].segments[0].text == "one\u2028two\u0085three"


# Settings that would go unheard ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"codebook": 8}, "prepare.codebook: is for sources of kind codes, not folder"),
        ({"image_codes_column": "x"}, "prepare.image_codes_column: is for"),
        ({"images": "."}, "prepare.images: is for sources of kind parquet or jsonl, not folder"),
        ({"image_column": "png"}, "--image-column: is one of metadata.csv"),
        ({"max_caption": 3, "min_caption": 4}, "prepare.max_caption: 3 is below min_caption"),
        ({"max_aspect": 0.5}, "prepare.max_aspect: 0.5"),
        ({"ground": "whitish"}, "prepare.ground"),
        ({"vocabulary": "v", "tokenizer": "t"}, "prepare.tokenizer: the store of prepare.vocabulary has its own"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, changes, line):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError) as caught:
        opened(tmp_path, **changes)
    assert line in str(caught.value)


def test_images_that_nothing_names_are_told(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png())
    write_lines(tmp_path / "docs" / "a.jsonl", [{"text": "t"}])
    named = {"images": str(tmp_path / "pictures")}
    found = open_with_rest(PrepareConfig(source=str(tmp_path / "docs"), **named))
    assert "the first lines name no picture" in found.notes[0]
    os.remove(tmp_path / "docs" / "a.jsonl")
    write_parquet(tmp_path / "docs" / "a.parquet", {"text": ["t"]})
    with pytest.raises(InputError, match=r"prepare.images: no document of .* names a picture kept elsewhere"):
        opened(tmp_path / "docs", **named)


def test_codes_are_wanted_where_a_codebook_is_given(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    write_lines(tmp_path / "a.jsonl", [{"image": "a.png", "text": "t"}])
    sizes = {"codebook": 8, "codes_per_image": 4}
    with pytest.raises(InputError, match="image, text: pictures, where ready codes are read"):
        opened(tmp_path / "a.jsonl", **sizes)
    write_lines(tmp_path / "a.jsonl", [{"text": "t"}])
    with pytest.raises(InputError, match="no codes; name theirs with --image-codes-column"):
        opened(tmp_path / "a.jsonl", **sizes)
    write_lines(tmp_path / "b.jsonl", [{"prompt": "t", "codes": [1, 2, 3, 4]}])
    os.remove(tmp_path / "a.png")
    assert len(everything(opened(tmp_path, **sizes))[0]) == 2, "texts beside codes"
    write_parquet(tmp_path / "table" / "a.parquet", {"prompt": ["t"], "codes": [[1, 2, 3, 4]]})
    assert len(everything(opened(tmp_path / "table", **sizes))[0]) == 1


def test_damaged_or_packed_pictures_elsewhere_are_refused(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "pictures").mkdir()
    write_lines(tmp_path / "docs" / "a.jsonl", [{"texts": ["t", None], "images": [None, "a"]}])
    named = {"images": str(tmp_path / "pictures"), "missing_pictures": "skip"}
    write_tar(tmp_path / "pictures" / "a.tar", {"a.png": png(), "b.png": png(1)})
    content = bytearray((tmp_path / "pictures" / "a.tar").read_bytes())
    content[1024 + 148 : 1024 + 156] = b"ffffffff"  # the second header's checksum: tarfile would take it for the end
    (tmp_path / "pictures" / "a.tar").write_bytes(content)
    with pytest.raises(InputError, match="a.tar is damaged"):
        list(opened(tmp_path / "docs", **named).read(0))
    os.rename(tmp_path / "pictures" / "a.tar", tmp_path / "pictures" / "a.tar.gz")
    with pytest.raises(InputError, match="a.tar.gz is compressed"):
        opened(tmp_path / "docs", **named)


# What prepare says at its end -----------------------------------------------------------------------------------------


def words(tmp_path, rows=40):
    (tmp_path / "source").mkdir()
    write_lines(tmp_path / "source" / "a.jsonl", [{"text": f"word {n}"} for n in range(rows)])
    return settings(str(tmp_path / "source"))


def test_too_many_broken_names_the_first(tmp_path):
    config = words(tmp_path)
    write_lines(tmp_path / "source" / "a.jsonl", [{"text": f"word {n}", "weight": n % 4 - 1} for n in range(40)])
    with pytest.raises(RunError, match=r"10 of 40 documents are broken.* such as a.jsonl:\d+: weight is '-1'"):
        prepare(config, str(tmp_path / "store"), progress=False)


def test_a_finished_store_is_left_alone(tmp_path):
    config = words(tmp_path)
    prepare(config, str(tmp_path / "store"), progress=False)
    before = {name: os.stat(tmp_path / "store" / name).st_mtime_ns for name in os.listdir(tmp_path / "store")}
    assert prepare(config, str(tmp_path / "store"), progress=False)["documents"] == 40
    assert before == {name: os.stat(tmp_path / "store" / name).st_mtime_ns for name in os.listdir(tmp_path / "store")}


def test_a_file_where_the_store_shall_be(tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(InputError, match="is a file; choose a new directory"):
        prepare(words(tmp_path), str(tmp_path / "store"), progress=False)


def test_sizes_that_a_tokenizer_brings(tmp_path):
    config = words(tmp_path)
    prepare(config, str(tmp_path / "store"), progress=False)
    given = {"source": config.source, "parts": 1, "vocabulary": str(tmp_path / "store")}
    with pytest.raises(InputError, match=r"prepare.text_size: 999, but prepare.vocabulary brings 300"):
        prepare(PrepareConfig(**given, text_size=999), str(tmp_path / "b"), progress=False)
    assert prepare(PrepareConfig(**given), str(tmp_path / "b"), progress=False)["documents"] == 40


def test_texts_alone_with_a_given_tokenizer(tmp_path):
    config = words(tmp_path)
    prepare(config, str(tmp_path / "store"), progress=False)
    given = {"source": config.source, "parts": 1, "tokenizer": str(tmp_path / "store" / "tokenizer.json")}
    assert prepare(PrepareConfig(**given), str(tmp_path / "b"), progress=False)["documents"] == 40


def test_a_map_that_is_no_map(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "a.png").write_bytes(png())
    write_lines(tmp_path / "docs" / "a.jsonl", [{"texts": [None], "images": ["there"]}])
    named = {"images": str(tmp_path / "a.png"), "image_map": str(tmp_path / "map.jsonl")}
    (tmp_path / "map.jsonl").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"map.jsonl cannot be read"):
        list(opened(tmp_path / "docs", **named).read(0))
    write_lines(tmp_path / "map.jsonl", [{"URL": "there", "Key": "a", "weight": "heavy"}])
    assert len(everything(opened(tmp_path / "docs", **named))[0]) == 1


def test_a_dry_run_refuses_what_prepare_would(tmp_path):
    config = words(tmp_path)
    (tmp_path / "source" / "a.jsonl").write_text("\n")
    with pytest.raises(InputError, match="has no documents"):
        list(preview(config))
    with pytest.raises(InputError, match="prepare.ground"):
        list(preview(settings(config.source, ground="whitish")))
