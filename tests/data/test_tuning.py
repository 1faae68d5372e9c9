"""The tuning split: a part of the training documents that training does not see, and that nothing else is."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from fake_views import MODALITIES, FakeStore, config, corpus

from moma_jax.checks import resolve
from moma_jax.config import EvalSet
from moma_jax.data import stream as stream_lib
from moma_jax.data.stream import open_stream
from moma_jax.data.tuning import Part
from moma_jax.errors import InputError


@pytest.mark.parametrize("share, documents", [(0.5, 7), (0.5, 8), (0.1, 100), (0.1, 101), (0.02, 30), (0.3, 1)])
def test_two_parts_are_the_whole(share, documents):
    view = corpus(0, (documents,) * 3)["text"]
    parts = [Part(view, share, tuning) for tuning in (True, False)]
    numbers = [part.numbers(np.arange(part.documents)) for part in parts]
    assert sorted(np.concatenate(numbers)) == list(range(documents)) and numbers[0][0] == 0
    for part, number_N in zip(parts, numbers, strict=True):
        assert np.all(np.diff(number_N) > 0)
        for start, stop in ((0, part.documents), (part.documents // 3, part.documents // 2), (0, 0)):
            index = part.index(start, stop)
            each = [view.index(n, n + 1) for n in number_N[start:stop].tolist()]
            for name in ("length_N", "span_modality_K", "span_length_K"):
                expected = [value for one in each for value in getattr(one, name).tolist()]
                assert getattr(index, name).tolist() == expected
            assert np.diff(index.span_row_N1).tolist() == [len(one.span_length_K) for one in each]


def test_token_counts_of_stores_beyond_int32_do_not_overflow():
    """4e9 documents of 2e13 tokens: their product is beyond int64."""
    view = SimpleNamespace(documents=4 * 10**9, tokens_M=np.array([2 * 10**13]), weighted=False)
    assert Part(view, 0.02, True).tokens_M == 4 * 10**11


@pytest.fixture
def store(monkeypatch):
    split = {"train": corpus(0, (500, 300, 200)), "validation": corpus(1, (40, 90, 30))}
    views = {(name, s): view for s, found in split.items() for name, view in found.items()}
    monkeypatch.setattr(stream_lib, "open_store", lambda path, **options: FakeStore(MODALITIES, views))


def seen(stream, batches):
    """(store, document) of what a stream hands out."""
    with stream:
        packed = [each for each, _ in zip(stream, range(batches), strict=False)]
    return {tuple(piece) for each in packed for piece in each.piece_N6[:, :2].tolist()}, packed


def test_training_does_not_see_what_is_tuned_on(store):
    apart = config(tuning=0.1)
    of_training, packed = seen(open_stream(apart), 60)
    of_tuning, tuned = seen(open_stream(apart, split="tuning", epochs=1), 10**6)
    assert sum(store == 0 for store, _ in of_tuning) == 50, "of the store that ends first, every tenth"
    texts = lambda batches: {  # noqa: E731
        tuple(b.batch.token_BS[r][b.batch.segment_BS[r] == s].tolist())
        for b in batches
        for r in range(len(b.batch.token_BS))
        for s in range(1, b.batch.segment_BS[r].max() + 1)
        if (b.batch.segment_BS[r] == s).sum() > 12
    }
    assert not texts(packed) & texts(tuned) and len(of_training) > 400
    same, _ = seen(open_stream(config()), 60)
    assert same != of_training, "without it training sees all"


def test_a_tuning_set_needs_documents():
    wants = config()
    train = dataclasses.replace(wants.train, eval_sets=(EvalSet(rows=4, split="tuning"),))
    with pytest.raises(InputError, match=r"data.tuning keeps no documents for it; set data.tuning"):
        resolve(dataclasses.replace(wants, train=train))
    with pytest.raises(InputError, match=r"data.tuning: 0.6 is more than half"):
        resolve(config(tuning=0.6))
