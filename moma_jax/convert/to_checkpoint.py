"""A dense run as a folder of Hugging Face: a Chameleon, a Llama or a Qwen3; see layout.py for what becomes what."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moma_jax.config import Config, ModelConfig
from moma_jax.convert import chameleon, language, layout
from moma_jax.convert.to_run import FORMAT_VERSION, SCRATCH, UNUSED, VISION_FILE, record_of
from moma_jax.convert.weights import (
    CONFIG,
    DTYPES,
    TOKENIZER,
    Weights,
    cast,
    copy_descriptions,
    dtype_named,
    library,
    new_directory,
    open_file,
    open_weights,
    read_json,
    shard_bytes,
    write_weights,
)
from moma_jax.data.store import open_store
from moma_jax.errors import InputError
from moma_jax.runs.checkpoint import Checkpoints
from moma_jax.runs.directory import RunDir
from moma_jax.training.load import config_of
from moma_jax.vocab import Vocabulary


class _Target(NamedTuple):
    """What a run becomes.

    Attributes:
      family: chameleon, llama or qwen3. model: as the folder has it; what was a model of it has its own config.
      folder: the files that describe it; None where they are made, of `described`.
      ids: of its vocabulary. first, rows: of `LanguageModel`; 0 and {} of a Chameleon.
    """

    family: str
    model: ModelConfig
    folder: Path | None
    described: dict[str, Any]
    ids: int
    first: int = 0
    rows: dict[int, int] = {}


def to_chameleon(
    run: str,
    out: str,
    *,
    like: str | None = None,
    dtype: str | None = None,
    shard_gb: float = 0.5,
    step: int | None = None,
    quiet: bool = False,
) -> list[str]:
    """Writes a dense run as a folder of ChameleonForConditionalGeneration; all as `to_language_model`."""
    options = {"like": like, "dtype": dtype, "shard_gb": shard_gb, "step": step, "quiet": quiet}
    return to_language_model("chameleon", run, out, **options)


def to_language_model(
    family: str,
    run: str,
    out: str,
    *,
    like: str | None = None,
    dtype: str | None = None,
    shard_gb: float = 0.5,
    step: int | None = None,
    quiet: bool = False,
) -> list[str]:
    """Writes a dense run as a folder of LlamaForCausalLM or Qwen3ForCausalLM.

    A run that was made of such a folder gets its ids back; of any other the ids of text are written. Pictures' codes
    stay behind.

    Memory: some times the largest tensor, and two shards, whatever the model's size. One parameter of all layers lies
    in a file beside the new ones meanwhile, in float32.

    Args:
      family: "llama" or "qwen3". run: run directory. out: the new folder. Both on a local disk.
      like: a folder of the model that the run came from: the files that describe it, and a Chameleon's image tokenizer,
        are taken over. None: those that the run keeps of it.
      dtype: "float32", "bfloat16" or "float16"; None: of each tensor that of the source, float32 without one.
      shard_gb: gigabytes (1e9) of one file. step: which checkpoint; None: the newest. quiet: print nothing.

    Returns:
      Names of the files written.

    Raises:
      InputError: the run is not dense, or the folders do not fit; nothing was written then.
    """
    library()
    file_bytes = shard_bytes(shard_gb)
    config = _dense_config(run, family)
    with contextlib.closing(Checkpoints(RunDir(run))) as checkpoints:
        step = _step(run, checkpoints, step)
        meta = checkpoints.saved(step).meta
        vocabulary = Vocabulary.from_json(meta["vocabulary"])
        target = _target(run, like, family, config, vocabulary, meta["hashes"])
        places = layout.places(config.model, target.ids, target.first, vocabulary.size)
        others = (chameleon.VISION,) if family == "chameleon" else (*UNUSED, *layout.LAST)
        original = None if like is None else layout.require_tensors(open_weights(target.folder), places, others)
        dtypes = _dtypes(run, family, places, dtype, original)
        vision = _vision(run, places, original) if family == "chameleon" else None
        with new_directory(out) as begun:
            load = functools.partial(checkpoints.copy_param, step)
            read = _reader(load, begun / SCRATCH, places, layout.shapes(config.model, places), target.rows)
            _write_tensors(begun, read, places, dtypes, vision, file_bytes)
            if target.folder is None:
                _write_described(begun, target.described, config, meta["hashes"])
            else:
                copy_descriptions(target.folder, begun)
            _state_dtype(begun / CONFIG, dtype)
            (begun / SCRATCH).unlink()
            files = sorted(path.name for path in begun.iterdir())
    say = (lambda line: None) if quiet else print
    if family == "chameleon" and vision is None:
        say(f"{out}: has no image tokenizer ({chameleon.VISION}*); --like DIR takes it from the original folder")
    if TOKENIZER not in files:
        say(f"{out}: has no {TOKENIZER}; --like DIR takes it from the original folder")
    say(f"{out}: step {step} of {run} in {', '.join(sorted({str(DTYPES[d]) for d in dtypes.values()}))}")
    return files


def _dense_config(run: str, family: str) -> Config:
    if "://" in run:
        raise InputError(f"{run}: no local directory; copy the run to one")
    config = config_of(run)
    if config.model.ffn != "dense":
        raise InputError(f"{run}: model.ffn is {config.model.ffn}; only dense runs fit the layout of {family}")
    if config.model.attention_weights != "shared":
        raise InputError(f"{run}: its modalities have attention weights of their own; a {family} has one for all")
    return config


def _step(run: str, checkpoints: Checkpoints, step: int | None) -> int:
    steps = checkpoints.steps()
    if step is None and steps:
        return steps[-1]
    if step not in steps:
        raise InputError(f"{run}: no checkpoint of step {step}; it has: {', '.join(map(str, steps)) or 'none'}")
    return step


def _target(
    run: str, like: str | None, family: str, config: Config, vocabulary: Vocabulary, hashes: dict[str, str | None]
) -> _Target:
    """What the run becomes; InputError where the files that describe it are of another model."""
    model, kept = config.model, Path(run).expanduser() / family
    folder = Path(like).expanduser() if like is not None else kept if kept.is_dir() else None
    sequence = config.data.sequence
    if family == "chameleon":
        if folder is None:
            described = chameleon.config_of(model, vocabulary, sequence)
            return _Target(family, model, None, described, vocabulary.size)
        source = chameleon.read_source(folder)
        same = source.vocabulary == vocabulary
        found = _Target(family, source.model, folder, {}, vocabulary.size)
    else:
        kind = language.FAMILIES[family]
        language.require_language_model(model, vocabulary, kind)
        if folder is None:
            described, ids = language.config_of(model, vocabulary, sequence, kind), vocabulary.modalities[0].size
            return _Target(family, model, None, described, ids)
        source = language.read_language_model(folder, kind)
        known = hashes.get("tokenizer") in (None, source.text.hash)
        same = language.text_size(source) == vocabulary.modalities[0].size and known
        found = _Target(family, source.model, folder, {}, source.ids, source.first, source.rows)
    _require_same(run, folder, found.model, model)
    if not same:
        raise InputError(f"{folder}: its ids do not mean what those of {run} do; give the folder it came from")
    return found


SHAPE = ("layers", "width", "heads", "key_heads", "head_size", "hidden", "norm", "qk_norm", "rope_theta")
SHAPE += ("rope_scaling", "norm_epsilon", "tied_embeddings")
"""Fields of ModelConfig that a folder and a run of it have alike."""


def _require_same(run: str, folder: Path, theirs: ModelConfig, ours: ModelConfig) -> None:
    for name in SHAPE:
        its, own = getattr(theirs, name), getattr(ours, name)
        if its != own:
            raise InputError(f"{folder}: {name} is {its}, that of {run} {own}; give the folder it came from")


def _vision(run: str, places: dict[str, layout.Place], original: Weights | None) -> Weights | None:
    """The image tokenizer's tensors: of the original folder, or of what the run keeps of it; None: there are none."""
    kept = Path(run).expanduser() / "chameleon" / VISION_FILE
    if original is not None and any(name not in places for name in original.tensors):
        return original
    return open_file(kept) if kept.is_file() else None


