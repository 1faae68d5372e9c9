"""Prompts to ids, and ids to text and pictures as they come: whole characters, whole pictures, stop sequences."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from scripted import picture

from moma_jax.config import Modality
from moma_jax.data.documents import Codes
from moma_jax.generation import generate
from moma_jax.generation.output import OutputReader, enlarged, half_blocks
from moma_jax.generation.prompts import Language, encode_prompt, language_of
from moma_jax.vocab import contiguous


@pytest.fixture
def language(loaded):
    """Tokenizer and codec of the store."""
    return language_of(loaded)


# Prompts --------------------------------------------------------------------------------------------------------------


def test_a_prompt_has_the_ids_of_a_document(language, tmp_path):
    image = language.vocabulary.modalities[1]
    pixels = picture(7)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    code_N = image.code_ids[language.image.encode([pixels])[0]]
    drawn = [image.begin, *code_N, image.end]
    words, more = language.text.encode("a red"), language.text.encode(" circle")
    for same in (pixels, Image.fromarray(pixels), tmp_path / "a.png", Codes("image", code_N - image.ranges[0][0])):
        assert encode_prompt(["a red", same, " circle", same], language).tolist() == [0, *words, *drawn, *more, *drawn]
    assert encode_prompt("a red", language).tolist() == encode_prompt(["a red"], language).tolist() == [0, *words]
    assert encode_prompt([], language).tolist() == [0]
    assert encode_prompt(str(tmp_path / "a.png"), language)[1] >= language.text.special_ids, "a str is text"


def test_pictures_of_any_kind_are_read(language):
    clear = Image.new("RGBA", (9, 5), (255, 0, 0, 0))
    white = encode_prompt([np.full((4, 4, 3), 255, np.uint8)], language).tolist()
    assert encode_prompt([clear], language).tolist() == white, "what is transparent is white"
    assert encode_prompt([Image.new("CMYK", (5, 5))], language).tolist() == white
    assert encode_prompt([Image.new("1", (5, 5), 1)], language).tolist() == white


# Reading what comes ---------------------------------------------------------------------------------------------------


def read_all(language, ids, pieces, stop=()):
    told, shown = [], []
    reader = OutputReader(language, stop, told.append, shown.append)
    for start in range(0, len(ids), pieces):
        reader.read(ids[start : start + pieces])
    reader.finish()
    return reader, told, shown


@pytest.mark.parametrize("pieces", [1, 2, 7, 100])
def test_characters_are_told_whole(language, pieces):
    text = "äh, 😀 €5 – 漢字!"
    ids = language.text.encode(text).tolist()
    assert len(ids) > len(text), "the characters span several tokens"
    reader, told, _ = read_all(language, ids, pieces)
    assert "".join(told) == text and reader.segments == [text] and "\ufffd" not in "".join(told)
    assert pieces > 2 or len(told) > 5, "told as it comes"


def test_bytes_that_are_no_character_are_told_in_the_end(language):
    ids = language.text.encode("ok €").tolist()[:-1]
    reader, told, _ = read_all(language, ids, 1)
    assert reader.segments == ["ok \ufffd"] == ["".join(told)]


@pytest.mark.parametrize("pieces", [1, 3, 50])
def test_pictures_text_and_codes_in_order(language, pieces):
    ids = encode_prompt(["one", picture(1), picture(2), "two", picture(3)], language)[1:].tolist()
    reader, told, shown = read_all(language, ids, pieces)
    assert [type(s) for s in reader.segments] == [str, Image.Image, Image.Image, str, Image.Image]
    assert "".join(told) == "onetwo" and shown == [s for s in reader.segments if not isinstance(s, str)]
    assert (
        np.asarray(shown[1]).tolist()
        == np.asarray(language.image.decode(language.image.encode([picture(2)]))[0]).tolist()
    )


def test_codes_of_other_modalities(language):
    codec = language.text
    layout = [("text", 700, 0), ("image", 6, 4), ("sound", 5, 3), ("bare", 4, 0)]
    vocabulary = contiguous([Modality(n, n[0], size, span) for n, size, span in layout])
    language = Language(vocabulary, codec, None)
    image, sound, bare = vocabulary.modalities[1:]
    ids = [image.begin, *image.code_ids[:4], image.end, sound.begin, *sound.code_ids[2:5], sound.end, bare.code_ids[3]]
    reader, _, shown = read_all(language, [*ids, 50, bare.code_ids[1]], 2)
    found = [(s.modality, s.codes.tolist()) for s in reader.segments if isinstance(s, Codes)]
    assert found == [("image", [0, 1, 2, 3]), ("sound", [2, 3, 4]), ("bare", [3]), ("bare", [1])] and len(shown) == 4
    prompt = [Codes("sound", np.array([1, 1, 1])), Codes("bare", np.array([0]))]
    assert encode_prompt(prompt, language).tolist() == [
        0,
        sound.begin,
        *[sound.code_ids[1]] * 3,
        sound.end,
        bare.code_ids[0],
    ]


@pytest.mark.parametrize("pieces", [1, 4, 100])
def test_stop_sequences(language, pieces):
    ids = language.text.encode("one two ENd three").tolist()
    reader, told, _ = read_all(language, ids, pieces, stop=("ENd", "zzz"))
    assert reader.segments == ["one two "] and "".join(told) == "one two " and reader.stopped
    counted = language.text.decode(ids[: reader.taken])
    assert "ENd" in counted and "ENd" not in language.text.decode(ids[: reader.taken - 1])
    reader, told, _ = read_all(language, ids, pieces, stop=("three!", "four"))
    assert "".join(told) == "one two ENd three" and not reader.stopped and reader.taken == len(ids)


# Showing --------------------------------------------------------------------------------------------------------------


def test_showing():
    small = Image.fromarray(picture(0, 4))
    assert enlarged(small).size == (128, 128) and enlarged(small, 3).size == (12, 12)
    assert enlarged(Image.new("RGB", (200, 300))).size == (200, 300)
    np.testing.assert_array_equal(np.asarray(enlarged(small, 3))[::3, ::3], np.asarray(small))
    lines = half_blocks(small, 64).split("\n")
    r, g, b = np.asarray(small)[1, 0]
    assert len(lines) == 2 and all(line.count("▀") == 4 for line in lines) and f"48;2;{r};{g};{b}m" in lines[0]
    assert half_blocks(Image.new("RGB", (200, 99)), 40).split("\n")[0].count("▀") == 40


def test_a_notebook_shows_text_and_pictures(loaded):
    (output,) = generate(loaded, ["a"], mode="image")
    assert output._repr_html_().startswith("<img") and "base64" in output._repr_html_()
    output = dataclasses.replace(output, segments=["<b>", Codes("sound", np.zeros(3, np.int32))])
    assert "&lt;b&gt;" in output._repr_html_() and "3 codes of sound" in output._repr_html_()
