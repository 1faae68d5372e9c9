"""Rows of tables and lines of JSON to documents, whichever of the known layouts they have.

  segments                 [{"text"} | {"image": "relative/path"} | {"codes": [...], "modality"?}], each with "weight"?
  text_list, image_info    MMC4 (Zhu et al., 2023): a picture stands before the sentence that it was matched to
  images, texts            OBELICS, OmniCorpus: two lists, of which exactly one has something at each place
  codes                    one picture, coded elsewhere: a list of codes or the JSON of one, and its caption
  image (a file's name)    one picture with one caption or several
  text                     text alone

All of them may have id, split, group, source and weight (of the whole document in the loss).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moma_jax.data.documents import Broken, Codes, Document, Picture, Segment, Text, arrange
from moma_jax.data.sources.columns import ABOUT, CAPTIONS, LIKE_SPLIT, PICTURE_NAMES, chosen, pictures_meant
from moma_jax.data.sources.files import SPLIT_WORDS, Folder, first_line, printable
from moma_jax.errors import InputError

MISSING = "pictures that the folder of pictures has not"
"""What a document lacks that was read without some of its pictures."""
MOST_WEIGHT = 1e6
INTERLEAVED = {"texts", "images"}, {"text_list", "image_info"}
"""Keys of documents that name pictures kept elsewhere."""


NAMES_ELSEWHERE = ("lists", "mmc4")
"""The layouts that have them."""


class Refused(ValueError):
    """Why a row cannot be used."""


class Missing(Refused):
    """A picture that is not there."""


@dataclass(frozen=True)
class CodesRule:
    """What the codes of one modality must look like.

    Attributes:
      codebook: codes run from 0 to codebook - 1.
      span: codes of one span; 0 where any length is right.
    """

    codebook: int
    span: int


@dataclass(frozen=True)
class Layout:
    """How the rows of a source are read.

    Attributes:
      source: its name, where a row does not give one.
      caption, image, codes: keys of the text, of a picture's path and of its codes, where the user named them.
      rules: of codes, by modality; {} where pictures are files.
      find: the bytes of a picture that a document of INTERLEAVED names; raises Missing; None where none were given.
      skip_missing: whether documents are read without the pictures that are missing.
    """

    source: str
    caption: str | None = None
    image: str | None = None
    codes: str | None = None
    rules: dict[str, CodesRule] = field(default_factory=dict)
    find: Callable[[str], bytes] | None = None
    skip_missing: bool = False

    @property
    def sizes(self) -> list[tuple[str, int, int]]:
        """The rules in plain values, for fingerprints."""
        return sorted((name, rule.codebook, rule.span) for name, rule in self.rules.items())


def documents_of(
    row: Any, row_id: str, layout: Layout, split: str | None, read: Callable[[str], bytes] | None
) -> Iterator[Document | Broken]:
    """The documents of one row: one, or as many as a picture has captions.

    Args:
      row: the row by column, or a line's JSON. row_id: its id where it has none.
      split: of its file. read: the bytes of a picture file by its path beside the row's file; None: there are none.
    """
    place = row_id
    try:
        if not isinstance(row, dict):
            raise Refused("not an object")
        row_id = id_of(row, place)
        about = facts_of(row, layout.source, split)
        alternatives, left_out = _alternatives(row, layout, read)
    except InputError:  # of the whole source, such as a map of addresses that cannot be read
        raise
    except (OSError, ValueError) as error:
        yield Broken(row_id, first_line(error))
        return
    yield from assembled(row_id, alternatives, about, left_out, place)


def id_of(row: dict, place: str) -> str:
    """The id that a row gives itself, else the place where it stands."""
    own = next((value for key, value in row.items() if str(key).lower() == "id"), None)
    return place if own in (None, "") else printable(str(own))


def assembled(
    row_id: str,
    alternatives: list[list[Segment]],
    about: Facts,
    left_out: tuple[str, ...] = (),
    place: str | None = None,
) -> Iterator[Document | Broken]:
    """A document of each list of segments; empty texts are left out of them, and a document of nothing is broken.

    `place` tells a row from every other of the source, as its id may not; None: its id does."""
    for number, segments in enumerate(alternatives):
        own_id = row_id if len(alternatives) == 1 else f"{row_id}#{number}"
        try:
            yield _document(own_id, place or row_id, segments, about, left_out)
        except ValueError as error:
            yield Broken(own_id, first_line(error))


def _document(own_id: str, row_id: str, segments: list[Segment], about: Facts, left_out: tuple[str, ...]) -> Document:
    for segment in segments:
        if isinstance(segment, Text):
            segment.text.encode()  # JSON can spell half of a surrogate pair, which is no Unicode text
    collection, segments = arrange([s for s in segments if not (isinstance(s, Text) and not s.text)])
    if not segments:
        raise Refused("has no content")
    if about.weight != 1:
        segments = [dataclasses.replace(s, weight=s.weight * about.weight) for s in segments]
    return Document(own_id, about.source, collection, segments, about.split, about.group, row_id, left_out)


def unharmed(items: Iterator[Document | Broken], folder: Folder, path: str) -> Iterator[Document | Broken]:
    """What was read of a file; all of it broken where it is compressed and its checksum is wrong: any of it may be."""
    damage = folder.damage(path)
    for item in items:
        broken = damage and isinstance(item, Document)
        yield Broken(item.id, f"{path} is damaged, and who knows where: {damage}") if broken else item


@dataclass(frozen=True)
class Facts:
    """What a row says of its documents, its content apart."""

    source: str
    split: str | None = None
    group: str | None = None
    weight: float = 1.0


def facts_of(row: dict, source: str, split: str | None) -> Facts:
    """Those of a row; a row's own split goes before its file's. Raises Refused."""
    told = {}
    for key, value in row.items():
        name = str(key).lower()
        if name in LIKE_SPLIT and isinstance(value, str) and value.lower() in SPLIT_WORDS:
            raise Refused(f"{key} is {value!r}, which may be its split; call it split, or leave it out")
        if name in ABOUT and value not in (None, ""):
            if name in told:
                raise Refused(f"has two keys called {name}, capitals apart")
            told[name] = value
    if (own := told.get("split")) is not None:
        if SPLIT_WORDS.get(own.lower() if isinstance(own, str) else None) in (None, "test"):
            raise Refused(f"split is {str(own)[:40]!r}, not train or validation")
        split = SPLIT_WORDS[own.lower()]
    names = {name: printable(str(told[name])) for name in ("source", "group") if name in told}
    return Facts(**({"source": source} | names), split=split, weight=weight_of(told))


def weight_of(row: dict) -> float:
    """The weight in the loss that a row or a segment states, 1 where it does not; raises Refused."""
    weight = row.get("weight")
    if weight is None:
        return 1.0
    if type(weight) not in (int, float) or not 0 <= weight <= MOST_WEIGHT:
        raise Refused(f"weight is {str(weight)[:40]!r}, not a number from 0 to {MOST_WEIGHT:g}")
    return float(weight)


# Layouts --------------------------------------------------------------------------------------------------------------


def layout_name(keys, layout: Layout) -> str | None:
    """Which layout a row with these keys has: a word of this module's docstring; None where none fits.

    Raises:
      InputError: several keys may hold the text, or the one that was named is not there.
    """
    keys = set(keys)
    codes = layout.codes or "codes"
    if layout.codes is not None or (codes in keys and "segments" not in keys):
        return "codes" if codes in keys else None
    if "segments" in keys:
        return "segments"
    for name, wanted in zip(NAMES_ELSEWHERE, INTERLEAVED, strict=True):
        if wanted <= keys:
            return name
    text = chosen(keys, CAPTIONS, layout.caption, "--caption-column", "the source")
    if layout.image is not None and layout.image not in keys:
        raise InputError(f"--image-column: the source has no {layout.image}; it has {', '.join(sorted(keys))}")
    if text is None:
        return None
    return "picture" if _picture_keys(keys, layout) else "text"


def _picture_keys(keys, layout: Layout) -> list[str]:
    """Those of a row's keys that may name its picture."""
    return [key for key in keys if key == layout.image or (layout.image is None and str(key).lower() in PICTURE_NAMES)]


