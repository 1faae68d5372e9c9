"""Generation from prompts to text and pictures, with a small model whose every token depends on all before it."""

import dataclasses
import types
from pathlib import Path

import numpy as np
import pytest
import scripted
from PIL import Image
from scripted import CONTEXT, picture

from moma_jax.config import Modality, StoreConfig
from moma_jax.data.documents import Codes
from moma_jax.errors import InputError, RunError
from moma_jax.generation import Guidance, Sampling, generate, generate_ids
from moma_jax.generation import decoding as writing_module
from moma_jax.generation.prompts import encode_prompt, language_of, writable_text
from moma_jax.vocab import contiguous

GREEDY = Sampling(temperature=0.0)


def is_picture_id(vocabulary, token):
    image = vocabulary.modalities[1]
    return vocabulary.modality_V[token] == 1 or token in (image.begin, image.end)


def slow(loaded, prompt_N, room, guidance=None, images=None):
    """Greedy writing without a cache: every token from three whole contexts, the grammar by hand."""
    vocabulary, ids, written = loaded.vocabulary, list(prompt_N), []
    image, text_ids = vocabulary.modalities[1], writable_text(vocabulary, language_of(loaded).text)
    open_codes, drawn = None, 0
    if image.begin in ids and image.end not in ids:
        open_codes = ids[ids.index(image.begin) + 1 :]
    while len(written) < room:
        logit_V = scripted.logits_of(loaded.model, ids)
        if open_codes is not None and guidance is not None:
            pictures = [ids[0], *(i for i in ids if is_picture_id(vocabulary, i))]
            none = [ids[0], image.begin, *open_codes]
            a, b = scripted.logits_of(loaded.model, pictures), scripted.logits_of(loaded.model, none)
            logit_V = b + guidance.image * (a - b) + guidance.text * (logit_V - a)
        if open_codes is not None:
            may = image.code_ids if len(open_codes) < image.span else [image.end]
        elif images is not None:
            may = [image.begin]
        else:
            fits = room - len(written) >= image.span + 2
            may = [*text_ids, vocabulary.end_document, *([image.begin] if fits else [])]
        token = int(max(may, key=lambda v: logit_V[v]))
        ids.append(token)
        written.append(token)
        if token == image.begin:
            open_codes = []
        elif token == image.end:
            open_codes, drawn = None, drawn + 1
        elif open_codes is not None:
            open_codes.append(token)
        if token == vocabulary.end_document or drawn == images:
            break
    return written


PROMPTS = [["a red circle"], [picture(1), "left of"], [], ["a", picture(2), "blue", picture(3), "is"], [picture(4)]]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("pieces, stride, whole", [((4, 16, 256), 32, True), ((4, 8), 3, True), ((4, 8), 3, False)])
def test_greedy_writing_equals_whole_forward_passes(loaded, monkeypatch, seed, pieces, stride, whole):
    monkeypatch.setattr(writing_module, "PIECES", pieces)
    monkeypatch.setattr(writing_module, "STRIDE", stride)
    loaded.model = scripted.make(loaded.vocabulary.size, seed, whole=whole)
    out_DV = loaded.model.weights["out_DV"]
    begin = loaded.vocabulary.modalities[1].begin
    loaded.model.weights["out_DV"] = out_DV.at[:, begin].mul(3.0)  # so that pictures are begun now and then
    outputs = generate(loaded, PROMPTS, text=GREEDY, image=GREEDY)
    language = language_of(loaded)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        prompt_N = encode_prompt(prompt, language)
        assert output.ids.tolist() == slow(loaded, prompt_N, CONTEXT - len(prompt_N))
        assert output.prompt_tokens == len(prompt_N)
    assert any(output.images for output in outputs)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("guidance", [None, Guidance(), Guidance(0.5, 2.0), Guidance(1.0, 1.0)])
def test_guided_pictures_equal_three_forward_passes(loaded, guidance, whole):
    loaded.model = loaded.model._replace(whole=whole)
    prompts = PROMPTS[:2] + [["a blue square", picture(5), "over"]]
    outputs = generate(loaded, prompts, mode="image", images=2, text=GREEDY, image=GREEDY, guidance=guidance)
    for prompt, output in zip(prompts, outputs, strict=True):
        prompt_N = encode_prompt(prompt, language_of(loaded))
        assert output.ids.tolist() == slow(loaded, prompt_N, 36, guidance, images=2)
        assert output.stopped == "end" and [i.size for i in output.images] == [(4, 4)] * 2


