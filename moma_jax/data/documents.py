"""What a source yields: documents of text, pictures and ready codes, or a word on what was broken."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Text:
    """A run of text: any Unicode that UTF-8 can hold."""

    text: str


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture: an encoded file (PNG, JPEG, WebP, ...) or pixels, uint8 of shape (height, width, 3) in sRGB."""

    image: bytes | np.ndarray


@dataclass(frozen=True, eq=False)
class Codes:
    """A span that is coded already: codes from 0, int32 of shape (span,), of the modality of that name."""

    modality: str
    codes: np.ndarray


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
      id: unique within its source.
      source: where it comes from, in the data's own words.
      collection: "text", "pairs" (one text and one picture, text first; `prepare` decides the order) or "interleaved".
      segments: in reading order.
      split: "train" or "validation"; None where the source does not say.
      group: documents of one group are held out together.
    """

    id: str
    source: str
    collection: str
    segments: list[Text | Picture | Codes]
    split: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Broken:
    """A row or picture that cannot be used, and why, in a few words."""

    id: str
    reason: str


def content_hash(document: Document) -> bytes:
    """The first 16 bytes of the SHA-256 of the segments: equal for equal content, whatever its id and source."""
    digest = hashlib.sha256()
    for segment in document.segments:
        match segment:
            case Text(text):
                kind, content = "text", text.encode()
            case Picture(bytes() as content):
                kind = "file"
            case Picture(pixels):
                kind, content = f"pixels {pixels.shape[0]}x{pixels.shape[1]}", np.ascontiguousarray(pixels).tobytes()
            case Codes(modality, codes):
                kind, content = f"codes {modality}", np.asarray(codes, "<i4").tobytes()
        # The length in front keeps ("ab", "c") apart from ("a", "bc").
        digest.update(f"{kind} {len(content)}\n".encode())
        digest.update(content)
    return digest.digest()[:16]


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document is held out: by its own split, else by the hash of its group, else of its content."""
    if document.split is not None:
        return document.split == "validation"
    if document.group is not None:
        return hash_share(f"group {document.group}".encode()) < share
    return int.from_bytes(content_hash(document)[:8]) / 2**64 < share


def hash_share(content: bytes) -> float:
    """A number in [0, 1) that depends on the content alone."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8]) / 2**64


def arrange(segments: list[Text | Picture | Codes]) -> tuple[str, list[Text | Picture | Codes]]:
    """The collection that segments make up, and the segments in that collection's order (a pair: text first)."""
    texts = [s for s in segments if isinstance(s, Text)]
    if len(texts) == len(segments):
        return "text", segments
    if len(texts) == 1 and len(segments) == 2:
        return "pairs", sorted(segments, key=lambda s: not isinstance(s, Text))
    return "interleaved", segments
