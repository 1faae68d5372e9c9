"""The adapter to the lm-evaluation-harness: numbers against plain sums, windows, generation, and the harness itself."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest
from tiny import tiny

# Before datasets is imported: it reads these once.
HOME = tempfile.TemporaryDirectory()  # removed with the process
os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = os.environ["HF_DATASETS_CACHE"] = HOME.name
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra evals)")

from lm_eval.api.instance import Instance  # noqa: E402

from moma_jax import load, prepare, train  # noqa: E402
from moma_jax.__main__ import main  # noqa: E402
from moma_jax.config import Modality, PrepareConfig, StoreConfig  # noqa: E402
from moma_jax.errors import InputError, RunError  # noqa: E402
from moma_jax.evaluation import harness as evals  # noqa: E402
from moma_jax.evaluation import tasks as running  # noqa: E402
from moma_jax.evaluation.harness import PAPER_TASKS, MomaLM, Wish, evaluate_tasks, wish_of  # noqa: E402
from moma_jax.generation import Sampling  # noqa: E402
from moma_jax.generation.prompts import writable_text  # noqa: E402
from moma_jax.model.decoder import decoder_of  # noqa: E402

SEQUENCE = 32
LONG = "a red circle above a blue square, and a green star left of it; below them nothing at all"


def moma_eval(*words):
    """Runs `moma eval words...`."""
    main(["eval", *words])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A dense model on drawn scenes, trained for two updates."""
    folder = tmp_path_factory.mktemp("evals")
    modalities = (Modality("text", "t", size=300, quota=1.0), Modality("image", "i", size=8, span=16, quota=1.0))
    settings = PrepareConfig(documents=60, text_size=300, image_side=4, colours=8, parts=1)
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
def peaky(run):
    """The same with strong opinions, so that an error of one position shows."""
    loaded = load(run)
    kernel_DV = loaded.params["unembedding"]["kernel_DV"] * 3
    return dataclasses.replace(loaded, params={**loaded.params, "unembedding": {"kernel_DV": kernel_DV}})


@pytest.fixture(scope="module")
def model(peaky):
    return MomaLM(peaky, batch_size=3)


def requests(kind, *arguments):
    return [Instance(kind, {}, argument, 0, ("task", number, 1)) for number, argument in enumerate(arguments)]


def log_probabilities(loaded, ids):
    """float64 (n, V) after each of some ids: one row by itself, nothing padded."""
    token_BS = np.array(ids, np.int32)[None]
    modality_BS, ones = loaded.vocabulary.modality_V[token_BS], np.ones_like(token_BS)
    alone = dataclasses.replace(decoder_of(loaded.config), group_rows=1)
    position_BS = np.arange(len(ids))[None]
    output = alone.apply({"params": loaded.params}, token_BS, ones, position_BS, modality_BS, key=jax.random.key(1))
    logit_SV = np.asarray(output.hidden_BSD[0], np.float64) @ np.asarray(loaded.params["unembedding"]["kernel_DV"])
    return logit_SV - np.log(np.exp(logit_SV).sum(-1, keepdims=True))


def expected(loaded, ids, count):
    """(sum, greedy) over the last `count` of some ids."""
    known_SV, targets = log_probabilities(loaded, ids[:-1])[len(ids) - 1 - count :], ids[len(ids) - count :]
    return sum(known_SV[np.arange(count), targets]), bool((known_SV.argmax(-1) == targets).all())


@pytest.mark.slow
def test_loglikelihoods_are_sums_over_the_continuation(model, peaky):
    pairs = [
        ("a red", " circle"),
        ("a red ", "circle"),  # the space belongs to the continuation
        ("", "a blue square"),
        ("  ", "a blue square"),
        ("a", " green star left of a red circle"),
        ("two\n\n", "lines"),
        ("nothing", ""),
    ]
    answers = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    encode = model._text.encode
    for (context, continuation), (value, greedy) in zip(pairs, answers, strict=True):
        whole, kept = encode(context + continuation).tolist(), encode(context.rstrip()).tolist()
        assert whole[: len(kept)] == kept, "these contexts end where a token ends"
        total, likeliest = expected(peaky, [0, *whole], len(whole) - len(kept))
        np.testing.assert_allclose(value, total, rtol=1e-4, atol=1e-4)
        assert greedy == likeliest
    assert answers[0] == answers[1] and answers[-1] == (0.0, True)


