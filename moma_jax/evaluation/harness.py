"""Tasks of EleutherAI's lm-evaluation-harness on a trained run, under a causal routing (extra `evals`).

    moma eval RUN --tasks boolq piqa --routing causal --out results.json
    moma eval RUN --tasks paper            # the paper's eight zero-shot text tasks
    moma eval RUN --tasks my_tasks/        # a folder of task files, on data of one's own

Task data come from where the task's file says, mostly the Hugging Face hub. From Python: `evaluate_tasks`, or hand a
`MomaLM` to `lm_eval.simple_evaluate(model=...)`, whose other options then all work.

A document begins with <s>, as in training. A context too long for the model's sequence loses its beginning: where it is
scored, <s> included, as with the harness's own models; where it is written on, all but <s>. A text whose every token is
to be scored is read in windows of one sequence instead. Probabilities are over the whole vocabulary, codes of pictures
included; what is written is text alone. Where the tokenizer joins the end of a context with the beginning of its
continuation, the joined tokens count as the continuation's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moma_jax.config import MeshConfig
from moma_jax.errors import InputError
from moma_jax.evaluation.choices import PieceEncoder, pieces_of
from moma_jax.evaluation.scoring import Scorer
from moma_jax.generation import Sampling, generate_ids
from moma_jax.generation.prompts import language_of
from moma_jax.training.load import Loaded, load

try:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows
    from tqdm import tqdm
except ImportError as error:
    raise ImportError("--tasks needs the lm-evaluation-harness; pip install 'moma_jax[evals]'") from error

PAPER_TASKS = (
    "boolq",
    "piqa",
    "social_iqa",
    "winogrande",
    "openbookqa",
    "hellaswag",
    "arc_easy",
    "arc_challenge",
)
"""The harness's names of the paper's eight zero-shot text tasks."""

MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks give to the number of tokens to generate; the first one given counts."""
DEFAULT_MAX_TOKENS = 256
"""Tokens to generate where a task does not say, as in the harness; at most half the model's sequence."""


class Wish(NamedTuple):
    """How a task wants text generated.

    Attributes:
      until: strings before which the text ends. max_tokens: tokens to generate at most.
      sampling: temperature 0 is greedy. seed: of the draws.
    """

    until: tuple[str, ...]
    max_tokens: int
    sampling: Sampling = Sampling(temperature=0.0)
    seed: int = 0


