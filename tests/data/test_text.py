"""Text codec: special ids stay out of reach, any Unicode comes back, training is deterministic."""

import functools
import json
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moma_jax.data.text import TextCodec, fit_tokenizer, load_tokenizer
from moma_jax.errors import InputError
from moma_jax.vocab import special_tokens

SPECIAL = special_tokens(["image"])
TEXTS = ["a red circle is left of a blue square", "the blue square is below a red circle", "circles and squares"] * 9
CODEC = TextCodec(fit_tokenizer(TEXTS, 320, SPECIAL))


def foreign(path):
    """A tokenizer.json from elsewhere: its own order and special tokens, a merge that spells one of ours, a cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|end|>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["<image>", "<image>s", "some clip art"] * 50, trainer)
    tokenizer.add_tokens([AddedToken("</image>"), "clip art"])
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path))
    assert "<image>" in tokenizer.get_vocab()
    return str(path)


def test_special_tokens_have_the_first_ids():
    assert [CODEC.tokenizer.token_to_id(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    assert CODEC.special_ids == len(SPECIAL)
    assert CODEC.size <= 320


def test_marks_in_a_text_are_plain_letters():
    text = "an <image> and </image><s><pad></s><unk>"
    ids = CODEC.encode(text)
    assert ids.dtype == np.int32
    assert ids.min() >= len(SPECIAL)
    assert CODEC.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back(text):
    assert CODEC.decode(CODEC.encode(text)) == text


def test_decode_leaves_out_special_and_foreign_ids():
    ids = [0, *CODEC.encode("red square"), 4, CODEC.size + 7, 2]
    assert CODEC.decode(ids) == "red square"


def test_training_is_deterministic_and_little_text_leaves_ids_unused():
    again = TextCodec(fit_tokenizer(iter(TEXTS), 320, SPECIAL))
    assert again.hash == CODEC.hash
    assert TextCodec(fit_tokenizer(["ab"], 5000, SPECIAL)).size == len(SPECIAL) + 256


def test_too_few_ids_are_refused():
    with pytest.raises(InputError, match=r"text_size.*use 262"):
        fit_tokenizer(TEXTS, 261, SPECIAL)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    CODEC.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path / "tokenizer.json"), SPECIAL).hash == CODEC.hash
    assert TextCodec.from_json(CODEC.to_json()).hash == CODEC.hash


def test_a_foreign_tokenizer_is_renumbered(tmp_path):
    path = foreign(tmp_path / "tokenizer.json")
    codec, plain = load_tokenizer(path, SPECIAL), Tokenizer.from_file(path)
    plain.no_truncation()
    text = "clip art, <image> of a <s> <|end|> </image>"
    ids = codec.encode(text)
    assert ids.min() >= len(SPECIAL)
    assert codec.decode(ids) == text
    assert codec.size == max(plain.get_vocab().values()) + 1 + len(SPECIAL)
    harmless = "some clip art, and more"
    assert codec.encode(harmless).tolist() == [i + len(SPECIAL) for i in plain.encode(harmless).ids]
    codec.save(str(tmp_path / "again.json"))
    assert load_tokenizer(str(tmp_path / "again.json"), SPECIAL).hash == codec.hash


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path):
    path = foreign(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="text_size"):
        load_tokenizer(path, SPECIAL, size=250)
    (tmp_path / "word.json").write_text(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str())
    with pytest.raises(InputError, match="WordLevel"):
        load_tokenizer(str(tmp_path / "word.json"), SPECIAL)
    for content in ("{", "{}", "[]", '{"model": {"vocab": 3}}'):
        (tmp_path / "broken.json").write_text(content)
        with pytest.raises(InputError, match="cannot be read"):
            load_tokenizer(str(tmp_path / "broken.json"), SPECIAL)
    with pytest.raises(InputError, match="missing.json"):
        load_tokenizer(str(tmp_path / "missing.json"), SPECIAL)
    with pytest.raises(InputError, match="no special tokens"):
        TextCodec(Tokenizer(models.BPE()))


# Tokenizers of other families -----------------------------------------------------------------------------------------

CORPUS = ["the quick brown fox", "naïve ß 漢字 🎉", "a  b\tc\n\n d", "Straße, ﬁne ² Ⅰ"] * 40
BYTE_PIECES = [f"<0x{i:02X}>" for i in range(256)]


def byte_level_bpe():
    return fit_tokenizer(CORPUS, 400, ["<|endoftext|>"])


def byte_fallback_bpe():
    """As Llama 2's: spaces are a letter, unknown letters are bytes."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *BYTE_PIECES]
    made.train_from_iterator(
        CORPUS[:1] * 40, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    return made


def unigram(bytes_too=True):
    """As SentencePiece's, with Metaspace."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made.train_from_iterator(
        CORPUS[:1] * 40,
        trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False),
    )
    content = json.loads(made.to_str())
    if bytes_too:
        content["model"]["vocab"][2:2] = [[piece, 0.0] for piece in BYTE_PIECES]
        content["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(content))


def folding():
    """Letters lose their marks and their case, as BERT's do."""
    made = byte_level_bpe()
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return made


@pytest.mark.parametrize("make", [byte_level_bpe, byte_fallback_bpe, unigram])
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda text: "▁" not in text))
def test_text_comes_back_from_every_family(make, text):
    codec = loaded(make)
    ids = codec.encode(text)
    assert codec.decode(ids) == text and (ids >= codec.special_ids).all() and (ids < codec.size).all()


