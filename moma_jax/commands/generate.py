"""Write text and draw pictures after a prompt."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tensorstore as ts
import tyro
from PIL import Image

from moma_jax import generation
from moma_jax.commands import Run
from moma_jax.data.directory import CONTEXT, Directory, first_line
from moma_jax.data.documents import Codes
from moma_jax.errors import InputError
from moma_jax.generation.generate import causal_routing, generator_of, settings_of
from moma_jax.generation.output import Output, enlarged, half_blocks
from moma_jax.generation.sampling import Guidance, Sampling
from moma_jax.runs.directory import commit, versions
from moma_jax.training.load import load

FORMAT_VERSION = 1
MARK = "<image>"
"""Where a picture stands in --prompt."""
RECORD = "generation.json"
HELD = ".writing"
"""A file that is in the directory while a process writes there."""
MOST_COLUMNS = 64
"""Characters that a picture is wide in the terminal, at most."""
MOST_SIDE = 8192
"""Pixels of a side of a picture file, at most."""
OPTIONS = {"images": "pictures", "image": "picture"}
"""Settings whose options have other names."""
STEERING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
"""Bidirectional classes of the characters that turn the order of what follows."""

Repeated = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]
"""Words of an option that may be given several times, with any number of words each time."""


@dataclass(frozen=True)
class Generate:
    """What is written, how, and where to."""

    out: str
    """Directory of the pictures and the record, new or empty: local, gs:// or s3://."""
    prompt: Repeated = ()
    """What to write on after; left out: the beginning of a document. White space next to <image> is dropped."""
    image: Repeated = ()
    """Picture files for the prompts."""
    mode: Literal["free", "text", "image"] = "free"
    """free: text and pictures as the model decides; text: text alone; image: --pictures pictures, next."""
    pictures: int = 1
    """Mode image: pictures to draw."""
    samples: int = 1
    """Times that each prompt is written on."""
    routing: Literal["causal", "threshold"] | None = None
    """Auxiliary routers, or running thresholds; the first of them that the run has where None."""
    max_tokens: int | None = None
    """Tokens to write at most; as many as the context holds (mode image: as the pictures need) where None."""
    stop: Repeated = ()
    """Texts that end the writing; they are left out."""
    seed: int = 0
    """Seed of the first row; the next have the next ones."""
    text: Sampling = Sampling()
    """How text is drawn."""
    picture: Sampling = Sampling()
    """How the codes of pictures are drawn."""
    guidance: Guidance = Guidance(1.0, 1.0)
    """Guidance of pictures; 1 and 1: none. Chameleon has text 3.0, image 1.2. It costs three times the work."""
    router: str | None = None
    """The run's own routing rule, FILE.py:ATTRIBUTE, where it was trained with one."""
    step: int | None = None
    """Which checkpoint; the newest where None."""
    scale: int | None = None
    """Enlargement of the picture files, to 8192 pixels a side at most; to at least 128 where None."""


def generate(run: Run, options: Annotated[Generate, tyro.conf.arg(name="", help="")]) -> dict[str, Any]:
    """Write text and draw pictures with a trained run, `moma generate RUN --prompt "a red circle" --out DIR`.

    Pictures and text stand in any order: each <image> in --prompt is the place of an --image, in the order given. Where
    there are more of them than places, the first ones come before the text. Several prompts are written side by side;
    then every --image needs a place. DIR receives pictures as 000-0.png (prompt, picture) and generation.json.

    Args:
      run: Run directory.

    Returns:
      What generation.json holds.

    Raises:
      InputError: the run, the prompts or the directory do not allow it; nothing was written.
      RunError: the model's logits are not finite; nothing was written.
    """
    if options.samples < 1:
        raise InputError("--samples: give 1 or more")
    if options.scale is not None and not 1 <= options.scale <= MOST_SIDE:
        raise InputError(f"--scale: {options.scale} is not from 1 to {MOST_SIDE}")
    texts = list(itertools.chain(*options.prompt)) if options.prompt else [""]
    if not texts:
        raise InputError("--prompt: no text after it; give one, or leave --prompt out to begin a document")
    rows = arranged(texts, list(itertools.chain(*options.image)))
    prompts = [prompt for prompt in rows for _ in range(options.samples)]
    settings = {
        "mode": options.mode,
        "routing": options.routing,
        "max_tokens": options.max_tokens,
        "images": options.pictures,
        "seed": options.seed,
        "text": options.text,
        "image": options.picture,
        "guidance": options.guidance,
        "stop": tuple(itertools.chain(*options.stop)),
    }
    with _complaints_of_options(settings), _held(options.out) as home:
        settings_of(settings)  # complains before a model is loaded
        loaded = load(run, step=options.step, router=options.router)
        settings["routing"] = options.routing or causal_routing(loaded)
        codec = generator_of(loaded).language.image
        if options.scale is not None and codec is not None and options.scale * codec.side > MOST_SIDE:
            raise InputError(
                f"--scale: {options.scale} is too much; {MOST_SIDE // codec.side} is the most for this run"
            )
        terminal = _Terminal(stream=len(prompts) == 1)
        told = {"on_text": lambda _, text: terminal.text(text), "on_image": lambda _, it: terminal.picture(it)}
        outputs = generation.generate(loaded, prompts, **told, **settings)
        terminal.finish(outputs)
        return write(home, prompts, outputs, _origin(run, loaded.step, settings), options.scale)


