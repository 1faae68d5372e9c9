"""The stream of pictures: every picture once in a pass, exact cursors, shares of processes, broken files."""

import contextlib
import dataclasses
import itertools
import logging
import shutil
from collections import Counter

import numpy as np
import pytest
from small_pictures import write_pictures

from moma_jax.codec.pictures import load_picture
from moma_jax.errors import InputError, RunError
from moma_jax.training.codec.config import PicturesConfig
from moma_jax.training.codec.pictures import Pictures, _Order

BATCH = 8


def read(image):
    return load_picture(image, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "source", train=600)


def taken(pictures, count, cursor=None, mine=range(BATCH)):
    with contextlib.closing(pictures.stream(read, BATCH, list(mine), cursor)) as stream:
        return list(itertools.islice(stream, count))


def assert_same(one, other):
    np.testing.assert_array_equal(one.batch, other.batch)
    assert (one.cursor, one.epochs) == (other.cursor, other.epochs)


def config(folder, **fields):
    return PicturesConfig(source=str(folder), window=512, **fields)


def test_a_pass_has_every_picture_once(folder):
    batches = taken(Pictures(config(folder, mirror=False)), 150)
    passes = np.concatenate([b.batch for b in batches]).reshape(2, 600, -1)
    seen = [Counter(picture.tobytes() for picture in each) for each in passes]
    files = Counter(read(path.read_bytes()).tobytes() for path in (folder / "train").iterdir())
    assert seen[0] == seen[1] == files
    assert (passes[0] != passes[1]).any()
    assert batches[74].epochs["pictures"] == 1 and batches[149].epochs["pictures"] == 2


def test_half_of_the_pictures_are_mirrored(folder):
    plain, mirrored = (
        np.concatenate([b.batch for b in taken(Pictures(config(folder, mirror=m)), 75)]) for m in (False, True)
    )
    flipped = [(a[:, ::-1] == b).all() and (a != b).any() for a, b in zip(plain, mirrored, strict=True)]
    assert all((a == b).all() or (a[:, ::-1] == b).all() for a, b in zip(plain, mirrored, strict=True))
    assert 0.4 < np.mean(flipped) < 0.6


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"offset": 10**6}, "has no such picture"),  # once without end: nothing was taken, and no pass was over
        ({"unit": 10**6}, "has no such picture"),
        ({"unit": -1}, "unit: must be at least 0"),
        ({"epoch": "1"}, "epoch: expected int"),
    ],
)
def test_a_damaged_cursor_is_refused(folder, change, refusal):
    cursor = {"step": 0, "epoch": 0, "unit": 0, "offset": 0} | change
    with pytest.raises(InputError, match=rf"data position \(cursor\): .*{refusal}"):
        taken(Pictures(config(folder)), 1, cursor)


def test_a_cursor_goes_on_with_the_next_batch(folder):
    whole = taken(Pictures(config(folder)), 160)
    for at in (0, 30, 74, 75, 130):
        gone_on = taken(Pictures(config(folder)), 3, whole[at].cursor)
        for one, other in zip(whole[at + 1 : at + 4], gone_on, strict=True):
            assert_same(one, other)


def test_processes_share_a_batch(folder):
    whole = taken(Pictures(config(folder)), 5)
    parts = [taken(Pictures(config(folder)), 5, mine=mine) for mine in ((0, 1, 2), (3, 6), (4, 5, 7))]
    for batch, *shares in zip(whole, *parts, strict=True):
        joined = np.concatenate([share.batch for share in shares])
        np.testing.assert_array_equal(joined, batch.batch[[0, 1, 2, 3, 6, 4, 5, 7]])
        assert all(share.cursor == batch.cursor for share in shares)


def test_neither_threads_nor_reading_ahead_change_the_order(folder):
    one, other = (taken(Pictures(config(folder, threads=t, prefetch=p)), 9) for t, p in ((1, 1), (4, 8)))
    for a, b in zip(one, other, strict=True):
        assert_same(a, b)


def test_seeds_differ(folder):
    one, other = (taken(Pictures(config(folder, seed=seed)), 1)[0] for seed in (0, 1))
    assert (one.batch != other.batch).any()


def test_held_out_pictures_are_those_of_validation(folder):
    parts = list(Pictures(config(folder)).held_out(read, at_once=4))
    assert [len(part) for part in parts] == [4, 2]
    found = np.concatenate(parts)
    files = sorted((folder / "validation").iterdir())
    np.testing.assert_array_equal(found, [read(path.read_bytes()) for path in files])
    np.testing.assert_array_equal(*Pictures(config(folder)).held_out(read, 2), found[:2])


def test_broken_pictures_are_named_and_replaced(tmp_path, caplog):
    folder = write_pictures(tmp_path / "source", train=8)
    (folder / "train" / "003.png").write_bytes(b"no picture")
    with caplog.at_level(logging.WARNING):
        (batch,) = taken(Pictures(config(folder, mirror=False)), 1)
    assert "003.png" in caplog.text and "another takes its place" in caplog.text
    counts = Counter(picture.tobytes() for picture in batch.batch)
    assert sorted(counts.values()) == [1] * 6 + [2]
    for path in (folder / "train").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(RunError, match="not one of 8 pictures can be read"):
        taken(Pictures(config(folder)), 1)


def test_sources_without_pictures_are_refused(tmp_path):
    folder = write_pictures(tmp_path / "source", train=0)
    with pytest.raises(InputError, match="no pictures to learn from"):
        taken(Pictures(config(folder)), 1)
    folder = write_pictures(tmp_path / "other", validation=0)
    with pytest.raises(InputError, match="no held-out pictures"):
        next(Pictures(config(folder)).held_out(read))
    with pytest.raises(InputError, match="scenes"):
        Pictures(dataclasses.replace(config(folder), source="scenes"))
    with pytest.raises(InputError, match="does not exist"):
        Pictures(dataclasses.replace(config(folder), source=str(tmp_path / "none")))


def test_windows_hold_as_many_pictures_as_they_say_whatever_the_units(folder):
    """Units of a folder hold a few pictures, those of a table 256: a window is filled from as many as it takes."""
    pictures = Pictures(dataclasses.replace(config(folder), window=60))
    order = _Order(pictures, 4, (0, 1, 2, 3), None)
    sizes = [len(order._window) for _ in range(100) if next(order)]
    assert set(sizes) == {60}, "600 pictures in units of 10"
    again = _Order(pictures, 4, (0, 1, 2, 3), order.get_state())
    assert [(n.document, m) for n, m in next(again).pictures] == [(n.document, m) for n, m in next(order).pictures]


def test_a_source_without_pictures_to_learn_from_is_refused(tmp_path):
    source = write_pictures(tmp_path / "source", train=4)
    shutil.rmtree(source / "train")
    with pytest.raises(InputError, match="has no pictures to learn from; lower data.held_out"):
        Pictures(config(source)).require_some()
