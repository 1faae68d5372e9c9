"""Questions over pictures and text with choices, answered by likelihood: the form of AI2D, ScienceQA and MMMU, and of
ranking captions and pictures.

    moma eval RUN --tasks captions pictures      # of the run's held-out pairs: which of 8 captions, of 8 pictures fits
    moma eval RUN --tasks questions.jsonl        # questions of one's own

A line of a file is a question, and its pictures lie beside the file; <image> stands where they are shown:

    {"text": "<image>\\nWhat is above it?", "images": ["7.png"], "choices": [" a circle", " a star"], "answer": 0}
    {"text": "A red circle", "choices": [{"text": "<image>", "images": ["7.png"]}, ...], "answer": 3}

The choice with the highest log-probability behind the question is the answer (acc), or by character, of pictures by id
(acc_norm), or less its log-probability without the question (acc_mutual_info), which does not prefer what is likely
anyway. Choices are scored under a causal routing, over the whole vocabulary, codes of pictures included.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

from moma_jax.data.store import open_store
from moma_jax.errors import InputError, naming
from moma_jax.evaluation.scoring import Scorer
from moma_jax.generation.prompts import MARK, Language, Piece, encodable, encode_prompt, language_of
from moma_jax.training.load import Loaded
from moma_jax.vocab import Vocabulary

BUILT_IN = ("captions", "pictures")
"""Tasks of a run's own held-out pairs."""
SUFFIX = ".jsonl"
OF = 8
"""Choices of a question of the built-in tasks."""
QUESTIONS = 256
"""Of the built-in tasks, where there are so many held-out pairs and no limit."""


class Choice(NamedTuple):
    """Ids (n,) of a choice, and what acc_norm divides by: characters of a text, ids of a picture."""

    token_N: np.ndarray
    size: int


class Question(NamedTuple):
    """What is asked.

    Attributes:
      context_N: ids before every choice, <s> first, for each choice its own where the tokenizer joins the two.
      choices: what may follow. answer: index of the right one.
    """

    contexts: tuple[np.ndarray, ...]
    choices: tuple[Choice, ...]
    answer: int


def is_of_choices(task: str) -> bool:
    """Whether a task's name is one of these; the others are the harness's."""
    return task in BUILT_IN or task.endswith(SUFFIX)


def answer_tasks(
    loaded: Loaded, tasks: Sequence[str], scorer: Scorer, *, limit: int | None = None, samples: bool = False
) -> dict[str, dict[str, Any]]:
    """Figures by task.

    Args:
      tasks: "captions", "pictures", or files of questions. scorer: of the model. limit: questions of each task.
      samples: also every question's log-probabilities.

    Returns:
      For each task "questions", "choices" (their mean), "chance"; and for acc, acc_norm and acc_mutual_info the share
      of right answers, under NAME, and its 95% interval (Wilson), under NAME_interval.

    Raises:
      InputError: a file is none of questions, a picture or a store cannot be read, or a question is too long.
    """
    language, found = language_of(loaded), {}
    for task in tasks:
        if task in BUILT_IN:
            questions = held_out_questions(loaded, task, QUESTIONS if limit is None else limit)
        else:
            questions = read_questions(task, language, scorer.longest, limit)
        found[task] = answered(questions, scorer, loaded.vocabulary.begin_document, samples)
    return found


# Scores ---------------------------------------------------------------------------------------------------------------


def answered(questions: Sequence[Question], scorer: Scorer, begin: int, samples: bool = False) -> dict[str, Any]:
    """`answer_tasks` of one task's questions."""
    pairs = [pair for question in questions for pair in zip(question.contexts, question.choices, strict=True)]
    alone = {choice.token_N.tobytes(): choice.token_N for _, choice in pairs}  # asked once, however often it is offered
    rows = [np.concatenate([context_N, choice.token_N]) for context_N, choice in pairs]
    rows += [np.concatenate([[begin], token_N]) for token_N in alone.values()]
    counts = [len(choice.token_N) for _, choice in pairs] + [len(token_N) for token_N in alone.values()]
    scored = zip(scorer(rows), counts, strict=True)
    scores = [-float(own.nats_N[len(own.nats_N) - n :].sum(dtype=np.float64)) for own, n in scored]
    behind, priors = scores[: len(pairs)], dict(zip(alone, scores[len(pairs) :], strict=True))
    right = {"acc": 0, "acc_norm": 0, "acc_mutual_info": 0}
    answers, start = [], 0
    for question in questions:
        stop = start + len(question.choices)
        score_C = np.array(behind[start:stop])
        size_C = np.array([max(choice.size, 1) for choice in question.choices])
        prior_C = np.array([priors[choice.token_N.tobytes()] for choice in question.choices])
        for name, value_C in (("acc", score_C), ("acc_norm", score_C / size_C), ("acc_mutual_info", score_C - prior_C)):
            right[name] += int(np.argmax(value_C)) == question.answer
        answers.append({"answer": question.answer, "scores": score_C.tolist(), "alone": prior_C.tolist()})
        start = stop
    count, offered = len(questions), [len(question.choices) for question in questions]
    figures = {
        "questions": count,
        "choices": float(np.mean(offered)),
        "chance": float(np.mean([1 / number for number in offered])),
    }
    for name, correct in right.items():
        figures |= {name: correct / count, f"{name}_interval": list(interval(correct, count))}
    return figures | ({"samples": answers} if samples else {})


