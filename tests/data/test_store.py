"""The token store: what is written is what is read, by any range, from any thread."""

import dataclasses
import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from small_stores import make_source, settings

from moma_jax.data.documents import Picture, Text, content_hash, is_held_out
from moma_jax.data.prepare import prepare
from moma_jax.data.sources import open_source
from moma_jax.data.store import COLLECTIONS, KINDS, SPLITS, open_store
from moma_jax.errors import InputError, RunError
from moma_jax.storage.directory import Directory
from moma_jax.vocab import Vocabulary


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return settings(make_source(tmp_path_factory.mktemp("data") / "source"), parts=4)


@pytest.fixture(scope="module")
def path(config, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("data") / "store")
    prepare(config, out, progress=False)
    return out


def expected(store, config):
    """What each view should hold, by (collection, split): the obvious way, a document at a time."""
    text, image, vocabulary = store.text_codec(), store.image_codec(), store.vocabulary
    marks = vocabulary.modalities[1]
    views = {(c, s): [] for c in COLLECTIONS for s in SPLITS}
    source = open_source(config)
    for k in range(config.parts):
        for unit in range(k, source.units(), config.parts):
            for document in source.read(unit):
                segments, kind = document.segments, document.collection
                if kind == "pairs":
                    image_first = content_hash(document)[15] % 2
                    kind = ("text-first", "image-first")[image_first]
                    segments = segments[::-1] if image_first else segments
                tokens = [vocabulary.begin_document]
                for segment in segments:
                    match segment:
                        case Text(written):
                            tokens += text.encode(written).tolist()
                        case Picture(picture):
                            tokens += [marks.begin, *(image.encode([picture])[0] + marks.ranges[0][0]), marks.end]
                tokens.append(vocabulary.end_document)
                split = SPLITS[is_held_out(document, config.held_out)]
                views[document.collection, split].append((KINDS.index(kind), tokens, content_hash(document)))
    return views


def runs(modality_N):
    """(modality, length) of the runs of a sequence."""
    found = []
    for modality in modality_N:
        if found and found[-1][0] == modality:
            found[-1][1] += 1
        else:
            found.append([modality, 1])
    return [tuple(run) for run in found]


def test_round_trip(path, config):
    store = open_store(path)
    modality_V = store.vocabulary.modality_V
    views = expected(store, config)
    for split in SPLITS:
        views["all", split] = sum((views[c, split] for c in COLLECTIONS), [])
    for (collection, split), documents in views.items():
        view = store.view(collection, split)
        assert view.documents == len(documents) > 5
        index = view.index(0, view.documents)
        tokens = view.read(range(view.documents), np.zeros(view.documents), index.length_N)
        assert [t.tolist() for t in tokens] == [t for _, t, _ in documents]
        assert index.kind_N.tolist() == [k for k, _, _ in documents]
        for n, (_, document, _) in enumerate(documents):
            rows = slice(index.span_row_N1[n], index.span_row_N1[n + 1])
            spans = list(zip(index.span_modality_K[rows].tolist(), index.span_length_K[rows].tolist(), strict=True))
            assert spans == runs(modality_V[document].tolist())
        names, hash_N16 = view.provenance(0, view.documents)
        assert [h.tobytes() for h in hash_N16] == [h for _, _, h in documents]
        assert set(names) == {"source"}
        counts = np.bincount(modality_V[np.concatenate(tokens)], minlength=2)
        assert view.tokens_M.tolist() == counts.tolist()


def test_index_by_ranges(path):
    view = open_store(path).view("all")
    whole, choice = view.index(0, view.documents), random.Random(0)
    assert int(whole.length_N.sum()) == int(whole.span_length_K.sum()) == int(view.tokens_M.sum())
    ranges = [sorted(choice.choices(range(view.documents + 1), k=2)) for _ in range(40)]
    for start, stop in [*ranges, (0, 0), (view.documents, view.documents), (0, 1)]:
        part = view.index(start, stop)
        assert np.array_equal(part.length_N, whole.length_N[start:stop])
        assert np.array_equal(part.kind_N, whole.kind_N[start:stop])
        rows = slice(whole.span_row_N1[start], whole.span_row_N1[stop])
        assert np.array_equal(part.span_row_N1, whole.span_row_N1[start : stop + 1] - whole.span_row_N1[start])
        assert np.array_equal(part.span_modality_K, whole.span_modality_K[rows])
        assert np.array_equal(part.span_length_K, whole.span_length_K[rows])
    for start, stop in ((-1, 3), (4, 3), (0, view.documents + 1)):
        with pytest.raises(IndexError):
            view.index(start, stop)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_random_reads_from_threads(path, cache_bytes):
    view = open_store(path, cache_bytes=cache_bytes, read_concurrency=3).view("all")
    length_N = view.index(0, view.documents).length_N
    documents = view.read(range(view.documents), np.zeros(view.documents, int), length_N)

    def check(seed):
        random_state = np.random.default_rng(seed)
        doc_N = random_state.integers(0, view.documents, 50)
        edge_N2 = np.sort(random_state.integers(0, length_N[doc_N][:, None] + 1, (50, 2)), axis=1)
        pieces = view.read(doc_N, edge_N2[:, 0], edge_N2[:, 1])
        return all(np.array_equal(p, documents[d][a:b]) for p, d, (a, b) in zip(pieces, doc_N, edge_N2, strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, range(40)))
    assert view.read([], [], []) == []
    for doc, start, stop in ((-1, 0, 1), (view.documents, 0, 1), (0, -1, 1), (0, 2, 1), (0, 0, length_N[0] + 1)):
        with pytest.raises(IndexError):
            view.read([doc], [start], [stop])


