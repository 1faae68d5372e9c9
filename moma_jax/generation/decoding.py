"""The jitted side of generation: prompts in pieces of static shape, then a loop that writes up to STRIDE tokens.

Programs are compiled once for each number of rows, number of positions (a multiple of POSITIONS) and length of a piece
(one of PIECES), and for whether anything is sorted or guided; other values need no other program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import moma_jax.generation.grammar as grammar
from moma_jax.checks import round_up
from moma_jax.config import Config
from moma_jax.generation.grammar import RUNNING, Rules, State
from moma_jax.generation.sampling import Draw, guided, sample
from moma_jax.model import decode

STRIDE = 32
"""Tokens that are written between two looks of the host, at most."""
PIECES = (16, 64, 256)
"""Tokens of a prompt that are read at once: as many as the longest has, or fewer."""
POSITIONS = 128
"""Caches have a multiple of this many positions."""


def filled_up(rows: int) -> int:
    """Rows that are written side by side where there are so many: the next power of two, for fewer programs."""
    return 1 << (rows - 1).bit_length()


class Model(NamedTuple):
    """What writes: the weights, and the functions of model/decode.py for one config and routing.

    Attributes:
      weights: a pytree of arrays.
      new_cache: (rows, positions) -> cache, a NamedTuple with `length_B`; a row is rewound by lowering it.
      extend: (weights, cache, token_BQ, count_B) -> (hidden_BQD, cache), the first count tokens of each row appended.
      logits: (weights, hidden) -> float32 (..., V). Both are called inside jit and outside, where they are programs
        already.
      whole: write tokens by one program.
    """

    weights: Any
    new_cache: Callable
    extend: Callable
    logits: Callable
    whole: bool


def model_of(weights: Any, config: Config, modality_V, routing: str) -> Model:
    """A decoder as one that writes.

    Args:
      weights: of `decode.unstack`. config: the resolved config. modality_V: modality of every id.
      routing: name of a causal routing of the config's rule.
    """
    modality_V = jnp.asarray(modality_V, jnp.int32)
    extend = functools.partial(decode.extend, config=config, vocabulary_modality_V=modality_V, routing=routing)
    new_cache = functools.partial(decode.new_cache, config)
    return Model(weights, new_cache, extend, decode.logits, decode.by_one_program(config))


class Rows(NamedTuple):
    """Documents that are being written: their cache and the logits after their last token, float32."""

    cache: Any
    logit_BV: Any


class Writing(NamedTuple):
    """What the loop carries.

    Attributes:
      rows: the B documents. guides: 2B more, first without text, then without anything; None without guidance.
      state: of the grammar. sound: bool scalar, whether all logits were numbers.
    """

    rows: Rows
    guides: Rows | None
    state: State
    sound: Any


class Writer:
    """The compiled functions of one model.

    Prompts are read by `extend` called from the host, whose programs do not grow with the number of layers. Tokens are
    written by one program, a loop on the device, or as prompts are read (`Model.whole`).
    """

    def __init__(self, model: Model):
        self._model = model
        self.write_whole = jax.jit(self._write_stride, donate_argnums=1)

    def read(self, rows: list[np.ndarray], positions: int, vocabulary: int) -> Rows:
        """Reads the beginnings of documents, of any lengths from 1, into a new cache of at least `positions`."""
        length_B = np.array([len(id_N) for id_N in rows])
        piece = max((size for size in PIECES if size <= length_B.max()), default=PIECES[0])
        cache = self._model.new_cache(len(rows), round_up(positions, POSITIONS))
        read = Rows(cache, jnp.zeros((len(rows), vocabulary), jnp.float32))
        for start in range(0, int(length_B.max()), piece):
            token_BQ = np.zeros((len(rows), piece), np.int32)
            count_B = np.clip(length_B - start, 0, piece).astype(np.int32)
            for b, id_N in enumerate(rows):
                token_BQ[b, : count_B[b]] = id_N[start : start + piece]
            read = self._append(self._model.weights, read, token_BQ, count_B)
        return read

    def write(self, writing: Writing, rules: Rules, draw: Draw, seed_B: np.ndarray) -> tuple[Writing, np.ndarray]:
        """Writes up to STRIDE tokens to every row that runs; `writing` is used up.

        Returns:
          What to go on with, and the tokens, int32 (B, STRIDE); how many of them a row wrote is in the state.
        """
        stride = self.write_whole if self._model.whole else self._write_stride
        rules, draw = jax.device_put((rules, draw))
        writing, token_BN = stride(self._model.weights, writing, rules, draw, seed_B)
        return writing, np.asarray(token_BN)

    def _append(self, weights, rows: Rows, token_BQ, count_B) -> Rows:
        """The first count tokens of each row appended; rows with none keep their logits."""
        hidden_BQD, cache = self._model.extend(weights, rows.cache, token_BQ, count_B)
        logit_BV = self._model.logits(weights, _last(hidden_BQD, count_B))
        return Rows(cache, _kept(count_B, logit_BV, rows.logit_BV))

    def _write_stride(self, weights, writing: Writing, rules: Rules, draw: Draw, seed_B):
        key_B = _keys(seed_B)

        def goes_on(carried):
            number, writing, _ = carried
            return _goes_on(number, STRIDE, writing.state.stopped_B)

        def write_one(carried):
            number, writing, token_BN = carried
            token_B, count_B, state, sound, token_BN = _draw(writing, rules, draw, key_B, token_BN, number)
            rows, guides = writing.rows, writing.guides
            if self._model.whole or np.any(count_B):  # the last token of all needs no logits after it
                rows = self._append(weights, rows, token_B[:, None], count_B)
                if guides is not None:
                    guides = self._append_guides(weights, guides, rules, token_B, count_B)
            return number + 1, Writing(rows, guides, state, sound), token_BN

        loop = jax.lax.while_loop if self._model.whole else _loop_on_host
        begun = (np.int32(0), writing, jnp.full((seed_B.shape[0], STRIDE), rules.pad, jnp.int32))
        return loop(goes_on, write_one, begun)[1:]

    def _append_guides(self, weights, guides: Rows, rules: Rules, token_B, count_B) -> Rows:
        """Appends codes and their marks; the contexts without anything go back to `<s>` at each begin mark.

        While no row is at a picture, the guides cost nothing.
        """
        token_C1, count_C, length_C = _guides_told(guides.cache.length_B, rules, token_B, count_B)

        def append(guides):
            cache = guides.cache._replace(length_B=length_C)
            return self._append(weights, Rows(cache, guides.logit_BV), token_C1, count_C)

        if self._model.whole:
            return jax.lax.cond(jnp.any(count_C > 0), append, lambda guides: guides, guides)
        return append(guides) if np.any(count_C) else guides


def _loop_on_host(goes_on: Callable, body: Callable, carried):
    """`jax.lax.while_loop` whose body is not one program."""
    while goes_on(carried):
        carried = body(carried)
    return carried


@jax.jit
def _goes_on(number, most, stopped_B):
    return (number < most) & jnp.any(stopped_B == RUNNING)


@jax.jit
def _keys(seed_B):
    return jax.vmap(jax.random.key)(seed_B)


@jax.jit
def _draw(writing: Writing, rules: Rules, draw: Draw, key_B, token_BN, number):
    """The next token of each row: (token_B, count_B of those that go on, State, whether all logits were numbers,
    token_BN with it)."""
    state = writing.state
    runs_B = state.stopped_B == RUNNING
    logit_BV = jnp.where(grammar.allowed(rules, state), _guided(writing, draw), -jnp.inf)
    sound = writing.sound & jnp.all(jnp.isfinite(logit_BV.max(-1)) | ~runs_B)
    number_key_B = jax.vmap(jax.random.fold_in)(key_B, state.written_B)
    inside_B = (state.inside_B > 0).astype(jnp.int32)
    token_B = jnp.where(runs_B, sample(number_key_B, logit_BV, inside_B, draw), rules.pad)
    state = grammar.advance(rules, state, token_B)
    count_B = (state.stopped_B == RUNNING).astype(jnp.int32)
    return token_B, count_B, state, sound, jax.lax.dynamic_update_index_in_dim(token_BN, token_B, number, axis=1)


@jax.jit
def _last(hidden_BQD, count_B):
    last_B11 = jnp.maximum(count_B - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden_BQD, last_B11, axis=1)[:, 0]


@jax.jit
def _kept(count_B, logit_BV, before_BV):
    return jnp.where(count_B[:, None] > 0, logit_BV, before_BV)


@jax.jit
def _guides_told(length_C, rules: Rules, token_B, count_B):
    """What guides are told of new tokens: (token_C1, count_C, the lengths that they go back to first)."""
    count_B = count_B * rules.picture_V[token_B]
    begun_B = (rules.begin_V[token_B] > 0) & (count_B > 0)
    rewound_C = jnp.concatenate([jnp.zeros_like(begun_B), begun_B])
    return jnp.tile(token_B, 2)[:, None], jnp.tile(count_B, 2), jnp.where(rewound_C, 1, length_C)


def _guided(writing: Writing, draw: Draw):
    """The logits to draw from, before the grammar: guided where a row is about to write a code."""
    logit_BV = writing.rows.logit_BV
    if writing.guides is None:
        return logit_BV
    pictures_BV, none_BV = jnp.split(writing.guides.logit_BV, 2)
    code_B1 = (writing.state.inside_B > 0)[:, None]
    return jnp.where(code_B1, guided(logit_BV, pictures_BV, none_BV, draw.scale_2), logit_BV)
