"""Questions with choices: likelihoods against plain sums, held-out pairs, files, and the numbers of the harness."""

import dataclasses
import json
import os
import tempfile

import numpy as np
import pytest
from PIL import Image
from tiny import tiny

from moma_jax import load, prepare, train
from moma_jax.__main__ import main
from moma_jax.config import Modality, PrepareConfig, StoreConfig
from moma_jax.errors import InputError
from moma_jax.evaluation.choices import (
    Choice,
    PieceEncoder,
    Question,
    answered,
    held_out_questions,
    interval,
    pieces_of,
    read_questions,
)
from moma_jax.evaluation.scoring import Scorer
from moma_jax.evaluation.tasks import run_tasks
from moma_jax.generation.prompts import encode_prompt, language_of

SEQUENCE = 64


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small dense model on drawn scenes, trained long enough to see what fits."""
    folder = tmp_path_factory.mktemp("choices")
    modalities = (Modality("text", "t", size=300, quota=1.0), Modality("image", "i", size=16, span=16, quota=1.0))
    settings = PrepareConfig(documents=2000, text_size=300, image_side=4, colours=16, parts=1, held_out=0.2)
    prepare(settings, str(folder / "store"), modalities=modalities, progress=False)
    config = tiny(
        folder / "run",
        model_ffn="dense",
        data_kind="store",
        data_modalities=modalities,
        data_stores=(StoreConfig("scenes", str(folder / "store")),),
        data_sequence=SEQUENCE,
        train_steps=2,
    )
    train(config, quiet=True)
    return str(folder / "run")


@pytest.fixture(scope="module")
def loaded(run):
    return load(run)


@pytest.fixture(scope="module")
def scorer(loaded):
    return Scorer(loaded, "causal")


class Told:
    """A scorer whose ids have log-probabilities by a rule of the test."""

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, rows):
        return [Nats(np.array([-self.rule(row, i) for i in range(1, len(row))])) for row in rows]


@dataclasses.dataclass
class Nats:
    nats_N: np.ndarray


# Held-out pairs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["captions", "pictures"])
def test_questions_are_of_held_out_pairs_that_differ(loaded, task):
    questions = held_out_questions(loaded, task, 20)
    vocabulary, marks = loaded.vocabulary, loaded.vocabulary.modalities[1]
    assert len(questions) == 20 and {question.answer for question in questions} == set(range(8))
    for question in questions:
        assert len(question.choices) == 8 and len({c.token_N.tobytes() for c in question.choices}) == 8
        for context_N, choice in zip(question.contexts, question.choices, strict=True):
            picture_N, text_N = (context_N[1:], choice.token_N[:-1])[:: 1 if task == "captions" else -1]
            assert context_N[0] == vocabulary.begin_document and choice.token_N[-1] == vocabulary.end_document
            assert (picture_N[0], picture_N[-1], len(picture_N)) == (marks.begin, marks.end, 18)
            assert np.all(vocabulary.modality_V[picture_N[1:-1]] == 1) and np.all(vocabulary.modality_V[text_N] == 0)
            text = language_of(loaded).text.decode(text_N)
            assert choice.size == (len(text) if task == "captions" else len(choice.token_N) - 1)
    again = held_out_questions(loaded, task, 20)
    assert all(np.array_equal(a.contexts[0], b.contexts[0]) for a, b in zip(questions, again, strict=True))


def test_too_few_pairs_are_refused(loaded):
    with pytest.raises(InputError, match="captions needs 1000 held-out pairs .* have"):
        held_out_questions(loaded, "captions", 5, of=1000)


def test_a_model_that_knows_is_right_and_one_that_does_not_is_at_chance(loaded):
    questions = held_out_questions(loaded, "captions", 60)
    right = {np.concatenate([q.contexts[0], q.choices[q.answer].token_N]).tobytes() for q in questions}

    def knowing(row, i):
        return -1.0 if row.tobytes() in right else -2.0

    figures = answered(questions, Told(knowing), loaded.vocabulary.begin_document)
    assert figures["acc_norm"] == figures["acc_mutual_info"] == 1.0 and figures["acc_norm_interval"][0] > 0.9
    rng = np.random.default_rng(0)
    figures = answered(questions, Told(lambda row, i: -rng.random()), loaded.vocabulary.begin_document)
    for name in ("acc_norm", "acc_mutual_info"):
        low, high = figures[f"{name}_interval"]
        assert low < figures["chance"] < high


# Scores ---------------------------------------------------------------------------------------------------------------


def test_scores_are_sums_of_the_choices_log_probabilities(loaded, scorer):
    question = held_out_questions(loaded, "captions", 1)[0]
    figures = answered([question], scorer, loaded.vocabulary.begin_document, samples=True)
    for context_N, choice, score in zip(
        question.contexts, question.choices, figures["samples"][0]["scores"], strict=True
    ):
        (alone,) = scorer([np.concatenate([context_N, choice.token_N])])
        assert score == pytest.approx(-alone.nats_N[-len(choice.token_N) :].sum(), abs=1e-4)
    assert figures["questions"] == 1 and figures["chance"] == 1 / 8


def test_three_ways_to_choose():
    """A long likely choice, a short one, and one that is likely only behind the question."""
    choices = (Choice(np.array([5, 5, 5, 5]), 4), Choice(np.array([6]), 1), Choice(np.array([7, 7]), 2))
    logs = {5: (-1.0, -0.5), 6: (-3.0, -2.0), 7: (-2.0, -9.0)}  # behind the question, alone

    def rule(row, i):
        return logs[row[i]][0 if row[1] == 1 else 1] if row[i] in logs else 0.0

    for answer, name in ((1, "acc"), (0, "acc_norm"), (2, "acc_mutual_info")):
        figures = answered([Question((np.array([0, 1]),) * 3, choices, answer)], Told(rule), 0)
        assert {n: figures[n] for n in ("acc", "acc_norm", "acc_mutual_info")} == {
            n: float(n == name) for n in ("acc", "acc_norm", "acc_mutual_info")
        }


def test_intervals_are_wilsons():
    assert interval(0, 20)[0] == 0 and interval(20, 20)[1] == 1
    low, high = interval(10, 20)
    assert (low, high) == pytest.approx((0.2993, 0.7007), abs=1e-4)  # by hand, 0.5 +- 0.2007


# Files ----------------------------------------------------------------------------------------------------------------


def write(folder, *lines):
    folder.mkdir(exist_ok=True)
    for number in range(3):
        Image.new("RGB", (8, 8), ("red", "blue", "green")[number]).save(folder / f"{number}.png")
    path = folder / "questions.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


WHAT = {"text": "<image>\na red", "images": ["0.png"], "choices": [" circle", " square above it"], "answer": 1}
WHICH = {
    "text": "a red circle",
    "choices": [{"text": "<image>", "images": [f"{n}.png"]} for n in range(3)],
    "answer": 2,
}


def test_files_of_questions(loaded, tmp_path):
    language = language_of(loaded)
    path = write(tmp_path / "tasks", WHAT, "", WHICH)
    what, which = read_questions(path, language, 65)
    whole = encode_prompt([tmp_path / "tasks" / "0.png", "\na red circle"], language)
    np.testing.assert_array_equal(np.concatenate([what.contexts[0], what.choices[0].token_N]), whole)
    assert [choice.size for choice in what.choices] == [7, 16] and what.answer == 1
    for number, (context_N, choice) in enumerate(zip(which.contexts, which.choices, strict=True)):
        np.testing.assert_array_equal(context_N, encode_prompt("a red circle", language))
        wanted = encode_prompt([tmp_path / "tasks" / f"{number}.png"], language)[1:]
        np.testing.assert_array_equal(choice.token_N, wanted)
        assert choice.size == len(choice.token_N) == 18
    assert len(read_questions(path, language, 65, limit=1)) == 1


def test_text_is_joined_as_the_model_has_seen_it(loaded):
    encoder, text = PieceEncoder(language_of(loaded)), language_of(loaded).text
    for context, choice in (("a red", " circle"), ("a red ", "circle"), ("", "a"), ("two\n", "lines")):
        context_N, token_N = encoder.pair(pieces_of(context, [], "x"), [choice], "x")
        np.testing.assert_array_equal(np.concatenate([context_N, token_N])[1:], text.encode(context + choice))
        assert len(token_N) > 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: no JSON"),
        ("[]", "a question has text and a list of choices"),
        (WHAT | {"choices": ["one"]}, "a list of choices, two or more"),
        (WHAT | {"answer": 2}, "answer is 2; give the index"),
        (WHAT | {"answer": True}, "answer is True"),
        (WHAT | {"images": []}, "1 times <image>, and 0 images"),
        (WHAT | {"images": ["9.png"]}, "No such file"),
        (WHAT | {"images": ["../x.png"]}, "lies outside of"),
        (WHAT | {"images": "0.png"}, "images a list of files' names"),
        (WHAT | {"text": "\ud800<image>"}, "lone surrogates"),
        (WHAT | {"choices": [" circle", ""]}, "maps the choice '' to nothing"),
        (WHAT | {"text": "<image>" + "a b " * 60}, "the model reads 65; cut it"),
        (WHAT | {"images": ["a\0.png"]}, "has a zero byte"),
        ({"text": 1, "choices": ["a", "b"], "answer": 0}, "text is a string"),
    ],
)
def test_lines_that_are_no_questions_are_named(loaded, line, message, tmp_path):
    path = write(tmp_path / "tasks", line)
    with pytest.raises(InputError, match=message) as raised:
        read_questions(path, language_of(loaded), 65)
    assert "\n" not in str(raised.value) and "line 1" in str(raised.value)


def test_the_command(run, tmp_path, capsys):
    path = write(tmp_path / "tasks", WHAT, WHICH)
    main(["eval", run, "--tasks", "captions", path, "--limit", "9", "--out", str(tmp_path / "out.json"), "--samples"])
    shown, written = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())["choices"]
    assert "captions" in shown and "acc_mutual_info" in shown
    assert written["captions"]["questions"] == 9 and len(written["captions"]["samples"]) == 9
    assert written[path]["questions"] == 2 and written[path]["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    for words, message in (
        (["captions", "--limit", "0"], "--limit: 0"),
        (["captions", "--num-fewshot", "1"], "captions has no examples to show"),
        (["nothing.jsonl"], "nothing.jsonl: No such file"),
        (["captions", "--routing", "threshold", "causal"], "run under one --routing"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["eval", run, "--tasks", *words])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


# The harness ----------------------------------------------------------------------------------------------------------

TASK = """
task: pictured
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_image: !function shown.shown
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_mutual_info}}]
"""


@pytest.mark.slow
def test_the_harness_gives_the_same_numbers(run, tmp_path):
    home = tempfile.mkdtemp(dir=tmp_path)
    os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HOME"] = os.environ["HF_DATASETS_CACHE"] = home
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra evals)")
    rng = np.random.default_rng(0)
    words = ["red circle", "blue square", "green star above it", "a yellow cross"]
    lines = [
        {"text": "<image>\na", "images": [f"{rng.integers(3)}.png"], "answer": int(rng.integers(3)),
         "choices": [f" {word}" for word in rng.permutation(words)[:3]]}
        for _ in range(12)
    ]  # fmt: skip
    path, folder = write(tmp_path / "tasks", *lines), tmp_path / "tasks"
    (folder / "shown.py").write_text(
        f"from PIL import Image\n\n\ndef shown(doc):\n    return [Image.open('{folder}/' + n) for n in doc['images']]\n"
    )
    (folder / "pictured.yaml").write_text(TASK.format(path=path))
    found = run_tasks(run, [path, str(folder)], samples=True)
    ours, theirs = found["choices"][path], found["results"]["pictured"]
    for sample, own in zip(found["samples"]["pictured"], ours["samples"], strict=True):
        values = [float(answer[0][0]) for answer in sample["resps"]]
        np.testing.assert_allclose(values, [*own["scores"], *own["alone"]], atol=1e-4)
    for name in ("acc", "acc_norm", "acc_mutual_info"):
        assert theirs[f"{name},none"] == pytest.approx(ours[name])


def test_the_harness_is_shown_pictures(loaded):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra evals)")
    from lm_eval.api.instance import Instance

    from moma_jax.evaluation.harness import MomaLM

    model = MomaLM(loaded)
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    asked = [("<image>\na", " circle", {"visual": [picture]}) for picture in pictures] + [("\na", " circle")]
    answers = model.loglikelihood(
        [Instance("loglikelihood", {}, ask, 0, ("task", n, 1)) for n, ask in enumerate(asked)], disable_tqdm=True
    )
    assert len({value for value, _ in answers}) == 3
    written = model.generate_until(
        [Instance("generate_until", {}, ("<image>", {"max_gen_toks": 3}, {"visual": pictures[:1]}), 0, ("task", 0, 1))]
    )
    assert len(written) == 1
    many = ("<image>" * 4, " a", {"visual": pictures * 2})
    with pytest.raises(InputError, match="4 pictures has .* tokens, the model reads"):
        model.loglikelihood([Instance("loglikelihood", {}, many, 0, ("task", 0, 1))], disable_tqdm=True)