def interval(right: int, of: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    found = binomtest(right, of).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


# Questions of held-out pairs ------------------------------------------------------------------------------------------


def held_out_questions(loaded: Loaded, task: str, count: int, *, of: int = OF, seed: int = 0) -> list[Question]:
    """Questions of the pairs that the run's stores hold out: each picture (captions) or caption (pictures), and its
    partner among those of `of` - 1 other pairs.

    A document of the store is text and one picture, in either order; here what is asked about comes first, and the
    choice ends the document. Pairs that share a caption or a picture are never offered together.

    Raises:
      InputError: too few pairs are held out.
    """
    pairs = list(_held_out_pairs(loaded))
    rng = np.random.default_rng(seed)
    order_N = rng.permutation(len(pairs))
    if len(pairs) < of or count < 1:
        raise InputError(
            f"--tasks: {task} needs {of} held-out pairs of a caption and a picture, and the stores of {loaded.run} "
            f"have {len(pairs)}; prepare them with a greater held_out"
        )
    begin, end = loaded.vocabulary.begin_document, loaded.vocabulary.end_document
    text = language_of(loaded).text
    size = (lambda token_N: len(text.decode(token_N))) if task == "captions" else len
    questions = []
    for n in order_N[:count]:
        shown, right = _sides(pairs[n], task)
        others, seen = [], {part.tobytes() for part in pairs[n]}
        for m in rng.permutation(len(pairs)):
            if len(others) == of - 1:
                break
            if not seen & {part.tobytes() for part in pairs[m]}:
                others.append(_sides(pairs[m], task)[1])
                seen |= {part.tobytes() for part in pairs[m]}
        if len(others) < of - 1:
            raise InputError(f"--tasks: {task}: fewer than {of} held-out pairs of {loaded.run} differ; hold out more")
        answer = int(rng.integers(of))
        offered = [*others[:answer], right, *others[answer:]]
        choices = tuple(Choice(np.append(token_N, end).astype(np.int32), size(token_N)) for token_N in offered)
        questions.append(Question((np.append(begin, shown).astype(np.int32),) * of, choices, answer))
    return questions


def _sides(pair: tuple[np.ndarray, np.ndarray], task: str) -> tuple[np.ndarray, np.ndarray]:
    """(what is shown, what is to be found) of a caption and its picture."""
    return pair[::-1] if task == "captions" else pair


def _held_out_pairs(loaded: Loaded) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids of the caption, ids of the picture with its marks) of all held-out pairs that fit into a row."""
    data = loaded.config.data
    with_pairs = [store.path for store in data.stores if store.collection in ("all", "pairs")]
    for path in dict.fromkeys(with_pairs) if data.kind == "store" else ():
        view = open_store(path).view("pairs", "validation")
        if view.documents:
            length_N = view.index(0, view.documents).length_N
            fits_N = np.flatnonzero(length_N <= data.sequence)
            for token_N in view.read(fits_N, np.zeros(len(fits_N)), length_N[fits_N]):
                pair = _parts(np.asarray(token_N, np.int32), loaded.vocabulary)
                if pair is not None:
                    yield pair


def _parts(token_N: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray] | None:
    """A pair's caption and its picture; None where it has not one of each."""
    marks = [(m.begin, m.end) for m in vocabulary.modalities if m.begin is not None]
    found = [np.flatnonzero(np.isin(token_N, [pair[side] for pair in marks])) for side in (0, 1)]
    if [len(at) for at in found] != [1, 1]:
        return None
    first, last = int(found[0][0]), int(found[1][0]) + 1
    text_N = np.concatenate([token_N[:first], token_N[last:]])
    text_N = text_N[~np.isin(text_N, [vocabulary.begin_document, vocabulary.end_document])]
    return (text_N, token_N[first:last]) if len(text_N) else None


# Questions of a file --------------------------------------------------------------------------------------------------


def read_questions(path: str, language: Language, longest: int, limit: int | None = None) -> list[Question]:
    """The questions of a file of JSON lines, see the top of this module; `longest`: ids that the model reads.

    Raises:
      InputError: the first line that is no question, or whose picture cannot be read or lies outside the file's folder.
    """
    try:
        lines = list(enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1))
        lines = [(number, line) for number, line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"--tasks: {path}: {getattr(error, 'strerror', None) or 'no UTF-8'}") from error
    if not lines:
        raise InputError(f"--tasks: {path}: has no questions")
    encoder, questions = PieceEncoder(language), []
    for number, line in lines[:limit]:
        where = f"--tasks: {path}, line {number}"
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: no JSON ({error})") from error
        questions.append(_question(content, Path(path).parent, encoder, where, longest))
    return questions


