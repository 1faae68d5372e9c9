"""The vocabulary of a new store: tokenizer and palette fitted on a sample of the training split, or taken over."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from moma_jax.codec import Codec
from moma_jax.codec.folder import open_codec
from moma_jax.codec.palette import fit_palette
from moma_jax.codec.pictures import BrokenPicture
from moma_jax.config import IMAGE, TEXT, Modality, PrepareConfig
from moma_jax.data.documents import Broken, Codes, Picture, Text, is_held_out
from moma_jax.data.encode import Pictures
from moma_jax.data.options import require_sizes
from moma_jax.data.store import Codecs, open_store
from moma_jax.data.text import TextCodec, fit_tokenizer, load_tokenizer
from moma_jax.errors import InputError
from moma_jax.process import cores
from moma_jax.vocab import Vocabulary, contiguous, special_tokens

SAMPLE_UNITS = 2048
"""Units of the source that are looked at, at most."""
SAMPLE_CHARACTERS = 50_000_000
"""Enough for a BPE of tens of thousands of ids; more changes little and takes long."""
UNIT_CHARACTERS = SAMPLE_CHARACTERS // 64
"""Of one unit that has pictures for all of the sample: others shall have their say."""
SAMPLE_PICTURES = 4096
LONGEST_WORD = 256
"""Characters of a run without spaces (or of nothing but spaces) that a BPE learns from at once: its time grows with the
square of a word's length, and DNA or base64 has no words."""


def ordered_map(function: Callable, items: Iterable) -> Iterator:
    """`map` in threads, one for each core, a few items ahead; results in the order of the items."""
    threads = cores()
    pool, waiting = ThreadPoolExecutor(threads), deque()  # the items are made in the caller's thread
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass
class Sample:
    """Training texts, training pictures as pixels (side, side, 3), whether there was any training document, and one of
    more than text, what the first broken document suffers from, and why a picture was left out."""

    texts: list[str] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)
    usable: bool = False
    beyond_text: bool = False
    broken: str = ""
    left_out: str = ""


def fit_codecs(source, config: PrepareConfig, modalities: Sequence[Modality] | None, look: Callable) -> Codecs:
    """The id layout, tokenizer and image codec for a source.

    Args:
      source: see sources.py.
      config: how to make them.
      modalities: what the layout must be, of config.data.modalities; None: text, and image where the source has any.
      look: called with (units looked at, units to look at), for a progress bar.

    Raises:
      InputError: the settings contradict `modalities`, or there is nothing to fit on.
    """
    if config.vocabulary is not None:
        codecs = open_store(config.vocabulary).codecs
        require_modalities(codecs.vocabulary, modalities)
        require_sizes(config, codecs.vocabulary)
        if codecs.image is None:
            _require_image(codecs, take_sample(source, config, look))
        return codecs
    sample = take_sample(source, config, look)
    if not sample.usable:
        reason = sample.broken or "check its split"
        raise InputError(f"prepare.source: {config.source} has no usable training document; {reason}")
    layout = tuple(modalities) if modalities is not None else _layout(config, sample)
    special = special_tokens([m.name for m in layout[1:]])
    if config.tokenizer is not None:
        text = load_tokenizer(config.tokenizer, special)
        size = text.size if modalities is None else layout[0].size
    else:
        text = TextCodec(fit_tokenizer(sample.texts, config.text_size, special))
        size = config.text_size
    if text.size > size:
        raise InputError(f"data.modalities: {layout[0].name} has size {size}; the tokenizer needs {text.size}")
    codec = _image_codec(config, sample) if any(m.name == IMAGE.name for m in layout) else None
    vocabulary = contiguous([_sized(layout[0], size, 0), *(_declared(m, config, codec) for m in layout[1:])])
    require_modalities(vocabulary, modalities)
    require_sizes(config, vocabulary)
    codecs = Codecs.of(vocabulary, text.to_json().encode(), codec)
    _require_image(codecs, sample)
    return codecs


def _require_image(codecs: Codecs, sample: Sample) -> None:
    names = [m.name for m in codecs.vocabulary.modalities]
    if sample.pictures and (codecs.image is None or "image" not in names):
        raise InputError(
            f"prepare.source: it has pictures, but the vocabulary ({', '.join(names)}) has no image codec; choose "
            "another --vocabulary or none, with a modality called image"
        )


def _layout(config: PrepareConfig, sample: Sample) -> tuple[Modality, ...]:
    return (TEXT, IMAGE) if sample.beyond_text or config.codebook is not None else (TEXT,)


def _sized(modality: Modality, size: int, span: int) -> Modality:
    return Modality(modality.name, modality.letter, size=size, span=span)


