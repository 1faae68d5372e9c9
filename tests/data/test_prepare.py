"""`moma prepare`: the same bytes whatever happens on the way, and clear refusals."""

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image
from processes import spawn
from small_codecs import small_codec
from small_stores import files_of, make_source, settings, write_rows

from moma_jax.codec.folder import write_codec
from moma_jax.config import IMAGE, TEXT, Modality, PrepareConfig
from moma_jax.data import fit
from moma_jax.data import prepare as prepare_lib
from moma_jax.data.parts import Column, PartWriter
from moma_jax.data.prepare import prepare
from moma_jax.data.store import KINDS, open_store, require_same_codecs
from moma_jax.errors import InputError, RunError
from moma_jax.storage.directory import Directory
from moma_jax.storage.staged import Staged


def documents_of(store, split):
    """(hash, kind, tokens) of every document of a split."""
    view = store.view("all", split)
    index = view.index(0, view.documents)
    tokens = view.read(np.arange(view.documents), np.zeros(view.documents), index.length_N)
    _, hash_N16 = view.provenance(0, view.documents)
    return [(h.tobytes(), int(k), t.tolist()) for h, k, t in zip(hash_N16, index.kind_N, tokens, strict=True)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("data") / "source")


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """A store made in one go."""
    out = str(tmp_path_factory.mktemp("data") / "store")
    prepare(settings(source), out, progress=False)
    return out


def test_twice_is_the_same_and_a_finished_store_stays(source, made, tmp_path):
    before = files_of(made)
    manifest = prepare(settings(source), made, progress=False)
    assert files_of(made) == before
    assert manifest["documents"] == 300 and manifest["broken"] == 0
    prepare(settings(source), str(tmp_path / "b"), progress=False)
    assert files_of(tmp_path / "b") == before


def test_killed_process_goes_on_to_the_same_bytes(source, made, tmp_path):
    out = str(tmp_path / "store")
    script = """if True:
        import sys, time
        from moma_jax.data.parts import Column, PartWriter
        from moma_jax.data.prepare import prepare
        from small_stores import settings
        append = PartWriter.append
        def slow(self, documents):
            append(self, documents)
            time.sleep(0.05)
        PartWriter.append = slow
        prepare(settings(sys.argv[1]), sys.argv[2], progress=False)
    """
    process = spawn("-c", script, source, out)
    while not os.path.exists(f"{out}/parts/00001-of-00003") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(InputError, match="unfinished"):
        open_store(out)
    prepare(settings(source), out, progress=False)
    assert files_of(out) == files_of(made)


@pytest.mark.parametrize("place", ["local", "memory"])
def test_stopped_anywhere_goes_on_to_the_same_documents(source, made, tmp_path, monkeypatch, place):
    out = str(tmp_path / "store") if place == "local" else f"memory://{tmp_path.name}/store"
    append, publish, calls = PartWriter.append, prepare_lib._publish, []

    def stumbling(function):
        def stumble(*arguments):
            calls.append(1)
            if len(calls) in (1, 3, 8, 9):
                raise KeyboardInterrupt
            return function(*arguments)

        return stumble

    monkeypatch.setattr(PartWriter, "append", stumbling(append))
    monkeypatch.setattr(prepare_lib, "_publish", stumbling(publish))
    stops = 0
    while True:
        try:
            manifest = prepare(settings(source), out, progress=False)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == 4
    assert manifest == open_store(made).manifest == open_store(out).manifest
    if place == "local":
        assert files_of(out) == files_of(made)
    else:
        assert documents_of(open_store(out), "train") == documents_of(open_store(made), "train")
        open_store(out).verify()


