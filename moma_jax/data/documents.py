"""What a source yields: documents of text, pictures and ready codes, or a word on what was broken."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

END_BYTES = 4096
"""Bytes of a picture's file, from its begin and its end, that decide whether it is held out."""


@dataclass(frozen=True)
class Text:
    """A run of text: any Unicode that UTF-8 can hold. `weight`: of its tokens in the loss."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture: an encoded file (PNG, JPEG, WebP, ...) or pixels, uint8 of shape (height, width, 3) in sRGB."""

    image: bytes | np.ndarray
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Codes:
    """A span that is coded already: codes from 0, int32 of shape (span,), of the modality of that name."""

    modality: str
    codes: np.ndarray
    weight: float = 1.0


Segment = Text | Picture | Codes


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
      id: unique within its source; several captions of one picture have the ids ID#0, ID#1, ...
      source: where it comes from, in the data's own words.
      collection: "text", "pairs" (one text and one picture, text first; `prepare` decides the order) or "interleaved".
      segments: in reading order.
      split: "train" or "validation"; None where the source does not say.
      group: documents of one group are held out together.
      row: id of what the source has it in, with its other captions; None: its own.
      left_out: a word for each thing of it that was left out, such as a picture that is missing.
    """

    id: str
    source: str
    collection: str
    segments: list[Segment]
    split: str | None = None
    group: str | None = None
    row: str | None = None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Broken:
    """A row or picture that cannot be used, and why, in a few words."""

    id: str
    reason: str


def content_hash(document: Document) -> bytes:
    """The first 16 bytes of the SHA-256 of the segments: equal for equal content, whatever its id and source."""
    digest = hashlib.sha256()
    for segment in document.segments:
        kind, content = _content(segment)
        # The length in front keeps ("ab", "c") apart from ("a", "bc").
        digest.update(f"{kind} {len(content)}\n".encode())
        digest.update(content)
    return digest.digest()[:16]


def _content(segment: Segment) -> tuple[str, bytes]:
    """What a segment says, as bytes, and what they are."""
    match segment:
        case Text(text):
            return "text", text.encode()
        case Picture(bytes() as content):
            return "file", content
        case Picture(pixels):
            return f"pixels {pixels.shape[0]}x{pixels.shape[1]}", np.ascontiguousarray(pixels).tobytes()
        case Codes(modality, codes):
            return f"codes {modality}", np.asarray(codes, "<i4").tobytes()


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document is held out: by its own split, else by the hash of its group, its pictures, its content.

    A picture has one side, whatever its captions: pairs go by the picture alone. Documents of several pictures go by
    the one of the smallest hash, which documents that share most of their pictures are likely to share too.
    """
    if document.split is not None:
        return document.split == "validation"
    if document.group is not None:
        return hash_share(f"group {document.group}".encode()) < share
    shown = [hashlib.sha256(_ends(_content(s)[1])).digest() for s in document.segments if not isinstance(s, Text)]
    if shown:  # other bytes decide than those that were compared
        return int.from_bytes(min(shown)[8:16]) / 2**64 < share
    return int.from_bytes(content_hash(document)[:8]) / 2**64 < share


def _ends(content: bytes) -> bytes:
    """Enough of a picture to tell on which side it is: equal pictures have equal ends, and few others have."""
    return len(content).to_bytes(8) + content[:END_BYTES] + content[-END_BYTES:]


def hash_bits(content: bytes) -> int:
    """64 bits that depend on the content alone."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8])


def hash_share(content: bytes) -> float:
    """A number in [0, 1) that depends on the content alone."""
    return hash_bits(content) / 2**64


def arrange(segments: Sequence[Segment]) -> tuple[str, list[Segment]]:
    """The collection that segments make up, and the segments in that collection's order (a pair: text first)."""
    texts = [s for s in segments if isinstance(s, Text)]
    if len(texts) == len(segments):
        return "text", list(segments)
    if len(texts) == 1 and len(segments) == 2:
        return "pairs", sorted(segments, key=lambda s: not isinstance(s, Text))
    return "interleaved", list(segments)
