"""What a run needs to speak with people: its tokenizer and image codec; prompts become ids."""

from __future__ import annotations

import io
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from moma_jax.codec import Codec
from moma_jax.codec.pictures import BrokenPicture
from moma_jax.config import PrepareConfig
from moma_jax.data.documents import Codes, Document, Picture, Text
from moma_jax.data.encode import Encoder
from moma_jax.data.store import open_store
from moma_jax.data.text import TextCodec
from moma_jax.errors import InputError
from moma_jax.generation.grammar import special_ids
from moma_jax.vocab import Vocabulary

Piece = str | Path | Image.Image | np.ndarray | Codes
"""A part of a prompt: text, a picture's file, a picture, pixels (height, width, 3) uint8, or ready codes."""
MARK = "<image>"
"""Where a picture stands in a prompt."""
MOST_BYTES = 1 << 28
"""Size of the largest picture file that is read."""


class Language(NamedTuple):
    """An id space with what turns text and pictures into its ids; `image` is None where the store has no codec."""

    vocabulary: Vocabulary
    text: TextCodec
    image: Codec | None


def language_of(loaded) -> Language:
    """Tokenizer and codec of the stores that a model was trained on.

    Raises:
      InputError: a store is missing or was replaced by one of other ids; the run was trained on random tokens.
    """
    data, where = loaded.config.data, loaded.run
    if data.kind == "synthetic":
        raise InputError(f"{where}: trained on random tokens, so it has no tokenizer; give a run trained on stores")
    store = open_store(data.stores[0].path)
    for name, value in loaded.hashes.items():
        if store.codecs.hashes.get(name) != value:
            raise InputError(
                f"{where}: the {name.replace('_', ' ')} of {store.path} is not the one it was trained with; restore "
                "the store that it was trained on"
            )
    return Language(loaded.vocabulary, store.text_codec(), store.image_codec())


def writable_text(vocabulary: Vocabulary, codec: TextCodec | None) -> np.ndarray:
    """Ids of text that may be written: those that the tokenizer has letters for, int64, sorted; without a tokenizer
    all that are not special."""
    if codec is None:
        return np.setdiff1d(np.flatnonzero(vocabulary.modality_V == 0), sorted(special_ids(vocabulary)))
    tokenizer = codec.tokenizer
    special = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    known = np.setdiff1d(list(tokenizer.get_vocab(with_added_tokens=True).values()), special)
    return known[(known >= codec.special_ids) & (known < codec.size)]


def encode_prompt(prompt: Piece | Sequence[Piece], language: Language, name: str = "prompt") -> np.ndarray:
    """The ids of a prompt, int32, `<s>` first, as the documents of a store have them.

    Args:
      prompt: one part, or parts in reading order. A `str` is always text and a `Path` always a picture's file; texts
        are encoded one by one. An empty sequence is `<s>` alone.
      name: what the prompt is called in complaints.

    Raises:
      InputError: a picture cannot be read, a text has no tokens, or a part is of another type.
    """
    parts = [prompt] if isinstance(prompt, Piece) else prompt
    if not isinstance(parts, Sequence):
        raise InputError(f"{name}: {type(prompt).__name__} is no prompt; give a text, or a list of texts and pictures")
    segments = [_segment(part, language, f"{name}, part {i}") for i, part in enumerate(parts)]
    if not segments:
        return np.array([language.vocabulary.begin_document], np.int32)
    encoder = Encoder(language.vocabulary, language.text, language.image, PrepareConfig(held_out=0.0))
    documents, broken, *_ = encoder.encode([Document(name, "", "interleaved", segments, split="train")])
    if broken:
        raise InputError(f"{name}: {broken[0][1]}")
    return np.asarray(documents[0].token_N, np.int32)[:-1]  # a document's end mark is for the model to write


def _segment(part: Piece, language: Language, name: str) -> Text | Picture | Codes:
    match part:
        case str():
            if not encodable(part) or not len(language.text.encode(part)):
                raise InputError(f"{name}: the tokenizer maps {part!r} to nothing; give other text, or leave it out")
            return Text(part)
        case Codes(modality, codes):
            code_N = np.asarray(codes)
            if code_N.ndim != 1 or not np.issubdtype(code_N.dtype, np.integer):
                raise InputError(
                    f"{name}: codes of {modality}: {code_N.dtype} of shape {code_N.shape}; give int32 (N,)"
                )
            return Codes(modality, code_N)
        case Path() | Image.Image() | np.ndarray():
            return Picture(_read(part, language, str(part) if isinstance(part, Path) else name))
    raise InputError(f"{name}: {type(part).__name__} is no text, picture, pixels, Path or Codes")


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold it: lone surrogates cannot be."""
    return text.encode("utf-8", "ignore").decode() == text


def _read(picture: Path | Image.Image | np.ndarray, language: Language, name: str) -> np.ndarray:
    """Pixels at the codec's size."""
    if language.image is None:
        raise InputError(f"{name}: a picture, but the model's store has no image codec; give text or Codes")
    try:
        match picture:
            case Path():
                return language.image.read(_content(picture))
            case Image.Image():
                return language.image.read(_as_png(picture))
        return language.image.read(picture)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from error
    except (BrokenPicture, InputError) as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{name}: cannot be read: {reason}") from error


def _content(path: Path) -> bytes:
    """A picture file's bytes."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InputError("is no regular file; give a picture's file")
    if status.st_size > MOST_BYTES:
        raise InputError(f"{status.st_size} bytes, more than {MOST_BYTES}; give a smaller picture")
    return path.read_bytes()


def _as_png(picture: Image.Image) -> bytes:
    """A picture as a file, so that transparency, depth and rotation are treated as in any other file."""
    upright, buffer = ImageOps.exif_transpose(picture), io.BytesIO()
    try:
        upright.save(buffer, "PNG", compress_level=1)
    except OSError:  # PNG has no CMYK, YCbCr, ...
        buffer = io.BytesIO()
        upright.convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def arranged(prompts: Sequence[str], images: Sequence[str]) -> list[list[str | Path]]:
    """Prompts with their pictures in place; see `Generate`.

    Raises:
      InputError: too few pictures, or pictures without a place where there are several prompts.
    """
    places = sum(prompt.count(MARK) for prompt in prompts)
    spare = len(images) - places
    if spare < 0:
        raise InputError(f"--prompt: {places} times {MARK}, but {len(images)} --image; give a file for each")
    if spare and len(prompts) > 1:
        raise InputError(
            f"--image: {len(images)} files, but {places} times {MARK} in the prompts; mark each one's place"
        )
    paths, result = [Path(image) for image in images], []
    for prompt in prompts:
        parts, paths, spare = paths[:spare], paths[spare:], 0
        for number, text in enumerate(prompt.split(MARK)):
            if number:
                parts.append(paths.pop(0))
            text = text.strip() if MARK in prompt else text
            parts += [text] if text else []
        result.append(parts)
    return result