@functools.cache
def loaded(make):
    """A tokenizer as `prepare` reads it, after a second round through its file."""
    with tempfile.TemporaryDirectory() as folder:
        make().save(f"{folder}/tokenizer.json")
        codec = load_tokenizer(f"{folder}/tokenizer.json", SPECIAL)
        again = TextCodec.from_json(codec.to_json())
        codec.save(f"{folder}/again.json")
        assert load_tokenizer(f"{folder}/again.json", SPECIAL).hash == codec.hash, "read again it stays as it is"
    return again


@pytest.mark.parametrize("make", [byte_level_bpe, byte_fallback_bpe, unigram])
def test_no_text_becomes_a_mark_or_a_byte(make):
    codec = loaded(make)
    for text in [*SPECIAL, "<0x41>", f"a{SPECIAL[0]}b", "<<s>>"]:
        ids = codec.encode(text)
        assert (ids >= codec.special_ids).all() and codec.decode(ids) == text


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: unigram(False), "cannot give its text back: 'The quick brown fox, 1234.5!' becomes"),
        (folding, "cannot give its text back: 'The quick brown fox, 1234.5!' becomes 'the quick"),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused(tmp_path, make, reason):
    make().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=reason) as caught:
        load_tokenizer(str(tmp_path / "tokenizer.json"), SPECIAL)
    assert "\n" not in str(caught.value)


def test_merges_without_the_prefix_of_continued_words():
    """tokenizers would panic, which ends in a trace of Rust and no exception that a program may catch."""
    content = json.loads(fit_tokenizer(["red red red"], 270, special_tokens(["image"])).to_str())
    content["model"]["continuing_subword_prefix"] = "long prefix"
    with pytest.raises(InputError, match="lacks continuing_subword_prefix 'long prefix'; restore the file"):
        TextCodec.from_json(json.dumps(content))


def test_an_id_that_two_tokens_have():
    """Read by tokenizers, and no longer when it was written: one of the two is lost, and with it what a merge needs."""
    content = json.loads(fit_tokenizer(["red red red"], 270, special_tokens(["image"])).to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["r"] = vocabulary["e"]
    with pytest.raises(InputError, match="cannot be read as a tokenizer.json: .*; restore the file"):
        for _ in range(20):  # which of the two is a matter of hashes
            TextCodec.from_json(json.dumps(content))