def test_guidance_goes_on_after_text_between_pictures(loaded):
    """Free writing: the text in between goes to none of the guides, and the second picture starts from <s> again."""
    vocabulary, guidance = loaded.vocabulary, Guidance()
    begin = vocabulary.modalities[1].begin
    loaded.model.weights["out_DV"] = loaded.model.weights["out_DV"].at[:, begin].mul(4.0)
    outputs = generate(loaded, PROMPTS, text=GREEDY, image=GREEDY, guidance=guidance)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        prompt_N = encode_prompt(prompt, language_of(loaded))
        assert output.ids.tolist() == slow(loaded, prompt_N, CONTEXT - len(prompt_N), guidance)
    assert max(len(output.images) for output in outputs) >= 2


def test_a_row_does_not_depend_on_its_batch(loaded):
    together = generate(loaded, PROMPTS, seed=40, text=Sampling(0.9, 0.95, 50))
    in_turns = generate(loaded, PROMPTS, seed=40, text=Sampling(0.9, 0.95, 50), batch=2)
    for i, (prompt, output) in enumerate(zip(PROMPTS, together, strict=True)):
        (alone,) = generate(loaded, [prompt], seed=output.seed, text=Sampling(0.9, 0.95, 50))
        assert output.seed == 40 + i
        assert output.ids.tolist() == alone.ids.tolist() == in_turns[i].ids.tolist()
    again = generate(loaded, PROMPTS, seed=41, text=Sampling(0.9, 0.95, 50))
    assert all(a.ids.tolist() != b.ids.tolist() for a, b in zip(together, again, strict=True))


def test_every_token_is_drawn_anew(loaded):
    loaded.model.weights["out_DV"] = loaded.model.weights["out_DV"] * 0.0  # all that may come is equally probable
    drawn = {
        (row, token) for row, output in enumerate(generate(loaded, ["a", "a"], max_tokens=60)) for token in output.ids
    }
    assert len({token for _, token in drawn}) > 20 and len(drawn) > 40


def test_one_piece_is_a_prompt_too(loaded, tmp_path):
    Image.fromarray(picture(1)).save(tmp_path / "a.png")
    code_N = encode_prompt([picture(1)], language_of(loaded))[2:-1] - loaded.vocabulary.modalities[1].ranges[0][0]
    pieces = [picture(1), Image.fromarray(picture(1)), tmp_path / "a.png", Codes("image", code_N.tolist())]
    lists = generate(loaded, [[piece] for piece in pieces], max_tokens=5)
    alone = generate(loaded, pieces, max_tokens=5)
    assert [o.ids.tolist() for o in alone] == [o.ids.tolist() for o in lists]
    assert {o.prompt_tokens for o in alone} == {19}


def test_guides_are_read_only_where_codes_may_come(loaded, monkeypatch):
    read, seen = writing_module.Writer.read, []
    monkeypatch.setattr(
        writing_module.Writer, "read", lambda self, rows, *rest: seen.append(1) or read(self, rows, *rest)
    )
    settings = {"mode": "text", "max_tokens": 20, "guidance": Guidance()}
    generate(loaded, ["a"], **settings)
    assert len(seen) == 1
    generate_ids(loaded, [encode_prompt([picture(1)], language_of(loaded))[:8]], **settings)
    assert len(seen) == 3, "an open picture is finished, with guidance"


def test_modes_and_lengths(loaded):
    (text,) = generate(loaded, ["a"], mode="text", max_tokens=20)
    assert not text.images and len(text.ids) <= 20 and (text.stopped == "end" or len(text.ids) == 20)
    (drawn,) = generate(loaded, ["a"], mode="image", max_tokens=30)
    assert drawn.stopped == "end" and len(drawn.ids) == 18 and drawn.text == ""
    assert generate(loaded, []) == []
    writable = set(writable_text(loaded.vocabulary, language_of(loaded).text).tolist())
    size = language_of(loaded).text.size
    assert size < 700 and writable == set(range(6, size)), "text ids that the tokenizer never uses are left out"
    for output in generate(loaded, [[]] * 8, mode="text"):
        assert set(output.ids.tolist()) <= writable | {loaded.vocabulary.end_document}
        assert output.stopped == "end" or output.prompt_tokens + len(output.ids) == CONTEXT


@pytest.mark.parametrize("whole", [True, False])
def test_programs_are_compiled_once_for_all_settings_of_a_kind(loaded, whole):
    loaded.model = loaded.model._replace(whole=whole)
    generate(loaded, ["a", "b"], mode="text", max_tokens=5)
    programs = writing_module._draw._cache_size()
    for options in ({"mode": "free"}, {"mode": "image"}, {"text": Sampling(0.3)}, {"seed": 5, "max_tokens": 9}):
        generate(loaded, ["c", "d"], **{"max_tokens": 20, **options})
    assert loaded._generator._writers["causal"].write_whole._cache_size() == int(whole)
    assert writing_module._draw._cache_size() == programs