def test_parts_and_merge_equal_one_go(source, made, tmp_path, capsys):
    out = str(tmp_path / "store")
    config = settings(source, parts=99)  # N of part=(K, N) decides
    for k in (2, 3):
        assert prepare(config, out, part=(k, 3), progress=False)["broken"] == 0
    with pytest.raises(InputError, match="parts not written yet: 1 of 3"):
        prepare(config, out, merge=True)
    prepare(config, out, part=(1, 3), progress=False)
    with pytest.raises(InputError, match="unfinished"):
        open_store(out)
    prepare(PrepareConfig(), out, merge=True)  # what the parts were made with decides, nothing need be repeated
    assert files_of(out) == files_of(made)
    assert "300 documents, 0 broken" in capsys.readouterr().err


def test_other_settings_source_or_parts_are_refused(source, made, tmp_path):
    before = files_of(made)
    other = make_source(tmp_path / "other", documents=30)
    (tmp_path / "no_store").mkdir()
    (tmp_path / "no_store" / "thesis.txt").write_text("dear to me")
    for config, out, word in [
        (settings(source, image_side=5), made, "prepare.image_side 4, now 5"),
        (settings(source, parts=4), made, "parts 3, now 4"),
        (settings(other), made, "fingerprint"),
        (settings(source), str(tmp_path / "no_store"), "thesis.txt"),
        (settings(source), "ftp://somewhere", "scheme"),
        (settings(str(tmp_path / "nothing")), str(tmp_path / "c"), "nothing"),
        (settings(source, parts=0), str(tmp_path / "d"), "parts"),
        (settings(source, tokenizer=str(tmp_path / "none.json")), str(tmp_path / "e"), "prepare.tokenizer"),
    ]:
        with pytest.raises(InputError, match=word) as caught:
            prepare(config, out, progress=False)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no store was begun"):
        prepare(settings(source), str(tmp_path / "f"), merge=True)
    assert files_of(made) == before


def test_bad_input_leaves_the_directory_free(source, tmp_path):
    """The remedy that a refusal names can be followed in the same directory."""
    out = str(tmp_path / "store")
    rows = [{"id": str(n), "segments": [{"text": f"word {n}"}]} for n in range(20)]
    words = write_rows(tmp_path / "words", rows)
    prepare(settings(words), str(tmp_path / "text"), progress=False)
    text = Modality("text", "t", size=300)
    for config, modalities, word in [
        (settings(source, text_size=20), None, "prepare.text_size: .* use 262"),
        (settings(source), (TEXT, Modality("image", "i", size=16, span=16)), "text has size 57344"),
        (settings(source), (text,), "has pictures, but the vocabulary .text. has no image codec"),
        (settings(source, vocabulary=str(tmp_path / "text")), None, "has pictures, .* another --vocabulary"),
        (settings(write_rows(tmp_path / "empty", [])), None, "no usable training document"),
    ]:
        with pytest.raises(InputError, match=word):
            prepare(config, out, modalities=modalities, progress=False)
        assert not os.path.exists(out) or not os.listdir(out)
    prepare(settings(words, vocabulary=str(tmp_path / "text")), out, progress=False)


@pytest.mark.parametrize(
    "change",
    [
        {"image_side": 0},
        {"chunk_tokens": 0},
        {"shard_bytes": 0},
        {"seed": -1},
        {"held_out": 2.0},
        {"held_out": -1.0},
        {"held_out": float("nan")},
        {"parts": 0},
        {"documents": 0},
        {"colours": 0},
        {"colours": 1 << 17},
        {"codebook": 0},
    ],
)
def test_settings_that_cannot_be_meant_are_refused_first(tmp_path, change):
    (name,) = change
    out = str(tmp_path / "store")
    with pytest.raises(InputError, match=f"^prepare.{name}: must be"):
        prepare(PrepareConfig(source="nowhere", **change), out, progress=False)
    assert not os.path.exists(out)


def test_a_part_being_written_is_not_written_twice(source, tmp_path):
    out = str(tmp_path / "store")
    prepare(settings(source), out, part=(1, 3), progress=False)
    directory = Directory(out)
    staged = Staged(directory, "parts/00002-of-00003")
    with pytest.raises(InputError, match="another process"):
        prepare(settings(source), out, part=(2, 3), progress=False)
    staged.close()
    prepare(settings(source), out, part=(2, 3), progress=False)


