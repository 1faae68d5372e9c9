"""What `prepare` does with pictures, splits, orders and weights on the way into a store."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms
from reading import write_lines
from small_stores import settings

from moma_jax.codec.pictures import load_picture, read_picture
from moma_jax.data import prepare as preparing
from moma_jax.data.assembly import Plan, Reader
from moma_jax.data.packing import Frame
from moma_jax.data.prepare import prepare
from moma_jax.data.store import KINDS, open_store
from moma_jax.errors import InputError


def encoded(pixels, kind="PNG", **options) -> bytes:
    import io

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed, shape=(9, 9, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def store_of(folder, columns, name="store", **changes):
    """The manifest and the store of one Parquet file."""
    (folder / "source").mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "source" / "pairs.parquet")
    manifest = prepare(settings(str(folder / "source"), **changes), str(folder / name), progress=False)
    return manifest, open_store(str(folder / name))


def documents_of(store, split="train", collection="all"):
    """Tokens of every document of a split."""
    view = store.view(collection, split)
    length_N = view.index(0, view.documents).length_N
    return view.read(np.arange(view.documents), np.zeros(view.documents, int), length_N)


# Reading pictures -----------------------------------------------------------------------------------------------------


def test_crops_take_the_square_that_they_name():
    pixels = noise(0, (4, 12, 3))
    windows = [pixels[:, left : left + 4] for left in range(9)]
    assert np.array_equal(load_picture(encoded(pixels), 4, "centre"), windows[4])
    found = [load_picture(encoded(pixels), 4, "random", seed=seed) for seed in range(40)]
    again = [load_picture(encoded(pixels), 4, "random", seed=seed) for seed in range(40)]
    assert np.array_equal(found, again)
    assert {f.tobytes() for f in found} == {w.tobytes() for w in windows}
    keys = {read_picture(encoded(pixels), 4, "random", seed=seed).key for seed in range(40)}
    assert keys == {read_picture(encoded(pixels), 4, "centre").key}, "a picture is the same wherever it is cropped"


def test_transparency_lies_on_the_ground():
    clear = np.zeros((4, 4, 4), np.uint8)
    assert (load_picture(encoded(clear), 2, ground=(10, 20, 30)) == [10, 20, 30]).all()


def test_colours_of_another_space_become_srgb():
    """A profile whose red is green and whose green is red swaps them; sRGB, or a damaged one, changes nothing."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = noise(1, (4, 4, 3))
    assert np.array_equal(load_picture(encoded(pixels, icc_profile=srgb), 4), pixels)
    assert np.array_equal(load_picture(encoded(pixels, icc_profile=b"damaged"), 4), pixels)
    swapped = srgb.replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "other".encode("utf-16-be")[:8])
    found = load_picture(encoded(pixels, icc_profile=swapped), 4).astype(int)
    assert np.abs(found - pixels[..., [1, 0, 2]]).max() <= 2


def test_a_turned_photograph_is_measured_as_it_is_seen():
    exif = Image.Exif()
    exif[0x0112] = 6
    read = read_picture(encoded(noise(2, (4, 12, 3)), "JPEG", exif=exif.tobytes()), 4)
    assert (read.width, read.height) == (4, 12)


# Splits and duplicates ------------------------------------------------------------------------------------------------


def test_a_picture_is_on_one_side_whatever_its_captions(tmp_path):
    pictures = [encoded(noise(n)) for n in range(40)]
    columns = {
        "image": [p for p in pictures for _ in range(5)],
        "caption": [f"view {j} of {n}" for n in range(40) for j in range(5)],
    }
    manifest, store = store_of(tmp_path, columns, image_first=0)
    codes = {}
    for split in ("train", "validation"):
        documents = documents_of(store, split)
        modality_V = store.vocabulary.modality_V
        codes[split] = {tuple(d[modality_V[d] == 1].tolist()) for d in documents}
        assert len(documents) == 5 * len(codes[split]) > 0
    assert not codes["train"] & codes["validation"] and len(codes["validation"]) < 20
    assert manifest["pictures"] == {
        "pictures": 200, "distinct": 40, "on_both_sides": 0, "dropped_duplicates": 0, "dropped_held_out": 0
    }  # fmt: skip


