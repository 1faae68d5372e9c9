"""What a held-out target asks of the model: its modality, and what stands before it in its document.

A kind is one of J numbers, `modality of the target + M * condition`. Conditions:

  * none of those below;
  * `<modality>_given_text`: the codes of a picture (of any modality with atomic spans) that text stands before, in a
    document of one picture;
  * `text_given_<modality>`: the text after a picture that the document begins with, its end mark included;
  * `interleaved`: everything in documents of two pictures or more.

A piece of a document that was cut tells less than the whole, so pieces that lack the document's begin are under no
condition, and pairs must be whole.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moma_jax.batch import Batch
from moma_jax.vocab import Vocabulary

GIVEN_TEXT = 1
"""The condition of codes after text; those of text after modality m follow it, `GIVEN_TEXT + m`."""


class _Documents(NamedTuple):
    """Of each document (or piece of one) in a batch; N counts rows and segments.

    Attributes:
      number_BS: which document a token belongs to.
      begins_N, ends_N: bool, its first token is the mark of a begin, its last that of an end.
      length_N: tokens. spans_N: atomic spans. first_N: position of the first code, codes_N: codes, modality_N: of the
      span, for documents with one. text_N: bool, all else is text.
    """

    number_BS: np.ndarray
    begins_N: np.ndarray
    ends_N: np.ndarray
    length_N: np.ndarray
    spans_N: np.ndarray
    first_N: np.ndarray
    codes_N: np.ndarray
    modality_N: np.ndarray
    text_N: np.ndarray


class Kinds:
    """The kinds of targets of a vocabulary.

    Attributes:
      number: J.
      measures: by name, which kinds it takes together, bool (J,): "" for all, each modality's name, and conditions.
    """

    def __init__(self, vocabulary: Vocabulary):
        modalities = vocabulary.modalities
        self._vocabulary = vocabulary
        self._atomic_M = np.array([m.span > 0 for m in modalities])
        self._interleaved = GIVEN_TEXT + len(modalities)
        self.number = len(modalities) * (self._interleaved + 1)
        modality_J, condition_J = self._of_kind(np.arange(self.number))
        text, atomic = modalities[0].name, np.flatnonzero(self._atomic_M).tolist()
        self.measures = {"": np.ones(self.number, bool)}
        self.measures |= {m.name: modality_J == i for i, m in enumerate(modalities)}
        for i in atomic:
            name = modalities[i].name
            self.measures[f"{name}_given_{text}"] = (condition_J == GIVEN_TEXT) & (modality_J == i)
            self.measures[f"{text}_given_{name}"] = condition_J == GIVEN_TEXT + i
        if atomic:
            self.measures["interleaved"] = condition_J == self._interleaved

    def _of_kind(self, kind):
        """(modality, condition) of a kind."""
        return kind % len(self._atomic_M), kind // len(self._atomic_M)

    def of(self, batch: Batch) -> np.ndarray:
        """The kind of every target of a packed batch on the host, int32 (B, S); on padding it means nothing."""
        modality_BS = batch.target_modality_BS.astype(np.int32)
        found = self._documents(batch)
        pair_N = found.begins_N & found.ends_N & (found.spans_N == 1) & found.text_N
        behind_N = found.first_N + found.codes_N  # position of the span's end mark
        # <s> text <image> codes </image> </s>, and <s> <image> codes </image> text </s>
        text_first_N = pair_N & (found.first_N > 2) & (behind_N == found.length_N - 2)
        image_first_N = pair_N & (found.first_N == 2) & (behind_N < found.length_N - 2)
        interleaved_N = found.begins_N & (found.spans_N > 1)
        document_BS, target_position_BS = found.number_BS, batch.position_BS + 1
        given_text_BS = text_first_N[document_BS] & (modality_BS > 0)
        given_image_BS = image_first_N[document_BS] & (target_position_BS > behind_N[document_BS])
        condition_BS = np.where(given_text_BS, GIVEN_TEXT, 0)
        condition_BS = np.where(given_image_BS, GIVEN_TEXT + found.modality_N[document_BS], condition_BS)
        condition_BS = np.where(interleaved_N[document_BS], self._interleaved, condition_BS)
        return (modality_BS + len(self._atomic_M) * condition_BS).astype(np.int32)

    def _documents(self, batch: Batch) -> _Documents:
        rows, width = batch.token_BS.shape[0], int(batch.segment_BS.max(initial=0)) + 1
        number_BS = np.arange(rows)[:, None] * width + batch.segment_BS
        modality_BS = batch.modality_BS.astype(np.int32)
        real_BS = batch.segment_BS > 0
        code_BS = real_BS & self._atomic_M[modality_BS]
        same_BS = np.zeros(real_BS.shape, bool)  # as the token to the left, in the same document
        same_BS[:, 1:] = (modality_BS[:, 1:] == modality_BS[:, :-1]) & (number_BS[:, 1:] == number_BS[:, :-1])
        start_BS = code_BS & ~same_BS

        def summed(where_BS, value_BS=None):
            weights = None if value_BS is None else value_BS[where_BS]
            return np.bincount(number_BS[where_BS], weights, minlength=rows * width).astype(np.int64)

        length_N = summed(real_BS)
        last_BS = real_BS & (batch.position_BS == length_N[number_BS] - 1)
        begin_BS = real_BS & (batch.position_BS == 0) & (batch.token_BS == self._vocabulary.begin_document)
        return _Documents(
            number_BS,
            begins_N=summed(begin_BS) > 0,
            ends_N=summed(last_BS & (batch.token_BS == self._vocabulary.end_document)) > 0,
            length_N=length_N,
            spans_N=summed(start_BS),
            first_N=summed(start_BS, batch.position_BS),
            codes_N=summed(code_BS),
            modality_N=summed(start_BS, modality_BS),
            text_N=summed(real_BS & ~code_BS & (modality_BS > 0)) == 0,
        )

    def figures(self, nats_J, weight_J) -> dict[str, float | int | None]:
        """`loss`, `loss_<measure>` in nats per target, None where there is none, and `tokens`, `tokens_<measure>`.

        Args:
          nats_J, weight_J: cross-entropy and weights, summed by kind.
        """
        losses, tokens = {}, {}
        for name, chosen_J in self.measures.items():
            nats, weight = float(np.sum(nats_J[chosen_J])), float(np.sum(weight_J[chosen_J]))
            losses["_".join(filter(None, ("loss", name)))] = nats / weight if weight else None
            tokens["_".join(filter(None, ("tokens", name)))] = int(weight)
        return losses | tokens