def test_manifest_counts_and_checksums(path, config):
    store = open_store(path)
    assert store.manifest["token_dtype"] == "uint16"
    for name, count in store.manifest["counts"].items():
        view = store.view(*name.split("-"))
        assert view.documents == count["documents"]
        assert view.tokens_M.tolist() == [count["tokens"]["text"], count["tokens"]["image"]]
    store.verify()
    text = "one red star, <image> and <s>"
    text_codec = store.text_codec()
    assert text_codec.decode(text_codec.encode(text)) == text
    assert store.image_codec().codes_per_image == store.vocabulary.modalities[1].span == config.image_side**2


def test_shards_hold_many_chunks_and_grow(path):
    layout = open_store(path).array("parts/00001-of-00004/interleaved-train/tokens").chunk_layout
    assert layout.read_chunk.shape == (128,) and layout.write_chunk.shape == (2048,)
    assert len(os.listdir(f"{path}/parts/00001-of-00004/interleaved-train/tokens/c")) > 1


def copy_with(path, out, name, change):
    """A copy of a store with one file changed."""
    shutil.copytree(path, out)
    with open(f"{out}/{name}", "rb") as file:
        content = file.read()
    with open(f"{out}/{name}", "wb") as file:
        file.write(change(content))
    return str(out)


def test_damage_is_noticed(path, tmp_path):
    def flip(content):
        return bytes([content[0] ^ 1]) + content[1:]

    tokens = "parts/00002-of-00004/text-train/tokens/c/0"
    with pytest.raises(RunError, match="00002-of-00004/text-train/tokens: damaged"):
        open_store(copy_with(path, tmp_path / "a", tokens, flip)).verify()
    with pytest.raises(InputError, match="not JSON"):
        open_store(copy_with(path, tmp_path / "b", "manifest.json", flip))
    later = copy_with(
        path, tmp_path / "c", "manifest.json", lambda c: json.dumps({**json.loads(c), "format_version": 9}).encode()
    )
    with pytest.raises(InputError, match="store format 9"):
        open_store(later)
    longer = copy_with(path, tmp_path / "d", "tokenizer.json", lambda content: content + b" ")
    with pytest.raises(InputError, match="tokenizer was changed"):
        _ = open_store(longer).vocabulary