def _origin(run: str, step: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The record's part on how the outputs came about."""
    return {
        "format_version": FORMAT_VERSION,
        "run": run,
        "step": step,
        "routing": settings["routing"],
        "seed": settings["seed"],
        "settings": {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in settings.items()},
        "versions": versions(),
        "commit": commit(),
    }


@contextlib.contextmanager
def _complaints_of_options(settings: dict[str, Any]) -> Iterator[None]:
    """InputErrors about one of the settings name the command's option."""
    try:
        yield
    except InputError as error:
        name, colon, rest = str(error).partition(":")
        setting, dot, part = name.partition(".")
        if setting not in settings:
            raise
        raise InputError(f"--{OPTIONS.get(setting, setting)}{dot}{part}".replace("_", "-") + colon + rest) from error


def arranged(prompts: Sequence[str], images: Sequence[str]) -> list[list[str | Path]]:
    """Prompts with their pictures in place; see `Generate`.

    Raises:
      InputError: too few pictures, or pictures without a place where there are several prompts.
    """
    places = sum(prompt.count(MARK) for prompt in prompts)
    spare = len(images) - places
    if spare < 0:
        raise InputError(f"--prompt: {places} times {MARK}, but {len(images)} --image; give a file for each")
    if spare and len(prompts) > 1:
        raise InputError(
            f"--image: {len(images)} files, but {places} times {MARK} in the prompts; mark each one's place"
        )
    paths, result = [Path(image) for image in images], []
    for prompt in prompts:
        parts, paths, spare = paths[:spare], paths[spare:], 0
        for number, text in enumerate(prompt.split(MARK)):
            if number:
                parts.append(paths.pop(0))
            text = text.strip() if MARK in prompt else text
            parts += [text] if text else []
        result.append(parts)
    return result


class _Terminal:
    """What standard output shows: of a single row all as it comes, of several each when all are complete."""

    def __init__(self, stream: bool):
        self._stream, self._tty = stream, sys.stdout.isatty()
        self._columns = min(shutil.get_terminal_size().columns, MOST_COLUMNS)
        self._at_start = True
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no failure

    def text(self, text: str) -> None:
        """Shows the next text."""
        if self._stream:
            self._print(text)

    def picture(self, picture: Image.Image | Codes) -> None:
        """Shows a picture, where there is a terminal; elsewhere a new line says that something stood there."""
        if self._stream:
            self._end_line()
            if self._tty and isinstance(picture, Image.Image):
                self._print(half_blocks(picture, self._columns) + "\n", plain=False)

    def finish(self, outputs: list[Output]) -> None:
        """Shows what was not yet, and ends the line."""
        if not self._stream:
            self._stream = True
            for number, output in enumerate(outputs):
                self._print(f"{number:03}: ")
                for segment in output.segments:
                    self.text(segment) if isinstance(segment, str) else self.picture(segment)
                self._end_line()
        self._end_line()

    def _end_line(self) -> None:
        if not self._at_start:
            self._print("\n")

    def _print(self, text: str, plain: bool = True) -> None:
        """Writes at once. A model may write what would steer the terminal: such characters are replaced there."""
        if plain and self._tty:
            text = "".join("\ufffd" if _steers(c) else c for c in text)
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has what it wanted; the files are still to be written
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        self._at_start = text.endswith("\n") if text else self._at_start


def _steers(character: str) -> bool:
    """Whether a character does something to a terminal other than show itself."""
    control = unicodedata.category(character) == "Cc" and character not in "\n\t"
    return control or unicodedata.bidirectional(character) in STEERING


# Files ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _held(out: str) -> Iterator[Directory]:
    """The new or empty directory `out`. On a local disk it is made, and held against other processes until the end;
    where nothing came to lie in it, what was made is removed again.

    Raises:
      InputError: something lies there, or it cannot be written.
    """
    home = Directory(out)
    if home.local is None:
        if (name := _first_key(out)) is not None:
            raise InputError(f"--out: {out} holds {name}; choose a new directory")
        yield home
        return
    path, mine = Path(home.local), False
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / HELD).open("x").close()
            mine = True
            held = sorted(entry.name for entry in path.iterdir() if entry.name != HELD)
        except FileExistsError as error:
            what = f"is being written, or was left unfinished ({HELD})" if path.is_dir() else "is a file"
            raise InputError(f"--out: {out} {what}; choose a new directory") from error
        except OSError as error:
            raise InputError(f"--out: {out} cannot be written to ({error.strerror}); choose another one") from error
        if held:
            raise InputError(f"--out: {out} holds {held[0]}; choose a new directory")
        yield home
    finally:
        with contextlib.suppress(OSError):  # a directory with something in it cannot be removed, and shall not
            if mine:
                (path / HELD).unlink(missing_ok=True)
            for folder in missing:
                folder.rmdir()


