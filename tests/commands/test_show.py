"""`moma show` of a store, and contact sheets."""

import json

import numpy as np
import pytest
from command_line import run as moma
from PIL import Image
from small_codecs import small_codec
from small_stores import make_source, settings
from tiny import tiny

from moma_jax import train
from moma_jax.codec.folder import write_codec
from moma_jax.data.prepare import prepare
from moma_jax.data.sheet import COLOURS, _colours, shown_documents
from moma_jax.data.store import open_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    home = tmp_path_factory.mktemp("show")
    prepare(settings(make_source(home / "source")), str(home / "store"), progress=False)
    return str(home / "store")


def test_a_store_at_a_glance(store, capsys):
    code, out, _ = moma(capsys, "show", store)
    assert code == 0 and out.startswith(f"{store}: 300 documents, 0 broken\n") and "image: " in out and "palette" in out
    code, out, _ = moma(capsys, "show", store, "--json")
    found = json.loads(out)
    assert found["documents"] == 300 and sum(c["documents"] for c in found["counts"].values()) == 300


def test_documents_are_drawn_as_the_model_sees_them(store, tmp_path, capsys):
    opened = open_store(store)
    shown = shown_documents(opened, 1000)
    assert len(shown) == 300 and {document.heading.split()[0] for document in shown} == {"train", "validation"}
    pictures = [piece for document in shown for piece in document.pieces if isinstance(piece, Image.Image)]
    side = opened.image_codec().side
    assert pictures and {picture.size for picture in pictures} == {(side, side)}
    code, out, _ = moma(capsys, "show", store, "--n", "3", "--out", tmp_path / "sheet.png")
    assert code == 0 and out.endswith("sheet.png\n") and Image.open(tmp_path / "sheet.png").width == 1000


def test_codes_that_cannot_be_drawn_are_counted(tmp_path):
    write_codec(str(tmp_path / "codec"), small_codec(decoder=False))
    source = make_source(tmp_path / "source", documents=30)
    config = settings(source, codec=str(tmp_path / "codec"), image_side=8, colours=32)
    prepare(config, str(tmp_path / "store"), progress=False)
    shown = shown_documents(open_store(str(tmp_path / "store")), 30)
    pieces = [piece for document in shown for piece in document.pieces]
    assert "<64 codes of image>" in pieces and all(isinstance(piece, str) for piece in pieces)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--n", "300"), "--n: 300 is not from 0 to 256"),
        (("--n", "2", "--out", "there.png"), "--out: there.png is there already"),
        (("--n", "2", "--out", "no/where.png"), "--out: no/where.png cannot be written"),
    ],
)
def test_bad_input_is_one_line(store, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").write_text("mine")
    code, _, err = moma(capsys, "show", store, *words)
    assert code == 2 and err.count("\n") == 1 and message in err
    assert (tmp_path / "there.png").read_text() == "mine"


def test_what_is_neither_is_refused(tmp_path, capsys):
    code, _, err = moma(capsys, "show", tmp_path)
    assert code == 2 and "neither config.json nor manifest.json" in err


def test_rows_are_coloured_by_modality_and_document():
    segment_BS, modality_BS = np.array([[1, 1, 2, 0]]), np.array([[0, 1, 1, 0]], np.int8)
    (row,) = _colours(segment_BS, modality_BS)
    assert tuple(row[0]) == COLOURS[0] and tuple(row[1]) == COLOURS[1]
    assert (row[2] > row[1]).all() and (row[3] == 255).all()


@pytest.mark.slow
def test_of_a_run_the_next_batch_is_shown(tmp_path, capsys):
    train(tiny(tmp_path / "run", train_steps=2), quiet=True)
    code, out, err = moma(capsys, "show", tmp_path / "run", "--n", "2", "--out", tmp_path / "sheet.png")
    assert code == 0 and "step 2" in out, err
    assert Image.open(tmp_path / "sheet.png").width == 1000
