"""Documents to tokens: text through the tokenizer, pictures through the codec, ready codes as they are."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from moma_jax.codec.pictures import BrokenPicture, Read, colour_of, read_picture
from moma_jax.config import PrepareConfig
from moma_jax.data.documents import Broken, Codes, Document, Picture, Text, content_hash, hash_bits, is_held_out
from moma_jax.data.parts import KINDS, Encoded
from moma_jax.errors import InputError
from moma_jax.vocab import ModalityIds, Vocabulary

AT_ONCE = 64
"""Pictures of a block that lie decoded in memory at once."""


class Pictures(NamedTuple):
    """How pictures are read, and which are left out; fields of PrepareConfig.

    Attributes:
      crop, ground, seed: of `codec.pictures.load_picture`.
      min_side, max_aspect: of pictures. min_caption, max_caption: of a pair's text, in characters.
    """

    crop: str
    ground: tuple[int, int, int]
    seed: int
    min_side: int = 0
    max_aspect: float = 0.0
    min_caption: int = 0
    max_caption: int = 0

    @classmethod
    def of(cls, config: PrepareConfig, crop: str) -> Pictures:
        """Those of a config; `crop`: as the image tokenizer was made for."""
        crop = config.crop if config.crop != "auto" else crop
        limits = config.min_side, config.max_aspect, config.min_caption, config.max_caption
        try:
            return cls(crop, colour_of(config.ground), config.seed, *limits)
        except ValueError as error:
            raise InputError(f"prepare.ground: {error}") from error

    def read(self, image: bytes | np.ndarray, side: int) -> Read | str:
        """A picture at `side`, or why it is left out; raises BrokenPicture."""
        read = read_picture(image, side, self.crop, self.ground, self.seed)
        short, long = sorted((read.width, read.height))
        if short < self.min_side:
            return "pictures smaller than min_side"
        if self.max_aspect and long > self.max_aspect * short:
            return "pictures longer than max_aspect"
        return read

    def refused_caption(self, caption: str) -> str:
        """Why a pair with this caption is left out, "" where it is not."""
        if len(caption) < self.min_caption:
            return "captions shorter than min_caption"
        return "captions longer than max_caption" if 0 < self.max_caption < len(caption) else ""


class Block(NamedTuple):
    """The outcome of some documents.

    Attributes:
      documents: what was encoded. broken: (id, reason) of what could not be.
      left_out: how often what was left out, by its name.
      filtered: documents that were left out as a whole, sound as they were.
      own_split: whether the source itself said of all which split they are in.
    """

    documents: list[Encoded]
    broken: list[tuple[str, str]]
    left_out: Counter
    filtered: int
    own_split: bool


class _Draft(NamedTuple):
    """A document before its tokens: its id, the fields of `Encoded` up to the hash, its row in the source, segments in
    their final order."""

    id: str
    collection: str
    split: str
    kind: int
    source: str
    hash: bytes
    row: str
    segments: list


class _Filtered(Exception):
    """A document is left out: its pictures, or its caption, are not wanted."""


class Encoder:
    """Turns documents into tokens. Its methods may be called from several threads."""

    def __init__(self, vocabulary: Vocabulary, text_codec, image_codec, config: PrepareConfig):
        """Args: the id layout, the codecs (image_codec may be None), how documents are made of the source's."""
        self._vocabulary, self._text, self._image, self._config = vocabulary, text_codec, image_codec, config
        self._pictures = Pictures.of(config, "whole" if image_codec is None else image_codec.crop)
        self._modality = {m.name: index for index, m in enumerate(vocabulary.modalities)}
        self._id_MV = [m.code_ids for m in vocabulary.modalities]

    def encode(self, items: Iterable[Document | Broken]) -> Block:
        """Encodes documents in order; those that cannot be are named with a reason."""
        drafts, broken, left_out, own_split = [], [], Counter(), True
        for item in items:
            if isinstance(item, Document):
                drafts.append(self._draft(item))
                left_out.update(item.left_out)
                own_split &= item.split is not None
            else:
                broken.append((item.id, item.reason))
        segments = [segment for draft in drafts for segment in draft.segments]
        texts = [s.text for s in segments if isinstance(s, Text)]
        encoded_texts = iter(self._text.encode_batch(texts) if texts else ())
        pictures = iter(self._coded([s.image for s in segments if isinstance(s, Picture)]))
        encoded, filtered = [], 0
        for draft in drafts:
            ready = [
                next(encoded_texts) if isinstance(s, Text) else next(pictures) if isinstance(s, Picture) else s.codes
                for s in draft.segments
            ]
            try:
                encoded.append(self._encoded(draft, ready, left_out))
            except _Filtered as reason:
                left_out[str(reason)] += 1
                filtered += 1
            except InputError:
                raise
            except ValueError as error:
                broken.append((draft.id, str(error)))
        return Block(encoded, broken, left_out, filtered, own_split)

    def _coded(self, images: list) -> list[tuple[np.ndarray, int] | str | BrokenPicture]:
        """(codes, key) of all pictures, encoded together; in their place why one is left out, or what is wrong."""
        if images and (self._image is None or "image" not in self._modality):
            raise InputError(
                "source: it has pictures, but the vocabulary has no image codec; choose another vocabulary"
            )
        found: list = []
        for start in range(0, len(images), AT_ONCE):
            some = [self._read(image) for image in images[start : start + AT_ONCE]]
            sound = [read.pixels_HW3 for read in some if isinstance(read, Read)]
            codes = iter(self._image.encode(sound) if sound else ())
            found += [(next(codes), read.key) if isinstance(read, Read) else read for read in some]
        return found

    def _read(self, image) -> Read | str | BrokenPicture:
        try:
            return self._pictures.read(image, self._image.side)
        except BrokenPicture as error:
            return error

    def _draft(self, document: Document) -> _Draft:
        """All that is known of a document without its tokens.

        The order of a pair hangs on the last bits of its content hash, not on those that decide what is held out.
        """
        digest, config = content_hash(document), self._config
        split = "validation" if is_held_out(document, config.held_out) else "train"
        kind, segments = document.collection, document.segments
        if kind == "pairs":
            share = int(f"{int.from_bytes(digest[8:]):064b}"[::-1], 2) / 2**64
            image_first = share >= 1 - config.image_first
            kind, segments = ("image-first", segments[::-1]) if image_first else ("text-first", segments)
            if config.prompt_weight != 1:
                weight = segments[0].weight * config.prompt_weight
                segments = [dataclasses.replace(segments[0], weight=weight), segments[1]]
        about = document.collection, split, KINDS.index(kind), document.source, digest[:16]
        return _Draft(document.id, *about, document.row or document.id, segments)

    def _encoded(self, draft: _Draft, ready: list, left_out: Counter) -> Encoded:
        """The tokens of a document whose segments' ids or codes are `ready`; raises _Filtered, or ValueError with the
        reason where it is broken."""
        segments, kept, keys = [], [], []
        for segment, own in zip(draft.segments, ready, strict=True):
            is_caption = isinstance(segment, Text) and draft.collection == "pairs"
            if is_caption and (reason := self._pictures.refused_caption(segment.text)):
                raise _Filtered(reason)
            if isinstance(own, str):
                if draft.collection == "pairs":
                    raise _Filtered(own)
                left_out[own] += 1
                continue
            if not isinstance(segment, Text):
                own, key = self._codes(segment, own)
                keys.append(key)
            segments.append(segment)
            kept.append(own)
        if not segments:
            raise _Filtered("documents of nothing but such pictures")
        tokens = self._tokens(segments, kept)
        return Encoded(*draft[1:6], *tokens, [(*key, hash_bits(draft.row.encode())) for key in keys])

    def _tokens(self, segments: list, ready: list) -> tuple[np.ndarray, list[tuple[int, int]], np.ndarray | None]:
        """Tokens, spans and weights of one document; raises ValueError with the reason where it is broken.

        Args:
          ready: of each segment, the ids of its text, or its modality's index and its codes.
        """
        vocabulary = self._vocabulary
        pieces, spans, weights = [np.array([vocabulary.begin_document])], [(0, 1)], [1.0]

        def add(modality: int, id_N: np.ndarray, weight: float) -> None:
            pieces.append(id_N)
            weights.append(weight)
            if spans[-1][0] == modality:
                spans[-1] = (modality, spans[-1][1] + len(id_N))
            elif len(id_N):
                spans.append((modality, len(id_N)))

        for segment, own in zip(segments, ready, strict=True):
            if isinstance(segment, Text):
                add(0, own, segment.weight)
                continue
            index, code_N = own
            modality = vocabulary.modalities[index]
            if modality.span:
                add(0, np.array([modality.begin]), segment.weight)
            add(index, self._id_MV[index][code_N], segment.weight)
            if modality.span:
                add(0, np.array([modality.end]), segment.weight)
        if sum(len(piece) for piece in pieces) == 1:
            raise ValueError("empty document")
        add(0, np.array([vocabulary.end_document]), weights[-1])
        weight_N = None
        if any(weight != 1 for weight in weights):
            weight_N = np.repeat(np.array(weights, np.float32), [len(piece) for piece in pieces])
        return np.concatenate(pieces).astype(vocabulary.token_dtype), spans, weight_N

    def _codes(self, segment: Picture | Codes, own) -> tuple[tuple[int, np.ndarray], tuple[int, int]]:
        """Modality index and codes of a segment, and 64 bits of its content and of its codes, which are the same for
        ready ones; raises ValueError with the reason where it is broken."""
        if isinstance(own, BrokenPicture):
            raise own
        if isinstance(segment, Picture):
            code_N, pixels = own
            return (self._modality["image"], code_N), (pixels, _bits(code_N))
        index = self._modality.get(segment.modality)
        if index is None:
            raise InputError(f"source: codes of modality {segment.modality!r}, which the vocabulary has not")
        code_N = _checked(own, self._vocabulary.modalities[index])
        bits = _bits(code_N) if segment.modality == "image" else hash_bits(segment.modality.encode() + _bytes(code_N))
        return (index, code_N), (bits, bits)


def _bytes(code_N: np.ndarray) -> bytes:
    return np.ascontiguousarray(code_N, "<i4").tobytes()


def _bits(code_N: np.ndarray) -> int:
    return hash_bits(_bytes(code_N))


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