def test_broken_documents_are_counted_named_and_skipped(tmp_path):
    rows = [{"id": str(n), "segments": [{"text": f"word {n}"}, {"image": "ok.png"}]} for n in range(97)]
    rows[5:5] = ["no json", {"id": "lost", "segments": [{"text": "x"}, {"image": "lost.png"}]},
                 {"id": "torn", "segments": [{"text": "x"}, {"image": "torn.png"}]}]  # fmt: skip
    folder = write_rows(tmp_path / "source", rows)
    Image.new("RGB", (8, 8), "red").save(f"{folder}/ok.png")
    with open(f"{folder}/torn.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n torn")
    manifest = prepare(settings(folder), str(tmp_path / "store"), progress=False)
    assert manifest["documents"] == 97 and manifest["broken"] == 3
    with open(tmp_path / "store" / "report.json") as file:
        report = json.load(file)
    assert report["documents"] == 100 and report["broken"] == 3
    assert {"lost", "torn"} < {entry["id"] for entry in report["listed"]}
    assert all(entry["reason"] for entry in report["listed"])


def test_more_than_five_percent_broken_fails(tmp_path):
    rows = [{"id": str(n), "segments": [{"text": f"word {n}"}]} for n in range(94)] + ["no json"] * 6
    out = str(tmp_path / "store")
    with pytest.raises(RunError, match="6 of 100 documents are broken.*report.json"):
        prepare(settings(write_rows(tmp_path / "source", rows)), out, progress=False)
    assert os.path.exists(f"{out}/report.json") and not os.path.exists(f"{out}/manifest.json")
    with pytest.raises(RunError, match="6 of 100"):
        prepare(settings(str(tmp_path / "source")), out, progress=False)


def test_held_out_and_order_of_pairs_depend_on_content_alone(source, made, tmp_path):
    with open(f"{source}/docs.jsonl") as file:
        rows = [json.loads(line) for line in file]
    random.Random(1).shuffle(rows)
    shuffled = write_rows(tmp_path / "shuffled", [{**row, "id": f"x{row['id']}"} for row in rows])
    for name in os.listdir(source):
        if name.endswith(".png"):
            os.link(f"{source}/{name}", f"{shuffled}/{name}")
    prepare(settings(shuffled, seed=7, parts=2), str(tmp_path / "store"), progress=False)
    first, second = open_store(made), open_store(str(tmp_path / "store"))
    for split in ("train", "validation"):
        sets = [{(h, k) for h, k, _ in documents_of(store, split)} for store in (first, second)]
        assert sets[0] == sets[1] and len(sets[0]) > 20
    kind_N = first.view("pairs").index(0, first.view("pairs").documents).kind_N
    assert 0.3 < np.mean(kind_N == KINDS.index("image-first")) < 0.7


def test_a_vocabulary_is_reused_or_refused(source, made, tmp_path):
    other = make_source(tmp_path / "other", documents=60, seed=5)
    prepare(settings(other), str(tmp_path / "own"), progress=False)
    prepare(settings(other, vocabulary=made), str(tmp_path / "same"), progress=False)
    first = open_store(made)
    require_same_codecs(first, open_store(str(tmp_path / "same")))
    with pytest.raises(InputError, match="differs.*--vocabulary"):
        require_same_codecs(first, open_store(str(tmp_path / "own")))


def test_modalities_are_checked(source, made, tmp_path):
    image = Modality("image", "i", size=16, span=16)
    right = (Modality("text", "t", size=300), image)
    prepare(settings(source), str(tmp_path / "a"), modalities=right, progress=False)
    assert files_of(tmp_path / "a") == files_of(made)
    for modalities, word in [
        ((TEXT, image), "text has size 57344; that of the prepared store is 300"),
        ((right[0], IMAGE), "image has size 8192"),
        ((right[0],), "the store has text, image"),
    ]:
        with pytest.raises(InputError, match=word):
            prepare(settings(source), made, modalities=modalities, progress=False)


