"""Batches: assembly, resume, independence of batch size and hosts, evaluation, random tokens."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
from fake_views import MODALITIES, STORES, FakeStore, config, corpus

from moma_jax.config import EvalSet, Modality, StoreConfig, TrainConfig
from moma_jax.data import stream as stream_lib
from moma_jax.data.assembly import assemble
from moma_jax.data.stream import merge_cursors, open_stream, require_held_out, vocabulary_of
from moma_jax.errors import InputError


@pytest.fixture
def views(monkeypatch):
    """A store in memory under every path."""
    split = {"train": corpus(0, (500, 300, 200)), "validation": corpus(1, (40, 90, 30))}
    views = {(name, s): view for s, found in split.items() for name, view in found.items()}
    store = FakeStore(MODALITIES, views)
    monkeypatch.setattr(stream_lib, "open_store", lambda path, **options: store)
    return views


def take(stream, count):
    """The next batches; the stream is closed."""
    with stream:
        return [next(stream) for _ in range(count)]


def assert_same(a, b):
    for x, y in zip(a.batch, b.batch, strict=True):
        np.testing.assert_array_equal(x, y)
    assert a.cursor.keys() == b.cursor.keys()
    for name in a.cursor:
        np.testing.assert_array_equal(a.cursor[name], b.cursor[name])
    assert (a.epochs, a.waiting) == (b.epochs, b.waiting)


def documents_of(batch):
    """(tokens, target, weight) of each segment."""
    for row in range(len(batch.token_BS)):
        for segment in range(1, batch.segment_BS[row].max() + 1):
            chosen = batch.segment_BS[row] == segment
            assert np.array_equal(batch.position_BS[row][chosen], np.arange(chosen.sum()))
            yield batch.token_BS[row][chosen], batch.target_BS[row][chosen], batch.weight_BS[row][chosen]


# Assembly -------------------------------------------------------------------------------------------------------------


def test_assembly_by_hand():
    """Two pieces in row 0, the second cut; row 1 empty; its rest in row 2."""
    tokens = [np.array([5, 6, 7]), np.array([8, 9, 10]), np.array([10, 11])]
    batch = assemble(
        tokens,
        np.array([3, 2, 2]),
        np.array([0, 0, 2]),
        rows=3,
        sequence=6,
        pad=1,
        modality_V=np.arange(12, dtype=np.int8) // 8,
    )
    assert batch.token_BS.tolist() == [[5, 6, 7, 8, 9, 1], [1] * 6, [10, 11, 1, 1, 1, 1]]
    assert batch.target_BS.tolist() == [[6, 7, 1, 9, 10, 1], [1] * 6, [11, 1, 1, 1, 1, 1]]
    assert batch.segment_BS.tolist() == [[1, 1, 1, 2, 2, 0], [0] * 6, [1, 1, 0, 0, 0, 0]]
    assert batch.position_BS.tolist() == [[0, 1, 2, 0, 1, 0], [0] * 6, [0, 1, 0, 0, 0, 0]]
    assert batch.weight_BS.tolist() == [[1, 1, 0, 1, 1, 0], [0] * 6, [1, 0, 0, 0, 0, 0]]
    assert batch.modality_BS.tolist() == [[0, 0, 0, 1, 1, 0], [0] * 6, [1, 1, 0, 0, 0, 0]]
    assert batch.target_modality_BS.tolist() == [[0, 0, 0, 1, 1, 0], [0] * 6, [1, 0, 0, 0, 0, 0]]
    assert [a.dtype.name for a in batch] == ["int32"] * 4 + ["float32"] + ["int8"] * 2


def test_an_empty_batch():
    none = np.zeros(0, np.int64)
    batch = assemble([], none, none, rows=2, sequence=3, pad=1, modality_V=np.zeros(2, np.int8))
    assert batch.token_BS.tolist() == [[1] * 3] * 2 and not batch.weight_BS.any()


def test_batches_hold_the_documents_tokens(views):
    """Each segment is a stretch of some document, with its true next tokens."""
    known = set()
    for (_, split), view in views.items():
        if split == "train":
            for document in range(view.documents):
                token_T = view.tokens(document).astype(int)
                known |= {tuple(token_T[i : i + 2]) for i in range(len(token_T) - 1)}
    filled = 0
    for packed in take(open_stream(config()), 20):
        filled += (packed.batch.segment_BS > 0).mean() / 20
        for token_T, target_T, weight_T in documents_of(packed.batch):
            assert np.all(weight_T[:-1] == 1)
            assert np.array_equal(token_T[1:], target_T[:-1])
            pairs = zip(token_T[weight_T > 0].tolist(), target_T[weight_T > 0].tolist(), strict=True)
            assert known.issuperset(pairs)
    assert filled >= 0.97


def test_groups_keep_the_quota(views):
    table_V = vocabulary_of(config()).modality_V
    for packed in take(open_stream(config()), 30):
        real_BS = packed.batch.segment_BS > 0
        image_BS = (table_V[packed.batch.token_BS] == 1) & real_BS
        text_BS = (table_V[packed.batch.token_BS] == 0) & real_BS
        assert image_BS.reshape(4, -1).sum(1).max() <= 128 and text_BS.reshape(4, -1).sum(1).max() <= 128


# Where a stream stands ------------------------------------------------------------------------------------------------


def test_resume_at_any_batch_is_exact(views):
    whole = take(open_stream(config()), 25)
    for at in (0, 1, 7, 23):
        for packed, again in zip(
            whole[at + 1 :], take(open_stream(config(), cursor=whole[at].cursor), 24 - at), strict=True
        ):
            assert_same(packed, again)


def test_prefetch_and_threads_change_nothing(views):
    slow = take(open_stream(config(prefetch=1, read_threads=1)), 8)
    for a, b in zip(slow, take(open_stream(config(prefetch=8, read_threads=4)), 8), strict=True):
        assert_same(a, b)


def test_groups_do_not_depend_on_the_batch(views):
    rows = [
        np.concatenate([p.batch.token_BS for p in take(open_stream(config(), rows=n), 24 // n)]) for n in (2, 6, 24)
    ]
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0], rows[2])


def test_seed_changes_the_order(views):
    a, b = (take(open_stream(config(), seed=seed), 1)[0] for seed in (0, 1))
    assert not np.array_equal(a.batch.token_BS, b.batch.token_BS)


@pytest.mark.parametrize("hosts", [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0, 1), (1, 2, 3), (2, 3)]])
def test_hosts_read_their_groups_and_cursors_merge(views, hosts):
    """Neighbouring groups, others, and some that two hosts read."""
    whole = take(open_stream(config()), 6)
    parts = [take(open_stream(config(), mine=mine), 6) for mine in hosts]
    for packed, *slices in zip(whole, *parts, strict=True):
        for name in packed.batch._fields:
            value_GRS = getattr(packed.batch, name).reshape(4, 2, -1)
            for mine, part in zip(hosts, slices, strict=True):
                np.testing.assert_array_equal(getattr(part.batch, name).reshape(-1, 2, 128), value_GRS[list(mine)])
        merged = merge_cursors([s.cursor for s in slices])
        assert merged.keys() == packed.cursor.keys()
        for name, value in packed.cursor.items():
            np.testing.assert_array_equal(value, merged[name])
        assert [len(s.cursor["lane"]) for s in slices] == [2 * len(mine) for mine in hosts]
    merged = merge_cursors([part[2].cursor for part in parts])
    last = take(open_stream(config(), mine=(3,), cursor=merged), 1)[0]
    np.testing.assert_array_equal(last.batch.token_BS, whole[3].batch.token_BS[6:])


def test_cursors_of_different_batches_do_not_merge(views):
    first, second = take(open_stream(config()), 2)
    with pytest.raises(ValueError, match="not of the same batch"):
        merge_cursors([first.cursor, second.cursor])


@pytest.mark.parametrize(("lanes", "first_rows"), [(6, 8), (8, 4)])
def test_hosts_plan_everything_where_lanes_serve_no_one_position(views, lanes, first_rows):
    """Lanes that are no multiple of the batch, or a position in the middle of one: the batches are the same."""
    cursor = take(open_stream(config(lanes=lanes), rows=first_rows), 1)[0].cursor
    whole = take(open_stream(config(lanes=lanes), cursor=cursor), 3)
    parts = [take(open_stream(config(lanes=lanes), cursor=cursor, mine=mine), 3) for mine in ((0, 3), (1, 2))]
    for packed, one, other in zip(whole, *parts, strict=True):
        groups = packed.batch.token_BS.reshape(4, 2, -1)
        np.testing.assert_array_equal(one.batch.token_BS, groups[[0, 3]].reshape(4, -1))
        np.testing.assert_array_equal(other.batch.token_BS, groups[[1, 2]].reshape(4, -1))
        merged = merge_cursors([one.cursor, other.cursor])
        assert all(np.array_equal(merged[name], value) for name, value in packed.cursor.items())


def test_rows_that_are_no_whole_groups_are_refused(views):
    with pytest.raises(InputError, match="train.batch_rows: 7 rows .* use 8"):
        open_stream(config(), rows=7)


def test_cursor_is_small_and_of_fixed_shape(views):
    first, *_, last = take(open_stream(config()), 30)
    assert {k: (np.shape(v), np.asarray(v).dtype) for k, v in first.cursor.items()} == {
        k: (np.shape(v), np.asarray(v).dtype) for k, v in last.cursor.items()
    }
    assert sum(np.asarray(v).nbytes for v in last.cursor.values()) < 8 * 16 * 3 * 8 + 2000
    assert last.epochs["pairs"] > first.epochs["pairs"] > 0 and set(last.epochs) == {"pairs", "text", "pages"}


# Evaluation -----------------------------------------------------------------------------------------------------------


def test_one_pass_predicts_every_token_but_the_first_once(views):
    only = config(stores=(StoreConfig("text", "here", "text"),))
    with open_stream(only, split="validation", seed=5, epochs=1) as stream:
        batches = [packed.batch for packed in stream]
    view = views["text", "validation"]
    assert sum(int(b.weight_BS.sum()) for b in batches) == (view.length_N - 1).sum()
    assert sum(int((b.segment_BS > 0).sum()) for b in batches) == view.length_N.sum()
    seen = sorted(int(t) for b in batches for t in b.token_BS[b.segment_BS > 0])
    assert seen == sorted(int(t) for d in range(view.documents) for t in view.tokens(d))
    assert all(b.token_BS.shape == (8, 128) for b in batches)


def test_one_pass_over_a_mixture_ends_with_its_first_store(views):
    with open_stream(config(), split="validation", epochs=1) as stream:
        *_, last = stream
    assert max(last.epochs.values()) == 1 and min(last.epochs.values()) > 0 and last.waiting == 0
    with open_stream(config(), split="validation", epochs=1, cursor=last.cursor) as stream:
        assert list(stream) == []


def test_one_pass_is_the_same_for_some_groups(views):
    with open_stream(config(), split="validation", epochs=1) as stream:
        whole = list(stream)
    for first in range(2):
        with open_stream(config(), split="validation", epochs=1, mine=(first, first + 2)) as stream:
            for packed, part in zip(whole, stream, strict=True):
                own_GRS = packed.batch.token_BS.reshape(4, 2, -1)[[first, first + 2]]
                np.testing.assert_array_equal(own_GRS.reshape(4, -1), part.batch.token_BS)


def test_some_stores_may_be_chosen(views):
    packed = take(open_stream(config(), stores=("pairs", "text"), epochs=1), 1)[0]
    assert set(packed.epochs) == {"pairs", "text"}
    with pytest.raises(InputError, match="data.stores: there is no 'words'"):
        open_stream(config(), stores=("words",))


# Ends and errors ------------------------------------------------------------------------------------------------------


def test_closing_early_does_not_hang(views):
    before = threading.active_count()
    stream = open_stream(config())
    next(stream)
    stream.close()
    stream.close()
    assert list(stream) == [] and threading.active_count() == before
    open_stream(config()).close()


def test_a_failing_read_is_raised(views, monkeypatch):
    def broken(*arguments):
        raise OSError("disk gone")

    monkeypatch.setattr(views["text", "train"], "read", broken)
    with open_stream(config()) as stream, pytest.raises(OSError, match="disk gone"):
        next(stream)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"size": 300}, "image has size=300, .* set size=256"), ({"span": 4}, "image has span=4, .* set span=16")],
)
def test_a_vocabulary_that_differs_is_refused(views, change, message):
    with pytest.raises(InputError, match=message):
        vocabulary_of(config(modalities=(MODALITIES[0], dataclasses.replace(MODALITIES[1], **change))))


def test_modalities_in_another_order_are_refused(views):
    with pytest.raises(InputError, match="data.modalities: they are text, the store pairs has text, image"):
        vocabulary_of(config(modalities=MODALITIES[:1]))


def test_an_evaluation_set_without_held_out_documents_is_refused(views):
    sets = (EvalSet("all"), EvalSet("texts", stores=("text",)))
    asked = dataclasses.replace(config(), train=TrainConfig(steps=1, batch_rows=8, eval_sets=sets))
    require_held_out(asked)
    require_held_out(dataclasses.replace(asked, data=dataclasses.replace(asked.data, kind="synthetic", stores=())))
    views["interleaved", "validation"].documents = 0
    with pytest.raises(InputError, match="train.eval_sets: all draws from pages .* raise data.prepare.held_out"):
        require_held_out(asked)
    require_held_out(dataclasses.replace(asked, train=dataclasses.replace(asked.train, eval_sets=sets[1:])))


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda c: c.pop("group"), "it has no group"),
        (lambda c: c.pop("ended"), "its ended is none"),
        (lambda c: c.update(lanes="4"), "'lanes' has other numbers"),
        (lambda c: c.update(order=c["order"].astype(float)), "'order' has other numbers"),
        (lambda c: c.update(group=2**63 - 1), "'group' has other numbers"),
        (lambda c: c.update(supplied=c["supplied"][1:]), "its supplied is none"),
        (lambda c: c.update(supplied=c["supplied"][:, :1]), "its supplied has rows of"),
        (lambda c: c["order"].__setitem__((0, 0, 0), -1), "its order is none"),
        (lambda c: c["order"].__setitem__((0, 0, 1), 10**9), "order: 1000000000 of .* places"),
        (lambda c: c["waiting"].__setitem__((0, 0), (9, 0, 0)), "document 0 of store 9 waits"),
        (lambda c: c["waiting"].__setitem__((0, 0), (0, 10**9, 0)), "document 1000000000 of store 0 waits"),
        (lambda c: c["waiting"].__setitem__((0, 0), (0, 0, 10**6)), "waits from token 1000000"),
    ],
)
def test_a_damaged_cursor_is_refused(views, change, refusal):
    cursor = {name: np.array(value) for name, value in take(open_stream(config()), 1)[0].cursor.items()}
    change(cursor)
    with pytest.raises(
        InputError, match=rf"data position \(cursor\) is damaged: .*{refusal}.*; move the checkpoint away"
    ):
        take(open_stream(config(), cursor=cursor), 1)


def test_a_cursor_of_more_lanes_is_refused(views):
    cursor = take(open_stream(config(lanes=8)), 1)[0].cursor
    with (
        pytest.raises(InputError, match="data.lanes: the checkpoint's data position has 8 of 8 lanes"),
        open_stream(config(lanes=6), cursor=cursor) as stream,
    ):
        next(stream)


# Random tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "modalities",
    [
        MODALITIES,
        (*MODALITIES[:1], dataclasses.replace(MODALITIES[1], quota=0.75)),
        (*MODALITIES, Modality("sound", "s", size=99, quota=0.2)),
    ],
)
def test_random_tokens_fill_rows_at_the_quotas_ratio(modalities):
    random = config(kind="synthetic", stores=(), modalities=modalities)
    table_V = vocabulary_of(random).modality_V
    packed, other = take(open_stream(random), 2)
    real_BS = packed.batch.segment_BS > 0
    assert real_BS.mean() > 0.95
    assert not np.array_equal(packed.batch.token_BS, other.batch.token_BS)
    for m, quota in enumerate(random.quotas):
        count_G = ((table_V[packed.batch.token_BS] == m) & real_BS).reshape(4, -1).sum(1)
        assert count_G.max() <= quota
        goal = quota * 256 / max(256, sum(random.quotas))
        assert count_G.min() >= goal - 16 - 2
    for token_T, target_T, weight_T in documents_of(packed.batch):
        assert np.array_equal(token_T[1:], target_T[:-1]) and weight_T.sum() == len(token_T) - 1


def test_random_tokens_resume_and_do_not_depend_on_hosts():
    random = config(kind="synthetic", stores=())
    whole = take(open_stream(random), 3)
    assert_same(take(open_stream(random, cursor=whole[0].cursor), 1)[0], whole[1])
    for mine in ((0, 1), (1, 3)):
        (part,) = take(open_stream(random, mine=mine), 1)
        own_GRS = whole[0].batch.token_BS.reshape(4, 2, -1)[list(mine)]
        np.testing.assert_array_equal(part.batch.token_BS, own_GRS.reshape(4, -1))
        assert part.cursor == merge_cursors([part.cursor, whole[0].cursor]) == {"step": 1}


def test_stores_of_equal_sizes_but_other_tokenizers_are_refused(views, monkeypatch):
    """The id layout alone does not say what an id means."""
    stores = {name: FakeStore(MODALITIES, views) for name in ("here", "there")}
    stores["there"].manifest["hashes"]["tokenizer"] = "other"
    monkeypatch.setattr(stream_lib, "open_store", lambda path, **options: stores[path])
    mixed = (STORES[0], dataclasses.replace(STORES[1], path="there"), STORES[2])
    with pytest.raises(InputError, match="its tokenizer differs .* --vocabulary"):
        open_stream(config(stores=mixed))