def test_held_out_documents_with_pictures_that_are_trained_on_go(tmp_path, capsys):
    """Interleaved documents share pictures as they like: what is held out shows none that is trained on."""
    random = np.random.default_rng(0)
    (tmp_path / "source").mkdir()
    for n in range(12):
        (tmp_path / "source" / f"{n}.png").write_bytes(encoded(noise(n)))
    for n in range(12, 100):
        (tmp_path / "source" / f"{n}.png").write_bytes(encoded(noise(n)))
    shown = [random.choice(12 if n % 3 == 0 else 100, 2, replace=False) for n in range(120)]
    rows = [{"segments": [{"image": f"{a}.png"}, {"text": f"between {n}"}, {"image": f"{b}.png"}]} for n, (a, b) in
            enumerate(shown)]  # fmt: skip
    write_lines(tmp_path / "source" / "docs.jsonl", rows)
    config = settings(str(tmp_path / "source"), held_out=0.3)
    manifest = prepare(config, str(tmp_path / "store"))
    dropped = manifest["pictures"]["dropped_held_out"]
    assert f"dropped: {dropped} held-out documents that show a picture which is trained on" in capsys.readouterr().err
    store = open_store(str(tmp_path / "store"))
    assert dropped > 0 and manifest["documents"] == 120 - dropped
    views = {split: store.view("all", split) for split in ("train", "validation")}
    assert views["validation"].documents > 0
    assert views["train"].documents + views["validation"].documents == 120 - dropped
    modality_V, seen = store.vocabulary.modality_V, {}
    for split, view in views.items():
        documents = documents_of(store, split)
        assert sum(map(len, documents)) == view.tokens_M.sum()
        index = view.index(0, view.documents)
        assert [len(d) for d in documents] == index.length_N.tolist()
        for number, document in enumerate(documents):
            first, last = index.span_row_N1[number : number + 2]
            runs = np.repeat(index.span_modality_K[first:last], index.span_length_K[first:last])
            assert np.array_equal(runs, modality_V[document])
        middle = view.index(1, view.documents)
        assert np.array_equal(middle.length_N, index.length_N[1:]) and np.array_equal(middle.kind_N, index.kind_N[1:])
        pictures = [d[modality_V[d] == 1].reshape(2, -1) for d in documents]
        seen[split] = {tuple(row) for pair in pictures for row in pair.tolist()}
    assert not seen["train"] & seen["validation"]
    store.verify()
    names, hashes = views["validation"].provenance(0, views["validation"].documents)
    assert len(names) == len(set(map(bytes, hashes))) == views["validation"].documents


def test_duplicates_are_counted_and_dropped_where_asked(tmp_path):
    pixels = [noise(n) for n in range(30)]
    files = [encoded(p) for p in pixels] + [encoded(p, compress_level=0) for p in pixels[:10]]
    captions = [[f"{n}", f"{n} again"] if n == 3 else [f"{n}"] for n in range(40)]
    columns = {"image": files, "caption": captions, "split": ["train"] * 40, "id": [n % 30 for n in range(40)]}
    manifest, _ = store_of(tmp_path, columns)
    assert manifest["documents"] == 41 and manifest["pictures"]["distinct"] == 30
    manifest, store = store_of(tmp_path, columns, "without", drop_duplicates=True)
    assert manifest["documents"] == 31 and manifest["pictures"]["dropped_duplicates"] == 10
    text = [store.text_codec().decode(d) for d in documents_of(store)]
    assert sorted(text, key=lambda t: (int(t.split()[0]), len(t))) == sorted(
        [str(n) for n in range(30)] + ["3 again"], key=lambda t: (int(t.split()[0]), len(t))
    )
    assert prepare(settings(str(tmp_path / "source"), drop_duplicates=True), str(tmp_path / "without")) == manifest


