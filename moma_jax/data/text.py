"""Text to ids and back: byte-level BPE, trained here, or any tokenizer.json that gives its text back.

The special ids of the vocabulary come first, 0..n-1. Text never encodes to them: "<image>" in a caption is seven
letters, not a mark. A tokenizer.json from elsewhere (BPE of bytes or with byte fallback, Unigram) is renumbered: its
own ids follow the special ones. What is saved is again a tokenizer.json, whose ids are those of the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moma_jax.errors import InputError

BYTES = 256
MODELS = ("BPE", "Unigram")
PROBES = (
    "The quick brown fox, 1234.5!",
    " a space before, two  within, one behind ",
    "lines\nand\ttabs\r\n\n",
    "na\u00efve \u00df \u6f22\u5b57 \u0e44\u0e17\u0e22 \U0001f389",
    "\ufb01 \u00b2 \u2160",
    "<0x41>",
)
"""Texts that a tokenizer must give back: spaces, line ends, letters of the world, signs that are easily lost, a
byte's name."""


def fit_tokenizer(texts: Iterable[str], size: int, special_tokens: Sequence[str]) -> Tokenizer:
    """Trains a byte-level BPE; the same texts give the same tokenizer.

    Args:
      texts: the training texts, read once.
      size: ids in all, the special ones and 256 bytes included. Little text yields fewer; the rest stay unused.
      special_tokens: texts of the ids 0..n-1.

    Raises:
      InputError: a size that cannot hold the special ids and the bytes.
    """
    least = len(special_tokens) + BYTES
    if size < least:
        raise InputError(f"prepare.text_size: {size} ids cannot hold {BYTES} bytes and the special ids; use {least}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(
    path: str, special_tokens: Sequence[str], size: int | None = None, field: str = "prepare.tokenizer: "
) -> TextCodec:
    """Reads a tokenizer.json; its ids are moved up unless it has the special tokens at 0..n-1.

    Args:
      path: a local file.
      special_tokens: texts of the special ids 0..n-1.
      size: text ids of the vocabulary, which must hold all of the tokenizer's; None: not checked.
      field: what asks for it, for messages.

    Raises:
      InputError: no such file, a model that is neither BPE nor Unigram, one that cannot give its text back, or more ids
        than `size`.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        kind = content["model"].get("type", "BPE")
        codec = TextCodec.from_json(json.dumps(_renumbered(content, special_tokens))) if kind in MODELS else None
    except InputError as error:
        raise InputError(f"{field}{path}: {error}") from error
    except Exception as error:  # what its content makes of `_renumbered`
        raise InputError(f"{field}{path} cannot be read as a tokenizer.json: {_reason(error)}") from error
    if codec is None:
        raise InputError(f"{field}{path}: model {str(kind)[:40]}; give one with a BPE or Unigram model")
    _require_round_trip(codec, f"{field}{path}")
    if size is not None and codec.size > size:
        raise InputError(
            f"prepare.text_size: {path} needs {codec.size} ids with the special ones, not {size}; "
            f"set prepare.text_size and the size of text in data.modalities to {codec.size}"
        )
    return codec


class TextCodec:
    """Text to ids and back.

    Attributes:
      tokenizer: the Hugging Face tokenizer; its special tokens have the first ids.
      special_ids: n; no text encodes to an id below.
      size: ids in use at most: 0 <= id < size.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Raises InputError where the special tokens do not have the ids 0..n-1, or text can encode to one."""
        self._json = tokenizer.to_str()
        self.tokenizer = Tokenizer.from_str(self._json)
        self.tokenizer.encode_special_tokens = True
        tokens = {i: t.content for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        self.special_ids = next(i for i in range(len(tokens) + 1) if i not in tokens)
        self.size = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.special_ids:
            raise InputError("has no special tokens at ids 0 and up")
        for special in range(self.special_ids):
            if np.any(self.encode(tokens[special]) < self.special_ids):
                raise InputError(f"encodes the letters of {tokens[special]!r} as the special id; use a byte-level BPE")

    @classmethod
    def from_json(cls, content: str | bytes) -> TextCodec:
        """Reads what `to_json` gave; InputError where it is no tokenizer.json."""
        try:
            _require_prefix(json.loads(content)["model"])
            return cls(Tokenizer.from_buffer(content.encode() if isinstance(content, str) else content))
        except InputError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"cannot be read as a tokenizer.json: {_reason(error)}; restore the file") from error

    def to_json(self) -> str:
        """The content of a tokenizer.json with the vocabulary's ids."""
        return self._json

    @property
    def hash(self) -> str:
        """SHA-256, as hex, of `to_json`."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    def save(self, path: str) -> None:
        """Writes tokenizer.json, whole or not at all."""
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.write(self._json)
        os.replace(f"{path}.tmp", path)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 of shape (tokens,). Nothing is added and no special id occurs."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts, on all cores."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids; special ids and ids that are no text are left out. Bytes that are no UTF-8 become U+FFFD."""
        ids = np.asarray(ids, np.int64)
        ids = ids[(ids >= self.special_ids) & (ids < self.size)]
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def _require_prefix(model: dict[str, Any]) -> None:
    """Raises ValueError where a merge lacks the prefix of continued words: tokenizers would panic."""
    prefix = model.get("continuing_subword_prefix")
    for merge in model["merges"] if prefix else ():
        second = merge.split(" ")[-1] if isinstance(merge, str) else merge[-1]
        if not second.startswith(prefix):
            raise ValueError(f"merge {merge} lacks continuing_subword_prefix {prefix!r}")