def test_what_is_lost_is_never_read_as_zeros(path, tmp_path):
    """A store whose file is gone or cut short says so; it does not feed padding to a run."""
    for number, array in enumerate(("tokens", "kind", "spans")):
        out = str(tmp_path / f"lost{number}")
        shutil.copytree(path, out)
        folder = f"{out}/parts/00001-of-00004/text-train/{array}/c"
        lost = os.path.join(folder, "0" if array in ("tokens", "kind") else "0/0")
        assert os.path.isfile(lost), "zeros are stored as well"
        os.remove(lost)
        with pytest.raises(RunError, match=f"text-train/{array}/c/0.* is missing; restore it") as caught:
            read_all(out)
        assert "\n" not in str(caught.value)
        with pytest.raises(RunError, match="is missing"):
            open_store(out).verify()
    tokens = "parts/00001-of-00004/text-train/tokens/c/0"
    cut = copy_with(path, tmp_path / "cut", tokens, lambda content: content[: len(content) // 2])
    with pytest.raises(RunError, match="damaged or unreadable: .*text-train/tokens/c/0.*restore it"):
        read_all(cut)


def read_all(path):
    view = open_store(path).view("text")
    return view.read(range(view.documents), np.zeros(view.documents), view.index(0, view.documents).length_N)


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"format_version": 1}', b"\xff", b"[" * 100_000])
def test_damaged_json_is_bad_input(path, config, tmp_path, content):
    for name in ("manifest.json", "vocabulary.json"):
        out = copy_with(path, tmp_path / name, name, lambda _: content)
        with pytest.raises(InputError, match="damaged|store format"):
            _ = open_store(out).vocabulary
    out = copy_with(path, tmp_path / "settings", "settings.json", lambda _: content)
    with pytest.raises(InputError, match="damaged|another version|begun with"):
        prepare(config, out, progress=False)


def test_wrong_names(path, tmp_path):
    with pytest.raises(InputError, match="no store here"):
        open_store(str(tmp_path / "none"))
    with pytest.raises(InputError, match="collection"):
        open_store(path).view("../text")
    with pytest.raises(InputError, match="split"):
        open_store(path).view("text", "test")


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda m: m.update(modalities="text"), "modalities: expected a list"),
        (lambda m: m["parts"][0].pop("collections"), "parts.0.collections: is missing"),
        (lambda m: m["parts"][0]["collections"].update({"../x": {}}), "'../x' is not one of text-train"),
        (lambda m: m["parts"][0]["collections"]["pairs-train"].update(documents=-1), "documents: must be at least 0"),
        (lambda m: m["parts"][0]["collections"]["pairs-train"]["tokens_M"].append(1), "of 3 modalities, not 2"),
        (lambda m: m["counts"]["pairs-train"].update(tokens=[]), "counts.pairs-train.tokens: expected an object"),
        (lambda m: m["hashes"].pop("tokenizer"), "hashes.tokenizer: is missing"),
    ],
)
def test_a_manifest_with_something_else_in_it(path, tmp_path, change, refusal):
    copy = shutil.copytree(path, tmp_path / "store")
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"manifest.json: .*{refusal}.*; restore the file, it is damaged"):
        open_store(str(copy))


def test_arrays_of_other_lengths_than_the_manifest_says(path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "store")
    manifest = json.loads((copy / "manifest.json").read_text())
    described = manifest["parts"][0]["collections"]["pairs-train"]
    described["documents"] += 10
    (copy / "manifest.json").write_text(json.dumps(manifest))
    view = open_store(str(copy)).view("pairs")
    with pytest.raises(RunError, match="rows, and .* by manifest.json; restore both"):
        view.index(0, view.documents)
    described["documents"] -= 10
    manifest["parts"][0]["sources"] = []
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="manifest.json: names 0 sources, and a document is of number 0"):
        open_store(str(copy)).view("pairs").provenance(0, 1)


def test_files_that_do_not_belong_together(path, tmp_path):
    """Their hashes agree; what they are of does not."""
    copy = shutil.copytree(path, tmp_path / "store")
    codecs = open_store(path).codecs

    def settle(**changes):
        changed = dataclasses.replace(codecs, **changes)
        changed.write(Directory(str(copy)))
        manifest = json.loads((copy / "manifest.json").read_text()) | {"hashes": changed.hashes}
        (copy / "manifest.json").write_text(json.dumps(manifest))
        return open_store(str(copy))

    few = {**codecs.image, "palette": codecs.image["palette"][:3]}
    with pytest.raises(InputError, match="codes of 3 a picture, by vocabulary.json .*; restore both files"):
        settle(image=few).image_codec()
    with pytest.raises(InputError, match="cannot be read as a tokenizer.json: .*; restore the file"):
        settle(tokenizer=b'{"model": {"merges": [}').text_codec()
    with pytest.raises(InputError, match="vocabulary.json is not the one of manifest.json"):
        settle(vocabulary=Vocabulary(codecs.vocabulary.modalities[:1])).vocabulary  # noqa: B018


@pytest.mark.parametrize(
    ("file", "change", "refusal"),
    [
        ("settings.json", {"parts": 10**12}, "settings.json: parts: must be at least 1 and at most 1000000"),
        ("settings.json", {"settings": []}, "settings.json: settings: expected an object"),
        ("parts/00001-of-*/part.json", {"documents": "9"}, "part.json: documents: expected int, found '9'"),
        (
            "parts/00001-of-*/part.json",
            {"broken": 5, "listed": []},
            "lists no broken documents",
        ),
    ],
)
def test_what_a_store_is_put_together_from(path, tmp_path, file, change, refusal):
    copy = shutil.copytree(path, tmp_path / "store")
    (found,) = copy.glob(file)
    found.write_text(json.dumps(json.loads(found.read_text()) | change))
    with pytest.raises(InputError, match=refusal):
        prepare(settings("unread"), str(copy), merge=True, progress=False)
