"""An independent checker of drawn scenes: reads a picture's pixels and a caption's words, and scores one by the other.

It shares with `data.scenes` the tables of colours and words alone; outlines and grammar are its own. It reads imperfect
input, as models make it: wrong pixels, unknown colours, several things of one colour, text that is no sentence. What
it cannot read counts as wrong, never as an error.

    score_picture(read_caption(caption), read_picture(drawn))      a drawn picture against its caption
    score_caption(read_caption(written), read_picture(true))       a written caption against its picture

A thing that is missing is wrong in everything said of it: its colour, its shape and its relations.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from moma_jax.data.scenes import BACKGROUNDS, COLOURS, GRID, RELATIONS, SHAPES
from moma_jax.errors import InputError

LEAST_CELLS = 5
"""Area of the smallest object, in cells of a 16 x 16 grid. The smallest that is drawn, a cross of side 5, has 9: it may
lose four pixels, and at side 16 a speckle of four is no object."""
LEAST_OVERLAP = 0.7
"""Intersection over union with the best outline from which an object has that shape. The smallest drawn shapes with two
wrong pixels keep 0.77 or more (but a cross that lost an arm); two shapes grown together have less than 0.6."""

# What is read ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Object:
    """Pixels of one colour that belong together.

    Attributes:
      colour: a name in COLOURS.
      shape: a name in SHAPES; None where the pixels look like none of them.
      box: top, bottom, left, right in pixels, half-open: of the outline that fits best, so that stray pixels do not
        move it; of the pixels themselves where none fits.
      pixels: their number.
    """

    colour: str
    shape: str | None
    box: tuple[int, int, int, int]
    pixels: int


@dataclass(frozen=True)
class Reading:
    """What a picture shows: the name of its background, None where no pixel has one, and its objects, largest first."""

    background: str | None
    objects: tuple[Object, ...]

    @property
    def by_colour(self) -> dict[str, Object]:
        """The object that a colour means: the largest of that colour."""
        return {thing.colour: thing for thing in reversed(self.objects)}


@dataclass(frozen=True)
class Claims:
    """What a text says.

    Attributes:
      named: (colour, shape) of the things it names. The colour may be a background's, which no object ever has.
      relations: (colour, relation, colour), the relation being one of left, above and inside.
      backgrounds: names of backgrounds it mentions.
    """

    named: frozenset[tuple[str, str]]
    relations: frozenset[tuple[str, str, str]]
    backgrounds: frozenset[str]


# Pictures -------------------------------------------------------------------------------------------------------------

_NAMES = (*COLOURS, *BACKGROUNDS)
_RGB_C3 = np.array([*COLOURS.values(), *BACKGROUNDS.values()], np.int32)


def read_picture(pixels_NN3: np.ndarray) -> Reading:
    """Reads any picture of N x N pixels, N at least 16.

    Every pixel counts as the nearest of the known colours (Euclid, RGB). The background is the most common of the
    three. Pixels of one colour that are at most one pixel apart form an object, if they are LEAST_CELLS or more.

    Args:
      pixels_NN3: uint8 (N, N, 3).

    Raises:
      InputError: another shape or type.
    """
    pixels_NN3 = np.asarray(pixels_NN3)
    side = len(pixels_NN3) if pixels_NN3.ndim else 0
    if pixels_NN3.dtype != np.uint8 or side < GRID or pixels_NN3.shape != (side, side, 3):
        raise InputError(
            f"judge_scenes: pixels of shape {pixels_NN3.shape}, {pixels_NN3.dtype}; give uint8 (N, N, 3), N at least 16"
        )
    difference_NNC3 = pixels_NN3[:, :, None].astype(np.int32) - _RGB_C3
    nearest_NN = (difference_NNC3**2).sum(axis=-1).argmin(axis=-1)
    count_C = np.bincount(nearest_NN.ravel(), minlength=len(_NAMES))
    ground = len(COLOURS) + int(count_C[len(COLOURS) :].argmax())
    least = LEAST_CELLS * (side / GRID) ** 2
    found = [
        (_NAMES[colour], mask_NN)
        for colour in np.flatnonzero(count_C[: len(COLOURS)] >= least)
        for mask_NN in _pieces(nearest_NN == colour)
        if mask_NN.sum() >= least
    ]
    found.sort(key=lambda item: -int(item[1].sum()))
    objects = tuple(_object(colour, mask_NN, [m for _, m in found]) for colour, mask_NN in found)
    return Reading(_NAMES[ground] if count_C[ground] else None, objects)


def _pieces(mask_NN: np.ndarray) -> list[np.ndarray]:
    """Groups of pixels with at most one pixel between neighbours: a wrong pixel in an arm of a cross splits nothing."""
    # Each pixel grown to a block of 2 x 2: two blocks touch if their pixels differ by at most 2 in x and in y.
    grown_NN = ndimage.binary_dilation(np.pad(mask_NN, (0, 1)), np.ones((2, 2)), origin=-1)
    label_NN, count = ndimage.label(grown_NN, np.ones((3, 3)))
    label_NN = label_NN[:-1, :-1]
    return [mask_NN & (label_NN == index + 1) for index in range(count)]


def _object(colour: str, mask_NN: np.ndarray, every: list[np.ndarray]) -> Object:
    """Names the shape. An object whose box lies inside this one's may fill a hole in it."""
    box = _box(mask_NN)
    overlap, shape, fitted = _fit(mask_NN)
    inside = [other_NN for other_NN in every if _surrounds(box, _box(other_NN))]
    if inside:
        overlap, shape, fitted = max(
            (overlap, shape, fitted), _fit(np.any([mask_NN, *inside], axis=0)), key=lambda f: f[0]
        )
    known = overlap >= LEAST_OVERLAP
    return Object(colour, shape if known else None, fitted if known else box, int(mask_NN.sum()))