def _reason(error: Exception) -> str:
    """The first line of what a library says of a tokenizer.json, which may hold a part of the file."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _require_round_trip(codec: TextCodec, where: str) -> None:
    """Raises InputError where text does not come back from its ids."""
    for probe in PROBES:
        if (back := codec.decode(codec.encode(probe))) != probe:
            raise InputError(
                f"{where} cannot give its text back: {probe!r} becomes {back!r}; use one of bytes or "
                "with byte fallback, which neither folds letters nor drops spaces"
            )


def _renumbered(content: dict[str, Any], special_tokens: Sequence[str]) -> dict[str, Any]:
    """A tokenizer.json's content with `special_tokens` at 0..n-1 and all else, where they were not, moved up by n.

    The tokenizer's own tokens of these texts lose them, and merges that would make one are dropped, so that no text
    can encode to a special id. Truncation, padding and templates go too: a document's marks are set by the caller.
    """
    model, added = content["model"], content.get("added_tokens") or []
    unigram = model.get("type") == "Unigram"
    pieces = {piece: i for i, (piece, _) in enumerate(model["vocab"])} if unigram else model["vocab"]
    vocabulary = {**{token["content"]: token["id"] for token in added}, **pieces}
    own = all(vocabulary.get(token) == i for i, token in enumerate(special_tokens))
    shift = 0 if own else len(special_tokens)
    taken = set(special_tokens)
    if unigram:
        model = _unigram(model, special_tokens, own)
    else:
        renamed = {f"\0{t}" if t in taken else t: i + shift for t, i in vocabulary.items() if not own}
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model = {
            **model,
            "vocab": {**{token: i for i, token in enumerate(special_tokens)}, **(vocabulary if own else renamed)},
            "merges": [merge for merge in merges if not taken & {*merge, "".join(merge)}],
        }
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    marks = [{"id": i, "content": token, **plain} for i, token in enumerate(special_tokens)]
    rest = [{**token, "id": token["id"] + shift} for token in added if token["content"] not in taken]
    cleared = {"truncation": None, "padding": None, "post_processor": None}
    tokens = sorted(marks + rest, key=lambda token: token["id"])
    content = {**content, **cleared, "model": model, "added_tokens": tokens}
    if own:  # one of ours, read again
        return content
    return _with_first_space(_apart(content) if unigram else content)


def _unigram(model: dict[str, Any], special_tokens: Sequence[str], own: bool) -> dict[str, Any]:
    """A Unigram model with `special_tokens` first; see `_apart` for why no text is cut into one."""
    pieces = [
        [f"\0{piece}" if piece in special_tokens and not own else piece, score] for piece, score in model["vocab"]
    ]
    marks, unknown = [[token, 0.0] for token in special_tokens], model.get("unk_id")
    shifted = unknown if own or unknown is None else unknown + len(marks)
    return {**model, "vocab": model["vocab"] if own else marks + pieces, "unk_id": shifted}


def _apart(content: dict[str, Any]) -> dict[str, Any]:
    """The same with every "<" a word of its own, so that no text is cut into a mark or the name of a byte."""
    split = {"type": "Split", "pattern": {"String": "<"}, "behavior": "Isolated", "invert": False}
    before = content.get("pre_tokenizer")
    steps = [split, *([before] if before else [])]
    return {**content, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def _with_first_space(content: dict[str, Any]) -> dict[str, Any]:
    """The same where a mark for a space is put before every text, and not only before those that begin without one:
    else a space at the begin is lost."""
    steps_before = content.get("pre_tokenizer") or {}
    each = steps_before.get("pretokenizers", [steps_before])
    spaces = [step for step in each if step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never"]
    if not spaces:
        return content
    mark, normalizer = spaces[0].get("replacement", "\u2581"), content.get("normalizer")
    steps = [normalizer] if normalizer else []
    steps += [{"type": "Replace", "pattern": {"String": " "}, "content": mark}, {"type": "Prepend", "prepend": mark}]
    each = [{**step, "prepend_scheme": "never"} if step in spaces else step for step in each]
    before = {"type": "Sequence", "pretokenizers": each}
    return {**content, "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": before}