@pytest.mark.slow
def test_the_likeliest_continuation_is_greedy(model, peaky):
    ids = model._text.encode("a red circle").tolist()
    best = int(log_probabilities(peaky, [0, *ids])[-1].argmax())
    other = model._text.encode(" star")[0]
    rows = [np.array([0, *ids, best]), np.array([0, *ids, other])]
    assert [bool(scored.greedy_N[-1]) for scored in model._scorer(rows)] == [True, best == other]


@pytest.mark.slow
def test_a_token_across_the_boundary_counts_as_the_continuations(model, peaky):
    """Where one token joins both, the probability of that token is taken, given what is before it."""
    words = ["circle", "square", "star", "above", "below", "green", "left"]
    encode = model._text.encode
    joined = [w for w in words if len(encode(f" {w}")) < len(encode(f" {w[:3]}")) + len(encode(w[3:]))]
    assert joined, "the tokenizer has whole words"
    context, continuation = f"a {joined[0][:3]}", joined[0][3:]
    whole, kept = encode(context + continuation).tolist(), encode(context).tolist()
    common = next(n for n, (x, y) in enumerate(zip([*whole, -1], [*kept, -2], strict=False)) if x != y)
    assert common < len(kept)
    [(value, _)] = model.loglikelihood(requests("loglikelihood", (context, continuation)), disable_tqdm=True)
    np.testing.assert_allclose(value, expected(peaky, [0, *whole], len(whole) - common)[0], rtol=1e-4)


@pytest.mark.slow
def test_a_context_too_long_loses_its_beginning(model, peaky):
    continuation = " a red star"
    whole = [0, *model._text.encode(LONG * 3 + continuation).tolist()]
    assert len(whole) > SEQUENCE + 1
    count = len(model._text.encode(continuation))
    [(value, _)] = model.loglikelihood(requests("loglikelihood", (LONG * 3, continuation)), disable_tqdm=True)
    np.testing.assert_allclose(value, expected(peaky, whole[-SEQUENCE - 1 :], count)[0], rtol=1e-4)
    with pytest.raises(InputError, match="the continuation .* tokens, the model reads 32"):
        model.loglikelihood(requests("loglikelihood", ("a", LONG * 3)), disable_tqdm=True)


@pytest.mark.slow
def test_rolling_windows_predict_every_token_once(model, peaky):
    texts = ["a red circle", LONG * 3, ""]
    answers = model.loglikelihood_rolling(requests("loglikelihood_rolling", *((t,) for t in texts)), disable_tqdm=True)
    ids = [0, *model._text.encode(texts[1]).tolist()]
    total, done = 0.0, 1
    while done < len(ids):
        stop = min(done + SEQUENCE, len(ids))
        total += expected(peaky, ids[max(0, stop - SEQUENCE - 1) : stop], stop - done)[0]
        done = stop
    short = [0, *model._text.encode(texts[0]).tolist()]
    np.testing.assert_allclose(answers, [expected(peaky, short, len(short) - 1)[0], total, 0.0], rtol=1e-4)


def test_what_tasks_want_generated():
    assert wish_of({}, 4096) == Wish((), 256) and wish_of({"until": "\n"}, 32) == Wish(("\n",), 16)
    greedy = {"until": ["\n", "", "."], "max_gen_toks": 5, "do_sample": False, "temperature": 0.7}
    assert wish_of(greedy, 32) == Wish(("\n", "."), 5, Sampling(0.0))
    drawn = {"max_new_tokens": 7, "do_sample": True, "top_p": 0.9, "seed": 3}
    assert wish_of({"num_beams": 1}, 32) == wish_of({}, 32), "one beam is no beam search"
    assert wish_of(drawn, 32) == Wish((), 7, Sampling(1.0, top_p=0.9), 3)
    for settings, message in [
        ({"num_beams": 4}, "num_beams is not known"),
        ({"max_gen_toks": 32}, "32 tokens leave no room"),
        ({"do_sample": True, "top_p": 0}, "generation_kwargs.top_p"),
    ]:
        with pytest.raises(InputError, match=message):
            wish_of(settings, 32)