def _image_codec(config: PrepareConfig, sample: Sample) -> Codec | None:
    """The image tokenizer that is given, or a palette fitted to the sample; None where there are no pictures."""
    if config.codec is not None:
        codec = open_codec(config.codec)
        asked = config.codebook or codec.codebook, config.codes_per_image or codec.codes_per_image
        if asked != (codec.codebook, codec.codes_per_image):
            raise InputError(
                f"prepare.codec: {config.codec} has {codec.codebook} codes, {codec.codes_per_image} a picture; leave "
                "codebook and codes_per_image out"
            )
        return codec
    if not sample.pictures:
        if sample.left_out:
            raise InputError(
                f"prepare.source: no picture is left to fit the palette on, as {sample.left_out} are left out; widen "
                "prepare.min_side or prepare.max_aspect"
            )
        return None
    return fit_palette(sample.pictures, config.image_side, config.colours, config.seed)


def _declared(modality: Modality, config: PrepareConfig, codec: Codec | None) -> Modality:
    """A further modality with the sizes that prepare's settings give it; others keep their own."""
    if modality.name != "image":
        return modality
    if config.codebook is not None and config.codes_per_image is not None:
        return _sized(modality, config.codebook, config.codes_per_image)
    return modality if codec is None else _sized(modality, codec.codebook, codec.codes_per_image)


def require_modalities(vocabulary: Vocabulary, modalities: Sequence[Modality] | None) -> None:
    """Raises InputError where a vocabulary is not the one that `modalities` (None: any) call for."""
    if modalities is None:
        return
    names = [m.name for m in vocabulary.modalities]
    if [m.name for m in modalities] != names:
        raise InputError(f"data.modalities: {', '.join(m.name for m in modalities)}; the store has {', '.join(names)}")
    for wanted, found in zip(modalities, vocabulary.modalities, strict=True):
        for attribute in ("size", "span", "letter"):
            value, right = getattr(wanted, attribute), getattr(found, attribute)
            if value != right:
                raise InputError(
                    f"data.modalities: {wanted.name} has {attribute} {value}; that of the prepared store is {right}"
                )


def take_sample(source, config: PrepareConfig, look: Callable) -> Sample:
    """Texts and pictures of training documents, from units in an order that the seed fixes."""
    sample, characters = Sample(), 0
    order = np.random.default_rng(config.seed).permutation(source.units())[:SAMPLE_UNITS]
    wanted = config.tokenizer is None

    def read(unit: int) -> Sample:
        # Units that begin when there are enough pictures come after enough pictures, so the outcome is the same.
        return _sample_unit(source.read(int(unit)), config, len(sample.pictures) < SAMPLE_PICTURES)

    for looked, found in enumerate(ordered_map(read, order), 1):
        sample.usable, sample.beyond_text = sample.usable | found.usable, sample.beyond_text | found.beyond_text
        sample.broken, sample.left_out = sample.broken or found.broken, sample.left_out or found.left_out
        if wanted and characters < SAMPLE_CHARACTERS:
            sample.texts += found.texts
            characters += sum(map(len, found.texts))
        if len(sample.pictures) < SAMPLE_PICTURES:
            sample.pictures += found.pictures
        look(looked, len(order))
        if len(sample.pictures) >= SAMPLE_PICTURES and (not wanted or characters >= SAMPLE_CHARACTERS):
            break
    return sample


def _sample_unit(items: Iterable, config: PrepareConfig, pictures: bool) -> Sample:
    """Of one unit: at most what is wanted in all, and little text more once there are pictures enough, as a unit may be
    a whole tar, or a file of any size."""
    sample, characters, wanted = Sample(), 0, Pictures.of(config, "whole")
    for document in items:
        if isinstance(document, Broken):
            sample.broken = sample.broken or f"{document.id}: {document.reason}"
            continue
        if is_held_out(document, config.held_out):
            continue
        sample.usable = True
        for segment in document.segments:
            match segment:
                case Text(text):
                    sample.texts += _pieces(text)
                    characters += len(text)
                case Picture(image):
                    sample.beyond_text = True
                    if not pictures or len(sample.pictures) >= SAMPLE_PICTURES:
                        continue
                    try:
                        read = wanted.read(image, config.image_side)
                    except BrokenPicture:
                        continue  # prepare counts and names it
                    if isinstance(read, str):
                        sample.left_out = read
                    else:
                        sample.pictures.append(read.pixels_HW3)
                case Codes():
                    sample.beyond_text = True
        enough = characters >= SAMPLE_CHARACTERS and (not pictures or len(sample.pictures) >= SAMPLE_PICTURES)
        if enough or (len(sample.pictures) >= SAMPLE_PICTURES and characters >= UNIT_CHARACTERS):
            break
    return sample


def _pieces(text: str) -> list[str]:
    """The text, cut where it runs on for too long without a space, or with nothing else."""
    return [piece for piece in _LONG.split(text) if piece] if _LONG.search(text) else [text]


_LONG = re.compile(rf"(\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}})")