def _first_key(out: str) -> str | None:
    """What lies below a place in an object store; None where nothing does."""
    scheme, _, rest = out.partition("://")
    parent, _, name = rest.strip("/").rpartition("/")
    if not parent:
        raise InputError(f"--out: {out} is a whole bucket; name a directory in it")
    try:
        store = ts.KvStore.open(Directory(f"{scheme}://{parent}").kvstore(name), context=CONTEXT).result()
        return min((key.decode(errors="replace") for key in store.list().result()), default=None)
    except ValueError as error:
        raise InputError(f"--out: {out}: {first_line(error)}") from error


def write(
    home: Directory, prompts: list[list[str | Path]], outputs: list[Output], record: dict[str, Any], scale: int | None
) -> dict[str, Any]:
    """Writes the pictures, and the record last: a directory without it is unfinished; returns the record.

    Raises:
      InputError: a file cannot be written, or one of its name has come meanwhile.
    """
    files: list[str] = []

    def put(name: str, content: bytes) -> None:
        if home.read(name) is not None:
            raise InputError(f"--out: {home.path.rstrip('/')}/{name} has come meanwhile; choose a new directory")
        home.write(name, content)

    def save(number: int) -> Callable[[Image.Image], str]:
        def save_one(picture: Image.Image) -> str:
            buffer = io.BytesIO()
            enlarged(picture, scale).save(buffer, "PNG")
            files.append(f"{number:03}-{sum(f.startswith(f'{number:03}-') for f in files)}.png")
            put(files[-1], buffer.getvalue())
            return files[-1]

        return save_one

    rows = [
        {
            "prompt": [{"image": str(part)} if isinstance(part, Path) else {"text": part} for part in prompt],
            "prompt_tokens": output.prompt_tokens,
            "seed": output.seed,
            "stopped": output.stopped,
            "text": output.text,
            "segments": [_described(segment, save(number)) for segment in output.segments],
            "ids": output.ids.tolist(),
        }
        for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]
    record = {**record, "outputs": rows, "files": files}
    put(RECORD, (json.dumps(record, sort_keys=True, indent=1) + "\n").encode())
    with contextlib.suppress(BrokenPipeError):
        for file in (*files, RECORD):
            print(f"{home.path.rstrip('/')}/{file}", file=sys.stderr)
    return record


def _described(segment: str | Image.Image | Codes, save: Callable[[Image.Image], str]) -> dict[str, Any]:
    """A segment as plain values; pictures are saved."""
    match segment:
        case str():
            return {"text": segment}
        case Codes():
            return {"modality": segment.modality, "codes": segment.codes.tolist()}
    return {"image": save(segment)}
