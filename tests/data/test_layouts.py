"""Every layout in which people keep mixed-modal data, written as the named tools write it."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from reading import everything, opened, png, write_lines, write_parquet

from moma_jax.config import PrepareConfig
from moma_jax.data.documents import Codes, Picture, Text
from moma_jax.data.preview import preview
from moma_jax.data.sources import open_with_rest
from moma_jax.errors import InputError


def jpeg(shade=0, size=(8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def pairs_of(documents):
    """(caption, the picture's bytes) by id."""
    assert all(d.collection == "pairs" for d in documents)
    return {d.id: (d.segments[0].text, d.segments[1].image) for d in documents}


def refused(*arguments, **settings):
    """The line with which a source is refused."""
    with pytest.raises(InputError) as caught:
        opened(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# WebDataset -----------------------------------------------------------------------------------------------------------


def img2dataset_shard(path, keys, failed=(), compress=False, **more):
    """A tar and its Parquet file, as img2dataset's WebDatasetSampleWriter leaves them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with webdataset.TarWriter(str(path), encoder=False, compress=compress) as writer:
        for number, key in enumerate(keys):
            status = "failed_to_download" if key in failed else "success"
            about = {
                "url": f"http://pictures.org/{key}.jpg", "key": key, "caption": f"caption {key}", "status": status,
                "error_message": "HTTP Error 404: Not Found" if key in failed else None, "width": 8, "height": 8,
                "original_width": 80, "original_height": 80, "exif": "{}", "sha256": "0" * 64,
            } | more  # fmt: skip
            rows.append(about)
            sample = {"__key__": key, "txt": about["caption"].encode(), "json": json.dumps(about).encode()}
            writer.write(sample | ({} if key in failed else {"jpg": jpeg(number)}))
    pq.write_table(pa.Table.from_pylist(rows), str(path).split(".tar")[0] + ".parquet")
    (path.parent / f"{path.name.split('.')[0]}_stats.json").write_text(json.dumps({"count": len(keys)}))


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_tars_of_img2dataset(tmp_path, suffix):
    img2dataset_shard(tmp_path / f"00000{suffix}", [f"{n:09}" for n in range(20)], compress=suffix == ".tar.gz")
    img2dataset_shard(tmp_path / f"00001{suffix}", ["000010000"], compress=suffix == ".tar.gz")
    source = open_with_rest(PrepareConfig(source=str(tmp_path)))
    documents, broken = everything(source.source)
    assert source.source.units() == 2 and not broken and {d.split for d in documents} == {None}
    found = pairs_of(documents)
    assert len(found) == 21
    assert found[f"00000{suffix}:000000007"] == ("caption 000000007", jpeg(7))
    assert source.notes == ["not read: 2 .json, 2 .parquet, such as 00000.parquet"]


def test_tars_follow_splits_and_name_what_is_broken(tmp_path):
    img2dataset_shard(tmp_path / "cc3m-train-0000.tar", ["a", "b", "c"], failed=["b"])
    with tarfile.open(tmp_path / "cc3m-validation-0000.tar", "w") as tar:
        members = {
            "x.jpg": jpeg(), "x.txt": b"an x", "y.png": png(), "y.json": b'{"caption": ["y", "why"], "group": 3}',
            "z.jpg": jpeg(), "w.txt": b"text alone", "two.jpg": jpeg(), "two.png": png(), "two.txt": b"two",
            "npy.npy": b"\x93NUMPY", "npy.txt": b"with features", "latin.jpg": jpeg(), "latin.txt": b"\xe9",
            "d/dotted.name.jpg": jpeg(), "d/dotted.txt": b"a", "bad.jpg": jpeg(), "bad.json": b"[1]",
        }  # fmt: skip
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    documents, broken = everything(opened(tmp_path))
    assert {d.id: (d.split, d.segments[0].text) for d in documents} == {
        "cc3m-train-0000.tar:a": ("train", "caption a"),
        "cc3m-train-0000.tar:c": ("train", "caption c"),
        "cc3m-validation-0000.tar:x": ("validation", "an x"),
        "cc3m-validation-0000.tar:y#0": ("validation", "y"),
        "cc3m-validation-0000.tar:y#1": ("validation", "why"),
    }
    reasons = {name.split(":")[1]: reason for name, reason in broken.items()}
    assert reasons["b"] == "was not downloaded: HTTP Error 404: Not Found"
    assert reasons["w"] == "has no picture"
    assert reasons["z"] == "its caption is missing or empty"
    assert reasons["two"] == "has .png besides; name its picture with --image-column"
    assert reasons["npy"] == "has .npy besides; name its picture with --image-column"
    assert "utf-8" in reasons["latin"] and ".name.jpg" in reasons["d/dotted"]
    assert reasons["bad"] == "its .json is not an object" and "a link" in reasons["link"]
    for name in ("cc3m-train-0000.tar", "cc3m-train-0000.parquet"):
        (tmp_path / name).unlink()
    documents, _ = everything(opened(tmp_path, image_column="png"))
    assert {d.id.split(":")[1] for d in documents} == {"two", "y#0", "y#1"}


def test_a_tar_without_pictures_is_refused(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for n in range(3):
            writer.write({"__key__": f"{n}", "txt": b"a caption"})
    assert "a.tar:0: has no picture; check that a.tar is a tar of samples" in refused(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    assert "a.tar holds no samples" in refused(tmp_path)


def damaged(content: bytes, how: str) -> bytes:
    """A tar of 20 samples, harmed in its middle."""
    middle = 512 * (len(content) // 1024)
    match how:
        case "cut within a member":
            return content[: middle + 700]
        case "cut between members":
            return content[: content.index(b"000000010.txt")]
        case "a header overwritten":
            place = content.index(b"000000010.txt")
            return content[: place + 100] + b"\xff" * 60 + content[place + 160 :]
        case "no end":
            return content.rstrip(b"\0") + b"\0" * (-len(content.rstrip(b"\0")) % 512)


@pytest.mark.parametrize("how", ["cut within a member", "cut between members", "a header overwritten", "no end"])
def test_a_damaged_tar_is_noticed_and_its_loss_counted(tmp_path, how):
    """tarfile takes an odd header, or no end at all, for the end."""
    img2dataset_shard(tmp_path / "a.tar", [f"{n:09}" for n in range(20)])
    (tmp_path / "a.tar").write_bytes(damaged((tmp_path / "a.tar").read_bytes(), how))
    documents, broken = everything(opened(tmp_path))
    assert set(pairs_of(documents)) <= {f"a.tar:{n:09}" for n in range(20)}
    assert broken and all("the tar is damaged behind" in reason for reason in broken.values())
    if how == "a header overwritten":  # of a tar that was cut nobody knows how long it was
        assert 18 <= len(documents) + len(broken) <= 26
    for number, document in enumerate(documents):
        assert (document.segments[0].text, document.segments[1].image) == (f"caption {number:09}", jpeg(number))


# Hugging Face ---------------------------------------------------------------------------------------------------------


def test_parquet_as_datasets_writes_it(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": png(n), "path": None} for n in range(3)], "text": [f"text {n}" for n in range(3)]}
    datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    documents, broken = everything(opened(tmp_path))
    assert list(pairs_of(documents).values()) == [(f"text {n}", png(n)) for n in range(3)] and not broken
    assert {d.split for d in documents} == {"train"}


KINDS_OF_TEXT = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.binary()]
KINDS_OF_BYTES = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(len(png()))]
KINDS_OF_LIST = [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2)]


@pytest.mark.parametrize("kind", KINDS_OF_TEXT, ids=str)
@pytest.mark.parametrize("picture", KINDS_OF_BYTES, ids=str)
def test_every_arrow_type_of_text_and_bytes(tmp_path, kind, picture):
    columns = {"caption": pa.array(["a b", "ö"]).cast(pa.string()), "image": pa.array([png()] * 2).cast(picture)}
    columns["caption"] = pa.array(["a b", "ö"], kind) if kind != pa.binary() else pa.array([b"a b", "ö".encode()])
    pq.write_table(pa.table(columns | {"id": pa.array([7, 8])}), tmp_path / "a.parquet")
    named = {"caption_column": "caption", "image_column": "image"} if kind == pa.binary() else {}
    documents, broken = everything(opened(tmp_path, **named))
    assert pairs_of(documents) == {"7": ("a b", png()), "8": ("ö", png())} and not broken


@pytest.mark.parametrize("kind", KINDS_OF_LIST)
def test_several_captions_of_a_picture_stay_together(tmp_path, kind):
    captions = pa.array([["a", "b"], ["c", "d"]], kind(pa.string()))
    pq.write_table(pa.table({"image": [png(0), png(1)], "captions": captions}), tmp_path / "a.parquet")
    documents, broken = everything(opened(tmp_path))
    assert [d.segments[0].text for d in documents] == ["a", "b", "c", "d"] and not broken
    assert [d.id for d in documents[:2]] == ["a.parquet:0#0", "a.parquet:0#1"]
    assert documents[0].row == documents[1].row == "a.parquet:0"


def test_columns_are_found_named_or_refused(tmp_path):
    def made(name, **columns):
        write_parquet(tmp_path / name / "a.parquet", columns)
        return tmp_path / name

    both = made("both", image=[png()], text=["t"], caption=["c"], url=["http://x"])
    assert "both text and caption may be meant; say which with --caption-column" in refused(both)
    documents, _ = everything(opened(both, caption_column="text"))
    assert documents[0].segments[0].text == "t"
    assert "--caption-column: a.parquet has no column titel" in refused(both, caption_column="titel").replace(
        "prepare.source: ", ""
    )
    assert "--image-column: url of" in refused(both, caption_column="text", image_column="url")
    two = made("two", image=[png(1)], mask=[png(2)], text=["t"])
    assert "both image and mask hold bytes; say which with --image-column" in refused(two)
    documents, _ = everything(opened(two, image_column="mask"))
    assert documents[0].segments[1].image == png(2)
    assert "URL is the address of a picture" in refused(made("laion", URL=["u"], TEXT=["t"], WIDTH=[1], HEIGHT=[2]))
    assert "image stands for pictures" in refused(made("path", image=["a.png"], text=["t"]))
    assert "holds lists of pictures" in refused(made("lists", images=[[png()]], text=["t"]))
    assert "codes holds ready codes; set prepare.kind codes" in refused(
        made("codes", text=["t"], codes=[[1]]), kind="parquet"
    )
    web = made("web", text=["t"], url=["u"], split=["val"])
    documents, _ = everything(opened(web))
    assert [(d.collection, d.split) for d in documents] == [("text", "validation")]
    assert list(preview(PrepareConfig(source=str(web)))) == [
        f"{web}: 1 units of work in 8 parts",
        "  a.parquet: text, 1 rows, columns split, text, split by row; not read: url",
        "the first 5 documents:",
        "  a.parquet:0 (text, held out): 't'",
    ]


def test_pictures_beside_a_table_are_read_by_their_path(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": "pictures/a.png"}, {"bytes": None, "path": "../secret.png"}], kind)
    (tmp_path / "secret.png").write_bytes(png())
    write_parquet(tmp_path / "set" / "a.parquet", {"image": images, "text": ["a", "b"]})
    (tmp_path / "set" / "pictures").mkdir()
    (tmp_path / "set" / "pictures" / "a.png").write_bytes(png(5))
    documents, broken = everything(opened(tmp_path / "set", kind="parquet"))
    assert pairs_of(documents) == {"a.parquet:0": ("a", png(5))}
    assert "leads out of the folder" in broken["a.parquet:1"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_image_folder_with_metadata(tmp_path, kind):
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        rows = [{"file_name": f"{n}.png", "text": f"{split}, {n}"} for n in range(3)]
        rows += [{"file_name": "0.png", "text": "another, of 0"}, {"file_name": "gone.png", "text": "gone"}]
        for n in (0, 1, 2, 7):
            (tmp_path / split / f"{n}.png").write_bytes(png(n))
        path = tmp_path / split / f"metadata.{kind}"
        if kind == "jsonl":
            write_lines(path, rows)
        else:
            path.write_text("file_name,text\n" + "".join(f'{r["file_name"]},"{r["text"]}"\n' for r in rows))
    documents, broken = everything(opened(tmp_path))
    found = {d.id: (d.split, d.segments[0].text, d.segments[1].image) for d in documents}
    assert found["train/0.png#1"] == ("train", "another, of 0", png(0))
    assert found["validation/2.png"] == ("validation", "validation, 2", png(2)) and len(found) == 8
    assert broken == {
        f"{s}/{name}": reason
        for s in ("train", "validation")
        for name, reason in (
            ("7.png", "the metadata has no line for it"),
            ("gone.png", "there is no picture of this name"),
        )
    }


def test_a_picture_whose_first_caption_is_empty_is_broken_and_two_tables_are_refused(tmp_path):
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,\n0.png,a\n1.png,b\n")
    documents, broken = everything(opened(tmp_path))
    assert [d.id for d in documents] == ["1.png"] and "caption is missing" in broken["0.png"]
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": "0.png", "text": "c"}])
    assert "the folder has both metadata.csv and metadata.jsonl; move one away" in refused(tmp_path)


def test_a_snapshot_of_the_hubs_cache(tmp_path):
    """Every file is a link to ../../blobs/HASH, and nothing else may be reached so."""
    hub = tmp_path / "datasets--me--set"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(png())
    (hub / "blobs" / "1").write_bytes(png(1))
    (hub / "blobs" / "2").write_text("a caption")
    (hub / "snapshots" / "abc" / "a.png").symlink_to("../../blobs/1")
    (hub / "snapshots" / "abc" / "a.txt").symlink_to("../../blobs/2")
    (hub / "snapshots" / "abc" / "b.png").symlink_to(tmp_path / "secret")
    (hub / "snapshots" / "abc" / "b.txt").symlink_to("../../blobs/2")
    documents, broken = everything(opened(hub / "snapshots" / "abc"))
    assert pairs_of(documents) == {"a.png": ("a caption", png(1))}
    assert "leads out of the folder" in broken["b.png"]


# Interleaved documents ------------------------------------------------------------------------------------------------


def obelics(folder):
    """OBELICS' Parquet: two lists of one length, one of them null at each place."""
    images = [
        [None, "http://a.org/1.jpg", None],
        [None],
        ["http://a.org/2.jpg", None, "http://gone.org/3.jpg"],
        [None, "x"],
    ]
    texts = [["before", None, "behind"], ["alone"], [None, "below", None], ["both", "at once"]]
    write_parquet(folder / "a.parquet", {"images": images, "metadata": ["[]"] * 4, "texts": texts})


def test_obelics_with_pictures_of_img2dataset(tmp_path):
    obelics(tmp_path / "set")
    img2dataset_shard(tmp_path / "pictures" / "00000.tar", ["k1", "k2"])
    table = pa.table({"url": ["http://a.org/1.jpg", "http://a.org/2.jpg"], "key": ["k1", "k2"]})
    pq.write_table(table, tmp_path / "pictures" / "00000.parquet")
    assert "names pictures; say with --images where they are" in everything(opened(tmp_path / "set"))[1]["a.parquet:0"]
    documents, broken = everything(opened(tmp_path / "set", images=str(tmp_path / "pictures")))
    assert [[getattr(s, "text", None) or s.image for s in d.segments] for d in documents] == [
        ["before", jpeg(0), "behind"],
        ["alone"],
    ]
    assert "'http://gone.org/3.jpg' is not in" in broken["a.parquet:2"] and "place 1" in broken["a.parquet:3"]
    settings = {"images": str(tmp_path / "pictures"), "missing_pictures": "skip"}
    documents, broken = everything(opened(tmp_path / "set", **settings))
    assert len(documents) == 3 and len(documents[2].left_out) == 1 and len(broken) == 1


def test_mmc4_with_a_folder_and_a_map(tmp_path):
    info = [
        {"image_name": "b.png", "raw_url": "u", "matched_text_index": 1, "matched_sim": 0.3},
        {"image_name": "a.png", "raw_url": "v", "matched_text_index": 0, "matched_sim": 0.3},
    ]
    row = {"text_list": ["one.", "two.", "three."], "image_info": info, "similarity_matrix": [[0.1]], "url": "w"}
    (tmp_path / "docs").mkdir()
    write_lines(tmp_path / "docs" / "docs_shard_0_v2.jsonl", [row, {**row, "image_info": [{"image_name": "c"}]}])
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for number, name in enumerate(("a", "b")):
        (tmp_path / "pictures" / "deep" / f"{name}.png").write_bytes(png(number))
    documents, broken = everything(opened(tmp_path / "docs", images=str(tmp_path / "pictures")))
    assert [getattr(s, "text", None) or s.image for s in documents[0].segments] == [
        png(0),
        "one.",
        png(1),
        "two. three.",
    ]
    assert len(broken) == 1
    write_lines(tmp_path / "map.jsonl", [{"url": "a.png", "key": "deep/b"}])
    settings = {"images": str(tmp_path / "pictures"), "image_map": str(tmp_path / "map.jsonl")}
    documents, _ = everything(opened(tmp_path / "docs", **settings))
    assert documents[0].segments[0].image == png(1)
    assert "image_map" in refused(tmp_path / "docs", image_map=str(tmp_path / "map.jsonl"))
    write_lines(tmp_path / "map.jsonl", [{"address": "a.png"}])
    source = opened(tmp_path / "docs", **settings)
    with pytest.raises(InputError, match="has columns address; it needs url and key"):
        list(source.read(0))


# Lines ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_plain_text_in_lines(tmp_path, suffix):
    rows = [{"text": f"document {n}", "meta": {"url": "x"}} for n in range(50)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode() + b"no json\n"
    codec = {".gz": "gzip", ".zst": "zstd"}.get(suffix[6:])
    with pa.output_stream(str(tmp_path / f"a{suffix}"), compression=codec) as stream:
        stream.write(content)
    documents, broken = everything(opened(tmp_path))
    assert [d.segments[0].text for d in documents] == [row["text"] for row in rows] and len(broken) == 1
    if codec:
        whole = (tmp_path / f"a{suffix}").read_bytes()
        (tmp_path / f"a{suffix}").write_bytes(whole[: len(whole) // 2])
        documents, broken = everything(opened(tmp_path))
        assert broken and len(documents) < 50


def test_lines_with_pictures_and_weights(tmp_path):
    (tmp_path / "a.png").write_bytes(png(3))
    rows = [
        {"image": "a.png", "caption": ["one", "two"], "weight": 0.5},
        {"segments": [{"text": "question", "weight": 0}, {"image": "a.png"}, {"text": "answer"}]},
        {"segments": [{"text": "both", "image": "a.png"}]},
        {"text": "negative", "weight": -1},
        {"text": "beyond any float", "weight": 10**400},
        {"something": "else"},
    ]
    write_lines(tmp_path / "docs.jsonl", rows)
    documents, broken = everything(opened(tmp_path))
    assert [[s.weight for s in d.segments] for d in documents] == [[0.5, 0.5], [0.5, 0.5], [0, 1, 1]]
    assert len(broken) == 4 and any("weight is '-1'" in reason for reason in broken.values())


def test_ready_codes_of_other_projects(tmp_path):
    """Liquid's lines: the JSON of a list; and Parquet with a column of lists."""
    rows = [
        {"data_type": "t2i", "text": f"t{n}", "vqcode_512": json.dumps([n, 2, 3, 4]), "width": 512} for n in range(3)
    ]
    write_lines(tmp_path / "a.jsonl", [*rows, {"text": "t", "vqcode_512": "[1, 2"}])
    named = {"image_codes_column": "vqcode_512", "codebook": 10, "codes_per_image": 4}
    documents, broken = everything(opened(tmp_path, **named))
    assert [(d.segments[0].text, d.segments[1].codes.tolist()) for d in documents][2] == ("t2", [2, 2, 3, 4])
    assert len(broken) == 1 and isinstance(documents[0].segments[1], Codes)
    assert "prepare.codebook" in refused(tmp_path, image_codes_column="vqcode_512")
    write_parquet(tmp_path / "p" / "a.parquet", {"image_tokens": [[1, 2, 3, 4]], "text": ["t"]})
    documents, _ = everything(opened(tmp_path / "p", **{**named, "image_codes_column": "image_tokens"}))
    assert documents[0].segments[1].codes.tolist() == [1, 2, 3, 4]
    assert "image_codes_column" in refused(tmp_path / "p", **named).replace(
        "--image-codes-column", "image_codes_column"
    )


# What would be lost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (("a.png", "a.txt", "cache.pkl"), "cache.pkl: pickles, which can run code"),
        (("a.png", "a.txt", "b.avif", "c.avif"), "b.avif and 1 more: pictures of a format that is not read"),
        (("a.png", "a.txt", "t.jsonl"), "holds files of several kinds: 1 jsonl (t.jsonl) and 1 folder (a.png)"),
        (("a.parquet", "a.png"), "holds files of several kinds"),
        (("a.arrow",), "a.arrow: Arrow files; write them as Parquet"),
        (("a.md",), "holds no Parquet, .tar, .jsonl or picture files"),
        (("a.png", "a.txt", "metadata.csv"), "metadata.csv and a.txt both have captions"),
    ],
)
def test_what_a_store_would_lack_is_refused(tmp_path, files, line):
    for name in files:
        path = tmp_path / name
        match path.suffix:
            case ".png":
                path.write_bytes(png())
            case ".parquet":
                write_parquet(path, {"text": ["t"]})
            case ".csv":
                path.write_text("file_name,text\na.png,caption\n")
            case _:
                path.write_text('{"text": "a text"}\n')
    assert line in refused(tmp_path)


def test_files_that_are_not_read_are_told_and_captions_without_picture_broken(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    for name in ("a.txt", "b.txt", "c.txt", "README.md", "LICENSE"):
        (tmp_path / name).write_text("words")
    source = open_with_rest(PrepareConfig(source=str(tmp_path)))
    documents, broken = everything(source.source)
    assert len(documents) == 2 and broken == {"c.txt": "there is no picture of this name"}
    assert source.notes == ["not read: 1 .md, 1 no suffix, such as LICENSE"]


def test_one_picture_alone_finds_its_caption(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / "b.txt").write_text("of nothing")
    documents, broken = everything(opened(tmp_path / "a.png"))
    assert [d.segments[0] for d in documents] == [Text("a caption")] and not broken
    assert isinstance(documents[0].segments[1], Picture) and np.asarray(documents[0].segments[1].weight) == 1
