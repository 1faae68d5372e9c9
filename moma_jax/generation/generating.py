"""Prompts in, text and pictures out: the host's side of generation (paper section 2.4 says what makes it causal)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np
from PIL import Image

from moma_jax import sharding
from moma_jax.data.documents import Codes
from moma_jax.errors import InputError, RunError
from moma_jax.generation.decoding import Model, Writer, Writing, filled_up, model_of
from moma_jax.generation.grammar import (
    REASONS,
    RUNNING,
    STOPPED,
    Rules,
    drawn_modality,
    first_state,
    make_rules,
    open_span,
)
from moma_jax.generation.output import Output, OutputReader
from moma_jax.generation.prompts import Language, Piece, encode_prompt, language_of, writable_text
from moma_jax.generation.sampling import Draw, Guidance, Sampling, draw_of
from moma_jax.model import decode
from moma_jax.training.load import Loaded
from moma_jax.vocab import Vocabulary

SEEDS = 1 << 32


@dataclass(frozen=True)
class Settings:
    """How to generate.

    Attributes:
      mode: "free": text and pictures as the model decides; "text": text alone; "image": `images` pictures, next.
      routing: "causal" (auxiliary routers) or "threshold"; None: the first of them that the run has.
      max_tokens: tokens to write at most; None: what the pictures need in mode image, else what the context holds.
      seed: of the first row; row i has seed + i.
      text, image: sampling outside and inside spans of codes.
      guidance: classifier-free guidance of pictures; None: none. With it a picture costs three times the work.
      stop: texts that end a row; they are left out of the output.
      batch: rows that are written together; more prompts are taken in turns.
    """

    mode: str = "free"
    routing: str | None = None
    max_tokens: int | None = None
    images: int = 1
    seed: int = 0
    text: Sampling = Sampling()
    image: Sampling = Sampling()
    guidance: Guidance | None = None
    stop: tuple[str, ...] = ()
    batch: int = 32

    def check(self) -> None:
        """Raises InputError where a value cannot be meant."""
        for name in ("max_tokens", "images", "batch", "seed"):
            value = getattr(self, name)
            if not isinstance(value, Integral) and not (name == "max_tokens" and value is None):
                raise InputError(f"{name}: {value!r} is not a whole number")
            if name != "seed" and value is not None and value < 1:
                raise InputError(f"{name}: {value}; give 1 or more")
        if not 0 <= self.seed < SEEDS:
            raise InputError(f"seed: {self.seed} is not from 0 to {SEEDS - 1}")
        if not isinstance(self.stop, (tuple, list)) or not all(isinstance(s, str) and s for s in self.stop):
            raise InputError("stop: give a tuple of texts, none of them empty")
        for name in ("text", "image"):
            value = getattr(self, name)
            if not isinstance(value, Sampling):
                raise InputError(f"{name}: {value!r} is no Sampling; give {name}=Sampling(temperature=...)")
            value.check(name)
        if self.guidance is not None:
            if not isinstance(self.guidance, Guidance):
                raise InputError(f"guidance: {self.guidance!r} is no Guidance; give guidance=Guidance(text=...)")
            self.guidance.check()


def generate(
    loaded: Loaded,
    prompts: Sequence[Piece | Sequence[Piece]],
    *,
    on_text: Callable[[int, str], None] | None = None,
    on_image: Callable[[int, Image.Image | Codes], None] | None = None,
    **settings: Any,
) -> list[Output]:
    """Writes on after each prompt.

    Args:
      loaded: a model, `moma_jax.load(run)`.
      prompts: each a text, a picture, or a list of texts and pictures in any order (PIL.Image, uint8 pixels, or the
        pathlib.Path of a file; a str is always text). An empty list is the beginning of a document.
      on_text: called with the row and each new piece of its text as it comes.
      on_image: called with the row and each picture as it comes; codes of other modalities come as Codes.
      settings: fields of `Settings`.

    Raises:
      InputError: a prompt, a setting or the model's stores do not allow it; nothing was generated then.
      RunError: the model's logits are not finite.
    """
    chosen, generator = settings_of(settings), generator_of(loaded)
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise InputError("prompts: give a list, one prompt a row, such as ['a red circle']")
    language = generator.language
    rows = [encode_prompt(prompt, language, f"prompt {i}") for i, prompt in enumerate(prompts)]
    return generator.run(rows, chosen, on_text, on_image)


def generate_ids(
    loaded: Loaded,
    rows: Sequence[np.ndarray],
    *,
    on_text: Callable[[int, str], None] | None = None,
    on_image: Callable[[int, Image.Image | Codes], None] | None = None,
    **settings: Any,
) -> list[Output]:
    """`generate` for prompts that are ids already, `<s>` first; a row may end inside a span of codes.

    A run that was trained on random tokens has no tokenizer: its outputs are ids alone.
    """
    chosen = settings_of(settings)
    return generator_of(loaded).run([np.asarray(id_N, np.int32) for id_N in rows], chosen, on_text, on_image)


def settings_of(fields: dict[str, Any]) -> Settings:
    """Checked settings of keyword arguments; raises InputError for a name that is none."""
    names = [field.name for field in dataclasses.fields(Settings)]
    unknown = [name for name in fields if name not in names]
    if unknown:
        raise InputError(f"{unknown[0]}: no such setting of generate; settings are {', '.join(names)}")
    settings = Settings(**fields)
    settings.check()
    return settings


def generator_of(loaded: Loaded) -> Generator:
    """The generator of a loaded model, made once: it holds the weights as decoding reads them, and what is compiled."""
    return vars(loaded).setdefault("_generator", Generator(loaded))


def causal_routing(loaded: Loaded) -> str:
    """The first causal routing that the run has; InputError where it has none."""
    for name in loaded.routings:
        if name != loaded.config.model.router.training_name:
            return name
    loaded.under("causal")  # says what is lacking
    raise AssertionError("a model that lacks a routing says so")


@dataclass
class Prompted:
    """One row that is being written.

    Attributes:
      prompt_N: its beginning, int32. start: where its open span begins, else its length.
      room: tokens that may be written. seed: of the row.
      reader: makes text and pictures of the ids; None for a model without a tokenizer.
      written: the ids so far. stopped: why it stopped; None while it runs.
    """

    prompt_N: np.ndarray
    start: int
    room: int
    seed: int
    reader: OutputReader | None
    written: list[int] = field(default_factory=list)
    stopped: str | None = None

    def take(self, ids: list[int]) -> bool:
        """Takes the next ids; returns whether a stop sequence ended the row."""
        if self.reader is None:
            self.written.extend(ids)
            return False
        before = self.reader.taken
        self.reader.read(ids)
        self.written.extend(ids[: self.reader.taken - before])
        return self.reader.stopped

    def finish(self, reason: str) -> None:
        """The row is complete."""
        self.stopped = reason
        if self.reader is not None:
            self.reader.finish()

    def output(self) -> Output:
        """What was written."""
        segments = [] if self.reader is None else self.reader.segments
        return Output(segments, np.array(self.written, np.int32), self.stopped, self.seed, len(self.prompt_N))


class Generator:
    """Generation with one loaded model."""

    def __init__(self, loaded: Loaded):
        self._loaded, self._writers = loaded, {}

    @cached_property
    def language(self) -> Language:
        """Tokenizer and codec of the run's stores."""
        return language_of(self._loaded)

    def run(self, rows: list[np.ndarray], settings: Settings, on_text=None, on_image=None) -> list[Output]:
        """Outputs of rows of ids, in their order; see `generate`."""
        vocabulary, speaks = self._loaded.vocabulary, self._loaded.config.data.kind != "synthetic"
        if settings.seed + len(rows) > SEEDS:
            raise InputError(f"seed: {settings.seed} and {len(rows) - 1} more pass {SEEDS - 1}; give a lower one")
        if not speaks and (settings.stop or on_text or on_image):
            raise InputError(f"{self._loaded.run}: has no tokenizer, so stop, on_text and on_image cannot be used")
        if settings.mode == "image" and speaks and (codec := self.language.image) is not None and not codec.draws:
            raise InputError(
                f"mode: image, but the image codec of {self._loaded.run} has no decoder to draw with; mode free gives "
                "codes, an import with a decoder pictures (moma codec import)"
            )
        text_ids = writable_text(vocabulary, self.language.text if speaks else None)
        rules = make_rules(vocabulary, text_ids, settings.mode, settings.images)
        jobs = [self._job(i, id_N, settings) for i, id_N in enumerate(rows)]
        if speaks:
            jobs = [self._read(i, job, settings.stop, on_text, on_image) for i, job in enumerate(jobs)]
        # Rows of text alone draw no codes, unless their prompt left a span open: then no guides are needed.
        codes = settings.mode != "text" or any(job.start < len(job.prompt_N) for job in jobs)
        draw = draw_of(settings.text, settings.image, settings.guidance if codes else None, vocabulary.size)
        with sharding.use_mesh(self._loaded.program.mesh):
            writer = self._writer(settings.routing or causal_routing(self._loaded))
            for start in range(0, len(jobs), settings.batch):
                self._run_batch(writer, jobs[start : start + settings.batch], rules, draw)
        return [job.output() for job in jobs]

    def _writer(self, routing: str) -> Writer:
        """The compiled functions under a routing that the model has."""
        if routing == self._loaded.config.model.router.training_name:
            raise InputError(f"routing: {routing} sees the future, which is not written yet; use causal or threshold")
        self._loaded.under(routing)  # refuses what the run does not have
        if routing not in self._writers:
            self._writers[routing] = Writer(self.model(routing))
        return self._writers[routing]

    @cached_property
    def _weights(self) -> Any:
        """What decoding reads, one copy for all routings."""
        return decode.unstack(self._loaded.params, self._loaded.config, self._loaded.routing_state)

    def model(self, routing: str) -> Model:
        """The loaded model as one that writes, under a causal routing; call it under the mesh that it shall lie on."""
        return model_of(self._weights, self._loaded.config, self._loaded.vocabulary.modality_V, routing)

    def _job(self, number: int, prompt_N: np.ndarray, settings: Settings) -> Prompted:
        """One row without a reader, checked: there is room for what is asked for."""
        vocabulary, context, name = self._loaded.vocabulary, self._loaded.config.data.sequence, f"prompt {number}"
        start = open_span(vocabulary, prompt_N, name)
        need, left = _needed(vocabulary, prompt_N[start:], settings), context - len(prompt_N)
        if left < max(need, 1):
            pictures = f" and {need} of pictures" if need else ""
            raise InputError(
                f"{name}: {len(prompt_N)} tokens{pictures} do not fit the context of {context}; shorten the prompt"
                + (", or draw fewer pictures" if need else " to leave room")
            )
        wanted = settings.max_tokens if settings.max_tokens is not None else need if settings.mode == "image" else left
        if wanted < need:
            raise InputError(f"max_tokens: {wanted} are too few for the pictures, which need {need}; give more")
        return Prompted(prompt_N, start, min(wanted, left), settings.seed + number, None)

    def _read(self, number: int, job: Prompted, stop: tuple[str, ...], on_text, on_image) -> Prompted:
        """The job with a reader, which has seen the prompt's open span."""
        tell_text = None if on_text is None else lambda text: on_text(number, text)
        tell_image = None if on_image is None else lambda image: on_image(number, image)
        reader = OutputReader(self.language, stop, tell_text, tell_image)
        reader.read(job.prompt_N[job.start :].tolist())
        return dataclasses.replace(job, reader=reader)

    def _run_batch(self, writer: Writer, jobs: list[Prompted], rules: Rules, draw: Draw) -> None:
        """Writes some rows to their end. Rows that have stopped already fill them up (`filled_up`)."""
        vocabulary = self._loaded.vocabulary
        begin_N = np.array([vocabulary.begin_document], np.int32)
        idle = [Prompted(begin_N, 1, 0, 0, None)] * (filled_up(len(jobs)) - len(jobs))
        rows, room = [job.prompt_N for job in jobs + idle], [job.room for job in jobs + idle]
        open_ids = [job.prompt_N[job.start :] for job in jobs + idle]
        positions = max(len(job.prompt_N) + job.room for job in jobs)
        guides = None
        if draw.scale_2 is not None:
            pictures = [np.append(begin_N, id_N[rules.picture_V[id_N]]) for id_N in rows]
            guide_rows = pictures + [np.append(begin_N, id_N) for id_N in open_ids]
            guides = writer.read(guide_rows, positions, vocabulary.size)
        state = first_state(vocabulary, open_ids, room)
        writing = Writing(writer.read(rows, positions, vocabulary.size), guides, state, np.bool_(True))
        seed_B = np.array([job.seed for job in jobs + idle], np.uint32)
        while np.any(np.asarray(writing.state.stopped_B) == RUNNING):
            written_B = np.array(writing.state.written_B)
            writing, token_BN = writer.write(writing, rules, draw, seed_B)
            if not writing.sound:
                raise RunError(f"{self._loaded.run}: the model's logits are not finite; use an earlier checkpoint")
            written_B, stopped_B = np.asarray(writing.state.written_B) - written_B, np.array(writing.state.stopped_B)
            for b, job in enumerate(jobs):
                if not job.stopped:
                    if job.take(token_BN[b, : written_B[b]].tolist()):
                        stopped_B[b] = STOPPED
                    if stopped_B[b] != RUNNING:
                        job.finish(REASONS[stopped_B[b]])
            writing = writing._replace(state=writing.state._replace(stopped_B=stopped_B))


def _needed(vocabulary: Vocabulary, open_N: np.ndarray, settings: Settings) -> int:
    """Tokens that a row has to write at least: the rest of its open span, and the pictures that it shall draw."""
    begins = {m.begin: m for m in vocabulary.modalities if m.span}
    rest = begins[int(open_N[0])].span + 2 - len(open_N) if len(open_N) else 0
    if settings.mode != "image":
        return rest
    image = vocabulary.modalities[drawn_modality(vocabulary)]
    begun = len(open_N) > 0 and int(open_N[0]) == image.begin
    return rest + (settings.images - begun) * (image.span + 2)