def _dtypes(
    run: str, family: str, places: dict[str, layout.Place], dtype: str | None, original: Weights | None
) -> dict[str, str]:
    """Type of every tensor to write, by safetensors' names."""
    if dtype is not None:
        return dict.fromkeys(places, dtype_named(dtype))
    name = record_of(family)
    record = RunDir(run).read_json(name)
    if record is not None:
        if (version := record.get("format_version")) != FORMAT_VERSION:
            raise InputError(f"{run}/{name}: format {version!r}; this moma_jax reads {FORMAT_VERSION}; give --dtype")
        if not isinstance(record.get("dtypes"), dict) or not places.keys() <= record["dtypes"].keys():
            raise InputError(f"{run}/{name}: does not say the types of all tensors; give --dtype")
        return {tensor: record["dtypes"][tensor] for tensor in places}
    return {name: "F32" if original is None else original.tensors[name].dtype for name in places}


def _reader(
    load: Callable[[str, np.ndarray], None],
    scratch: Path,
    places: dict[str, layout.Place],
    shapes: dict[str, tuple[int, ...]],
    rows: dict[int, int],
) -> Callable[[str], np.ndarray]:
    """Reads tensors, float32.

    Args:
      load: (a parameter's path, an array to fill). scratch: a new file for one parameter at a time, all layers of which
        are stored together.
      rows: our marks, and our ids of the source's own tokens, which get what these became.
    """
    held: dict[str, np.ndarray] = {}

    def read(name: str) -> np.ndarray:
        place = places[name]
        if (path := place.parameter) not in held:
            held.clear()
            held[path] = np.memmap(scratch, np.float32, "w+", shape=shapes[path])
            load(path, held[path])
            if place.first is not None:
                table_VD = held[path].T if place.projection else held[path]
                for ours, theirs in rows.items():
                    table_VD[theirs] = table_VD[ours]
        return place.from_ours(held[path][place.index])

    return read