def test_ready_codes_and_a_given_tokenizer(made, tmp_path):
    tokenizer = f"{made}/tokenizer.json"
    codes = [[(n + i) % 50 for i in range(4)] for n in range(40)]
    rows = [{"id": str(n), "segments": [{"text": f"a red star {n}"}, {"codes": c}]} for n, c in enumerate(codes)]
    rows.insert(7, {"id": "short", "segments": [{"text": "a"}, {"codes": [1, 2]}]})
    rows.insert(9, {"id": "large", "segments": [{"text": "a"}, {"codes": [1, 2, 3, 50]}]})
    config = settings(write_rows(tmp_path / "source", rows), tokenizer=tokenizer, codebook=50, codes_per_image=4)
    manifest = prepare(config, str(tmp_path / "store"), progress=False)
    assert manifest["documents"] == 40 and manifest["broken"] == 2
    store = open_store(str(tmp_path / "store"))
    image = store.vocabulary.modalities[1]
    assert (image.size, image.span, store.image_codec()) == (50, 4, None)
    assert store.text_codec().hash == open_store(made).text_codec().hash
    found = []
    for _, kind, tokens in documents_of(store, "train") + documents_of(store, "validation"):
        at = tokens.index(image.begin)
        assert tokens[at + 5] == image.end and (at == 1) == (KINDS[kind] == "image-first")
        found.append([t - image.ranges[0][0] for t in tokens[at + 1 : at + 5]])
    assert sorted(found) == sorted(codes)


def test_a_learned_codec_is_used_kept_and_required(tmp_path):
    source, codec = make_source(tmp_path / "source", documents=30), small_codec()
    write_codec(str(tmp_path / "codec"), codec)
    config = settings(source, codec=str(tmp_path / "codec"), image_side=8, colours=codec.codebook)
    manifest = prepare(config, str(tmp_path / "store"), progress=False)
    store = open_store(str(tmp_path / "store"))
    kept, image = store.image_codec(), store.vocabulary.modalities[1]
    assert kept.hash == codec.hash and (image.size, image.span) == (codec.codebook, codec.codes_per_image)
    assert manifest["broken"] == 0
    shutil.rmtree(tmp_path / "codec")  # the store has its own
    images = [np.full((20, 30, 3), grey, np.uint8) for grey in (0, 100, 200)]
    np.testing.assert_array_equal(
        open_store(str(tmp_path / "store")).image_codec().encode(images), codec.encode(images)
    )
    parts = {"a": (1, 2), "b": (2, 2)}
    write_codec(str(tmp_path / "codec"), codec)
    for part in parts.values():
        prepare(dataclasses.replace(config, parts=2), str(tmp_path / "parts"), part=part, progress=False)
    write_codec(str(tmp_path / "other"), small_codec(seed=1))
    other = dataclasses.replace(config, codec=str(tmp_path / "other"))
    with pytest.raises(InputError, match="begun with prepare.codec"):
        prepare(other, str(tmp_path / "store"), progress=False)
    prepare(other, str(tmp_path / "another"), progress=False)
    with pytest.raises(InputError, match="image codec differs"):
        require_same_codecs(store, open_store(str(tmp_path / "another")))
    with pytest.raises(InputError, match=r"no codec.json here"):
        prepare(dataclasses.replace(config, codec=str(tmp_path)), str(tmp_path / "none"), progress=False)
    with pytest.raises(InputError, match="give one of the two"):
        prepare(dataclasses.replace(config, vocabulary=str(tmp_path / "store")), str(tmp_path / "none"), progress=False)
    with pytest.raises(InputError, match="leave codebook and codes_per_image out"):
        sizes = {"codebook": 64, "codes_per_image": 64}
        prepare(dataclasses.replace(config, **sizes), str(tmp_path / "none"), progress=False)
    (tmp_path / "store" / "codec-image.safetensors").unlink()
    lost = dataclasses.replace(config, codec=None, vocabulary=str(tmp_path / "store"))
    with pytest.raises(InputError, match="store: image codec: its weights are missing"):
        prepare(lost, str(tmp_path / "none"), progress=False)
    assert not (tmp_path / "none").exists()


