"""What a model says of given documents, token by token, under a causal routing (paper section 2.4).

Every document is a row of its own, so nothing that it is batched with is seen. A probability is one over the whole
vocabulary, codes of pictures included: that is what the model was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moma_jax import sharding
from moma_jax.checks import round_up
from moma_jax.errors import InputError
from moma_jax.model.parameters import unembedding_of
from moma_jax.training.load import Loaded

BUCKET = 128
"""Rows are padded to a multiple of this many positions: a program is compiled for each length."""


class Scored(NamedTuple):
    """One document of n ids.

    Attributes:
      nats_N: float32 (n-1,), minus the log-probability of ids 1..n-1, each given all ids before it.
      greedy_N: bool (n-1,), whether no other id was likelier.
    """

    nats_N: np.ndarray
    greedy_N: np.ndarray


class Scorer:
    """Scores documents; compiles once for each padded length."""

    def __init__(self, loaded: Loaded, routing: str, *, batch_rows: int = 8):
        """A scorer of a trained model.

        Args:
          loaded: what `moma_jax.load` gave.
          routing: a causal one that the model has, "causal" or "threshold".
          batch_rows: documents at a time; rounded up to whole routing groups on every device.

        Raises:
          InputError: the model has no such routing, or no rows were asked for.
        """
        if batch_rows < 1:
            raise InputError(f"batch_size: {batch_rows} documents at a time; use 1 or more")
        if routing == loaded.config.model.router.training_name:
            raise InputError(f"routing: {routing} sees the future, so it gives no likelihoods; use causal or threshold")
        self._loaded, config = loaded, loaded.config
        self._decoder = loaded.under(routing)
        self._mesh, self._pad = loaded.program.mesh, loaded.vocabulary.pad
        self._rows = round_up(batch_rows, self._decoder.group_rows * sharding.shards(self._mesh))
        self._sequence, self._vocabulary = config.data.sequence, loaded.vocabulary.size
        self._modality_V = jnp.asarray(loaded.vocabulary.modality_V, jnp.int32)
        self._program = jax.jit(self._score, out_shardings=sharding.rows(self._mesh))

    @property
    def longest(self) -> int:
        """Ids of the longest document: the model reads one less, since nothing follows the last."""
        return self._sequence + 1

    def __call__(self, rows: Sequence[np.ndarray]) -> list[Scored]:
        """Scores of documents, in their order; see `each`."""
        found = dict(self.each(rows))
        return [found[number] for number in range(len(rows))]

    def each(self, rows: Sequence[np.ndarray]) -> Iterator[tuple[int, Scored]]:
        """Yields (index of a row, its scores) as they are computed, the longest documents first.

        Args:
          rows: int ids of documents, (n,) each, the mark of a document's begin included where one is wanted.

        Raises:
          InputError: a document without ids, longer than `longest`, or with an id that the vocabulary has not.
        """
        rows = [np.asarray(row, np.int32) for row in rows]
        for number, row in enumerate(rows):
            self._check(number, row)
        buckets: dict[int, list[int]] = {}
        for number in sorted(range(len(rows)), key=lambda number: -len(rows[number])):
            length = min(round_up(max(len(rows[number]) - 1, 1), BUCKET), self._sequence)
            buckets.setdefault(length, []).append(number)
        for length, numbers in buckets.items():
            for first in range(0, len(numbers), self._rows):
                chosen = numbers[first : first + self._rows]
                yield from zip(chosen, self._batch([rows[n] for n in chosen], length), strict=True)

    def _check(self, number: int, row: np.ndarray) -> None:
        if row.ndim != 1 or not len(row):
            raise InputError(f"score: document {number} is no list of at least one id")
        if len(row) > self.longest:
            raise InputError(
                f"score: document {number} has {len(row)} ids; the model's sequence of {self._sequence} allows "
                f"{self.longest}: cut it"
            )
        if row.min() < 0 or row.max() >= self._vocabulary:
            raise InputError(f"score: document {number} has ids that are not below the vocabulary's {self._vocabulary}")

    def _batch(self, rows: list[np.ndarray], length: int) -> list[Scored]:
        """Scores of at most `_rows` documents, padded to `length` positions."""
        token_BS = np.full((self._rows, length), self._pad, np.int32)
        target_BS, segment_BS = token_BS.copy(), np.zeros_like(token_BS)
        for b, row in enumerate(rows):
            token_BS[b, : len(row) - 1] = row[:-1]
            target_BS[b, : len(row) - 1] = row[1:]
            segment_BS[b, : len(row) - 1] = 1
        with sharding.use_mesh(self._mesh):
            arrays = jax.device_put((token_BS, target_BS, segment_BS), sharding.rows(self._mesh))
            scored = self._program(self._loaded.params, self._loaded.routing_state, *arrays)
        nats_BS, greedy_BS = jax.device_get(scored)
        return [Scored(nats_BS[b, : len(row) - 1], greedy_BS[b, : len(row) - 1]) for b, row in enumerate(rows)]

    def _score(self, params, routing_state, token_BS, target_BS, segment_BS):
        """(nats_BS, greedy_BS) of the targets; what padding gets means nothing."""
        position_BS = jnp.broadcast_to(jnp.arange(token_BS.shape[1]), token_BS.shape)
        output = self._decoder.apply(
            {"params": params},
            token_BS,
            segment_BS,
            position_BS,
            jnp.take(self._modality_V, token_BS),
            key=jax.random.key(0),  # nothing is drawn
            routing_state=routing_state,
        )
        kernel_DV = unembedding_of(params).astype(output.hidden_BSD.dtype)
        return _of_targets(output.hidden_BSD, kernel_DV, target_BS, chunk=self._loaded.config.train.loss_chunk)


def _of_targets(hidden_BSD, kernel_DV, target_BS, *, chunk: int):
    """(float32 nats_BS, bool greedy_BS) of targets; the logits of about `chunk` tokens exist at once."""

    def score(column):
        hidden_BD, target_B = column
        logit_BV = jnp.dot(hidden_BD, kernel_DV, preferred_element_type=jnp.float32)
        chosen_B = jnp.take_along_axis(logit_BV, target_B[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logit_BV, axis=-1) - chosen_B, jnp.argmax(logit_BV, axis=-1) == target_B

    # Position by position, some of them together: rows stay where they are when devices share them.
    columns = (jnp.moveaxis(hidden_BSD, 1, 0), target_BS.T)
    nats_SB, greedy_SB = jax.lax.map(score, columns, batch_size=max(1, chunk // target_BS.shape[0]))
    return nats_SB.T, greedy_SB.T
