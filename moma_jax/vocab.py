"""One id space for every modality: which id means what.

A token's modality is a function of its id alone (paper section 1), so everything downstream -- quotas, routing,
losses by modality -- is read from one table. An atomic span of codes (an image) stands in a sequence as
`begin, codes..., end`; the two marks belong to text because they are not codebook entries.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

import numpy as np

from moma_jax.errors import require
from moma_jax.fields import read, setting, shown

FORMAT_VERSION = 1
MOST_IDS = 1 << 24
"""Of a vocabulary: tables of all ids stay small."""
BEGIN_DOCUMENT, PAD, END_DOCUMENT, UNKNOWN = 0, 1, 2, 3
SPECIAL_NAMES = ("<s>", "<pad>", "</s>", "<unk>")


@dataclass(frozen=True)
class ModalityIds:
    """The ids of one modality.

    Attributes:
      name: the modality's name, such as "image".
      letter: its letter in the FFN notation, such as "i".
      ranges: half-open id ranges, in code order; code c is the c-th id of their concatenation.
      span: codes in one atomic span; 0 where spans may be cut anywhere (text).
      begin, end: ids that open and close a span; None where span is 0.
    """

    name: str
    letter: str
    ranges: tuple[tuple[int, int], ...]
    span: int = setting(0, least=0)
    begin: int | None = None
    end: int | None = None

    @property
    def size(self) -> int:
        """Number of ids of the modality."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def code_ids(self) -> np.ndarray:
        """Ids in code order, int32 of shape (size,)."""
        return np.concatenate([np.arange(start, stop, dtype=np.int32) for start, stop in self.ranges])


@dataclass(frozen=True)
class Vocabulary:
    """The layout of all ids. Modality 0 is text; every id belongs to exactly one modality.

    Attributes:
      modalities: in the order that indexes modalities everywhere.
      begin_document, end_document, pad, unknown: special ids, all of them text.
    """

    modalities: tuple[ModalityIds, ...]
    begin_document: int = BEGIN_DOCUMENT
    end_document: int = END_DOCUMENT
    pad: int = PAD
    unknown: int = UNKNOWN

    def __post_init__(self):
        end = 0
        for start, stop in sorted(ids for m in self.modalities for ids in m.ranges if ids[0] != ids[1]):
            covered = start == end < stop
            require(covered, "vocabulary: the id ranges of its modalities must cover 0..size-1 once each")
            end = stop
        require(end <= MOST_IDS, f"vocabulary: {end} ids, more than {MOST_IDS}")
        marks = [mark for m in self.modalities for mark in (m.begin, m.end) if mark is not None]
        for special in (self.begin_document, self.end_document, self.pad, self.unknown, *marks):
            require(0 <= special < end, f"vocabulary: the special id {special} is none of its {end} ids")

    @property
    def size(self) -> int:
        """Number of ids."""
        return sum(m.size for m in self.modalities)

    @property
    def modality_V(self) -> np.ndarray:
        """Modality index of every id, int8 of shape (V,)."""
        table_V = np.zeros(self.size, np.int8)
        for index, modality in enumerate(self.modalities):
            table_V[modality.code_ids] = index
        return table_V

    @property
    def code_V(self) -> np.ndarray:
        """Code of every id, its place among its modality's ids, int32 of shape (V,)."""
        table_V = np.zeros(self.size, np.int32)
        for modality in self.modalities:
            table_V[modality.code_ids] = np.arange(modality.size)
        return table_V

    @property
    def token_dtype(self) -> str:
        """Smallest unsigned type that holds every id: "uint16" or "uint32"."""
        return "uint16" if self.size <= 1 << 16 else "uint32"

    def to_json(self) -> dict:
        """A plain dictionary that `from_json` reads back."""
        return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: dict) -> Vocabulary:
        """Reads `to_json`'s dictionary; InputError on another format version, or where it is none of ours."""
        version = data.get("format_version")
        require(version == FORMAT_VERSION, f"vocabulary: format version {shown(version)}, this version reads 1")
        return read(cls, {k: v for k, v in data.items() if k != "format_version"}, "vocabulary")

    @property
    def hash(self) -> str:
        """SHA-256 of the layout, as hex. The codec's and tokenizer's own hashes are kept beside it in a store."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def contiguous(modalities) -> Vocabulary:
    """The layout that `moma prepare` writes: text ids first, then each further modality's codes.

    Text begins with the special ids `<s> <pad> </s> <unk>` and then, for each further modality with spans, its begin
    and end marks, in order.

    Args:
      modalities: objects with `name`, `letter`, `size` (ids) and `span` (codes per atomic span); the first is text.
    """
    start, layout = 0, []
    for index, modality in enumerate(modalities):
        marks = {}
        if index and modality.span:
            begin = len(SPECIAL_NAMES) + 2 * (index - 1)
            marks = {"begin": begin, "end": begin + 1}
        layout.append(
            ModalityIds(modality.name, modality.letter, ((start, start + modality.size),), span=modality.span, **marks)
        )
        start += modality.size
    return Vocabulary(tuple(layout))


def special_tokens(names) -> list[str]:
    """Text of the special ids 0..n-1 in id order, for further modalities called `names`."""
    return [*SPECIAL_NAMES, *(mark for name in names for mark in (f"<{name}>", f"</{name}>"))]
