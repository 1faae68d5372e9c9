"""Lists of what lies in a directory: every flipped byte is found and named, and nothing in what is whole."""

import json
import os
import shutil
import uuid

import pytest
from command_line import run as command
from small_stores import make_source, settings
from stale import StaleStore
from tiny import tiny

import moma_jax
from moma_jax.data.prepare import prepare
from moma_jax.errors import InputError
from moma_jax.runs.checkpoint import AFTER_LIST
from moma_jax.storage import directory as directory_module
from moma_jax.storage.contents import FILE, Damage, read_contents, verify, write_contents
from moma_jax.storage.directory import Directory
from moma_jax.whole import verified


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    prepare(settings(make_source(folder / "source", documents=12), parts=1), str(folder / "store"), progress=False)
    return folder / "store"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "run"
    moma_jax.train(tiny(path, train_steps=2, train_checkpoint_every=2), quiet=True)
    return path


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def flipped(path):
    """Flips the middle byte's lowest bit; returns what undoes it."""
    before = path.read_bytes()
    middle = len(before) // 2
    path.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
    return lambda: path.write_bytes(before)


def damaged(path):
    return [piece.about for piece in verified(str(path)) if not piece.whole]


def test_a_flipped_byte_in_any_file_of_a_store_is_found(store):
    assert not damaged(store)
    for path in files_of(store):
        if not path.stat().st_size:
            continue
        undo = flipped(path)
        (about,) = (
            damaged(store) if "parts" not in path.parts or path.name not in ("part.json", FILE) else damaged(store)[:1]
        )
        assert str(path.name) in about, path
        undo()
    assert not damaged(store)


def test_a_flipped_byte_in_any_file_of_a_checkpoint_is_found(trained):
    assert not damaged(trained)
    for path in files_of(trained / "checkpoints"):
        if path.stat().st_size and not (path.name in AFTER_LIST and path.parent.name == "2"):
            undo = flipped(path)
            (about,) = damaged(trained)
            assert path.name in about
            undo()
    assert not damaged(trained)


def test_a_flipped_byte_in_any_record_is_found(trained):
    path = trained / "metrics.jsonl"
    content = path.read_bytes()
    for place in range(len(content) - 1):  # a last line without its end is one that a kill cut off
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError, match=f"line {content[:place].count(10) + 1}: "):
            moma_jax.read_metrics(trained)
    (about,) = damaged(trained)
    assert about.startswith("DAMAGED: metrics.jsonl: line ") and "restore" not in about
    path.write_bytes(content[:-1])
    assert [piece.about for piece in verified(str(trained))][-1].endswith("records, and one that was cut off")
    path.write_bytes(content)
    assert not damaged(trained)


def test_a_file_that_is_gone_cut_off_or_new_is_named(tmp_path):
    home = Directory(str(tmp_path))
    for name, content in {"a": b"one", "b/c": b"two", "empty": b""}.items():
        home.write(name, content)
    assert write_contents(home, coming={"last": b"four"}) == 10
    assert verify(home).damages == [Damage("last", "is gone")]
    home.write("last", b"four")
    assert verify(home) == (4, 10, [], [])
    home.write("a", b"on")
    os.remove(tmp_path / "b" / "c")
    home.write("d", b"")
    found = verify(home)
    assert dict(found.damages) == {"a": "has 2 bytes in place of 3", "b/c": "is gone"} and found.unlisted == ["d"]


def test_a_list_waits_until_listings_show_everything():
    home = Directory(f"memory://{uuid.uuid4()}")
    StaleStore(home, 1.0)
    for name in ("a", "b"):
        home._kv.write(name, b"1").result()  # as another object of this directory would
    write_contents(home)
    assert set(read_contents(home)) == {"a", "b"}
    assert Directory(home.path).names("") == ["a", "b", FILE]  # the mark is gone


def test_what_a_listing_shows_and_nobody_can_read_is_not_in_the_list():
    home = Directory(f"memory://{uuid.uuid4()}")
    home.write("a", b"1")
    home._written.add("deleted")
    write_contents(home)
    assert set(read_contents(home)) == {"a"}


def test_listings_that_never_show_anything_are_refused(monkeypatch):
    monkeypatch.setattr(directory_module, "LISTING_SECONDS", 1)
    home = Directory(f"memory://{uuid.uuid4()}")
    StaleStore(home, 60)
    with pytest.raises(InputError, match="are over 1 s old"):
        home.await_listing()
    assert Directory(home.path)._listed("") == set()


@pytest.mark.parametrize("content", [b"{}", b"[]", b'{"objects": {"a": 3}, "crc32c": 1}', b"\xff", b'{"objects": []}'])
def test_a_damaged_list_is_damage(tmp_path, content):
    home = Directory(str(tmp_path))
    home.write(FILE, content)
    assert [damage.name for damage in verify(home).damages] == [FILE]


@pytest.mark.parametrize("where", ["disk", "store"])
def test_large_files_are_read_in_pieces(where, tmp_path, monkeypatch):
    monkeypatch.setattr(directory_module, "PIECE", 4)
    home = Directory(str(tmp_path) if where == "disk" else f"memory://{tmp_path}")
    for size in (0, 3, 4, 5, 8, 11):
        home.write("file", content := bytes(range(size)))
        pieces = list(home.pieces("file"))
        assert b"".join(pieces) == content and all(len(piece) <= 4 for piece in pieces)


def test_the_command_names_what_is_damaged(store, trained, capsys):
    code, out, _ = command(capsys, "verify", str(store), str(trained))
    assert code == 0 and out.count("whole: ") == 4
    undo = flipped(store / "manifest.json")
    code, out, err = command(capsys, "verify", str(store), "--json")
    undo()
    assert code == 1 and "manifest.json its CRC-32C is another" in err and "\n" not in err.strip()
    assert [row["whole"] for row in json.loads(out)] == [False, True]
    code, _, err = command(capsys, "verify", str(store / "parts"))
    assert code == 2 and "neither a store nor a run;" in err


def test_a_store_without_lists_is_held_against_its_manifest(store, tmp_path):
    shutil.copytree(store, older := tmp_path / "older")
    for path in older.rglob(FILE):
        path.unlink()
    assert [piece.whole for piece in verified(str(older))] == [True]
    (path,) = (older / "parts" / "00001-of-00001" / "text-train" / "tokens" / "c").iterdir()
    flipped(path)
    assert damaged(older)
    with pytest.raises(InputError, match="neither a store nor a run;"):
        list(verified(str(tmp_path / "nowhere")))
