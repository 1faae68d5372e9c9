"""Documents to tokens: text through the tokenizer, pictures through the codec, ready codes as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from moma_jax.codec.pictures import BrokenPicture
from moma_jax.data.parts import KINDS, Encoded
from moma_jax.data.sources import Broken, Codes, Document, Picture, Text, content_hash, is_held_out
from moma_jax.errors import InputError
from moma_jax.vocab import ModalityIds, Vocabulary

AT_ONCE = 64
"""Pictures of a unit that lie decoded in memory at once."""


class Unit(NamedTuple):
    """The outcome of one unit of a source: what was encoded, and (id, reason) of what was broken."""

    documents: list[Encoded]
    broken: list[tuple[str, str]]


class _Draft(NamedTuple):
    """A document before its tokens: its id, the fields of `Encoded` up to the hash, segments in their final order."""

    id: str
    collection: str
    split: str
    kind: int
    source: str
    hash: bytes
    segments: list


class Encoder:
    """Turns documents into tokens. Its methods may be called from several threads."""

    def __init__(self, vocabulary: Vocabulary, text_codec, image_codec, held_out: float):
        """Args: the id layout, the codecs (image_codec may be None), the share of documents to hold out."""
        self._vocabulary, self._text, self._image, self._held_out = vocabulary, text_codec, image_codec, held_out
        self._modality = {m.name: index for index, m in enumerate(vocabulary.modalities)}
        self._id_MV = [m.code_ids for m in vocabulary.modalities]

    def encode(self, items: Iterable[Document | Broken]) -> Unit:
        """Encodes documents in order; those that cannot be are named with a reason."""
        drafts, broken = [], []
        for item in items:
            drafts.append(self._draft(item)) if isinstance(item, Document) else broken.append((item.id, item.reason))
        segments = [segment for draft in drafts for segment in draft.segments]
        texts = [s.text for s in segments if isinstance(s, Text)]
        encoded_texts = iter(self._text.encode_batch(texts) if texts else ())
        pictures = iter(self._pictures([s.image for s in segments if isinstance(s, Picture)]))
        encoded = []
        for draft in drafts:
            ready = [
                next(encoded_texts) if isinstance(s, Text) else next(pictures) if isinstance(s, Picture) else s.codes
                for s in draft.segments
            ]
            try:
                token_N, spans = self._tokens(draft.segments, ready)
            except InputError:
                raise
            except ValueError as error:
                broken.append((draft.id, str(error)))
            else:
                encoded.append(
                    Encoded(draft.collection, draft.split, draft.kind, draft.source, draft.hash, token_N, spans)
                )
        return Unit(encoded, broken)

    def _pictures(self, images: list) -> list[np.ndarray | BrokenPicture]:
        """Codes of all pictures, encoded together; what is wrong with one in its place."""
        if images and (self._image is None or "image" not in self._modality):
            raise InputError(
                "source: it has pictures, but the vocabulary has no image codec; choose another vocabulary"
            )
        found: list[np.ndarray | BrokenPicture] = []
        for start in range(0, len(images), AT_ONCE):
            some: list[np.ndarray | BrokenPicture] = []
            for image in images[start : start + AT_ONCE]:
                try:
                    some.append(self._image.read(image))
                except BrokenPicture as error:
                    some.append(error)
            sound = [pixels for pixels in some if isinstance(pixels, np.ndarray)]
            codes = iter(self._image.encode(sound) if sound else ())
            found += [next(codes) if isinstance(own, np.ndarray) else own for own in some]
        return found

    def _draft(self, document: Document) -> _Draft:
        """All that is known of a document without its tokens.

        The order of a pair hangs on one bit of its content hash, not on those that decide what is held out.
        """
        digest = content_hash(document)
        split = "validation" if is_held_out(document, self._held_out) else "train"
        kind, segments = document.collection, document.segments
        if kind == "pairs":
            image_first = digest[15] & 1
            kind, segments = ("image-first", segments[::-1]) if image_first else ("text-first", segments)
        return _Draft(
            document.id, document.collection, split, KINDS.index(kind), document.source, digest[:16], segments
        )

    def _tokens(self, segments: list, ready: list) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Tokens and spans of one document; raises ValueError with the reason where it is broken.

        Args:
          ready: of each segment, the ids of its text, its codes, or why there are none.
        """
        vocabulary = self._vocabulary
        pieces, spans = [np.array([vocabulary.begin_document])], [(0, 1)]

        def add(modality: int, id_N: np.ndarray) -> None:
            pieces.append(id_N)
            if spans[-1][0] == modality:
                spans[-1] = (modality, spans[-1][1] + len(id_N))
            elif len(id_N):
                spans.append((modality, len(id_N)))

        for segment, own in zip(segments, ready, strict=True):
            if isinstance(segment, Text):
                add(0, own)
                continue
            index, code_N = self._codes(segment, own)
            modality = vocabulary.modalities[index]
            if modality.span:
                add(0, np.array([modality.begin]))
            add(index, self._id_MV[index][code_N])
            if modality.span:
                add(0, np.array([modality.end]))
        if sum(len(piece) for piece in pieces) == 1:
            raise ValueError("empty document")
        add(0, np.array([vocabulary.end_document]))
        return np.concatenate(pieces).astype(vocabulary.token_dtype), spans

    def _codes(self, segment: Picture | Codes, own) -> tuple[int, np.ndarray]:
        """Modality index and codes of a segment; raises ValueError with the reason where it is broken."""
        if isinstance(own, BrokenPicture):
            raise own
        if isinstance(segment, Codes):
            index = self._modality.get(segment.modality)
            if index is None:
                raise InputError(f"source: codes of modality {segment.modality!r}, which the vocabulary has not")
            return index, _checked(own, self._vocabulary.modalities[index])
        return self._modality["image"], own


def _checked(codes, modality: ModalityIds) -> np.ndarray:
    """Ready codes as an array; raises ValueError where they do not fit the modality."""
    code_N = np.asarray(codes)
    if code_N.ndim != 1 or (len(code_N) and not np.issubdtype(code_N.dtype, np.integer)):
        raise ValueError(f"codes of {modality.name} are not a list of whole numbers")
    if modality.span and len(code_N) != modality.span:
        raise ValueError(f"{len(code_N)} codes of {modality.name}, not {modality.span}")
    if len(code_N) and (code_N.min() < 0 or code_N.max() >= modality.size):
        raise ValueError(
            f"codes of {modality.name} from {code_N.min()} to {code_N.max()}; the codebook has {modality.size}"
        )
    return code_N.astype(np.int64)
