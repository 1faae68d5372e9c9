"""A dense run as a folder of ChameleonForConditionalGeneration; see layout.py for what becomes what."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moma_jax.config import Config, ModelConfig
from moma_jax.convert import layout
from moma_jax.convert.source import (
    CONFIG,
    FORMAT_VERSION,
    RECORD,
    SOURCE,
    TOKENIZER,
    VISION_FILE,
    read_source,
    require_tensors,
)
from moma_jax.convert.weights import (
    DTYPES,
    Weights,
    cast,
    copy_descriptions,
    library,
    new_directory,
    open_file,
    open_weights,
    read_json,
    write_weights,
)
from moma_jax.data.store import open_store
from moma_jax.errors import InputError
from moma_jax.runs.checkpoint import Checkpoints
from moma_jax.runs.directory import RunDir
from moma_jax.training.load import config_of
from moma_jax.vocab import Vocabulary


def to_chameleon(
    run: str,
    out: str,
    *,
    like: str | None = None,
    dtype: str | None = None,
    shard_gb: float = 5.0,
    step: int | None = None,
    quiet: bool = False,
) -> list[str]:
    """Writes a dense run as a folder of ChameleonForConditionalGeneration.

    Memory: some times one parameter of all layers in float32, and one shard.

    Args:
      run: run directory. out: the new folder. Both on a local disk.
      like: a folder of the Chameleon that the run came from; its image tokenizer's tensors and the files that describe
        it are taken over. None: those that the run keeps of it.
      dtype: "float32", "bfloat16" or "float16"; None: of each tensor that of the source, float32 without one.
      shard_gb: gigabytes (1e9) of one file. step: which checkpoint; None: the newest. quiet: print nothing.

    Returns:
      Names of the files written.

    Raises:
      InputError: the run is not dense, or the folders do not fit; nothing was written then.
    """
    library()
    if not shard_gb > 0:
        raise InputError(f"--shard-gb: must be positive, is {shard_gb}")
    config = _dense_config(run)
    with contextlib.closing(Checkpoints(RunDir(run))) as checkpoints:
        step = _step(run, checkpoints, step)
        meta = checkpoints.saved(step).meta
        vocabulary = Vocabulary.from_json(meta["vocabulary"])
        places = layout.places(config.model, vocabulary.size)
        source = _source_of(run, like, config.model, vocabulary)
        original = None if like is None else require_tensors(open_weights(source), places)
        dtypes = _dtypes(run, places, dtype, original)
        kept = Path(run).expanduser() / SOURCE / VISION_FILE
        has_vision = original is not None and any(name not in places for name in original.tensors)
        vision = original if has_vision else open_file(kept) if kept.is_file() else None
        made = None if source is not None else layout.config_of(config.model, vocabulary, config.data.sequence)
        with new_directory(out) as begun:
            read = _reader(checkpoints, step, places, layout.shapes(config.model, places))
            _write_tensors(begun, read, places, dtypes, vision, int(shard_gb * 1e9))
            copy_descriptions(source, begun) if made is None else _write_described(begun, made, config, meta["hashes"])
            _state_dtype(begun / CONFIG, dtype)
            files = sorted(path.name for path in begun.iterdir())
    say = (lambda line: None) if quiet else print
    if vision is None:
        say(f"{out}: has no image tokenizer ({layout.VISION}*); --like DIR takes it from the original folder")
    if TOKENIZER not in files:
        say(f"{out}: has no {TOKENIZER}; --like DIR takes it from the original folder")
    say(f"{out}: step {step} of {run} in {', '.join(sorted({str(DTYPES[d]) for d in dtypes.values()}))}")
    return files


def _dense_config(run: str) -> Config:
    if "://" in run:
        raise InputError(f"{run}: no local directory; copy the run to one")
    config = config_of(run)
    if config.model.ffn != "dense":
        raise InputError(f"{run}: model.ffn is {config.model.ffn}; only dense runs fit Chameleon's layout")
    if config.model.attention_weights != "shared":
        raise InputError(f"{run}: its modalities have attention weights of their own; a Chameleon has one for all")
    return config


def _step(run: str, checkpoints: Checkpoints, step: int | None) -> int:
    steps = checkpoints.steps()
    if step is None and steps:
        return steps[-1]
    if step not in steps:
        raise InputError(f"{run}: no checkpoint of step {step}; it has: {', '.join(map(str, steps)) or 'none'}")
    return step


def _source_of(run: str, like: str | None, model: ModelConfig, vocabulary: Vocabulary) -> Path | None:
    """The folder whose files describe the run as a Chameleon; None where it was none before.

    Raises:
      InputError: they describe another model.
    """
    kept = Path(run).expanduser() / SOURCE
    folder = Path(like).expanduser() if like is not None else kept
    if like is None and not kept.is_dir():
        return None
    source = read_source(folder)
    for name in ("layers", "width", "heads", "key_heads", "head_size", "hidden", "norm", "rope_theta", "norm_epsilon"):
        theirs, ours = getattr(source.model, name), getattr(model, name)
        if theirs != ours:
            raise InputError(f"{folder}: {name} is {theirs}, that of {run} {ours}; give the folder it came from")
    if source.vocabulary != vocabulary:
        raise InputError(f"{folder}: its ids do not mean what those of {run} do; give the folder it came from")
    return folder


def _dtypes(run: str, places: dict[str, layout.Place], dtype: str | None, original: Weights | None) -> dict[str, str]:
    """Type of every tensor to write, by safetensors' names."""
    if dtype is not None:
        chosen = {str(kind): name for name, kind in DTYPES.items()}
        if dtype not in chosen:
            raise InputError(f"--dtype: {dtype!r} is none of {', '.join(chosen)}")
        return dict.fromkeys(places, chosen[dtype])
    record = RunDir(run).read_json(RECORD)
    if record is not None:
        if (version := record.get("format_version")) != FORMAT_VERSION:
            raise InputError(f"{run}/{RECORD}: format {version!r}; this moma_jax reads {FORMAT_VERSION}; give --dtype")
        return {name: record["dtypes"][name] for name in places}
    return {name: "F32" if original is None else original.tensors[name].dtype for name in places}


def _reader(
    checkpoints: Checkpoints, step: int, places: dict[str, layout.Place], shapes: dict[str, tuple[int, ...]]
) -> Callable[[str], np.ndarray]:
    """Reads tensors, float32, into host memory, whatever devices are here; of one parameter after the other, as all
    layers of one are stored together."""
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    held: dict[str, np.ndarray] = {}

    def read(name: str) -> np.ndarray:
        place = places[name]
        if (path := place.parameter) not in held:
            held.clear()  # before the next one comes
            target = jax.ShapeDtypeStruct(shapes[path], np.float32, sharding=host)
            held[path] = np.asarray(checkpoints.restore_param(step, path, target))
        return place.from_ours(held[path] if place.layer is None else held[path][place.layer])

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
    """config.json of a run that was no Chameleon before, and the tokenizer of its stores, where they are there."""
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
