"""Generated scenes: two or three coloured shapes in a spatial relation, with a true English caption.

Everything a caption says can be read off the pixels again: each object of a picture has a colour of its own, no two
objects touch (but for one inside another), and pixels are never blended, so each has exactly the colour of COLOURS
or BACKGROUNDS that is named. In captions an object is always named by colour and shape ("red circle"), and a relation
by one of the words in RELATIONS, between the objects before and after it or, in the wordings that say "to the left of
a blue square there is a red circle", between those after it.

Places and sizes are whole cells of a grid of 16 x 16; row 0 is at the top.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from moma_jax.data.documents import Document, Picture, Text, hash_share
from moma_jax.errors import InputError

VERSION = 1
"""Changes whenever a seed gives another scene."""
GRID = 16
COLOURS = {
    "red": (215, 25, 35),
    "green": (30, 150, 60),
    "blue": (30, 70, 220),
    "yellow": (250, 220, 30),
    "orange": (250, 130, 10),
    "purple": (125, 35, 165),
    "cyan": (50, 205, 225),
    "pink": (250, 135, 195),
}
BACKGROUNDS = {"white": (250, 250, 250), "black": (15, 15, 15), "gray": (128, 128, 128)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
    "inside": ("inside", "within"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
HELD_OUT = 1 / 11
"""Share of scene descriptions that only the held-out split shows."""
STORIES = 0.2
"""Share of documents that are stories."""
# Odd sizes: at side 16 a diamond of 6 pixels can hardly be told from a circle.
_INNER, _SIZES, _OUTER = 5, (5, 7), (13, 15)


@dataclass(frozen=True)
class Thing:
    """One object: its name, and the upper left cell and the side of its square on the grid."""

    colour: str
    shape: str
    x: int = 0
    y: int = 0
    size: int = 5

    @property
    def name(self) -> str:
        """Colour and shape, such as "red circle"."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One picture's content.

    Attributes:
      background: a name in BACKGROUNDS.
      things: two or three objects, of different colours.
      relations: true triples (index, relation, index): things[first] is RELATION things[second]. With three things
        the first is beside the second, and the third above or below one of them.
      wording: chooses among the patterns of captions; means nothing else.
    """

    background: str
    things: tuple[Thing, ...]
    relations: tuple[tuple[int, str, int], ...]
    wording: int = 0

    @property
    def description(self) -> str:
        """What the scene shows, without exact places and sizes: equal for scenes that mean the same."""
        facts = set()
        for first, relation, second in self.relations:
            a, b = self.things[first].name, self.things[second].name
            facts.add((b, OPPOSITE[relation], a) if relation in ("right", "below") else (a, relation, b))
        return json.dumps([self.background, sorted(facts)])

    @property
    def held_out(self) -> bool:
        """Whether scenes of this description are kept for the held-out split."""
        return hash_share(self.description.encode()) < HELD_OUT


class _Dice:
    """Choices that depend on the seed alone: of `random`, only `random()` is the same in every Python version."""

    def __init__(self, seed: int):
        self.roll = random.Random(seed).random

    def below(self, count: int) -> int:
        return int(self.roll() * count)

    def pick(self, choices):
        return choices[int(self.roll() * len(choices))]

    def some(self, choices, count: int) -> list:
        """`count` different choices."""
        left = list(choices)
        return [left.pop(int(self.roll() * len(left))) for _ in range(count)]


# Scenes ---------------------------------------------------------------------------------------------------------------


def scene(seed: int) -> Scene:
    """The scene of a seed: half of them two things side by side, a third three things, the rest one inside another."""
    dice = _Dice(seed)
    kind = dice.roll()
    if kind < 0.5:
        return _two(dice)
    return _three(dice) if kind < 0.85 else _nested(dice)


def _two(dice: _Dice) -> Scene:
    background, things = _cast(dice, 2)
    return _beside(dice, background, things, dice.pick(tuple(OPPOSITE)))


def _cast(dice: _Dice, count: int) -> tuple[str, list[Thing]]:
    """A background and things that have no place yet."""
    background, colours = dice.pick(tuple(BACKGROUNDS)), dice.some(COLOURS, count)
    return background, [Thing(colour, dice.pick(SHAPES), size=dice.pick(_SIZES)) for colour in colours]


def _beside(dice: _Dice, background: str, things: list[Thing], relation: str) -> Scene:
    """Puts the first of two things in this relation to the second, at most half as far off the axis as along it."""
    first, second = things if relation in ("left", "above") else things[::-1]
    along_1 = dice.below(GRID - first.size - second.size)
    along_2 = along_1 + first.size + 1 + dice.below(GRID - along_1 - first.size - second.size)
    distance = along_2 + second.size / 2 - along_1 - first.size / 2
    across_1 = dice.below(GRID - first.size + 1)
    middle = across_1 + first.size / 2
    across_2 = dice.pick(
        [a for a in range(GRID - second.size + 1) if abs(a + second.size / 2 - middle) <= distance / 2]
    )
    if relation in ("left", "right"):
        placed = replace(first, x=along_1, y=across_1), replace(second, x=along_2, y=across_2)
    else:
        placed = replace(first, x=across_1, y=along_1), replace(second, x=across_2, y=along_2)
    things = placed if relation in ("left", "above") else placed[::-1]
    return Scene(background, things, ((0, relation, 1),), dice.below(1 << 16))


def _three(dice: _Dice) -> Scene:
    """Each thing in a quarter of its own: two side by side, the third above or below one of them."""
    background, things = _cast(dice, 3)
    column, row, anchor = dice.below(2), dice.below(2), dice.below(2)
    # Quarters (column, row): the first two share a row, the third has the column of its anchor in the other row.
    quarters = [(column, row), (1 - column, row), (column if anchor == 0 else 1 - column, 1 - row)]
    half = GRID // 2
    placed = tuple(
        # Sizes of 5 and 7 leave a free cell before the next quarter.
        replace(t, x=half * q[0] + dice.below(half - t.size), y=half * q[1] + dice.below(half - t.size))
        for t, q in zip(things, quarters, strict=True)
    )
    relations = ((0, "right" if column else "left", 1), (2, "above" if row else "below", anchor))
    return Scene(background, placed, relations, dice.below(1 << 16))


def _nested(dice: _Dice) -> Scene:
    background, colours = dice.pick(tuple(BACKGROUNDS)), dice.some(COLOURS, 2)
    outer = Thing(colours[0], dice.pick(SHAPES[:-1]), size=dice.pick(_OUTER))  # a cross has no inside
    outer = replace(outer, x=dice.below(GRID - outer.size + 1), y=dice.below(GRID - outer.size + 1))
    # A triangle is wide enough only in its lower half.
    down = outer.size - _INNER - 2 if outer.shape == "triangle" else (outer.size - _INNER) // 2
    inner = Thing(colours[1], dice.pick(SHAPES), outer.x + (outer.size - _INNER) // 2, outer.y + down, _INNER)
    return Scene(background, (inner, outer), ((0, "inside", 1),), dice.below(1 << 16))


# Pictures -------------------------------------------------------------------------------------------------------------


def render(scene: Scene, side: int) -> np.ndarray:
    """Draws a scene, uint8 of shape (side, side, 3), without blending. Shapes can be told apart from side 16 up."""
    if side < 1:
        raise InputError(f"scenes: a side of {side} pixels; give 16 or more")
    picture_HW3 = np.empty((side, side, 3), np.uint8)
    picture_HW3[:] = BACKGROUNDS[scene.background]
    for thing in sorted(scene.things, key=lambda t: -t.size):  # what is inside comes last
        x, y, size = (round(value * side / GRID) for value in (thing.x, thing.y, thing.size))
        window_HW3 = picture_HW3[y : y + size, x : x + size]
        mask_HW = _mask(thing.shape, size)[: len(window_HW3), : window_HW3.shape[1]]
        window_HW3[mask_HW] = COLOURS[thing.colour]
    return picture_HW3


@functools.lru_cache(maxsize=512)
def _mask(shape: str, size: int) -> np.ndarray:
    """Pixels of a shape that fills a square of `size` pixels, bool of shape (size, size)."""
    u = (np.arange(size) + 0.5) / size * 2 - 1
    right, down = np.abs(u)[None, :], u[:, None]
    off = np.abs(down)
    match shape:
        case "circle":
            return right**2 + off**2 <= 1
        case "square":
            return np.ones((size, size), bool)
        case "triangle":
            # A little wider than it should be, so that the tip has its one pixel, or its two.
            return right <= (down + 1) / 2 + (0.45 if size % 2 else 0.55) / size
        case "diamond":
            return right + off <= 1 + 1e-9
        case "cross":
            return (right <= 0.2) | (off <= 0.2)
    raise InputError(f"scenes: no shape {shape!r}; there are {', '.join(SHAPES)}")


# Captions -------------------------------------------------------------------------------------------------------------

_PAIR = (
    "{A} is {is_r} {b}.",
    "{A} {r} {b}.",
    "There is {a} {r} {b}.",
    "{R} {b} there is {a}.",
    "Two shapes on a {ground} background: {a} {r} {b}.",
    "{A} is {is_r} {b} on a {ground} background.",
    "On a {ground} background, {a} can be seen {r} {b}.",
    "The background is {ground}. {A} is {is_r} {b}.",
    "A {ground} picture of {a} and {b}. The {a_name} is {is_r} the {b_name}.",
    "This picture shows {a} {r} {b}; the rest is {ground}.",
)
_TRIPLE = (
    "{A} is {is_r} {b}, and {c} is {is_q} the {d_name}.",
    "{A} is {is_r} {b}. {Q} the {d_name} there is {c}.",
    "There are three shapes: {a}, {b} and {c}. The {a_name} is {is_r} the {b_name}. The {c_name} is {q} the {d_name}.",
    "On a {ground} background, {a} is {is_r} {b}, and {c} is {q} the {d_name}.",
    "{A} {r} {b}, with {c} {q} the {d_name}, on a {ground} background.",
    "{Q} {d} there is {c}. The {d_name} is {s} {e}.",
)


def caption(scene: Scene) -> str:
    """A true caption; `scene.wording` chooses the pattern, and which thing of a relation comes first."""
    dice = _Dice(scene.wording)
    first, relation, second = scene.relations[0]
    if relation in OPPOSITE and dice.below(2):
        first, relation, second = second, OPPOSITE[relation], first
    words = {"ground": scene.background, **_names("ab", scene, first, second), **_relation("r", dice, relation)}
    if len(scene.relations) == 1:
        return dice.pick(_PAIR).format(**words)
    third, other, anchor = scene.relations[1]
    # e is the one of the first two that the third is not next to; s is how the anchor stands to it.
    rest = second if anchor == first else first
    words |= {**_names("cde", scene, third, anchor, rest), **_relation("q", dice, other)}
    words |= _relation("s", dice, relation if anchor == first else OPPOSITE[relation])
    return dice.pick(_TRIPLE).format(**words)


def _names(letters: str, scene: Scene, *things: int) -> dict[str, str]:
    words = {}
    for letter, index in zip(letters, things, strict=True):
        name = scene.things[index].name
        words |= {letter: _with_article(name), letter.upper(): _with_article(name, "A"), f"{letter}_name": name}
    return words


def _relation(letter: str, dice: _Dice, relation: str) -> dict[str, str]:
    words = dice.pick(RELATIONS[relation])
    plain = RELATIONS[relation][0]
    return {letter: plain, letter.upper(): plain[0].upper() + plain[1:], f"is_{letter}": words}


def _with_article(name: str, article: str = "a") -> str:
    return f"{article}n {name}" if name[0] in "aeio" else f"{article} {name}"


# Stories --------------------------------------------------------------------------------------------------------------


def story(seed: int) -> tuple[list[str], list[Scene]]:
    """Two or three pictures, each but the first with one change, and the text before each of them, all true."""
    dice = _Dice(seed)
    count = 2 + dice.below(2)
    scenes = [_three(dice) if dice.roll() < 0.3 else _two(dice)]
    texts = [caption(scenes[0])]
    while len(scenes) < count:
        before = scenes[-1]
        change = dice.pick(_CHANGES if len(before.things) == 2 else _CHANGES_OF_THREE)
        after, text = change(dice, before)
        opening = dice.pick(("Now ", "Then ", "Next, ", "After that, ", "In the next picture, "))
        texts.append(opening + text)
        scenes.append(after)
    return texts, scenes


def _move(dice: _Dice, before: Scene) -> tuple[Scene, str]:
    relation = dice.pick([r for r in OPPOSITE if r != before.relations[0][1]])
    after = _beside(dice, before.background, list(before.things), relation)
    mover, other = after.things
    if dice.below(2):
        mover, other, relation = other, mover, OPPOSITE[relation]
    place = RELATIONS[relation][0]
    sentence = dice.pick(("the {0} moves, and is {1} the {2}.", "the {0} is {1} the {2}.", "the {0} goes {1} the {2}."))
    return after, sentence.format(mover.name, place, other.name)


def _recolour(dice: _Dice, before: Scene) -> tuple[Scene, str]:
    index = dice.below(len(before.things))
    old = before.things[index]
    colour = dice.pick([c for c in COLOURS if c not in {t.colour for t in before.things}])
    new = replace(old, colour=colour)
    sentence = dice.pick(("the {0} turns {1}.", "the {0} becomes {2}.", "the {0} has changed its colour to {1}."))
    return _with(before, index, new), sentence.format(old.name, colour, _with_article(new.name))


def _reshape(dice: _Dice, before: Scene) -> tuple[Scene, str]:
    index = dice.below(len(before.things))
    old = before.things[index]
    new = replace(old, shape=dice.pick([s for s in SHAPES if s != old.shape]))
    sentence = dice.pick(("the {0} becomes {1}.", "the {0} changes into {1}.", "there is {1} in place of the {0}."))
    return _with(before, index, new), sentence.format(old.name, _with_article(new.name))


def _vanish(dice: _Dice, before: Scene) -> tuple[Scene, str]:
    """The third thing goes; the other two stay where they were."""
    after = replace(before, things=before.things[:2], relations=before.relations[:1])
    first, relation, second = after.relations[0]
    sentence = dice.pick(("the {0} is gone.", "the {0} is gone, and the {1} is {2} the {3}.", "the {0} disappears."))
    things = before.things
    return after, sentence.format(things[2].name, things[first].name, RELATIONS[relation][0], things[second].name)


def _with(before: Scene, index: int, thing: Thing) -> Scene:
    return replace(before, things=(*before.things[:index], thing, *before.things[index + 1 :]))


_CHANGES: tuple[Callable, ...] = (_move, _recolour, _reshape)
_CHANGES_OF_THREE: tuple[Callable, ...] = (_recolour, _reshape, _vanish)


# Documents ------------------------------------------------------------------------------------------------------------


def document(seed: int, split: str, index: int, side: int) -> Document:
    """Document `index` of a split, drawn at `side`: a pair in four of five, else a story.

    A training document shows no scene whose description is held out; a held-out one shows such a scene (a story: as
    its last picture), so no held-out description is ever seen in training.
    """
    held_out = split == "validation"
    dice = _Dice(_mix(seed, split, index))
    is_story = dice.roll() < STORIES
    while True:
        attempt = dice.below(1 << 52)
        texts, scenes = story(attempt) if is_story else ([], [scene(attempt)])
        if scenes[-1].held_out if held_out else not any(s.held_out for s in scenes):
            break
    name = f"scenes/{split}/{index:08d}"
    pictures = [Picture(render(s, side)) for s in scenes]
    if not is_story:
        return Document(name, "scenes", "pairs", [Text(caption(scenes[0])), *pictures], split)
    segments = [part for text, picture in zip(texts, pictures, strict=True) for part in (Text(text), picture)]
    return Document(name, "scenes", "interleaved", segments, split)


def _mix(seed: int, split: str, index: int) -> int:
    """One number for the document of a seed: different for every document."""
    return ((seed % (1 << 64)) << 65) + (index << 1) + (split == "validation")