@pytest.mark.slow
def test_contexts_are_cut_to_leave_room_and_alike_requests_go_together(model, monkeypatch):
    seen = []

    def written(rows, wish):
        seen.append((rows, wish.max_tokens))
        return [str(len(row)) for row in rows]

    monkeypatch.setattr(model, "_written", written)
    wishes = [{"until": ["\n"], "max_gen_toks": n} for n in (4, 8, 4)]
    asked = requests("generate_until", *zip(["a red", LONG * 3, LONG * 3], wishes, strict=True))
    short = 1 + len(model._text.encode("a red"))
    assert model.generate_until(asked, disable_tqdm=True) == [str(short), "24", "28"]
    assert [(len(rows), tokens) for rows, tokens in seen] == [(2, 4), (1, 8)]
    assert seen[0][0][0][0] == 0 and np.array_equal(seen[1][0][0], [0, *model._text.encode(LONG * 3)[-23:]])


@pytest.mark.slow
def test_written_text_is_the_models_likeliest(model, peaky):
    """Greedy, token by token from full logits over ids that have letters; a string or the number of tokens stops it."""
    context, tokens = "a red circle", 6
    ids = [0, *model._text.encode(context).tolist()]
    start, allowed = len(ids), writable_text(peaky.vocabulary, model._text)
    allowed = np.append(allowed, peaky.vocabulary.end_document)
    while len(ids) < start + tokens and ids[-1] != peaky.vocabulary.end_document:
        ids.append(int(allowed[log_probabilities(peaky, ids)[-1][allowed].argmax()]))
    text = model._text.decode(ids[start:])
    assert len(text) > 2
    wishes = [{"max_gen_toks": tokens}, {"max_gen_toks": tokens, "until": [text[2:]]}]
    asked = requests("generate_until", *((context, wish) for wish in wishes))
    assert model.generate_until(asked, disable_tqdm=True) == [text, text[: text.index(text[2:])]]


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
{more}
metadata: {{version: 1.0}}
"""
CHOICE = """\
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]"""
ROLLING = """\
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]"""
GENERATE = """\
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of three tasks, and their documents."""
    folder = tmp_path_factory.mktemp("tasks")
    pairs = [("a red", ["circle", "square"], 0), ("a blue", ["star above it", "circle"], 1), ("the", ["sky", "a"], 0)]
    documents = [dict(zip(("question", "choices", "answer"), pair, strict=True)) for pair in pairs]
    (folder / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    kinds = {"multiple_choice": CHOICE, "loglikelihood_rolling": ROLLING, "generate_until": GENERATE}
    for kind, more in kinds.items():
        text = TASK.format(name=f"tiny_{kind}", data=folder / "data.jsonl", kind=kind, more=more)
        (folder / f"{kind}.yaml").write_text(text)
    return folder, documents


@pytest.mark.slow
def test_the_harness_gets_the_numbers_that_plain_sums_give(model, peaky, tasks):
    folder, documents = tasks
    results = evaluate_tasks(model, [str(folder)], bootstrap_iters=0)["results"]
    encode, right, nats = model._text.encode, [], 0.0
    for document in documents:
        start = encode(document["question"]).tolist()
        sums = []
        for choice in document["choices"]:
            end = encode(f" {choice}").tolist()
            sums.append(expected(peaky, [0, *start, *end], len(end))[0])
        right.append(int(np.argmax(sums)) == document["answer"])
        nats -= expected(peaky, [0, *start], len(start))[0]
    assert results["tiny_multiple_choice"]["acc,none"] == pytest.approx(np.mean(right))
    size = sum(len(d["question"].encode()) for d in documents)
    assert results["tiny_loglikelihood_rolling"]["bits_per_byte,none"] == pytest.approx(
        nats / size / np.log(2), rel=1e-4
    )
    assert results["tiny_generate_until"]["exact_match,none"] == 0.0  # two updates teach nothing


@pytest.mark.slow
def test_the_command_writes_what_it_prints(run, tasks, tmp_path, capsys):
    out = tmp_path / "results.json"
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "choice.yaml").write_text((tasks[0] / "multiple_choice.yaml").read_text())
    moma_eval(run, "--tasks", str(folder), "--out", str(out), "--limit", "2")
    written = json.loads(out.read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "tasks"]
    assert "tiny_multiple_choice" in capsys.readouterr().out
    assert written["n-samples"]["tiny_multiple_choice"]["effective"] == 2
    assert written["config"]["run"] == run and written["config"]["routing"] == "causal"


def test_results_that_are_there_are_not_overwritten(tmp_path, monkeypatch, capsys):
    (tmp_path / "old.json").write_text("mine")
    monkeypatch.setattr(running, "load", lambda *rest, **named: pytest.fail("the model was loaded"))
    for out, message in (("old.json", "is there already"), ("", "is a folder")):
        with pytest.raises(SystemExit) as stopped:
            moma_eval("RUN", "--tasks", "piqa", "--out", str(tmp_path / out))
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert (tmp_path / "old.json").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_tasks_may_be_joined_by_commas(tmp_path, monkeypatch, capsys):
    (tmp_path / "a,b").mkdir()
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(running, "load", lambda *rest, **named: None)
    monkeypatch.setattr(evals, "MomaLM", lambda *rest: None)
    monkeypatch.setattr(evals, "evaluate_tasks", lambda model, names, **options: seen.append(names) or {})
    moma_eval("RUN", "--tasks", "piqa,boolq", "a,b", "paper")
    assert seen == [["piqa", "boolq", "a,b", "paper"]]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RunError("not finite"), 1, "moma: not finite"),
        (KeyboardInterrupt(), 130, "moma: interrupted"),
        (ValueError("two\nlines"), 1, "moma: ValueError: two lines"),
        (RuntimeError("no data"), 1, "moma: RuntimeError: no data"),
    ],
)
def test_what_goes_wrong_later_is_one_line_too(tmp_path, monkeypatch, capsys, error, code, message):
    def fail(*rest, **options):
        raise error

    monkeypatch.setattr(running, "load", lambda *rest, **named: None)
    monkeypatch.setattr(evals, "MomaLM", lambda *rest: None)
    monkeypatch.setattr(evals, "evaluate_tasks", fail)
    with pytest.raises(SystemExit) as stopped:
        moma_eval("RUN", "--tasks", "piqa", "--out", str(tmp_path / "out.json"))
    assert stopped.value.code == code and capsys.readouterr().err == message + "\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--tasks", "piqa"], "nowhere: no config.json"),
        (["RUN", "--tasks", "piquant"], "piquant: the lm-evaluation-harness has no such task"),
        (["RUN", "--tasks", "."], "no task files there"),
        (["RUN", "--tasks", "piqa"], "the data of piqa cannot be had"),
        (["RUN", "--tasks", "piqa", "--out", "no/where.json"], "no such folder"),
        (["RUN", "--tasks", "piqa", "--batch-size", "0"], "batch_size: 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        moma_eval(*[run if word == "RUN" else word for word in words])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err.splitlines()[-1] and err.splitlines()[-1].startswith("moma: ")


@pytest.mark.slow
def test_a_run_without_a_tokenizer_is_refused(tmp_path):
    train(tiny(tmp_path, model_ffn="dense", train_steps=1), quiet=True)
    with pytest.raises(InputError, match="random tokens, so it has no tokenizer"):
        MomaLM(str(tmp_path))


@pytest.mark.slow
def test_the_harness_knows_the_papers_tasks():
    from lm_eval.tasks import TaskManager

    assert len(PAPER_TASKS) == 8 and set(PAPER_TASKS) <= set(TaskManager().all_subtasks)


def test_without_the_harness_one_line_says_what_to_install():
    code = "import sys; sys.modules['lm_eval'] = None; from moma_jax.__main__ import main\n"
    code += "main(['eval', 'RUN', '--tasks', 'piqa'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install 'moma_jax[evals]'" in done.stderr