def test_a_sources_own_split_is_kept_and_its_overlap_told(tmp_path, capsys):
    files = [encoded(noise(n % 20)) for n in range(30)]
    columns = {"image": files, "caption": [f"{n}" for n in range(30)], "split": ["train"] * 20 + ["validation"] * 10}
    (tmp_path / "source").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "source" / "pairs.parquet")
    manifest = prepare(settings(str(tmp_path / "source")), str(tmp_path / "store"))
    assert manifest["counts"]["pairs-validation"]["documents"] == 10
    assert "warning: 10 pictures are both trained on and held out" in capsys.readouterr().err
    config = settings(str(tmp_path / "source"), drop_duplicates=True)
    manifest = prepare(config, str(tmp_path / "without"))
    assert "pairs-validation" not in manifest["counts"] and manifest["counts"]["pairs-train"]["documents"] == 20


# Filters and orders ---------------------------------------------------------------------------------------------------


def test_what_is_not_wanted_is_left_out_and_counted(tmp_path):
    shapes = [(9, 9, 3), (2, 9, 3), (9, 40, 3), (9, 9, 3), (9, 9, 3)]
    captions = ["a good one", "small picture", "long picture", "s", "long words " * 9]
    columns = {"image": [encoded(noise(n, s)) for n, s in enumerate(shapes)] * 10, "caption": captions * 10}
    limits = {"min_side": 4, "max_aspect": 3.0, "min_caption": 3, "max_caption": 50, "held_out": 0}
    manifest, store = store_of(tmp_path, columns, **limits)
    assert manifest["documents"] == 10 and manifest["filtered"] == 40 and manifest["broken"] == 0
    assert manifest["left_out"] == {
        "captions longer than max_caption": 10,
        "captions shorter than min_caption": 10,
        "pictures longer than max_aspect": 10,
        "pictures smaller than min_side": 10,
    }
    with open(tmp_path / "store" / "report.json") as file:
        report = json.load(file)
    assert report["documents"] == 50 and report["left_out"] == manifest["left_out"]
    assert {store.text_codec().decode(d) for d in documents_of(store)} == {"a good one"}


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_the_share_of_pairs_with_the_picture_first(tmp_path, share):
    columns = {"image": [encoded(noise(n)) for n in range(200)], "caption": [f"{n}" for n in range(200)]}
    _, store = store_of(tmp_path, columns, image_first=share, held_out=0)
    view = store.view("pairs")
    first = np.mean(view.index(0, view.documents).kind_N == KINDS.index("image-first"))
    assert first == share if share in (0, 1) else 0.1 < first < 0.3


def test_bad_settings_are_one_line(tmp_path):
    with pytest.raises(InputError, match="no picture is left to fit the palette on, as pictures smaller than min_side"):
        store_of(tmp_path, {"image": [encoded(noise(0))], "caption": ["a"]}, held_out=0, min_side=100)
    assert not (tmp_path / "store").exists()
    for changes, line in [({"ground": "white"}, "prepare.ground: 'white' is not #rrggbb")]:
        with pytest.raises(InputError, match=line):
            store_of(tmp_path, {"image": [encoded(noise(0))], "caption": ["a"]}, held_out=0, **changes)
    with pytest.raises(InputError, match="--engine is process or ray, --workers at least 1"):
        prepare(settings(str(tmp_path / "source")), str(tmp_path / "store"), workers=0)
    assert not (tmp_path / "store").exists()


# Weights --------------------------------------------------------------------------------------------------------------


