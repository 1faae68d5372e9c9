"""What is written always parses, whatever the logits: spans exact, nothing over the context, no id that may not be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moma_jax.config import Modality
from moma_jax.errors import InputError
from moma_jax.generation.grammar import (
    ENDED,
    FULL,
    RUNNING,
    advance,
    allowed,
    drawn_modality,
    first_state,
    make_rules,
    open_span,
)
from moma_jax.vocab import contiguous

VOCABULARY = contiguous(
    [
        Modality("text", "t", size=30),
        Modality("image", "i", size=6, span=4),
        Modality("sound", "s", size=5, span=3),
        Modality("bare", "b", size=4),
    ]
)
TEXT_IDS = range(12, 27)  # 10 special ids, two that the tokenizer reserves, three that it never uses
CODES = {m.name: set(m.code_ids.tolist()) for m in VOCABULARY.modalities}


def parses(ids, *, mode="free"):
    """Reads ids by hand: (spans of each modality, whether the document ended); fails where they do not parse."""
    ids, spans, at = list(ids), {"image": 0, "sound": 0}, 0
    while at < len(ids):
        token = ids[at]
        modality = next((m for m in VOCABULARY.modalities if m.begin == token and m.span), None)
        if modality is not None:
            assert mode != "text" and (mode == "free" or modality.name == "image")
            inside = ids[at + 1 : at + 1 + modality.span]
            assert len(inside) == modality.span and set(inside) <= CODES[modality.name]
            assert ids[at + 1 + modality.span] == modality.end
            spans[modality.name] += 1
            at += modality.span + 2
        elif token == VOCABULARY.end_document:
            assert at == len(ids) - 1, "nothing follows the end"
            return spans, True
        else:
            assert token in TEXT_IDS or (token in CODES["bare"] and mode == "free")
            at += 1
    return spans, False


@jax.jit
def walk(rules, state, key):
    """Lets wild logits write 40 tokens."""

    def step(state, key):
        may_BV = allowed(rules, state)
        # Marks would be rare among so many ids; they are what is tested.
        logit_BV = 3 * jax.random.normal(key, may_BV.shape) + 3 * (jnp.arange(may_BV.shape[1]) < 10)
        token_B = jnp.argmax(jnp.where(may_BV, logit_BV, -jnp.inf), -1)
        runs_B = state.stopped_B == RUNNING
        return advance(rules, state, token_B), (token_B, runs_B, may_BV.any(-1) | ~runs_B)

    return jax.lax.scan(step, state, jax.random.split(key, 40))


def written(rules, state, seed):
    state, (token_NB, runs_NB, possible_NB) = walk(rules, state, jax.random.key(seed))
    assert np.all(possible_NB), "a row that runs can always go on"
    rows = [np.asarray(token_NB[:, b])[np.asarray(runs_NB[:, b])] for b in range(token_NB.shape[1])]
    return jax.tree.map(np.asarray, state), rows


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(["free", "text"]),
    room=st.lists(st.integers(0, 40), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_wild_logits_write_what_parses(mode, room, seed):
    rules = make_rules(VOCABULARY, TEXT_IDS, mode, 1)
    empty = np.zeros(0, np.int32)
    state, rows = written(rules, first_state(VOCABULARY, [empty] * 4, room), seed)
    for b, ids in enumerate(rows):
        _, ended = parses(ids, mode=mode)
        assert len(ids) <= room[b] and len(ids) == state.written_B[b]
        assert ended == (state.stopped_B[b] == ENDED)
        assert ended or (len(ids) == room[b] and state.stopped_B[b] == FULL)


def test_free_writing_reaches_every_kind():
    rules = make_rules(VOCABULARY, TEXT_IDS, "free", 1)
    state = first_state(VOCABULARY, [np.zeros(0, np.int32)] * 8, [40] * 8)
    total = {"image": 0, "sound": 0}
    seen = set()
    for seed in range(20):
        for ids in written(rules, state, seed)[1]:
            seen |= set(ids.tolist())
            for name, count in parses(ids)[0].items():
                total[name] += count
    assert min(total.values()) > 10 and CODES["bare"] <= seen and set(TEXT_IDS) <= seen


@pytest.mark.parametrize("images", [1, 3])
def test_mode_image_draws_pictures_and_stops(images):
    rules = make_rules(VOCABULARY, TEXT_IDS, "image", images)
    state = first_state(VOCABULARY, [np.zeros(0, np.int32)] * 3, [40] * 3)
    state, rows = written(rules, state, 1)
    assert np.all(state.stopped_B == ENDED)
    for ids in rows:
        assert len(ids) == 6 * images and parses(ids, mode="image") == ({"image": images, "sound": 0}, False)


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 4), seed=st.integers(0, 99), mode=st.sampled_from(["free", "text", "image"]))
def test_an_open_span_is_filled(cut, seed, mode):
    image = VOCABULARY.modalities[1]
    begun = np.array([image.begin, *image.code_ids[:cut]], np.int32)
    assert open_span(VOCABULARY, np.append([VOCABULARY.begin_document, 15], begun), "row") == 2
    rules = make_rules(VOCABULARY, TEXT_IDS, mode, 1)
    state, (ids,) = written(rules, first_state(VOCABULARY, [begun], [20]), seed)
    whole = [*begun, *ids]
    spans, _ = parses(whole[6:], mode=mode)
    assert parses(whole[:6])[0]["image"] == 1, "the span of the prompt is exact"
    assert mode != "image" or (sum(spans.values()) == 0 and state.stopped_B[0] == ENDED)


def test_a_begin_mark_needs_room_for_its_span_and_end():
    rules = make_rules(VOCABULARY, TEXT_IDS, "free", 1)
    empty = np.zeros(0, np.int32)
    may_BV = np.asarray(allowed(rules, first_state(VOCABULARY, [empty] * 4, [4, 5, 6, 7])))
    image, sound = VOCABULARY.modalities[1:3]
    assert may_BV[:, image.begin].tolist() == [False, False, True, True]
    assert may_BV[:, sound.begin].tolist() == [False, True, True, True]
    assert not may_BV[:, [image.end, sound.end, VOCABULARY.pad, VOCABULARY.unknown, VOCABULARY.begin_document]].any()


def test_a_prompt_that_is_no_document_is_refused():
    image, s = VOCABULARY.modalities[1], VOCABULARY.begin_document
    codes = image.code_ids.tolist()
    good = [s, 15, image.begin, *codes[:4], image.end, 16, VOCABULARY.modalities[3].code_ids[0]]
    assert open_span(VOCABULARY, np.array(good), "row") == len(good)
    for bad, message in [
        ([], "begin with <s>"),
        ([15], "begin with <s>"),
        ([s, 99], "ids from 0 to 99"),
        ([s, codes[0]], "cannot stand outside"),
        ([s, image.end], "cannot stand outside"),
        ([s, VOCABULARY.end_document], "cannot stand outside"),
        ([s, image.begin, codes[0], 15], "is not 4 codes of image"),
        ([s, image.begin, *codes[:5]], "is not 4 codes of image"),
    ]:
        with pytest.raises(InputError, match=message):
            open_span(VOCABULARY, np.array(bad, np.int32), "row")


def test_a_vocabulary_without_pictures_draws_none():
    text = contiguous([Modality("text", "t", size=30)])
    assert drawn_modality(text) is None and drawn_modality(VOCABULARY) == 1
    bare = dataclasses.replace(VOCABULARY.modalities[1], span=0, begin=None, end=None)
    assert (
        drawn_modality(
            dataclasses.replace(VOCABULARY, modalities=(VOCABULARY.modalities[0], bare, *VOCABULARY.modalities[2:]))
        )
        is None
    )
    with pytest.raises(InputError, match="knows no pictures"):
        make_rules(text, TEXT_IDS, "image", 1)
    with pytest.raises(InputError, match="'draw' is not one of free, text, image"):
        make_rules(VOCABULARY, TEXT_IDS, "draw", 1)
