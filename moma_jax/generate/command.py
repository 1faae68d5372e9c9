"""`moma generate`: text to the terminal as it comes, pictures as files, and a record of how they came about."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from PIL import Image

from moma_jax.data.directory import Directory
from moma_jax.data.documents import Codes
from moma_jax.errors import InputError
from moma_jax.generate.output import Output, enlarged, half_blocks
from moma_jax.generate.run import causal_routing, generate
from moma_jax.generate.sampling import Guidance, Sampling
from moma_jax.training.load import load
from moma_jax.training.run_dir import commit, versions

FORMAT_VERSION = 1
MARK = "<image>"
"""Where a picture stands in --prompt."""
RECORD = "generation.json"
MOST_COLUMNS = 64
"""Characters that a picture is wide in the terminal, at most."""


@dataclass(frozen=True)
class Generate:
    """Write text and draw pictures with a trained run, `moma generate RUN --prompt "a red circle" --out DIR`.

    Pictures and text stand in any order: each <image> in --prompt is the place of an --image, in the order given. Where
    there are more of them than places, the first ones come before the text. Several prompts are written side by side;
    then every --image needs a place. DIR receives pictures as 000-0.png (prompt, picture) and generation.json.
    """

    run: tyro.conf.Positional[str]
    """Run directory."""
    out: str
    """Directory of the pictures and the record, new or empty: local, gs:// or s3://."""
    prompt: tuple[str, ...] = ("",)
    """What to write on after; nothing: the beginning of a document. White space next to <image> is dropped."""
    image: tuple[str, ...] = ()
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
    stop: tuple[str, ...] = ()
    """Texts that end the writing; they are left out."""
    seed: int = 0
    """Seed of the first row; the next have the next ones."""
    text: Sampling = Sampling()
    """How text is drawn."""
    picture: Sampling = Sampling()
    """How the codes of pictures are drawn."""
    guidance: Guidance = Guidance(1.0, 1.0)
    """Guidance of pictures; 1 and 1: none. Chameleon has text 3.0, image 1.2. It costs three times the work."""
    step: int | None = None
    """Which checkpoint; the newest where None."""
    scale: int | None = None
    """Enlargement of the picture files; to at least 128 pixels a side where None."""


def run(options: Generate) -> dict[str, Any]:
    """`moma generate`; returns what generation.json holds.

    Raises:
      InputError: the run, the prompts or the directory do not allow it; nothing was written.
    """
    if options.samples < 1 or (options.scale is not None and options.scale < 1):
        raise InputError("--samples and --scale: give 1 or more")
    prompts = [prompt for prompt in arranged(options.prompt, options.image) for _ in range(options.samples)]
    _require_free(options.out)
    loaded = load(options.run, step=options.step)
    terminal = _Terminal(stream=len(prompts) == 1)
    settings = {
        "mode": options.mode,
        "routing": options.routing or causal_routing(loaded),
        "max_tokens": options.max_tokens,
        "images": options.pictures,
        "seed": options.seed,
        "text": options.text,
        "image": options.picture,
        "guidance": options.guidance,
        "stop": options.stop,
    }
    outputs = generate(
        loaded,
        prompts,
        on_text=lambda _, text: terminal.text(text),
        on_image=lambda _, picture: terminal.picture(picture),
        **settings,
    )
    terminal.finish(outputs)
    named = {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in settings.items()}
    record = {
        "format_version": FORMAT_VERSION,
        "run": options.run,
        "step": loaded.step,
        "routing": settings["routing"],
        "seed": options.seed,
        "settings": named,
        "versions": versions(),
        "commit": commit(),
    }
    return write(options.out, prompts, outputs, record, options.scale)


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
        """Shows a picture, where there is a terminal."""
        if self._stream and self._tty and isinstance(picture, Image.Image):
            self._print(("" if self._at_start else "\n") + half_blocks(picture, self._columns) + "\n", plain=False)

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
            text = "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
        sys.stdout.write(text)
        sys.stdout.flush()
        self._at_start = text.endswith("\n") if text else self._at_start


# Files ----------------------------------------------------------------------------------------------------------------


def _require_free(out: str) -> None:
    """InputError where `out` cannot become a directory of ours; nothing there is ever overwritten."""
    directory = Directory(out)
    if directory.local is None:
        if directory.read(RECORD) is not None:
            raise InputError(f"--out: {out} holds {RECORD}; choose a new directory")
        return
    path = Path(directory.local)
    if path.is_dir():
        if held := sorted(entry.name for entry in path.iterdir()):
            raise InputError(f"--out: {out} holds {held[0]}; choose a new directory")
    elif path.exists():
        raise InputError(f"--out: {out} is a file; choose a new directory")
    parent = next(parent for parent in path.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--out: {parent} cannot be written to; choose another directory")


def write(
    out: str, prompts: list[list[str | Path]], outputs: list[Output], record: dict[str, Any], scale: int | None
) -> dict[str, Any]:
    """Writes the pictures and the record into the new directory `out`, whole or not at all; returns the record."""
    home = Directory(out)
    parent, _, name = (home.local or home.path.rstrip("/")).rpartition("/")
    staged = Directory(parent or "/").stage(name)
    directory, files = Directory(f"{parent}/{staged.name}"), []

    def save(number: int) -> Callable[[Image.Image], str]:
        def save_one(picture: Image.Image) -> str:
            buffer = io.BytesIO()
            enlarged(picture, scale).save(buffer, "PNG")
            files.append(f"{number:03}-{sum(f.startswith(f'{number:03}-') for f in files)}.png")
            directory.write(files[-1], buffer.getvalue())
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
    staged.publish(RECORD, record)
    for file in (*files, RECORD):
        print(f"{out.rstrip('/')}/{file}", file=sys.stderr)
    return record


def _described(segment: str | Image.Image | Codes, save: Callable[[Image.Image], str]) -> dict[str, Any]:
    """A segment as plain values; pictures are saved."""
    match segment:
        case str():
            return {"text": segment}
        case Codes():
            return {"modality": segment.modality, "codes": segment.codes.tolist()}
    return {"image": save(segment)}