def _box(mask_NN: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask_NN.any(axis=1)), np.flatnonzero(mask_NN.any(axis=0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _surrounds(outer: tuple[int, int, int, int], inner: tuple[int, int, int, int]) -> bool:
    """Whether one box lies inside another without touching its sides."""
    (a, b, c, d), (e, f, g, h) = outer, inner
    return a < e and f < b and c < g and h < d


def _fit(mask_NN: np.ndarray) -> tuple[float, str, tuple[int, int, int, int]]:
    """The outline of highest intersection over union: its overlap, shape and box.

    Outlines stand in squares whose sides may lie up to two pixels inside those of the mask's box or one outside: stray
    pixels make the box larger, a lost tip makes it smaller.
    """
    side, area = len(mask_NN), int(mask_NN.sum())
    top, bottom, left, right = _box(mask_NN)
    longest = max(bottom - top, right - left)
    best = (0.0, SHAPES[0], (top, bottom, left, right))
    for size in range(max(longest - 4, 3), min(longest + 1, side) + 1):
        outline_FSS, area_F = _outlines(size)
        for y in _starts(top, bottom, size, side):
            for x in _starts(left, right, size, side):
                common_F = (outline_FSS & mask_NN[y : y + size, x : x + size]).sum(axis=(1, 2))
                overlap_F = common_F / (area_F + area - common_F)
                index = int(overlap_F.argmax())
                if overlap_F[index] > best[0]:
                    best = (float(overlap_F[index]), SHAPES[index], (y, y + size, x, x + size))
    return best


def _starts(first: int, last: int, size: int, side: int) -> range:
    """Where a square of this size may begin."""
    return range(max(first - 1, last - 2 - size, 0), min(first + 2, side - size) + 1)


@functools.lru_cache(maxsize=256)
def _outlines(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of every shape in a square, bool (5, size, size): those that it covers by half. And their number (5,)."""
    fine = 16
    place = (np.arange(size * fine) + 0.5) / fine - size / 2  # centres of the points that coverage is counted on
    y, x = place[:, None], place[None, :]
    half = size / 2
    inside = {
        "circle": x**2 + y**2 <= half**2,
        "square": (abs(x) <= half) & (abs(y) <= half),
        # Its tip is at the top, one pixel wide, or two where the size is even.
        "triangle": 2 * abs(x) <= y + half + (0 if size % 2 else 0.5),
        "diamond": abs(x) + abs(y) <= half,
        "cross": np.minimum(abs(x), abs(y)) <= size / 10,
    }
    covered = np.stack([inside[shape].reshape(size, fine, size, fine).mean(axis=(1, 3)) for shape in SHAPES])
    # A little less than half, as tips cover just that.
    outline_FSS = covered >= 0.45
    return outline_FSS, outline_FSS.sum(axis=(1, 2))


# Captions -------------------------------------------------------------------------------------------------------------

_MENTION = re.compile(rf"\b({'|'.join(_NAMES)}) ({'|'.join(SHAPES)})\b")
_BACKGROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)})\b(?! (?:{'|'.join(SHAPES)})\b)")
_MEANING = {phrase: relation for relation, phrases in RELATIONS.items() for phrase in phrases}
_PHRASE = "|".join(sorted(_MEANING, key=len, reverse=True))
# What stands between two things: "[is] above the" says it of the first; "there is a", after "Above the", of the second.
_BETWEEN = re.compile(rf"(?:,? moves, and)?(?: is| goes| can be seen)? ({_PHRASE})(?: an?| the)? ")
_BEFORE = re.compile(rf"\b({_PHRASE})(?: an?| the)? $")
_THERE_IS = re.compile(r",? there is(?: an?| the)? ")
_MIRRORED = {"right": "left", "below": "above"}


def read_caption(text: str) -> Claims:
    """Reads every wording of `scenes`, and of any other text the things, relations and backgrounds it can make out.

    A relation counts where its words stand between two things, or before the first of two with "there is" between
    them. "right" and "below" are turned round.
    """
    text = " ".join(text.lower().split())
    mentions = list(_MENTION.finditer(text))
    relations = set()
    for first, second in zip(mentions, mentions[1:], strict=False):
        between = text[first.end() : second.start()]
        a, b = first[1], second[1]
        if found := _BETWEEN.fullmatch(between):
            relations.add(_upright(a, _MEANING[found[1]], b))
        elif _THERE_IS.fullmatch(between) and (found := _BEFORE.search(text[: first.start()])):
            relations.add(_upright(b, _MEANING[found[1]], a))
    named = frozenset((m[1], m[2]) for m in mentions)
    return Claims(named, frozenset(relations), frozenset(_BACKGROUND.findall(text)))


def _upright(first: str, relation: str, second: str) -> tuple[str, str, str]:
    return (second, _MIRRORED[relation], first) if relation in _MIRRORED else (first, relation, second)


# Scores ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """So many right of so many asked for; counts add up."""

    right: int = 0
    asked: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.right + other.right, self.asked + other.asked)

    @property
    def share(self) -> float:
        """Right of asked, 0 to 1; NaN where nothing was asked."""
        return self.right / self.asked if self.asked else float("nan")

    @property
    def full(self) -> bool:
        """Whether nothing is wrong."""
        return self.right == self.asked


@dataclass(frozen=True)
class Score:
    """What is right; scores add up with `sum(scores, Score())`.

    Attributes:
      colours: of the colours that are asked for, those that are there.
      shapes: of the things that are asked for, those that are there with this shape.
      relations: of the relations, those that hold.
      background: whether the background is the one named, where one is named.
      all: whether all of this is right and nothing else is there; one for each picture or caption.
    """

    colours: Count = Count()
    shapes: Count = Count()
    relations: Count = Count()
    background: Count = Count()
    all: Count = Count()

    def __add__(self, other: Score) -> Score:
        names = [field.name for field in dataclasses.fields(Score)]
        return Score(**{name: getattr(self, name) + getattr(other, name) for name in names})


def score_picture(claims: Claims, reading: Reading) -> Score:
    """Scores a drawn picture by what its caption claims.

    Asked for are the colours, things, relations and the background that the caption names. A colour means the largest
    object of that colour. An object that was not asked for makes only `all` wrong.
    """
    there = reading.by_colour
    colours = {colour for colour, _ in claims.named}
    shapes = sum(colour in there and there[colour].shape == shape for colour, shape in claims.named)
    score = Score(
        Count(len(colours & set(there)), len(colours)),
        Count(shapes, len(claims.named)),
        Count(sum(_holds(claim, there) for claim in claims.relations), len(claims.relations)),
        _background(claims, reading),
    )
    return _with_all(score, len(reading.objects) == len(claims.named))


def score_caption(claims: Claims, reading: Reading) -> Score:
    """Scores what a written caption claims by the picture it was written for.

    Asked for are the colour and the shape of every object, one relation fewer than there are objects (more where the
    caption claims more), and the background where the caption names one. A thing that is named but not there, or a
    colour named with two shapes, makes only `all` wrong.
    """
    there = reading.by_colour
    things = {(thing.colour, thing.shape) for thing in there.values()}
    score = Score(
        Count(len({colour for colour, _ in claims.named} & set(there)), len(there)),
        Count(len(claims.named & things), len(there)),
        Count(
            sum(_holds(claim, there) for claim in claims.relations),
            max(len(claims.relations), len(reading.objects) - 1, 0),
        ),
        _background(claims, reading),
    )
    return _with_all(score, claims.named == things and len(there) == len(reading.objects))


def _background(claims: Claims, reading: Reading) -> Count:
    return Count(int(claims.backgrounds == {reading.background}), int(bool(claims.backgrounds)))


def _with_all(score: Score, nothing_else: bool) -> Score:
    counts = (score.colours, score.shapes, score.relations, score.background)
    return dataclasses.replace(score, all=Count(int(nothing_else and all(count.full for count in counts)), 1))


def _holds(claim: tuple[str, str, str], there: dict[str, Object]) -> bool:
    """Whether a relation holds: side by side means at most half as far off the axis as along it, between centres."""
    first, relation, second = claim
    if first not in there or second not in there:
        return False
    a, b = there[first].box, there[second].box
    if relation == "inside":
        return _surrounds(b, a)
    # Twice the way from centre to centre, which is whole.
    down, right = (b[0] + b[1] - a[0] - a[1], b[2] + b[3] - a[2] - a[3])
    along, across = (right, down) if relation == "left" else (down, right)
    return along > 0 and along >= 2 * abs(across)
