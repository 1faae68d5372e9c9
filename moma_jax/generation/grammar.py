"""What may come next. Every row that is written parses: inside a span its modality's codes, exactly as many as the
span has, then its end mark; outside text, begin marks that leave room for their span, and codes of modalities without
spans. All of it runs inside the jitted loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moma_jax.errors import InputError
from moma_jax.vocab import Vocabulary

MODES = ("free", "text", "image")
RUNNING, ENDED, FULL, STOPPED = range(4)
REASONS = ("running", "end", "length", "stop")
"""Why a row stopped: end of document or the last picture asked for; no room left; a stop sequence."""
IMAGE = "image"
"""The modality that mode "image" draws."""


class Rules(NamedTuple):
    """The grammar as arrays: other modes and limits need no other program. M modalities; 0 is text.

    Attributes:
      outside_V: bool, what may stand outside spans where there is room.
      modality_V: int32. begin_V: int32, the modality whose span an id begins; 0 for all other ids.
      picture_V: bool, ids that guidance keeps where it leaves out the text: codes and their marks.
      span_M: int32 codes of a span. need_M: int32 tokens of a span with its marks; 0 for modalities without spans.
      end_M: int32 id of the end mark; -1 for modalities without spans.
      end_document, pad, drawn: int32 scalars; `drawn` is the modality whose spans count, -1 where none do.
      limit: int32 scalar, spans of it after which a row ends.
    """

    outside_V: Any
    modality_V: Any
    begin_V: Any
    picture_V: Any
    span_M: Any
    need_M: Any
    end_M: Any
    end_document: Any
    pad: Any
    drawn: Any
    limit: Any


class State(NamedTuple):
    """Where each row stands, int32 (B,).

    Attributes:
      inside_B: modality of the open span, 0 outside. left_B: codes that it still lacks.
      room_B: tokens that may still be written. written_B: tokens written. spans_B: spans of the drawn modality.
      stopped_B: RUNNING, or why the row stopped.
    """

    inside_B: Any
    left_B: Any
    room_B: Any
    written_B: Any
    spans_B: Any
    stopped_B: Any


def special_ids(vocabulary: Vocabulary) -> set[int]:
    """Ids that are no text: those of documents and the marks of spans."""
    marks = {mark for m in vocabulary.modalities if m.span for mark in (m.begin, m.end)}
    return marks | {vocabulary.begin_document, vocabulary.end_document, vocabulary.pad, vocabulary.unknown}


def drawn_modality(vocabulary: Vocabulary) -> int | None:
    """Index of the modality that mode "image" draws; None where the vocabulary has no such spans."""
    names = [m.name for m in vocabulary.modalities]
    found = IMAGE in names[1:] and vocabulary.modalities[names.index(IMAGE)].span > 0
    return names.index(IMAGE) if found else None


def make_rules(vocabulary: Vocabulary, text_ids: Iterable[int], mode: str, images: int) -> Rules:
    """The grammar of a vocabulary in one of the MODES.

    Args:
      text_ids: ids of text that may be written; special ids among them are left out.
      mode: "free"; "text": no codes and no marks; "image": `images` pictures, then the row ends.

    Raises:
      InputError: an unknown mode, or "image" where the vocabulary has no pictures.
    """
    if mode not in MODES:
        raise InputError(f"mode: {mode!r} is not one of {', '.join(MODES)}")
    drawn, modalities = drawn_modality(vocabulary), vocabulary.modalities
    if mode == "image" and drawn is None:
        raise InputError("mode: image, but the model knows no pictures; use mode text or free")
    outside_V, begin_V = np.zeros(vocabulary.size, bool), np.zeros(vocabulary.size, np.int32)
    modality_V, spans = vocabulary.modality_V.astype(np.int32), [(i, m) for i, m in enumerate(modalities) if m.span]
    picture_V = modality_V > 0
    for index, modality in spans:
        begin_V[modality.begin] = index
        picture_V[[modality.begin, modality.end]] = True
    if mode == "image":
        outside_V[modalities[drawn].begin] = True
    else:
        outside_V[[i for i in text_ids if modality_V[i] == 0]] = True
        outside_V[sorted(special_ids(vocabulary))] = False
        outside_V[vocabulary.end_document] = True
    if mode == "free":
        outside_V[begin_V > 0] = True
        for modality in modalities[1:]:
            outside_V[modality.code_ids] = not modality.span
    span_M = np.array([m.span for m in modalities], np.int32)
    return Rules(
        outside_V,
        modality_V,
        begin_V,
        picture_V,
        span_M,
        np.where(span_M > 0, span_M + 2, 0).astype(np.int32),
        np.array([m.end if m.span else -1 for m in modalities], np.int32),
        np.int32(vocabulary.end_document),
        np.int32(vocabulary.pad),
        np.int32(drawn if mode == "image" else -1),
        np.int32(min(images, np.iinfo(np.int32).max)),  # no context has room for more
    )


def allowed(rules: Rules, state: State):
    """What each row may write next: bool (B, V), never nothing for a row that runs."""
    fits_BM = rules.need_M <= state.room_B[:, None]
    outside_BV = rules.outside_V & fits_BM[:, rules.begin_V]
    inside_B1 = state.inside_B[:, None]
    code_BV = rules.modality_V == inside_B1
    end_BV = jnp.arange(rules.modality_V.shape[0]) == jnp.asarray(rules.end_M)[inside_B1]
    inside_BV = jnp.where(state.left_B[:, None] > 0, code_BV, end_BV)
    return jnp.where(inside_B1 > 0, inside_BV, outside_BV)


def advance(rules: Rules, state: State, token_B) -> State:
    """The state after each running row wrote its token; others stay as they are."""
    begun_B = jnp.asarray(rules.begin_V)[token_B]
    ends_B = (state.inside_B > 0) & (state.left_B == 0)
    spans_B = state.spans_B + (ends_B & (state.inside_B == rules.drawn))
    room_B = state.room_B - 1
    over_B = ((state.inside_B == 0) & (token_B == rules.end_document)) | (ends_B & (spans_B >= rules.limit))
    left_B = jnp.where(begun_B > 0, jnp.asarray(rules.span_M)[begun_B], jnp.maximum(state.left_B - 1, 0))
    after = State(
        jnp.where(begun_B > 0, begun_B, jnp.where(ends_B, 0, state.inside_B)),
        left_B,
        room_B,
        state.written_B + 1,
        spans_B,
        jnp.where(over_B, ENDED, jnp.where(room_B == 0, FULL, RUNNING)),
    )
    return State(*(jnp.where(state.stopped_B == RUNNING, new, old) for new, old in zip(after, state, strict=True)))


def open_span(vocabulary: Vocabulary, id_N: np.ndarray, name: str) -> int:
    """Where in a row its last span begins, if it is still open; the row's length otherwise.

    Args:
      id_N: ids of a document's beginning, `<s>` first.
      name: what the row is called in complaints.

    Raises:
      InputError: the ids are not the beginning of a document of this vocabulary.
    """
    if len(id_N) == 0 or id_N[0] != vocabulary.begin_document:
        raise InputError(f"{name}: does not begin with <s>, id {vocabulary.begin_document}; put it first")
    if id_N.min() < 0 or id_N.max() >= vocabulary.size:
        raise InputError(f"{name}: ids from {id_N.min()} to {id_N.max()}; the vocabulary has {vocabulary.size}")
    modality_N, spans = vocabulary.modality_V[id_N], [m for m in vocabulary.modalities if m.span]
    begins, start = {m.begin: (index, m) for index, m in enumerate(vocabulary.modalities) if m.span}, 1
    closing = {m.end for m in spans} | {vocabulary.begin_document, vocabulary.end_document, vocabulary.pad}
    while start < len(id_N):
        index, modality = begins.get(int(id_N[start]), (0, None))
        if modality is None:
            bare = modality_N[start] and vocabulary.modalities[modality_N[start]].span
            if bare or int(id_N[start]) in closing:
                raise InputError(f"{name}: id {id_N[start]} at position {start} cannot stand outside a span of codes")
            start += 1
            continue
        stop = start + 1 + modality.span
        if np.any(modality_N[start + 1 : stop] != index) or (stop < len(id_N) and id_N[stop] != modality.end):
            raise InputError(
                f"{name}: the span at position {start} is not {modality.span} codes of {modality.name} and their end"
            )
        if stop >= len(id_N):
            return start
        start = stop + 1
    return len(id_N)


def first_state(vocabulary: Vocabulary, open_ids: list[np.ndarray], room: list[int]) -> State:
    """The state of rows before anything is written.

    Args:
      open_ids: the ids of each row's open span, begin mark first; empty where none is open.
      room: tokens that each row may write; 0: the row is stopped from the start.
    """
    begins = {m.begin: index for index, m in enumerate(vocabulary.modalities) if m.span}
    inside = [begins[int(id_N[0])] if len(id_N) else 0 for id_N in open_ids]
    left = [vocabulary.modalities[i].span - len(id_N) + 1 if i else 0 for i, id_N in zip(inside, open_ids, strict=True)]
    zero_B = np.zeros(len(room), np.int32)
    stopped_B = np.where(np.array(room) > 0, RUNNING, FULL)
    return State(*(np.asarray(x, np.int32) for x in (inside, left, room, zero_B, zero_B.copy(), stopped_B)))
