"""Documents written as letters."""

import numpy as np

from moma_jax.config import Modality
from moma_jax.data.assembly import assemble
from moma_jax.vocab import contiguous

TEXT = Modality("text", "t", size=40)
IMAGE = Modality("image", "i", size=24, span=4)
TWO = contiguous((TEXT, IMAGE))
THREE = contiguous((TEXT, IMAGE, Modality("audio", "a", size=8, span=2)))
STREAMED = contiguous((TEXT, IMAGE, Modality("code", "c", size=8)))


def ids(words, vocabulary=TWO):
    """Tokens from letters: `<` and `>` begin and end a document, `[ccc]` a picture, `(aa)` sound, x code, t text."""
    start = {m.name: m.ranges[0][0] for m in vocabulary.modalities}
    marks = {"<": vocabulary.begin_document, ">": vocabulary.end_document, "t": 20, "c": start["image"]}
    marks |= {"[": vocabulary.modalities[1].begin, "]": vocabulary.modalities[1].end, "x": start.get("code")}
    if "audio" in start:
        marks |= {"(": vocabulary.modalities[2].begin, ")": vocabulary.modalities[2].end, "a": start["audio"]}
    return np.array([marks[letter] for letter in words])


def packed(rows, vocabulary=TWO, sequence=40):
    """A batch of rows of documents; a document "abc|d" was cut behind the c."""
    pieces, sizes, row_N = [], [], []
    for row, documents in enumerate(rows):
        for words in documents:
            stands, _, follows = words.partition("|")
            pieces.append(ids(stands + follows[:1], vocabulary))
            sizes.append(len(stands))
            row_N.append(row)
    shape = len(rows), sequence, vocabulary.pad, vocabulary.modality_V
    return assemble(pieces, np.array(sizes), np.array(row_N), *shape)
