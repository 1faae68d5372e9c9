"""What a held-out target asks of the model, on documents written out by hand."""

import numpy as np
import pytest
from lettered import STREAMED, TEXT, THREE, TWO, packed

from moma_jax.evaluation.conditions import Kinds
from moma_jax.vocab import contiguous


def measured(words, vocabulary=TWO):
    """For every measure of conditions, which of a document's targets (tokens but the first) it takes, as 0 and 1.

    The document stands in the second row, between two others.
    """
    batch = packed([["<[cccc]t>"], ["<ttt>", words, "<[cccc]>"]], vocabulary)
    kinds = Kinds(vocabulary)
    kind_S = kinds.of(batch)[1, 5 : 5 + len(words.split("|")[0])]
    weight_S = batch.weight_BS[1, 5 : 5 + len(kind_S)]
    taken = {n: "".join("01"[int(c)] for c in chosen_J[kind_S[weight_S > 0]]) for n, chosen_J in kinds.measures.items()}
    plain = {"", *(m.name for m in vocabulary.modalities)}
    return {name: bits for name, bits in taken.items() if "1" in bits and name not in plain}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("<tt[cccc]>", {"image_given_text": "000111100"}),
        ("<[cccc]tt>", {"text_given_image": "000000111"}),
        ("<t[cccc]t[cccc]>", {"interleaved": "111111111111111"}),
        ("<[cccc][cccc]>", {"interleaved": "1111111111111"}),
        ("<t[cccc]t>", {}),
        ("<[cccc]>", {}),
        ("<ttt>", {}),
        # Pieces of documents that were cut: the begin is missing, or the end.
        ("tt[cccc]>", {}),
        ("[cccc]tt>", {}),
        ("t[cccc]t[cccc]>", {}),
        ("<tt[cccc]|t", {}),
        ("<[cccc]t|t", {}),
        ("<t[cccc][cccc]|t", {"interleaved": "11111111111111"}),
    ],
)
def test_conditions_of_targets(words, expected):
    assert measured(words) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("<t(aa)>", {"audio_given_text": "001100"}),
        ("<(aa)tt>", {"text_given_audio": "0000111"}),
        ("<t[cccc]>", {"image_given_text": "00111100"}),
        ("<[cccc](aa)>", {"interleaved": "11111111111"}),
    ],
)
def test_three_modalities_have_conditions_each(words, expected):
    assert measured(words, THREE) == expected


def test_what_is_neither_text_nor_picture_makes_no_pair():
    assert measured("<t[cccc]>", STREAMED) == {"image_given_text": "00111100"}
    assert measured("<x[cccc]>", STREAMED) == {} == measured("<[cccc]tx>", STREAMED)
    assert set(Kinds(STREAMED).measures) == {
        "", "text", "image", "code", "image_given_text", "text_given_image", "interleaved"
    }  # fmt: skip


def test_without_pictures_there_are_no_conditions():
    kinds = Kinds(contiguous((TEXT,)))
    assert set(kinds.measures) == {"", "text"}


def test_every_target_counts_once_by_modality_and_documents_may_be_anywhere():
    batch = packed([["<tt[cccc]>", "<[cccc]tt>"], ["<t[cccc]t[cccc]>"], ["<ttttt|t"], []])
    kinds, weight_BS = Kinds(TWO), batch.weight_BS
    kind_BS = kinds.of(batch)
    assert kind_BS.dtype == np.int32 and kind_BS.min() >= 0 and kind_BS.max() < kinds.number
    weight_J = np.bincount(kind_BS.ravel(), weight_BS.ravel(), minlength=kinds.number)
    figures = kinds.figures(2 * weight_J, weight_J)
    tokens = {name.removeprefix("tokens_"): n for name, n in figures.items() if name.startswith("tokens_")}
    assert tokens == {
        "text": 5 + 5 + 7 + 6, "image": 4 + 4 + 8, "image_given_text": 4, "text_given_image": 3, "interleaved": 15
    }  # fmt: skip
    assert figures["tokens"] == 39 and {v for n, v in figures.items() if n.startswith("loss")} == {2.0}
    nothing = kinds.figures(np.zeros(kinds.number), np.zeros(kinds.number))
    assert {nothing[name] for name in nothing if name.startswith("loss")} == {None} and nothing["tokens"] == 0