def wish_of(settings: dict[str, Any], sequence: int) -> Wish:
    """A task's generation_kwargs, read as the harness's own models read them; `sequence` is the model's, in tokens.

    Raises:
      InputError: a setting that is not known here, or so many tokens that no context has room.
    """
    left = {name: value for name, value in settings.items() if value is not None}
    until = left.pop("until", ())
    until = tuple(stop for stop in ((until,) if isinstance(until, str) else until) if stop)
    lengths = [int(left.pop(name)) for name in MAX_TOKENS if name in left]
    max_tokens = lengths[0] if lengths else max(1, min(DEFAULT_MAX_TOKENS, sequence // 2))
    temperature = float(left.pop("temperature", 1.0 if left.get("do_sample") else 0.0))
    sampled, seed = left.pop("do_sample", temperature > 0), int(left.pop("seed", 0))
    bounds = {name: kind(left.pop(name)) for name, kind in (("top_p", float), ("top_k", int)) if name in left}
    if left.get("num_beams") == 1:
        del left["num_beams"]  # no beam search: what is done here
    if left:
        raise InputError(
            f"generate_until: generation_kwargs.{min(left)} is not known to moma_jax; remove it from the task"
        )
    if not 0 < max_tokens < sequence:
        raise InputError(
            f"generate_until: {max_tokens} tokens leave no room for a context in the model's sequence of {sequence}; "
            "set generation_kwargs.max_gen_toks in the task"
        )
    sampling = Sampling(temperature, **bounds) if sampled else Sampling(temperature=0.0)
    sampling.check("generation_kwargs")
    return Wish(until, max_tokens, sampling, seed)


class MomaLM(LM):
    """A trained run as a model of the harness, which may show it pictures."""

    MULTIMODAL = True

    def __init__(
        self,
        run: str | Loaded,
        routing: str = "causal",
        batch_size: int = 8,
        step: int | None = None,
        router: Any = None,
        mesh: MeshConfig | None = None,
    ):
        """Loads the run and its tokenizer.

        Args:
          run: run directory, or what `moma_jax.load` gave. step: which checkpoint; None: the newest.
          routing: "causal" or "threshold". batch_size: documents at a time.
          router: the run's own routing rule, where it was trained with one. mesh: devices to lay the model on; both as
            of `moma_jax.load`.

        Raises:
          InputError: no such run, checkpoint or routing; or the stores, which hold the tokenizer, are not there.
        """
        super().__init__()
        self.loaded = run if isinstance(run, Loaded) else load(run, step=step, router=router, mesh=mesh)
        self.routing, self.batch_size = routing, int(batch_size)
        language = language_of(self.loaded)
        self._text, self._encoder = language.text, PieceEncoder(language)
        self._scorer = Scorer(self.loaded, routing, batch_rows=self.batch_size)
        self._begin = self.loaded.vocabulary.begin_document

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at once."""
        return self.loaded.config.data.sequence

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding gives it) of each request's continuation after its context.

        Raises:
          InputError: a continuation that is longer than the model's sequence.
        """
        pairs = [self._pair(*request.args) for request in requests]
        answers: list[Any] = [None] * len(requests)
        for number, scored in self._scored([row for row, _ in pairs], "loglikelihood", disable_tqdm):
            first = len(scored.nats_N) - pairs[number][1]
            answers[number] = (-float(scored.nats_N[first:].sum(dtype=np.float64)), bool(scored.greedy_N[first:].all()))
            self.cache_hook.add_partial("loglikelihood", requests[number].args, answers[number])
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each request's whole text, in windows of one sequence where it is longer."""
        owner, rows, counts = [], [], []
        for number, request in enumerate(requests):
            token_ids = self._text.encode(request.args[0]).tolist()
            for read, predicted in get_rolling_token_windows(token_ids, self._begin, self.max_length, 1):
                owner.append(number)
                rows.append([*read, predicted[-1]])
                counts.append(len(predicted))
        nats = [0.0] * len(requests)
        for number, scored in self._scored(rows, "loglikelihood_rolling", disable_tqdm):
            first = len(scored.nats_N) - counts[number]
            nats[owner[number]] += float(scored.nats_N[first:].sum(dtype=np.float64))
        for request, total in zip(requests, nats, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, -total)
        return [-total for total in nats]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The text after each request's context, up to the first of its stop strings, </s>, or its number of tokens.

        Raises:
          InputError: a request whose tokens to generate leave no room for a context.
        """
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers = [""] * len(requests)
        for numbers in alike.values():
            wish = wish_of(requests[numbers[0]].args[1], self.max_length)
            room, cut = self.max_length - wish.max_tokens - 1, []
            for number in numbers:
                context, _, *shown = requests[number].args
                context_N, pictures = self._context(context, *shown)
                self._require_room(context_N, pictures, room)
                cut.append(context_N[max(0, len(context_N) - room) :])
            rows = [np.concatenate([[self._begin], context_N]) for context_N in cut]
            for number, text in zip(numbers, self._written(rows, wish), strict=True):
                answers[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, answers[number])
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return {"run": self.loaded.run, "step": self.loaded.step, "routing": self.routing}

    def _written(self, rows: list[np.ndarray], wish: Wish) -> list[str]:
        """What the model writes after each row."""
        outputs = generate_ids(
            self.loaded,
            rows,
            mode="text",
            routing=self.routing,
            max_tokens=wish.max_tokens,
            stop=wish.until,
            text=wish.sampling,
            seed=wish.seed,
            batch=self.batch_size,
        )
        return [output.text for output in outputs]

    def _scored(self, rows, what: str, quiet: bool) -> Iterator[tuple[int, Any]]:
        return tqdm(self._scorer.each(rows), total=len(rows), desc=f"moma {what}", disable=quiet)

    def _pair(self, context: str, continuation: str, shown: dict[str, Any] | None = None) -> tuple[np.ndarray, int]:
        """(ids of a row, how many of them at its end are the continuation's); `shown`: the pictures of the context."""
        # The harness asks for a choice by itself with no context, and still hands over the question's pictures.
        pictures = (shown or {}).get("visual") or [] if context else []
        pieces = pieces_of(context, pictures, "loglikelihood") if pictures else [context]
        context_N, behind_N = self._encoder.pair(pieces, [continuation], "a picture")
        if len(behind_N) > self.max_length:
            raise InputError(
                f"loglikelihood: the continuation {continuation[:40]!r} has {len(behind_N)} tokens, the model reads "
                f"{self.max_length}; score it as a rolling loglikelihood"
            )
        row = np.concatenate([context_N, behind_N])
        self._require_room(row, pictures, self._scorer.longest)
        return row[-self._scorer.longest :], len(behind_N)

    def _context(self, context: str, shown: dict[str, Any] | None = None) -> tuple[np.ndarray, list[Any]]:
        """(ids of a context without <s>, its pictures)."""
        pictures = (shown or {}).get("visual") or []
        pieces = pieces_of(context, pictures, "generate_until") if pictures else [context]
        return self._encoder.ids(pieces, "a picture"), pictures

    def _require_room(self, row, pictures, room: int) -> None:
        """InputError where pictures would lose their beginning."""
        if pictures and len(row) > room:
            raise InputError(
                f"a question with {len(pictures)} pictures has {len(row)} tokens, the model reads {room}; show fewer"
            )


# Running tasks --------------------------------------------------------------------------------------------------------


def evaluate_tasks(model: MomaLM, tasks: Sequence[str], **options: Any) -> dict[str, Any]:
    """Runs tasks of the harness.

    Args:
      model: the run.
      tasks: names of tasks or groups of the harness, "paper" for the paper's eight, or folders of task files, of which
        all tasks are taken.
      options: of `lm_eval.simple_evaluate`, such as num_fewshot, limit, log_samples, bootstrap_iters.

    Returns:
      What `lm_eval.simple_evaluate` returns; metrics are in ["results"][task].

    Raises:
      InputError: no such task, or its data cannot be had.
    """
    folders = [task for task in tasks if os.path.isdir(task)]
    manager = TaskManager(include_path=folders)
    names: list[str] = []
    for task in tasks:
        if task == "paper":
            names += PAPER_TASKS
        elif task in folders:
            names += TaskManager(include_path=task, include_defaults=False).all_subtasks
        elif task in manager.all_tasks:
            names.append(task)
        else:
            raise InputError(
                f"--tasks: {task}: the lm-evaluation-harness has no such task, and it is no folder of them"
            )
    if not names:
        raise InputError(f"--tasks: {', '.join(folders) or 'nothing'}: no task files there; name at least one task")
    try:
        return lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, **options)
    except (ConnectionError, FileNotFoundError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--tasks: the data of {', '.join(names)} cannot be had: {reason}") from error