def test_ids_in_ids_out_without_a_tokenizer(loaded):
    loaded.config = dataclasses.replace(loaded.config, data=dataclasses.replace(loaded.config.data, kind="synthetic"))
    image = loaded.vocabulary.modalities[1]
    open_row = np.array([0, 50, image.begin, *image.code_ids[:3]])
    outputs = generate_ids(loaded, [[0, 50], open_row], max_tokens=40)
    assert outputs[0].segments == [] and len(outputs[0].ids) > 0
    assert np.all(loaded.vocabulary.modality_V[outputs[1].ids[:13]] == 1) and outputs[1].ids[13] == image.end
    with pytest.raises(InputError, match="trained on random tokens"):
        generate(loaded, ["a"])
    with pytest.raises(InputError, match="no tokenizer"):
        generate_ids(loaded, [[0]], stop=(".",))


def test_an_open_picture_is_finished_and_shown_as_a_whole(loaded):
    language = language_of(loaded)
    whole = encode_prompt([picture(1)], language)
    (output,) = generate_ids(loaded, [whole[:8]], mode="image", guidance=Guidance())
    assert len(output.ids) == len(whole) - 8 and output.stopped == "end"
    settings = {"mode": "image", "images": 2, "image": GREEDY, "guidance": Guidance()}
    (greedy,) = generate_ids(loaded, [whole[:8]], **settings)
    assert greedy.ids.tolist() == slow(loaded, whole[:8], 29, Guidance(), images=2)
    pixels = np.asarray(output.images[0]).reshape(16, 3)[:6]
    np.testing.assert_array_equal(
        pixels, language.image.palette_K3[whole[2:8] - language.vocabulary.modalities[1].ranges[0][0]]
    )


def test_a_stop_sequence_ends_its_row_alone(loaded):
    language = language_of(loaded)
    a, b, c, d = (language.text.encode(x)[0] for x in "abcd")
    loaded.model = scripted.scripted(loaded.vocabulary.size, {a: b, b: c, c: d, d: a})
    told = {0: "", 1: ""}
    outputs = generate(
        loaded,
        ["a", "b"],
        mode="text",
        stop=("bcda",),
        max_tokens=70,
        on_text=lambda row, t: told.update({row: told[row] + t}),
    )
    assert [o.text for o in outputs] == ["", "cda"] and [o.stopped for o in outputs] == ["stop", "stop"]
    assert outputs[0].ids.tolist() == [b, c, d, a] and outputs[1].ids.tolist() == [c, d, a, b, c, d, a]
    assert told == {0: "", 1: "cda"}
    (whole,) = generate(loaded, ["a"], mode="text", max_tokens=70)
    assert whole.text == ("bcda" * 18)[:70] and whole.stopped == "length"