def _write_tensors(
    begun: Path,
    read: Callable[[str], np.ndarray],
    places: dict[str, layout.Place],
    dtypes: dict[str, str],
    vision: Weights | None,
    shard_bytes: int,
) -> None:
    """Our tensors, parameter by parameter; then those of the image tokenizer, as they were."""
    order = list(dict.fromkeys(place.parameter for place in places.values()))
    names = sorted(places, key=lambda name: order.index(places[name].parameter))
    others = {} if vision is None else {n: t.dtype for n, t in vision.tensors.items() if n not in places}
    sizes = {name: math.prod(places[name].shape) * DTYPES[dtypes[name]].itemsize for name in names}
    sizes |= {n: math.prod(vision.tensors[n].shape) * DTYPES[dtype].itemsize for n, dtype in others.items()}
    write_weights(
        begun,
        sizes,
        lambda name: vision.read(name) if name in others else cast(name, read(name), dtypes[name]),
        shard_bytes,
    )


def _write_described(begun: Path, made: dict[str, Any], config: Config, hashes: dict[str, str | None]) -> None:
    """config.json of a run that was no such model before, and the tokenizer of its stores, where they are there."""
    (begun / CONFIG).write_text(json.dumps({**made, "dtype": "float32"}, indent=2) + "\n")
    if config.data.kind == "store":
        with contextlib.suppress(InputError):  # stores that are gone
            codecs = open_store(config.data.stores[0].path).codecs
            if codecs.tokenizer and codecs.hashes["tokenizer"] == hashes.get("tokenizer"):
                (begun / TOKENIZER).write_bytes(codecs.tokenizer)


def _state_dtype(path: Path, dtype: str | None) -> None:
    """Says in config.json that the weights have another type than the source's."""
    if dtype is not None:
        described = read_json(path)
        names = [name for name in ("dtype", "torch_dtype") if name in described] or ["dtype"]
        path.write_text(json.dumps({**described, **dict.fromkeys(names, dtype)}, indent=2) + "\n")
