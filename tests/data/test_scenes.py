"""Scenes: a caption is true of the pixels, read by a checker that knows only colours and words."""

import re

import numpy as np
import pytest

from moma_jax.data import scenes
from moma_jax.data.documents import Picture, Text, content_hash

NAME = rf"(?:an? |the )?({'|'.join(scenes.COLOURS)}) ({'|'.join(scenes.SHAPES)})"
WORDS = {phrase: relation for relation, phrases in scenes.RELATIONS.items() for phrase in phrases}
RELATION = "|".join(sorted(WORDS, key=len, reverse=True))
FORWARD = re.compile(rf"{NAME}(?: moves, and)?(?: is| goes| can be seen)? ({RELATION}) {NAME}", re.I)
BACKWARD = re.compile(rf"({RELATION}) {NAME} there is {NAME}", re.I)
HOLDS = {
    "left": lambda a, b: b[1] - a[1] >= 2 * abs(a[0] - b[0]),
    "above": lambda a, b: b[0] - a[0] >= 2 * abs(a[1] - b[1]),
}


def claims(text):
    """What a text says: the colours and shapes it names, and (colour, relation, colour)."""
    said = [(m[0], WORDS[m[2].lower()], m[3]) for m in FORWARD.findall(text) for m in [tuple(s.lower() for s in m)]]
    said += [(m[3], WORDS[m[0]], m[1]) for m in BACKWARD.findall(text) for m in [tuple(s.lower() for s in m)]]
    return {(colour.lower(), shape.lower()) for colour, shape in re.findall(NAME, text, re.I)}, said


def masks(picture):
    """Pixels of each colour that occurs; every pixel must have a known colour."""
    found = {name: (picture == rgb).all(axis=-1) for name, rgb in scenes.COLOURS.items()}
    grounds = [name for name, rgb in scenes.BACKGROUNDS.items() if (picture == rgb).all(axis=-1).any()]
    assert len(grounds) == 1
    ground = (picture == scenes.BACKGROUNDS[grounds[0]]).all(axis=-1)
    assert (sum(found.values()) + ground == 1).all()
    return {name: mask for name, mask in found.items() if mask.any()}, grounds[0]


def box(mask):
    rows, columns = np.nonzero(mask)
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


def centre(mask):
    top, bottom, left, right = box(mask)
    return (top + bottom) / 2, (left + right) / 2


def surrounds(outer, inner):
    (a, b, c, d), (e, f, g, h) = box(outer), box(inner)
    return a < e and f < b and c < g and h < d


def shape_of(mask):
    """A shape from its outline alone: how full its box is, and whether its lower half is the heavier one."""
    top, bottom, left, right = box(mask)
    window = mask[top:bottom, left:right]
    half = len(window) // 2
    full, lean = window.mean(), window[-half:].sum() / max(window[:half].sum(), 1)
    if full == 1:
        return "square"
    if lean > 1.4:
        return "triangle"
    return "circle" if full > 0.7 else "diamond" if full > 0.45 else "cross"


def check(text, picture, whole=True):
    """Asserts that what the text says holds in the picture; with `whole`, that it names everything."""
    named, said = claims(text)
    found, ground = masks(picture)
    for name in re.findall("|".join(scenes.BACKGROUNDS), text):
        assert name == ground
    if whole:
        assert {colour for colour, _ in named} == set(found)
        assert len(said) == len(found) - 1
        for colour, shape in named:
            mask = found[colour]
            for other in found.values():
                if surrounds(mask, other):
                    mask = mask | other
            assert shape_of(mask) == shape, (text, colour)
    for first, relation, second in said:
        a, b = found[first], found[second]
        match relation:
            case "inside":
                assert surrounds(b, a), text
            case "right" | "below":
                assert HOLDS[scenes.OPPOSITE[relation]](centre(b), centre(a)), text
            case _:
                assert HOLDS[relation](centre(a), centre(b)), text