def test_weights_reach_the_batch(tmp_path):
    """By token: a target's weight is that of its own segment, markers as their picture, ends as what they end."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.png").write_bytes(encoded(noise(0)))
    rows = [
        {
            "id": "0",
            "segments": [{"text": "prompt", "weight": 0}, {"image": "a.png", "weight": 0.5}, {"text": "answer"}],
        },
        {"id": "1", "segments": [{"text": "plain"}]},
        {"id": "2", "weight": 0.25, "segments": [{"text": "light"}]},
    ]
    write_lines(tmp_path / "source" / "docs.jsonl", rows)
    prepare(settings(str(tmp_path / "source"), held_out=0, parts=1), str(tmp_path / "store"), progress=False)
    store = open_store(str(tmp_path / "store"))
    view, vocabulary = store.view(), store.vocabulary
    length_N = view.index(0, view.documents).length_N
    tokens = view.read(range(3), [0] * 3, length_N)
    weights = view.read(range(3), [0] * 3, length_N, "weights")
    assert view.weighted and not store.view("pairs").weighted
    codec = store.text_codec()
    for token_N, weight_N in zip(tokens, weights, strict=True):
        if 1 in vocabulary.modality_V[token_N]:
            before, after = len(codec.encode("prompt")), len(codec.encode("answer"))
            expected = [1] + [0] * before + [0.5] * 18 + [1] * (after + 1)
        else:
            expected = [1] + [1 if codec.decode(token_N) == "plain" else 0.25] * (len(token_N) - 1)
        assert weight_N.tolist() == expected
    total = int(length_N.sum())
    piece_N6 = np.array([[0, n, 0, length, length, 0] for n, length in enumerate(length_N)])
    reader = Reader([view], Frame(1, total, (total, total), (0, 16)), 1, vocabulary)
    batch = reader.packed(Plan(piece_N6, {}, {}, 0)).batch
    expected = np.concatenate([[*weight_N[1:], 0] for weight_N in weights])
    assert batch.weight_BS[0].tolist() == expected.tolist()


def test_a_masked_prompt(tmp_path):
    columns = {"image": [encoded(noise(n)) for n in range(8)], "caption": [f"caption {n}" for n in range(8)]}
    _, store = store_of(tmp_path, columns, prompt_weight=0, image_first=1, held_out=0)
    view = store.view()
    (weight_N,) = view.read([3], [0], view.index(3, 4).length_N, "weights")
    assert weight_N.tolist() == [1] + [0] * 18 + [1] * (len(weight_N) - 19)


def test_the_bytes_of_weights_do_not_depend_on_blocks(tmp_path, monkeypatch):
    rows = [{"segments": [{"text": f"text {n}", "weight": 1 if n < 30 else n / 40}]} for n in range(40)]
    (tmp_path / "source").mkdir()
    write_lines(tmp_path / "source" / "docs.jsonl", rows)
    config = dataclasses.replace(settings(str(tmp_path / "source"), held_out=0), parts=1)
    manifest = prepare(config, str(tmp_path / "one"), progress=False)
    monkeypatch.setattr(preparing, "BLOCK", 3)
    assert prepare(config, str(tmp_path / "two"), progress=False)["parts"] == manifest["parts"]


def test_a_store_of_the_first_format_is_read(tmp_path):
    """Its arrays are a part of today's."""
    columns = {"image": [encoded(noise(n)) for n in range(8)], "caption": [f"caption {n}" for n in range(8)]}
    manifest, store = store_of(tmp_path, columns, held_out=0)
    before = documents_of(store)
    for part in manifest["parts"]:
        for description in part["collections"].values():
            del description["checksums"]["pictures"]
    old = {k: v for k, v in manifest.items() if k not in ("pictures", "left_out", "filtered", "own_split", "images")}
    with open(tmp_path / "store" / "manifest.json", "w") as file:
        json.dump({**old, "format_version": 1}, file)
    store = open_store(str(tmp_path / "store"))
    assert all(np.array_equal(a, b) for a, b in zip(documents_of(store), before, strict=True))
    store.verify()
    with open(tmp_path / "store" / "manifest.json", "w") as file:
        json.dump({**old, "format_version": 3}, file)
    with pytest.raises(InputError, match="store format 3; this version of moma_jax reads 1 to 2"):
        open_store(str(tmp_path / "store"))
