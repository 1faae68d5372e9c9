"""Damaged files of a token store: what is read of them is right, or refused in one line."""

import dataclasses
import hashlib
import json
import os

import pytest
from mutations import COUNTS, mutants, replacing, require_refusals
from small_stores import make_source, settings
from tiny import tiny

from moma_jax.codec.interface import description_hash
from moma_jax.commands.show import format_store, glance_of_store
from moma_jax.config import DataConfig, Modality, StoreConfig
from moma_jax.data.prepare import prepare
from moma_jax.data.sheet import shown_documents
from moma_jax.data.store import COLLECTIONS, SPLITS, open_store
from moma_jax.data.stream import open_stream
from moma_jax.data.text import load_tokenizer
from moma_jax.vocab import Vocabulary, special_tokens


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    where = tmp_path_factory.mktemp("fuzz")
    prepare(settings(make_source(where / "source", 120), parts=2), str(where / "store"), progress=False)
    return str(where / "store")


@pytest.fixture
def file(store):
    """Reads a file of the store, and puts others in its place; it is there again after the test."""
    with replacing(store) as replaced:
        yield replaced


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["settings.json", "parts/00001-of-00002/part.json"])
def test_what_a_store_is_put_together_from(store, file, name, count):
    """By `moma prepare` again, and with --merge."""
    config = settings(os.path.join(os.path.dirname(store), "source"), parts=2)

    def use(content):
        file(name, content)
        prepare(config, store, merge=len(content) % 2 == 0, progress=False)

    file("manifest.json")  # is written anew
    use(file(name))
    require_refusals(use, mutants(file(name), count))


def config_of(path):
    modalities = (Modality("text", "t", size=300, quota=0.9), Modality("image", "i", size=16, span=16, quota=0.6))
    data = DataConfig(modalities=modalities, stores=(StoreConfig("own", path),), sequence=64, group_rows=2, lanes=2)
    return dataclasses.replace(tiny(), data=data)


def looked_at(path):
    """What commands do with a store: a glance, a sheet, views of everything, a batch of training, checksums."""
    format_store(glance_of_store(path)).encode(errors="backslashreplace")
    store = open_store(path)
    for split in SPLITS:
        for collection in (*COLLECTIONS, "all"):
            view = store.view(collection, split)
            if some := min(3, view.documents):
                view.index(0, some)
                view.read([0, some - 1], [0, 0], [1, 1])
                view.provenance(view.documents - some, view.documents)
    shown_documents(store, 2)
    with open_stream(config_of(path)) as stream:
        next(stream)
    store.verify()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["manifest.json", "vocabulary.json", "codec-image.json"])
def test_files_of_a_store(store, file, name, count):
    def use(content):
        file(name, content)
        looked_at(store)

    looked_at(store)
    require_refusals(use, mutants(file(name), count))


def hashed(content, name, file):
    """Puts a file there as if the store had been made with it: the hashes say so, as far as it can be read at all."""
    described = json.loads(file("vocabulary.json"))
    try:
        match name:
            case "tokenizer.json":
                described["hashes"]["tokenizer"] = hashlib.sha256(content).hexdigest()
            case "codec-image.json":
                described["hashes"]["image_codec"] = description_hash(json.loads(content))
            case "vocabulary.json":
                described["layout"] = json.loads(content)
                described["hashes"]["vocabulary"] = Vocabulary.from_json(described["layout"]).hash
    except (ValueError, AttributeError, RecursionError):
        pass
    if name != "vocabulary.json":
        file(name, content)
    file("vocabulary.json", json.dumps(described).encode())
    file("manifest.json", json.dumps(json.loads(file("manifest.json")) | {"hashes": described["hashes"]}).encode())


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["tokenizer.json", "vocabulary.json", "codec-image.json"])
def test_past_the_hashes(store, file, name, count):
    def use(content):
        hashed(content, name, file)
        looked_at(store)
        text = open_store(store).text_codec()
        text.decode(text.encode("a red circle"))

    original = file(name)
    if name == "vocabulary.json":
        original = json.dumps(json.loads(original)["layout"]).encode()
    use(original)
    require_refusals(use, mutants(original, count))


@pytest.mark.parametrize("count", COUNTS)
def test_a_tokenizer_of_a_user(store, file, tmp_path, count):
    path = tmp_path / "tokenizer.json"

    def use(content):
        path.write_bytes(content)
        load_tokenizer(str(path), special_tokens(["image"]), 300)

    use(file("tokenizer.json"))
    require_refusals(use, mutants(file("tokenizer.json"), count))