def _question(content: Any, folder: Path, encoder: PieceEncoder, where: str, longest: int) -> Question:
    """One line's question."""
    if not isinstance(content, dict) or not isinstance(content.get("choices"), list) or len(content["choices"]) < 2:
        raise InputError(f"{where}: a question has text and a list of choices, two or more")
    context = _pieces(content, folder, where)
    asked = [choice if isinstance(choice, dict) else {"text": choice} for choice in content["choices"]]
    answer = content.get("answer")
    if type(answer) is not int or not 0 <= answer < len(asked):
        raise InputError(f"{where}: answer is {answer!r}; give the index of the right choice, from 0")
    contexts, choices = [], []
    for choice in asked:
        pieces = _pieces(choice, folder, where)
        context_N, token_N = encoder.pair(context, pieces, where)
        if not len(token_N):
            shown = choice["text"][:40]
            raise InputError(f"{where}: the tokenizer maps the choice {shown!r} to nothing; give other text")
        if len(context_N) + len(token_N) > longest:
            count = f"{len(context_N) + len(token_N)} ids"
            raise InputError(f"{where}: the question with a choice has {count}, the model reads {longest}; cut it")
        size = len(choice["text"]) if all(isinstance(piece, str) for piece in pieces) else len(token_N)
        contexts.append(context_N)
        choices.append(Choice(token_N, size))
    return Question(tuple(contexts), tuple(choices), answer)


def _pieces(content: dict[str, Any], folder: Path, where: str) -> list[Piece]:
    """Texts and pictures' files in reading order."""
    text, images = content.get("text"), content.get("images", [])
    if not isinstance(text, str) or not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise InputError(f"{where}: text is a string, and images a list of files' names")
    if not encodable(text):
        raise InputError(f"{where}: text has lone surrogates, which UTF-8 cannot hold")
    root = folder.resolve()
    if any("\0" in name for name in images):
        raise InputError(f"{where}: a name in images has a zero byte")
    paths = [(folder / name).resolve() for name in images]
    for name, path in zip(images, paths, strict=True):
        if not path.is_relative_to(root):
            raise InputError(f"{where}: the picture {name} lies outside of {folder}; put it beside the questions")
    return pieces_of(text, paths, where)


def pieces_of(text: str, pictures: Sequence[Piece], where: str) -> list[Piece]:
    """Texts and pictures in reading order, these where the text has <image>, or before it where it has none.

    Raises:
      InputError: there are not as many pictures as places.
    """
    texts = text.split(MARK) if MARK in text else [*[""] * len(pictures), text]
    if len(texts) != len(pictures) + 1:
        raise InputError(f"{where}: {len(texts) - 1} times {MARK}, and {len(pictures)} images; give one for each")
    places = [piece for pair in zip(texts, [*pictures, ""], strict=True) for piece in pair]
    return [piece for piece in places if not isinstance(piece, str) or piece]


class PieceEncoder:
    """Ids of texts and pictures; a picture is encoded once, however often it is shown."""

    def __init__(self, language: Language):
        self._language = language
        self._held: dict[Any, tuple[Piece, np.ndarray]] = {}

    def ids(self, pieces: Iterable[Piece], where: str) -> np.ndarray:
        """Ids of pieces side by side, int32, nothing before or behind them."""
        found = [np.zeros(0, np.int32)]
        for piece in pieces:
            if isinstance(piece, str):
                found.append(self._language.text.encode(piece))
                continue
            key = piece if isinstance(piece, Path) else id(piece)
            if key not in self._held:  # with the piece itself: an id is another's once its object is gone
                with naming(where):
                    self._held[key] = piece, encode_prompt([piece], self._language, where)[1:]
            found.append(self._held[key][1])
        return np.concatenate(found)

    def pair(self, context: list[Piece], choice: list[Piece], where: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids of the context, <s> first, ids of what follows).

        Where text follows text the two are encoded as one, as the model has seen text; joined tokens, and white space
        between the two, are the choice's.
        """
        begin = [self._language.vocabulary.begin_document]
        if not (context and choice and isinstance(context[-1], str) and isinstance(choice[0], str)):
            return np.append(begin, self.ids(context, where)).astype(np.int32), self.ids(choice, where)
        before_N, kept = self.ids(context[:-1], where), context[-1].rstrip()
        kept_N = self._language.text.encode(kept)
        whole_N = self._language.text.encode(context[-1] + choice[0])
        differ_N = whole_N[: len(kept_N)] != kept_N[: len(whole_N)]
        common = int(np.argmax(differ_N)) if differ_N.any() else len(differ_N)
        behind_N = np.append(whole_N[common:], self.ids(choice[1:], where))
        return np.concatenate([begin, before_N, whole_N[:common]]).astype(np.int32), behind_N.astype(np.int32)


# For people -----------------------------------------------------------------------------------------------------------


def choices_table(figures: dict[str, dict[str, Any]]) -> Any:
    """A table for the terminal."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("task", "questions", "chance", "acc", "acc_norm", "acc_mutual_info"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, own in figures.items():
        shares = (
            "{:.3f} ({:.3f}-{:.3f})".format(own[name], *own[f"{name}_interval"])
            for name in ("acc", "acc_norm", "acc_mutual_info")
        )
        table.add_row(task, str(own["questions"]), f"{own['chance']:.3f}", *shares)
    return table