def _alternatives(row: dict, layout: Layout, read) -> tuple[list[list[Segment]], tuple[str, ...]]:
    """(segments of each document of a row, what was left out of them)."""
    match of_row(layout_name, row, layout):
        case "segments":
            return [_own_segments(row["segments"], layout, read)], ()
        case "codes":
            codes = _codes("image", row[layout.codes or "codes"], layout.rules)
            return [[Text(caption), codes] for caption in _captions(row, layout)], ()
        case "lists":
            return _found(_alternating(row["images"], row["texts"]), layout)
        case "mmc4":
            return _found(_matched(row["text_list"], row["image_info"]), layout)
        case "picture":
            if read is None or layout.rules:
                raise Refused("names a picture, where pictures are not read")
            picture = Picture(read(_picture_name(row, layout)))
            return [[Text(caption), picture] for caption in _captions(row, layout)], ()
        case "text":
            _require_no_picture(row, layout)
            return [[Text(caption)] for caption in _captions(row, layout)], ()
    raise Refused(f"has none of the known layouts, but {', '.join(map(str, list(row)[:8]))}")


def of_row(function: Callable, *arguments: Any) -> Any:
    """What a function says; what would be wrong input for a whole source is one row's own fault here."""
    try:
        return function(*arguments)
    except InputError as error:
        raise Refused(str(error)) from error


def _require_no_picture(row: dict, layout: Layout) -> None:
    """Raises Refused where a row of text stands for a picture too, and the user did not name its text."""
    if layout.caption is None and (meant := pictures_meant(row, chosen(row, CAPTIONS, None, "", ""))):
        raise Refused(f"{meant}; say which with --image-column, or --caption-column where the text stands alone")


def _picture_name(row: dict, layout: Layout) -> str:
    names = {row[key] for key in _picture_keys(row, layout) if isinstance(row.get(key), str)}
    if len(names) != 1:
        raise Refused("names no picture" if not names else "names several pictures")
    return names.pop()