def test_codes_of_a_codec_are_those_in_the_store(tmp_path):
    codec = small_codec()
    write_codec(str(tmp_path / "codec"), codec)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 24, 16, 3), np.uint8)
    (tmp_path / "source" / "train").mkdir(parents=True)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "source" / "train" / f"{number}.png")
        (tmp_path / "source" / "train" / f"{number}.txt").write_text(f"picture {number}")
    config = PrepareConfig(source=str(tmp_path / "source"), codec=str(tmp_path / "codec"), text_size=300, parts=1)
    prepare(config, str(tmp_path / "store"), progress=False)
    store = open_store(str(tmp_path / "store"))
    image, found = store.vocabulary.modalities[1], set()
    for *_, tokens in documents_of(store, "train"):
        begin = tokens.index(image.begin)
        found.add(tuple(image.code_ids.tolist().index(t) for t in tokens[begin + 1 : begin + 1 + image.span]))
    assert found == set(map(tuple, codec.encode(list(pixels)).tolist())) and len(found) == 6


def test_text_alone_and_nothing_at_all(tmp_path, capsys):
    rows = [{"id": str(n), "segments": [{"text": f"word {n}"}]} for n in range(20)]
    prepare(settings(write_rows(tmp_path / "text", rows), held_out=0.0), str(tmp_path / "a"))
    assert "warning:" in (said := capsys.readouterr().err) and "raise --held-out" in said
    store = open_store(str(tmp_path / "a"))
    assert [m.name for m in store.vocabulary.modalities] == ["text"] and store.image_codec() is None
    assert store.view("all", "validation").documents == 0
    with pytest.raises(InputError, match="no usable training document"):
        prepare(settings(write_rows(tmp_path / "empty", [])), str(tmp_path / "b"), progress=False)


def test_a_run_of_letters_without_spaces_is_cut_for_the_tokenizer(tmp_path):
    """The time of a BPE's training grows with the square of a word's length."""
    texts = ["a b", "x" * 1000, " " * 300, "no spaces" + "\u6f22" * 600 + " end"]
    pieces = [piece for text in texts for piece in fit._pieces(text)]
    assert "".join(pieces) == "".join(texts) and pieces[0] == "a b"
    assert max(len(word) for piece in pieces for word in piece.split(" ")) <= fit.LONGEST_WORD
    rows = [{"segments": [{"text": "".join(random.Random(0).choices("ACGT", k=100_000))}]}] * 2
    rows += [{"segments": [{"text": f"a line number {n}"}]} for n in range(50)]
    store = str(tmp_path / "store")
    assert (
        prepare(settings(write_rows(tmp_path / "source", rows), held_out=0), store, progress=False)["documents"] == 52
    )


def test_a_full_disk_is_one_line_and_can_be_gone_on_from(tmp_path, monkeypatch):
    source = make_source(tmp_path / "source", documents=30)
    real, calls = Column._store, itertools.count()

    def full(self, value_N, stop):
        if next(calls) == 9:
            raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device")
        real(self, value_N, stop)

    monkeypatch.setattr(Column, "_store", full)
    with pytest.raises(InputError, match="cannot be written: the disk is full; run it again") as caught:
        prepare(settings(source), str(tmp_path / "store"), progress=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "store" / "manifest.json").exists()
    assert prepare(settings(source), str(tmp_path / "store"), progress=False)["documents"] == 30