def test_text_and_pictures_are_told_as_they_come(loaded):
    begin = loaded.vocabulary.modalities[1].begin
    loaded.model.weights["out_DV"] = loaded.model.weights["out_DV"].at[:, begin].mul(3.0)
    told = [[] for _ in PROMPTS]
    outputs = generate(
        loaded, PROMPTS, on_text=lambda row, t: told[row].append(t), on_image=lambda row, i: told[row].append(i)
    )
    for pieces, output in zip(told, outputs, strict=True):
        assert "".join(p for p in pieces if isinstance(p, str)) == output.text
        assert [p for p in pieces if not isinstance(p, str)] == output.images
    assert any(len(pieces) > 2 for pieces in told) and any(output.images for output in outputs)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        (["a" * 200], {}, "prompt 0: 201 tokens do not fit the context of 96; shorten the prompt"),
        (["ok", "b" * 90], {"mode": "image"}, "prompt 1: 91 tokens and 18 of pictures do not fit"),
        (["a"], {"mode": "image", "images": 6}, "108 of pictures do not fit the context of 96"),
        (["a"], {"mode": "image", "max_tokens": 17}, "max_tokens: 17 .* need 18"),
        (["a"], {"max_tokens": 0}, "max_tokens: 0"),
        (["a"], {"text": Sampling(-1.0)}, "text.temperature: -1.0"),
        (["a"], {"image": Sampling(1.0, 1.5)}, "image.top_p: 1.5"),
        (["a"], {"seed": -1}, "seed: -1"),
        (["a", "b"], {"seed": 2**32 - 1}, "give a lower one"),
        (["a"], {"mode": "draw"}, "mode: 'draw'"),
        (["a"], {"images": 0}, "images: 0"),
        (["a"], {"stop": "x"}, "stop: give a tuple"),
        (["a"], {"temprature": 1.0}, "temprature: no such setting .* settings are mode"),
        (["a"], {"routing": "choice"}, "choice sees the future"),
        (["a"], {"routing": "threshold"}, "has no threshold"),
        ("a red circle", {}, "prompts: give a list"),
        ([[""]], {}, "maps '' to nothing"),
        ([["\ud800"]], {}, "to nothing"),
        ([[3]], {}, "prompt 0, part 0: int is no text"),
        ([None], {}, "prompt 0: NoneType is no prompt"),
        ([[Codes("image", None)]], {}, "prompt 0, part 0: codes of image: object"),
        ([[Path("/")]], {}, "is no regular file; give a picture's file"),
        ([[Path("a\0.png")]], {}, "cannot be read: .*embedded null"),
        ([[Image.new("RGB", (0, 0))]], {}, "prompt 0, part 0: "),
        (["a"], {"guidance": 3.0}, r"guidance: 3.0 is no Guidance; give guidance=Guidance\("),
        (["a"], {"guidance": Guidance("3")}, "guidance.text: '3' is not a number"),
        (["a"], {"text": 0.5}, r"text: 0.5 is no Sampling; give text=Sampling\("),
        (["a"], {"text": Sampling("0.5")}, "text.temperature: '0.5' is not a number"),
        (["a"], {"image": Sampling(top_k=2.5)}, "image.top_k: 2.5 is not a whole number"),
        (["a"], {"seed": 1.5}, "seed: 1.5 is not a whole number"),
        (["a"], {"images": "2"}, "images: '2' is not a whole number"),
        (["a"], {"images": None}, "images: None is not a whole number"),
        (["a"], {"max_tokens": 2.5}, "max_tokens: 2.5 is not a whole number"),
        (["a"], {"stop": None}, "stop: give a tuple"),
        (["a"], {"mode": "image", "images": 2**31}, "of pictures do not fit the context"),
        ([[Path("nowhere.png")]], {}, "nowhere.png: cannot be read: No such file"),
        ([[np.zeros((4, 4))]], {}, "prompt 0, part 0: pixels of shape"),
        ([[Codes("image", np.zeros(3, int))]], {}, "prompt 0: 3 codes of image, not 16"),
    ],
)
def test_bad_input_is_one_line(loaded, prompts, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        generate(loaded, prompts, **settings)
    assert "\n" not in str(caught.value)


def test_a_huge_file_is_not_read(loaded, tmp_path):
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**28 + 1)  # a hole: it takes no room on the disk
    with pytest.raises(InputError, match="huge.png: 268435457 bytes, more than 268435456; give a smaller picture"):
        generate(loaded, [tmp_path / "huge.png"])


def test_a_broken_picture_is_named(loaded, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"broken.png: cannot be decoded: not a picture"):
        generate(loaded, [["a", tmp_path / "broken.png"]])


def test_stores_of_another_vocabulary_or_none(loaded, store, tmp_path):
    loaded.hashes = {**loaded.hashes, "tokenizer": "0" * 64}
    with pytest.raises(InputError, match="the tokenizer of .* is not the one it was trained with; restore"):
        generate(loaded, ["a"])
    missing = (StoreConfig("scenes", str(tmp_path / "gone")),)
    data = dataclasses.replace(loaded.config.data, stores=missing)
    loaded.config = dataclasses.replace(loaded.config, data=data)
    vars(loaded).pop("_generator")
    with pytest.raises(InputError, match="gone: no store here"):
        generate(loaded, ["a"])


def test_pictures_without_a_codec(loaded):
    language = language_of(loaded)._replace(image=None)
    with pytest.raises(InputError, match="no image codec"):
        encode_prompt([picture()], language)


def test_logits_that_are_no_numbers(loaded):
    loaded.model.weights["out_DV"] = loaded.model.weights["out_DV"] * np.nan
    with pytest.raises(RunError, match="not finite"):
        generate(loaded, ["a"])


def test_a_model_without_pictures(loaded):
    vocabulary = contiguous([Modality("text", "t", size=338)])
    fake = types.SimpleNamespace(**{**vars(loaded), "vocabulary": vocabulary, "hashes": {}, "run": "r"})
    with pytest.raises(InputError, match="knows no pictures"):
        generate(fake, ["a"], mode="image")