def _captions(row: dict, layout: Layout) -> list[str]:
    key = of_row(chosen, row, CAPTIONS, layout.caption, "--caption-column", "the row")
    return captions_in(None if key is None else row[key])


def captions_in(value: Any) -> list[str]:
    """The captions in a cell: text, UTF-8 bytes, or a list of them; raises Refused where it holds none."""
    values = value if isinstance(value, list) else [value]
    values = [v.decode() if isinstance(v, bytes) else v for v in values]
    if not values or not all(isinstance(v, str) and v for v in values):
        raise Refused("its caption is missing, empty or no UTF-8")
    return values


def _own_segments(segments: Any, layout: Layout, read) -> list[Segment]:
    if not isinstance(segments, list):
        raise Refused("has no list of segments")
    return [_segment(segment, layout.rules, read) for segment in segments]


def _segment(segment: Any, rules: dict[str, CodesRule], read) -> Segment:
    present = {k: v for k, v in segment.items() if v is not None} if isinstance(segment, dict) else {}
    weight = weight_of(present)
    match present:
        case {"text": str() as text} if not {"image", "codes"} & set(present):
            return Text(text, weight)
        case {"image": str() as name} if read is not None and not rules and not {"text", "codes"} & set(present):
            return Picture(read(name), weight)
        case {"codes": list() as codes} if rules and not {"text", "image"} & set(present):
            return _codes(present.get("modality", "image"), codes, rules, weight)
    wanted = '{"codes": [...]}' if rules else '{"image": "relative/path"}'
    raise Refused(f'a segment is neither {{"text": "..."}} nor {wanted}')


def _codes(modality: Any, codes: Any, rules: dict[str, CodesRule], weight: float = 1.0) -> Codes:
    rule = rules.get(modality) if isinstance(modality, str) else None
    if rule is None:
        raise Refused(f"codes of modality {modality!r}; declared: {', '.join(rules)}")
    if isinstance(codes, (str, bytes)):
        try:
            codes = json.loads(codes)
        except (ValueError, RecursionError) as error:
            raise Refused(f"codes of {modality} that are no JSON") from error
    if not isinstance(codes, list) or not all(type(code) is int for code in codes):
        raise Refused(f"codes of {modality} that are not whole numbers")
    if not codes or (rule.span and len(codes) != rule.span):
        raise Refused(f"{len(codes)} codes of {modality}, not {rule.span or 'at least 1'}")
    if min(codes) < 0 or max(codes) >= rule.codebook:
        raise Refused(f"codes of {modality} outside 0..{rule.codebook - 1}")
    return Codes(modality, np.array(codes, np.int32), weight)


# Pictures that are named and kept elsewhere ---------------------------------------------------------------------------


def _alternating(images: Any, texts: Any) -> list[Text | str]:
    """Text, and names of pictures, in reading order (OBELICS, Laurençon et al., 2023)."""
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise Refused("images and texts are not two lists of one length")
    parts: list[Text | str] = []
    for place, (image, text) in enumerate(zip(images, texts, strict=True)):
        if image is None and text == "":  # nothing at all
            continue
        image, text = image or None, text or None
        if (image is None) == (text is None) or not isinstance(text if image is None else image, str):
            raise Refused(f"place {place} has not exactly one of a picture and a text")
        parts.append(Text(text) if image is None else image)
    return parts


def _matched(sentences: Any, pictures: Any) -> list[Text | str]:
    """Sentences, each after the pictures that were matched to it (MMC4, Zhu et al., 2023)."""
    if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
        raise Refused("text_list is not a list of texts")
    if not isinstance(pictures, list) or not all(isinstance(p, dict) for p in pictures):
        raise Refused("image_info is not a list of objects")
    before: dict[int, list[str]] = {}
    for picture in pictures:
        place, name = picture.get("matched_text_index"), picture.get("image_name") or picture.get("raw_url")
        if type(place) is not int or not 0 <= place < len(sentences) or not isinstance(name, str):
            raise Refused("a picture of image_info has no name, or stands beside no sentence")
        before.setdefault(place, []).append(name)
    parts: list[Text | str] = []
    for place, sentence in enumerate(sentences):
        parts += before.get(place, [])
        if parts and isinstance(parts[-1], Text):
            parts[-1] = Text(f"{parts[-1].text} {sentence}")
        else:
            parts.append(Text(sentence))
    return parts


def _found(parts: list[Text | str], layout: Layout) -> tuple[list[list[Segment]], tuple[str, ...]]:
    """The segments, pictures fetched, of one document, and what it lacks."""
    segments, left_out = [], []
    for part in parts:
        if isinstance(part, Text):
            segments.append(part)
            continue
        if layout.find is None:
            raise Refused("names pictures; say with --images where they are")
        try:
            segments.append(Picture(layout.find(part)))
        except Missing:
            if not layout.skip_missing:
                raise
            left_out.append(MISSING)
    return [segments], tuple(left_out)