@pytest.mark.parametrize("side", [16, 32, 48])
def test_captions_are_true_of_the_pixels(side):
    for seed in range(400):
        scene = scenes.scene(seed)
        check(scenes.caption(scene), scenes.render(scene, side))


def test_every_wording_is_true():
    kinds = {}
    for seed in range(60):
        kinds.setdefault((len(scenes.scene(seed).things), scenes.scene(seed).relations[0][1]), scenes.scene(seed))
    assert len(kinds) >= 7
    texts = set()
    for scene in kinds.values():
        for wording in range(120):
            text = scenes.caption(scenes.replace(scene, wording=wording))
            check(text, scenes.render(scene, 16))
            texts.add(text)
    assert len(texts) > 100


def test_stories_are_true_and_change_one_thing_at_a_time():
    lengths = set()
    for seed in range(200):
        texts, shown = scenes.story(seed)
        lengths.add(len(shown))
        assert len(texts) == len(shown)
        check(texts[0], scenes.render(shown[0], 16))
        for text, before, after in zip(texts[1:], shown, shown[1:], strict=False):
            picture = scenes.render(after, 16)
            check(scenes.caption(after), picture)
            check(text, picture, whole=False)
            old, new = ({t.name for t in s.things} for s in (before, after))
            if old == new:
                assert before.relations != after.relations
                continue
            (gone,), appeared = old - new, new - old
            assert gone in text
            colour, shape = next(iter(appeared), "gone gone").split()
            assert colour in text or shape in text or "disappears" in text
    assert lengths == {2, 3}


def test_objects_do_not_touch():
    for seed in range(300):
        scene = scenes.scene(seed)
        things = [(t.x, t.y, t.x + t.size, t.y + t.size) for t in scene.things]
        assert all(min(thing) >= 0 and max(thing) <= 16 for thing in things)
        if scene.relations[0][1] != "inside":
            for i, (a, b, c, d) in enumerate(things):
                assert all(c < e or g < a or d < f or h < b for e, f, g, h in things[:i])


def test_description_is_the_same_for_scenes_that_mean_the_same():
    red, blue = scenes.Thing("red", "circle", 0, 5, 5), scenes.Thing("blue", "square", 8, 5, 5)
    one = scenes.Scene("white", (red, blue), ((0, "left", 1),))
    other = scenes.Scene("white", (scenes.replace(blue, x=9), red), ((0, "right", 1),), wording=7)
    assert one.description == other.description
    assert one.description != scenes.replace(one, background="black").description
    assert one.description != scenes.replace(one, relations=((0, "right", 1),)).description


def test_no_held_out_scene_is_seen_in_training(monkeypatch):
    seen = {"train": set(), "validation": set()}
    last, plain = [], scenes.render

    def render(scene, side):
        last.append(scene.description)
        return plain(scene, side)

    monkeypatch.setattr(scenes, "render", render)
    stories = 0
    for split, count in (("train", 1500), ("validation", 150)):
        for index in range(count):
            last.clear()
            document = scenes.document(0, split, index, 16)
            assert document.split == split
            stories += document.collection == "interleaved"
            seen[split] |= set(last if split == "train" else last[-1:])
    assert not seen["train"] & seen["validation"]
    assert 0.15 < stories / 1650 < 0.25


def test_documents_depend_on_seed_split_and_index_alone():
    document = scenes.document(3, "train", 5, 16)
    assert content_hash(document) == content_hash(scenes.document(3, "train", 5, 16))
    others = [scenes.document(*key, 16) for key in ((4, "train", 5), (3, "train", 6), (3, "validation", 5))]
    assert len({content_hash(d) for d in [document, *others]}) == 4
    assert [type(s) for s in document.segments] == [Text, Picture] * (len(document.segments) // 2)


def test_a_seed_gives_the_scene_it_always_gave():
    """Change scenes.VERSION together with these."""
    digest = "".join(content_hash(scenes.document(0, "train", i, 16)).hex()[:8] for i in range(4))
    assert (scenes.VERSION, digest) == (1, "5235c3cd1d89fee879988d6ab0289373")
