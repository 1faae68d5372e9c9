"""`moma generate`: what the terminal shows, the files, the record, and one line for bad input."""

import dataclasses
import json
import os
import sys

import numpy as np
import pytest
import scripted
from PIL import Image
from scripted import picture

from moma_jax import commands
from moma_jax.commands import generate as command
from moma_jax.commands.generate import Generate
from moma_jax.data.documents import Codes
from moma_jax.errors import InputError
from moma_jax.generation.files import held
from moma_jax.generation.prompts import arranged, language_of
from moma_jax.generation.terminal import Terminal
from moma_jax.storage.directory import Directory


@pytest.fixture
def moma(loaded, monkeypatch, tmp_path):
    """Runs the words after `moma generate RUN`, in an empty directory; returns the record."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load", lambda run, step=None, router=None, mesh=None: loaded)

    def words(*rest):
        return commands.run(["generate", "runs/r", *map(str, rest)])

    return words


def parts(prompt, *images):
    return [str(p) for p in arranged([prompt], images)[0]]


def test_pictures_and_text_in_any_order():
    assert parts("a red circle") == ["a red circle"] and parts("") == []
    assert parts(" kept ") == [" kept "]
    assert parts("a <image> and\n<image>", "1.png", "2.png") == ["a", "1.png", "and", "2.png"]
    assert parts("<image><image> b", "1.png", "2.png") == ["1.png", "2.png", "b"]
    assert parts("and then <image>", "1.png", "2.png", "3.png") == ["1.png", "2.png", "and then", "3.png"]
    assert parts("", "1.png") == ["1.png"] and parts("b", "1.png") == ["1.png", "b"]
    several = arranged(["<image> a", "b <image>"], ["1.png", "2.png"])
    assert [[str(p) for p in prompt] for prompt in several] == [["1.png", "a"], ["b", "2.png"]]


def test_pictures_and_a_record_are_written(moma, capsys, tmp_path):
    Image.fromarray(picture(1)).save(tmp_path / "a.png")
    options = ["--mode", "image", "--pictures", 2, "--samples", 2, "--seed", 5, "--picture.top-k", 4]
    guidance = ["--guidance.text", 3, "--guidance.image", 1.2]
    record = moma("--prompt", "a red <image> or", "--image", "a.png", "--out", "new/out", *options, *guidance)
    out = tmp_path / "new" / "out"
    files = ["000-0.png", "000-1.png", "001-0.png", "001-1.png"]
    assert sorted(path.name for path in out.iterdir()) == [*files, "generation.json"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"], "nothing unfinished is left"
    assert json.loads((out / "generation.json").read_text()) == json.loads(json.dumps(record))
    assert record["files"] == files and record["step"] == 7 and record["routing"] == "causal"
    assert record["settings"]["guidance"] == {"text": 3.0, "image": 1.2} and record["settings"]["image"]["top_k"] == 4
    assert "jax" in record["versions"] and record["run"] == "runs/r"
    first, second = record["outputs"]
    assert first["prompt"] == [{"text": "a red"}, {"image": "a.png"}, {"text": "or"}]
    assert (first["seed"], second["seed"], first["stopped"]) == (5, 6, "end") and first["ids"] != second["ids"]
    assert second["segments"] == [{"image": "001-0.png"}, {"image": "001-1.png"}] and len(first["ids"]) == 36
    assert Image.open(out / "000-0.png").size == (128, 128)
    assert capsys.readouterr().err.count("new/out/") == 5


def test_the_picture_file_is_the_picture(moma, loaded, tmp_path):
    record = moma("--prompt", "a", "--mode", "image", "--out", "out", "--scale", 3)
    codec, image = language_of(loaded).image, loaded.vocabulary.modalities[1]
    code_N = np.array(record["outputs"][0]["ids"])[1:17] - image.ranges[0][0]
    pixels = np.asarray(Image.open(tmp_path / "out" / "000-0.png"))
    assert pixels.shape == (12, 12, 3)
    np.testing.assert_array_equal(pixels[::3, ::3], codec.palette_K3[code_N].reshape(4, 4, 3))
    again = moma("--prompt", "a", "--mode", "image", "--out", "out2", "--seed", record["outputs"][0]["seed"])
    assert again["outputs"] == record["outputs"], "the record is enough to repeat it"


def write_letters(loaded, word):
    """Makes the model write a word over and over."""
    ids = [language_of(loaded).text.encode(letter)[0] for letter in word]
    following = dict(zip(ids, [*ids[1:], ids[0]], strict=True))
    loaded.model = scripted.scripted(loaded.vocabulary.size, following)


def test_text_comes_to_the_terminal_as_it_is_written(moma, loaded, monkeypatch):
    write_letters(loaded, "abcd")
    told = []
    monkeypatch.setattr(sys.stdout, "write", told.append)
    moma("--prompt", "d", "--mode", "text", "--max-tokens", 70, "--out", "out")
    assert "".join(told) == ("abcd" * 18)[:70] + "\n" and len(told) == 4


def test_several_rows_are_shown_one_after_the_other(moma, loaded, capsys):
    write_letters(loaded, "abcd")
    moma("--prompt", "a", "c", "--mode", "text", "--max-tokens", 3, "--out", "out")
    assert capsys.readouterr().out == "000: bcd\n001: dab\n"


def test_a_terminal_shows_pictures_and_is_not_steered(moma, loaded, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    moma("--prompt", "a", "--mode", "image", "--out", "out")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.count("▀") == 4 and "\x1b[38;2;" in line for line in lines)
    escape = language_of(loaded).text.encode("\x1b")[0]
    loaded.model = scripted.scripted(loaded.vocabulary.size, {0: escape, escape: escape})
    del loaded._generator
    moma("--mode", "text", "--max-tokens", 2, "--out", "out2")
    assert capsys.readouterr().out == "\ufffd\ufffd\n"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--prompt", "a", "--image", "nowhere.png"], "nowhere.png: cannot be read: No such file"),
        (["--prompt", "<image> a"], "1 times <image>, but 0 --image"),
        (["--prompt", "a", "b", "--image", "c.png"], "mark each one's place"),
        (["--prompt", "a" * 200], "do not fit the context"),
        (["--prompt", "a", "--routing", "threshold"], "has no threshold"),
        (["--prompt", "a", "--mode", "draw"], "draw"),
        (["--prompt", "a", "--text.temperature", -1], "text.temperature: -1"),
        (["--prompt", "a", "--picture.top-p", 0], "--picture.top-p: 0"),
        (["--prompt", "a", "--max-tokens", 0], "--max-tokens: 0"),
        (["--prompt", "a", "--samples", 0], "--samples"),
        (["--prompt", "--mode", "text"], "--prompt: no text after it"),
        (["--prompt", "a", "--image", "."], ".: is no regular file"),
        (["--prompt", "a", "--scale", 0], "--scale: 0 is not from 1"),
        (["--prompt", "a", "--scale", 8193], "--scale: 8193 is not from 1"),
        (["--prompt", "a", "--scale", 2049], "--scale: 2049 is too much; 2048 is the most"),
        (["--prompt", "a", "--mode", "image", "--pictures", 0], "--pictures: 0"),
        (["--prompt", "a", "--mode", "image", "--pictures", 2**31], "of pictures do not fit the context"),
        (["--prompt", "a", "--guidance.text", "nan"], "--guidance.text: nan"),
        (["--prompt", "a", "--temprature", 1], "--temprature"),
    ],
)
def test_bad_input_writes_nothing(moma, tmp_path, capsys, words, message):
    with pytest.raises(InputError, match=message) as caught:
        moma(*words, "--out", "out")
    assert "\n" not in str(caught.value) and capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_directory_is_never_touched(moma, tmp_path):
    (tmp_path / "out").mkdir()
    moma("--prompt", "a", "--mode", "image", "--out", "out/")  # an empty one is as good as none
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match="out holds 000-0.png; choose a new directory"):
        moma("--prompt", "a", "--mode", "image", "--seed", 1, "--out", "out")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file"):
        moma("--prompt", "a", "--out", "file")
    with pytest.raises(InputError, match="cannot be written to"):
        moma("--prompt", "a", "--out", "file/deeper")


def test_an_object_store_takes_the_files_too(moma):
    record = moma("--prompt", "a", "--mode", "image", "--out", "memory://generated/out")
    directory = Directory("memory://generated/out")
    assert directory.read_json("generation.json")["files"] == record["files"] == ["000-0.png"]
    assert directory.read("000-0.png").startswith(b"\x89PNG")
    with pytest.raises(InputError, match="holds 000-0.png"):
        moma("--prompt", "a", "--out", "memory://generated/out")


def test_what_lies_in_an_object_store_is_never_touched(moma):
    run, beside = Directory("memory://kept/runs/x"), Directory("memory://kept/runs/xy")
    run.write("checkpoints/100/params", b"precious")
    beside.write("config.json", b"{}")
    with pytest.raises(InputError, match="holds checkpoints/100/params; choose a new directory"):
        moma("--prompt", "a", "--mode", "image", "--out", "memory://kept/runs/x/")
    assert run.read("checkpoints/100/params") == b"precious" and run.read("generation.json") is None
    for root in ("memory://kept", "gs://bucket", "s3://bucket/"):
        with pytest.raises(InputError, match="is a whole bucket"):
            moma("--prompt", "a", "--out", root)


def test_directories_that_cannot_be_renamed_are_written_into(moma, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "here").mkdir()
    moma("--prompt", "a", "--mode", "image", "--out", "link")
    monkeypatch.chdir(tmp_path / "here")
    moma("--prompt", "a", "--mode", "image", "--out", ".")
    for folder in ("real", "here"):
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == ["000-0.png", "generation.json"]
    assert (tmp_path / "link").is_symlink()


def test_a_directory_is_held_from_before_the_model_is_loaded(moma, loaded, tmp_path, monkeypatch):
    def intrude(run, step=None, router=None, mesh=None):
        assert (tmp_path / "out" / ".writing").exists()
        with pytest.raises(InputError, match="out is being written, or was left unfinished"), held("out"):
            pass
        (tmp_path / "out" / "000-0.png").write_bytes(b"mine")
        return loaded

    monkeypatch.setattr(command, "load", intrude)
    with pytest.raises(InputError, match="out/000-0.png has come meanwhile"):
        moma("--prompt", "a", "--mode", "image", "--out", "out")
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "out").iterdir()] == [("000-0.png", b"mine")]


def test_a_closed_pipe_is_no_reason_to_lose_what_was_made(moma, loaded, monkeypatch, tmp_path):
    write_letters(loaded, "abcd")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        record = moma("--prompt", "d", "--mode", "text", "--max-tokens", 70, "--out", "out")
    assert record["outputs"][0]["text"] == ("abcd" * 18)[:70]
    assert json.loads((tmp_path / "out" / "generation.json").read_text())["outputs"] == record["outputs"]


def test_options_given_again_add_up(moma, tmp_path):
    for seed in (1, 2):
        Image.fromarray(picture(seed)).save(tmp_path / f"{seed}.png")
    words = ["--prompt", "a <image>", "b", "--prompt", "c <image>", "--image", "1.png", "--image", "2.png"]
    record = moma(*words, "--mode", "text", "--max-tokens", 2, "--stop", "x", "--stop", "y", "z", "--out", "out")
    first, second, third = ([*part.values()][0] for row in record["outputs"] for part in row["prompt"][-1:])
    assert (first, second, third) == ("1.png", "b", "2.png")
    assert record["settings"]["stop"] == ("x", "y", "z")


def test_a_pipe_has_a_new_line_where_a_picture_stood(monkeypatch, capsys):
    terminal = Terminal(stream=True)
    for show in ("a red", Image.new("RGB", (4, 4)), "and", Codes("sound", np.arange(3)), "blue"):
        terminal.text(show) if isinstance(show, str) else terminal.picture(show)
    terminal.finish([])
    assert capsys.readouterr().out == "a red\nand\nblue\n"
    terminal._tty = True
    terminal.text("a\u202eb\u2066c\x1b\u200d\n")
    assert capsys.readouterr().out == "a\ufffdb\ufffdc\ufffd\u200d\n"


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit):
        commands.run(["generate", "--help"])
    page = capsys.readouterr().out
    for field in dataclasses.fields(Generate):
        assert field.name.replace("_", "-") in page
    assert "--guidance.text" in page and "<image>" in page
