"""Ids become text and pictures again, as they come: whole characters, whole pictures, up to a stop sequence."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from moma_jax.codec.pictures import data_uri
from moma_jax.data.documents import Codes
from moma_jax.generation.grammar import IMAGE
from moma_jax.generation.prompts import Language

SHOWN_SIDE = 128
"""Pixels of the shorter side that a picture is shown with, at least."""
UNFINISHED = "\ufffd"
"""What the bytes of a character decode to before its last one came."""


@dataclass(frozen=True, eq=False)
class Output:
    """What a model wrote after one prompt.

    Attributes:
      segments: texts (str), pictures (PIL.Image) and codes of other modalities (Codes), in reading order; a picture
        that the prompt's ids left open is here as a whole. Empty for a model without a tokenizer.
      ids: what was written, int32; the token that ends a stop sequence is the last one.
      stopped: "end" (of the document, or the last picture asked for), "length", or "stop" (a stop sequence).
      seed: of this row; with it the same prompt alone gives the same, but for the rounding of other batch sizes.
      prompt_tokens: length of the prompt, `<s>` included.
    """

    segments: list[str | Image.Image | Codes]
    ids: np.ndarray
    stopped: str
    seed: int
    prompt_tokens: int

    @property
    def text(self) -> str:
        """All text, without what stands between."""
        return "".join(s for s in self.segments if isinstance(s, str))

    @property
    def images(self) -> list[Image.Image]:
        """The pictures, at the codec's size."""
        return [s for s in self.segments if isinstance(s, Image.Image)]

    def _repr_html_(self) -> str:
        """Text and pictures for a notebook."""
        return "".join(_as_html(segment) for segment in self.segments)


def _as_html(segment: str | Image.Image | Codes) -> str:
    match segment:
        case str():
            return f"<p style='white-space: pre-wrap'>{html.escape(segment)}</p>"
        case Codes():
            return f"<p>[{len(segment.codes)} codes of {html.escape(segment.modality)}]</p>"
    return f"<img alt='picture' src='{data_uri(enlarged(segment))}'>"


def enlarged(picture: Image.Image, scale: int | None = None) -> Image.Image:
    """A picture with every pixel `scale` times as wide and high; None: as often as SHOWN_SIDE needs."""
    scale = -(-SHOWN_SIDE // min(picture.size)) if scale is None else scale
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def half_blocks(picture: Image.Image, columns: int) -> str:
    """A picture as lines of text in 24-bit colours: one character is two pixels, one above the other."""
    if picture.width > columns:
        height = max(1, round(picture.height * columns / picture.width))
        picture = picture.resize((columns, height), Image.Resampling.BOX)
    pixels_HW3 = np.asarray(picture.convert("RGB"))
    pixels_HW3 = np.pad(pixels_HW3, ((0, pixels_HW3.shape[0] % 2), (0, 0), (0, 0)), mode="edge")
    lines = []
    for upper_W3, lower_W3 in zip(pixels_HW3[::2].tolist(), pixels_HW3[1::2].tolist(), strict=True):
        cells = (
            f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{r2};{g2};{b2}m▀"
            for (r, g, b), (r2, g2, b2) in zip(upper_W3, lower_W3, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


class OutputReader:
    """Turns the ids of one row into segments as they come.

    Attributes:
      segments: what is complete.
      taken: ids that were read, up to the one that completed a stop sequence.
      stopped: whether a stop sequence came; nothing is read after it.
    """

    def __init__(
        self,
        language: Language,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
        on_image: Callable[[Image.Image | Codes], None] | None = None,
    ):
        """Args: stop sequences, each within one text; who is told of new text, and of each picture or run of codes."""
        self.segments: list[str | Image.Image | Codes] = []
        self.taken, self.stopped = 0, False
        self._language, self._stop, self._on_text, self._on_image = language, tuple(stop), on_text, on_image
        vocabulary = language.vocabulary
        self._modality_V = vocabulary.modality_V
        self._marks = {mark for m in vocabulary.modalities if m.span for mark in (m.begin, m.end)}
        self._code_V = vocabulary.code_V
        self._text: list[int] = []
        self._codes: list[int] = []
        self._modality, self._told = 0, 0

    def read(self, ids: Sequence[int]) -> None:
        """Takes the next ids and tells what is certain by now."""
        for token in map(int, ids):
            modality = int(self._modality_V[token])
            plain = modality == 0 and token not in self._marks
            if not plain:
                self._read_text(last=True)
            if plain or modality != self._modality:
                self._close_codes()
            if self.stopped:
                return
            if plain:
                self._text.append(token)
            elif modality:
                self._modality = modality
                self._codes.append(int(self._code_V[token]))
            self.taken += 1
        self._read_text(last=False)

    def finish(self) -> None:
        """The row is complete: what was held back is told."""
        self._read_text(last=True)
        self._close_codes()

    def _read_text(self, last: bool) -> None:
        """Looks at the text so far; tells what no later id can change, or all of it where it is the `last`."""
        if not self._text:
            return
        text = self._language.text.decode(self._text)
        if self._first_stop(text) is not None:
            for count in range(1, len(self._text) + 1):
                text = self._language.text.decode(self._text[:count])
                if (cut := self._first_stop(text)) is not None:
                    break
            self.taken -= len(self._text) - count
            text, self.stopped, last = text[:cut], True, True
        sure = len(text) if last else self._sure(text)
        if sure > self._told and self._on_text is not None:
            self._on_text(text[self._told : sure])
        self._told = max(sure, self._told)
        if last:
            self.segments += [text] if text else []
            self._text, self._told = [], 0

    def _first_stop(self, text: str) -> int | None:
        """Where the first stop sequence begins."""
        return min((at for s in self._stop if (at := text.find(s)) >= 0), default=None)

    def _sure(self, text: str) -> int:
        """How much of a text stays as it is: not an unfinished character, not what may become a stop sequence."""
        sure = len(text.rstrip(UNFINISHED))
        begun = (n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n], 0, sure))
        return sure - max(begun, default=0)

    def _close_codes(self) -> None:
        """Ends a picture, or a run of codes."""
        if not self._codes:
            return
        codec, name = self._language.image, self._language.vocabulary.modalities[self._modality].name
        if name == IMAGE and codec is not None and codec.draws and len(self._codes) == codec.codes_per_image:
            segment = codec.decode(np.array([self._codes]))[0]
        else:
            segment = Codes(name, np.array(self._codes, np.int32))
        self.segments.append(segment)
        if self._on_image is not None:
            self._on_image(segment)
        self._codes, self._modality = [], 0
