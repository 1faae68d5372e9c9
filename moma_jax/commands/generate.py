"""Write text and draw pictures after a prompt."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from moma_jax import generation
from moma_jax.commands import Run
from moma_jax.config import MeshConfig
from moma_jax.errors import InputError
from moma_jax.generation.files import held, write
from moma_jax.generation.generating import causal_routing, generator_of, settings_of
from moma_jax.generation.prompts import arranged
from moma_jax.generation.sampling import Guidance, Sampling
from moma_jax.generation.terminal import Terminal
from moma_jax.runs.directory import commit, versions
from moma_jax.training.load import load

FORMAT_VERSION = 1
MOST_SIDE = 8192
"""Pixels of a side of a picture file, at most."""
OPTIONS = {"images": "pictures", "image": "picture"}
"""Settings whose options have other names."""

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
    mesh: MeshConfig = MeshConfig()
    """Devices to share the model: along fsdp, expert and tensor alike each has heads and a part of every expert."""
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
    with _complaints_of_options(settings), held(options.out) as home:
        settings_of(settings)  # complains before a model is loaded
        loaded = load(run, step=options.step, router=options.router, mesh=options.mesh)
        settings["routing"] = options.routing or causal_routing(loaded)
        codec = generator_of(loaded).language.image
        if options.scale is not None and codec is not None and options.scale * codec.side > MOST_SIDE:
            raise InputError(
                f"--scale: {options.scale} is too much; {MOST_SIDE // codec.side} is the most for this run"
            )
        terminal = Terminal(stream=len(prompts) == 1)
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
