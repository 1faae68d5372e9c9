"""The order of documents, cutting, the quota invariant, shares."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from fake_views import FakeView, Index, corpus, page, pair, text
from hypothesis import given, settings
from hypothesis import strategies as st

from moma_jax.config import Modality, StoreConfig
from moma_jax.data.mixture import resolve_shares
from moma_jax.data.order import IndexReader, LaneOrder, OrderedDocument, Window, block_documents, permute
from moma_jax.data.packing import Frame, best_subset, pieces_of
from moma_jax.data.planner import Planner, StoreOrder
from moma_jax.errors import InputError

SPAN = 16
FRAME = Frame(rows=4, sequence=128, quotas=(256, 256), spans=(0, SPAN))


def planner(views, shares, frame=FRAME, lanes=4, wait=16, **options):
    sources = [StoreOrder(name, view, share) for (name, view), share in zip(views.items(), shares, strict=True)]
    settings = {"seed": 0, "window_documents": 64, "wait_documents": wait} | options
    return Planner(sources, frame, lanes=lanes, **settings)


def mixed(counts=(600, 300, 200), **options):
    views = corpus(0, counts)
    return views, planner(views, [(0.2, 0.5), (0.4, 0.0), (0.4, 0.5)], **options)


# Order ----------------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 700), key=st.integers(0, 1 << 63))
@settings(max_examples=40, deadline=None)
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permute_is_fixed_for_ever():
    """Runs resume on other machines and versions: these numbers must never change."""
    assert permute(np.arange(10), 10, 1).tolist() == PERMUTED


PERMUTED = [3, 9, 4, 0, 7, 8, 1, 2, 5, 6]


@pytest.mark.parametrize("documents", [4, 5, 37, 1000, 3001])
def test_each_epoch_of_all_lanes_has_every_document_once(documents):
    view = FakeView([[(0, 3)]] * documents)
    lanes = 4
    for epoch in range(2):
        seen = Counter()
        for lane in range(lanes):
            order = LaneOrder(
                IndexReader(view), lane, lanes, seed=3, name="a", window_documents=100, spans=(0, SPAN),
                span_limit=9, epochs=2,
            )  # fmt: skip
            order.seek(epoch, 0)
            while order.epoch == epoch:
                seen[order.draw().document] += 1
        assert seen == Counter(range(documents))


def test_windows_of_a_sorted_store_resemble_the_store():
    """A view of everything lists collection after collection; each window still has all of them in proportion."""
    view = FakeView([[(0, 3)]] * 30000 + [[(0, 1), (1, SPAN), (0, 1)]] * 10000)
    order = LaneOrder(IndexReader(view), 1, 4, seed=0, name="a", window_documents=2000, spans=(0, SPAN), span_limit=9)
    drawn = np.array([order.draw().modality < 0 for _ in range(8000)])
    assert np.all(np.abs(drawn.reshape(4, 2000).mean(1) - 0.25) < 1 / 12)  # 12 blocks a window


def test_blocks_are_small_in_small_stores():
    assert block_documents(10, 16) == 1
    assert block_documents(10**9, 16) == 256


class Endless:
    """An index of 5e8 documents, made up on the fly."""

    documents = 500_000_000
    tokens_M = np.array([250_000_000 * 40, 250_000_000 * SPAN])

    def index(self, start, stop):
        length_N = (np.arange(start, stop) * 2654435761 % 97) + 8
        size = stop - start
        return Index(length_N, np.zeros(size, np.uint8), np.arange(size + 1), np.zeros(size, np.uint8), length_N)


def test_seek_in_half_a_billion_documents():
    cursor_planner = planner({"a": Endless()}, [(1.0, 0.0)], lanes=16, window_documents=16384)
    for lane in range(16):
        cursor_planner.next_group(lane)
    cursor = cursor_planner.cursor()
    cursor["order"][:, 0] = [[2, 20_000_000 + 1000 * lane] for lane in range(16)]
    tracemalloc.start()
    begin = time.perf_counter()
    fresh = planner({"a": Endless()}, [(1.0, 0.0)], lanes=16, window_documents=16384)
    fresh.restore(cursor)
    groups = [fresh.next_group(lane) for lane in range(16)]
    assert time.perf_counter() - begin < 30
    assert tracemalloc.get_traced_memory()[1] < 2 << 30
    tracemalloc.stop()
    assert all(sum(group.left_M) == 256 for group in groups)
    assert fresh.epochs()["a"] == pytest.approx(2 + 20_007_500 * 16 / 5e8, rel=1e-3)


# Cutting --------------------------------------------------------------------------------------------------------------


def cut(runs, frame=FRAME):
    length = sum(size for _, size in runs)
    count_M = [sum(size for m, size in runs if m == modality) for modality in range(len(frame.quotas))]
    return [(p.start, p.stop, p.modality) for p in pieces_of(0, OrderedDocument(0, length, -1, count_M, runs), frame)]


def test_a_document_that_fits_stays_whole():
    assert cut([(0, 20), (1, 16), (0, 92)]) == [(0, 128, -1)]


def test_long_documents_are_cut_between_spans_and_marks_stay_with_their_span():
    # heading 30, begin, 16 codes, end, 50 of text, begin, 16 codes, end, 80 of text
    runs = [(0, 31), (1, 16), (0, 52), (1, 16), (0, 81)]
    assert cut(runs) == [(0, 116, -1), (116, 196, -1)]
    # Two adjacent pictures are parted between one's end mark and the other's begin mark.
    assert cut([(0, 100), (1, 16), (0, 2), (1, 16), (0, 1)]) == [(0, 117, -1), (117, 135, -1)]


def test_text_beside_pictures_that_no_row_holds_is_cut_anywhere():
    assert cut([(0, 301), (1, 16), (0, 5)]) == [(0, 300, 0), (300, 322, -1)]


def test_a_small_quota_cuts_too():
    frame = Frame(rows=2, sequence=128, quotas=(20, 236), spans=(0, SPAN))
    pieces = cut([(0, 11), (1, 16), (0, 12), (1, 16), (0, 2)], frame)
    assert pieces == [(0, 28, -1), (28, 57, -1)] or sum(b - a for a, b, _ in pieces) == 57


def test_a_span_that_no_row_holds_is_refused():
    with pytest.raises(InputError, match="data.sequence"):
        cut([(0, 5), (1, 200), (0, 5)])


@given(sizes=st.lists(st.tuples(st.integers(2, 200), st.booleans()), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_pieces_cover_the_document_and_keep_spans(sizes):
    runs = [(0, 1)]
    for text_size, image in sizes:
        runs[-1] = (0, runs[-1][1] + text_size)
        if image:
            runs += [(1, SPAN), (0, 1)]
    pieces = cut(runs)
    edges = [0, *(stop for _, stop, _ in pieces)]
    assert edges[-1] == sum(size for _, size in runs) and [p[0] for p in pieces] == edges[:-1]
    at = 0
    for modality, size in runs:
        if modality:
            assert not [edge for edge in edges if at - 1 < edge < at + size + 1]
        at += size


@given(sizes=st.lists(st.integers(1, 40), max_size=10), room=st.integers(0, 90))
@settings(max_examples=100, deadline=None)
def test_best_subset_is_exact(sizes, room):
    chosen = best_subset(sizes, room)
    reachable = {0}
    for size in sizes:
        reachable |= {s + size for s in reachable if s + size <= room}
    assert len(set(chosen)) == len(chosen)
    assert sum(sizes[i] for i in chosen) == max(reachable)


# Groups ---------------------------------------------------------------------------------------------------------------


def check_group(group, frame, views):
    """Quotas, rows, and pieces that are what they say they are."""
    used_M = np.zeros(len(frame.quotas), int)
    for row, room in zip(group.rows, group.room_R, strict=True):
        assert sum(p.stop - p.start for p in row) == frame.sequence - room <= frame.sequence
        for piece in row:
            if piece.modality >= 0:
                used_M[piece.modality] += piece.stop - piece.start
            else:
                used_M += piece.count_M
    assert np.all(used_M <= frame.quotas)
    assert np.array_equal(used_M, np.array(frame.quotas) - group.left_M)
    return used_M


def test_quota_and_no_token_lost_or_repeated_over_10000_groups():
    views, packing = mixed()
    views = list(views.values())
    taken = [np.zeros((view.documents, view.length_N.max() + 1), np.int16) for view in views]
    filled = 0
    for number in range(10_000):
        group = packing.next_group(number % 4)
        check_group(group, FRAME, views)
        assert packing.waiting() <= 4 * 16
        filled += 512 - sum(group.room_R)
        for row in group.rows:
            for piece in row:
                taken[piece.store][piece.document, piece.start : piece.stop] += 1
    assert filled >= 0.97 * 10_000 * 512
    cursor = packing.cursor()
    for store, document, start in cursor["waiting"].reshape(-1, 3).tolist():
        if store >= 0:
            taken[store][document, start : views[store].length_N[document]] += 1
    # With what waits, every token of a document has come once in each of its lane's epochs.
    for store, (view, count) in enumerate(zip(views, taken, strict=True)):
        assert cursor["order"][:, store, 0].min() > 5
        for document in range(view.documents):
            row = count[document, : view.length_N[document]]
            epoch = cursor["order"][document // block_documents(view.documents, 4) % 4, store, 0]
            assert row.min() == row.max() and row[0] in (epoch, epoch + 1)


def test_pieces_count_their_tokens_by_modality():
    views, packing = mixed()
    for number in range(50):
        for row in packing.next_group(number % 4).rows:
            for piece in row:
                view = list(views.values())[piece.store]
                index = view.index(piece.document, piece.document + 1)
                modality_T = np.repeat(index.span_modality_K, index.span_length_K)[piece.start : piece.stop]
                assert piece.length == view.length_N[piece.document]
                if piece.modality >= 0:
                    assert np.all(modality_T == piece.modality)
                else:
                    assert np.bincount(modality_T, minlength=2).tolist() == list(piece.count_M)


def test_shares_are_kept():
    rng = np.random.default_rng(0)
    views = {
        "a": FakeView([pair(rng) for _ in range(500)]),
        "b": FakeView([pair(rng) for _ in range(500)]),
        "text": FakeView([text(rng) for _ in range(500)]),
    }
    stores = [StoreConfig("a", "", share={"image": 0.7}), StoreConfig("b", ""), StoreConfig("text", "")]
    modalities = (Modality("text", "t", 64, quota=0.5), Modality("image", "i", 64, span=SPAN, quota=0.5))
    share_NM = resolve_shares(stores, [v.tokens_M for v in views.values()], modalities)
    packing = planner(views, share_NM)
    tokens_NM = np.zeros((3, 2))
    for number in range(800):
        for row in packing.next_group(number % 4).rows:
            for piece in row:
                if piece.modality >= 0:
                    tokens_NM[piece.store, piece.modality] += piece.stop - piece.start
                else:
                    tokens_NM[piece.store] += piece.count_M
    np.testing.assert_allclose(tokens_NM / tokens_NM.sum(0), share_NM, atol=0.01)
    assert share_NM[:, 1].tolist() == pytest.approx([0.7, 0.3, 0])


def test_restored_planner_goes_on_with_the_same_groups():
    views, packing = mixed()
    for number in range(203):
        packing.next_group(number % 4)
    fresh = planner(views, [(0.2, 0.5), (0.4, 0.0), (0.4, 0.5)])
    fresh.restore(packing.cursor())
    for number in range(203, 260):
        assert fresh.next_group(number % 4).rows == packing.next_group(number % 4).rows
    assert fresh.epochs() == packing.epochs()


def test_whole_documents_alone_fill_rows_by_exchange():
    """Without cuttable text, rows are filled by choosing among the waiting documents."""
    rng = np.random.default_rng(0)
    view = FakeView([pair(rng) if rng.random() < 0.7 else page(rng, 3) for _ in range(4000)])
    text_share = view.tokens_M[0] / view.tokens_M.sum()
    tokens = 8 * 512
    frame = Frame(8, 512, (round((text_share + 0.025) * tokens), round((1 - text_share + 0.025) * tokens)), (0, SPAN))
    packing = planner({"a": view}, [(1.0, 1.0)], frame, wait=64, window_documents=1000)
    groups = [packing.next_group(number % 4) for number in range(200)]
    assert sum(sum(group.room_R) for group in groups) <= 0.03 * 200 * tokens


def test_three_modalities_one_of_them_cuttable():
    rng = np.random.default_rng(0)
    frame = Frame(4, 128, (160, 192, 160), (0, SPAN, 0))

    def document(kind):
        if kind == 0:
            return text(rng)
        return pair(rng) if kind == 1 else [(0, 2), (2, int(rng.integers(20, 300))), (0, 2)]

    view = FakeView([document(rng.integers(3)) for _ in range(3000)], modalities=3)
    taken = np.zeros((view.documents, view.length_N.max()), int)
    packing = planner({"a": view}, [(1.0, 1.0, 1.0)], frame, epochs=1, lanes=1)
    while any((group := packing.next_group(0)).rows):
        used_M = check_group(group, frame, [view])
        assert np.all(used_M <= frame.quotas)
        for row in group.rows:
            for piece in row:
                taken[piece.document, piece.start : piece.stop] += 1
    assert np.array_equal(taken.sum(1), view.length_N)
    assert taken.max() == 1


def test_too_many_lanes_are_refused():
    with pytest.raises(InputError, match="data.lanes: 4 lanes, but a has 3 documents; use 3"):
        planner({"a": FakeView([[(0, 5)]] * 3)}, [(1.0, 0.0)])


def test_a_cursor_of_another_store_is_refused():
    _, packing = mixed()
    _, other = mixed(counts=(601, 300, 200))
    with pytest.raises(InputError, match="data.stores"):
        other.restore(packing.cursor())
    with pytest.raises(InputError, match="data.wait_documents"):
        mixed(wait=17)[1].restore(packing.cursor())


# Shares ---------------------------------------------------------------------------------------------------------------

HALVES = (Modality("text", "t", 64, quota=0.5), Modality("image", "i", 64, span=SPAN, quota=0.5))


def shares(tokens_NM, stated, modalities=HALVES):
    stores = [StoreConfig(name, "", share=share) for name, share in stated.items()]
    return resolve_shares(stores, tokens_NM, modalities).round(3).tolist()


def test_leftover_shares_follow_the_documents_own_ratio_and_their_tokens():
    pairs, words, more = (10, 90), (300, 0), (100, 0)
    assert shares([pairs, words, more], {"p": {}, "w": {}, "m": {}}) == [[0.111, 1.0], [0.667, 0.0], [0.222, 0.0]]
    assert shares([pairs, words, more], {"p": {}, "w": {"text": 0.2}, "m": {}})[2] == [0.689, 0.0]


def test_one_store_of_the_quotas_ratio():
    assert shares([(505, 495)], {"all": {}}) == [[1.0, 1.0]]


def test_one_store_of_another_ratio_is_refused_with_the_quotas_that_fit():
    with pytest.raises(InputError, match=r"data.modalities: .* quotas of text 0.600, image 0.400 would fit"):
        shares([(600, 400)], {"all": {}})


def test_slack_makes_room_for_another_ratio():
    loose = (Modality("text", "t", 64, quota=0.55), Modality("image", "i", 64, span=SPAN, quota=0.5))
    assert shares([(545, 455)], {"all": {}}, loose) == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"p": {"image": 0.9}, "w": {}}, "the shares of image add up to 0.900; set that of p to 1.000"),
        ({"p": {}, "w": {"text": 0.8}}, "share of 0.8 of text in w .* set it to 0.889"),
        ({"p": {"image": 1.0, "text": 0.5}, "w": {}}, "p has a share of 0.5 of text, .* make that 0.111"),
        ({"p": {}, "w": {"image": 0.5}}, "w has a share of 0.5 of image but no such tokens"),
    ],
)
def test_contradicting_shares_are_refused_with_the_right_one(stated, message):
    with pytest.raises(InputError, match=message):
        shares([(10, 90), (300, 0)], stated)


def test_a_modality_that_nobody_has_is_refused():
    with pytest.raises(InputError, match="no store has tokens of image"):
        shares([(300, 0)], {"w": {}})


def test_window_takes_documents_by_place():
    view = FakeView([[(0, 5)], [(0, 2), (1, SPAN), (0, 3)], [(1, SPAN)]])
    window = Window(IndexReader(view), [(0, 3)], (0, SPAN), span_limit=20)
    found = window.take(np.array([2, 1, 0]))
    assert [(d.document, d.modality, d.count_M) for d in found] == [(2, -1, [0, 16]), (1, -1, [5, 16]), (0, 0, [5, 0])]
    assert found[1].spans == [(0, 2), (1, SPAN), (0, 3)] and found[2].spans is None
