"""Checkpoints of Hugging Face as runs: a Chameleon, or a Llama or Qwen3 with room for pictures among its ids; see
layout.py for what becomes what.

A converted run is an ordinary dense run of 0 updates, with more in it, FAMILY being chameleon, llama or qwen3:

    FAMILY/        files that describe the source: config, tokenizer, processor; a Chameleon's image tokenizer as it was
    FAMILY.json    the types of the source's tensors
    vocabulary/    a store without documents, with id layout and tokenizers: for `moma prepare --vocabulary`

It has no optimizer moments and no data cursor, so it is not trained on in place, but begun from: `moma upcycle`, or
`run.init_from`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from moma_jax.checks import resolve
from moma_jax.codec import Codec
from moma_jax.codec.folder import open_codec
from moma_jax.codec.vqgan import VqganCodec
from moma_jax.config import Config, DataConfig, Modality, ModelConfig, RunConfig, StoreConfig, TrainConfig
from moma_jax.config_json import to_json
from moma_jax.convert import chameleon, layout
from moma_jax.convert.from_vqgan import codec_of_tensors, tensors_of
from moma_jax.convert.language import FAMILIES, LONGEST, extend, modalities_of, read_language_model
from moma_jax.convert.weights import (
    DTYPES,
    TOKENIZER,
    Weights,
    copy_descriptions,
    library,
    new_directory,
    open_weights,
    write_file,
)
from moma_jax.data.parts import FORMAT_VERSION as STORE_VERSION
from moma_jax.data.store import Codecs, image_codec, read_codecs
from moma_jax.errors import InputError
from moma_jax.model.decoder import first_routing_state
from moma_jax.rules import rule_name
from moma_jax.runs.checkpoint import Checkpoints, Saved
from moma_jax.runs.directory import RunDir, command, commit, versions
from moma_jax.runs.resume import CONFIG, SUMMARY
from moma_jax.runs.status import Status
from moma_jax.storage.directory import Directory
from moma_jax.training.metrics import step_sums, token_meter
from moma_jax.training.step import TrainState
from moma_jax.vocab import Vocabulary, contiguous

FORMAT_VERSION = 1
VOCABULARY, SCRATCH = "vocabulary", ".float32"
FILE_BYTES = 64 << 20
"""Of a checkpoint's files, some of which are in memory while they fill."""
VISION_FILE = "vqmodel.safetensors"
"""A Chameleon's image tokenizer, beside the files that describe it."""
UNUSED = ("rotary_emb.inv_freq",)
"""How tensors end that some files have, and no decoder needs."""


def record_of(family: str) -> str:
    """The file in a converted run that says the types of the source's tensors."""
    return f"{family}.json"


class _OnDisk(np.memmap):
    """A parameter that lies in a file and that nobody changes any more, so saving it needs no copy in memory."""

    def __deepcopy__(self, memo: dict) -> _OnDisk:
        return self


def from_chameleon(folder: str, out: str, *, quiet: bool = False) -> dict[str, Any]:
    """Converts a folder of ChameleonForConditionalGeneration to a dense run of 0 updates.

    Memory and disk: as `_convert`.

    Args:
      folder: config.json, safetensors and, where text is to be encoded, tokenizer.json.
      out: the new run directory, on a local disk.
      quiet: print nothing.

    Returns:
      The run's summary, as in summary.json.

    Raises:
      InputError: the folder or `out` cannot be used; nothing was written then.
    """
    library()
    source = chameleon.read_source(Path(folder).expanduser())
    places = layout.places(source.model, source.vocabulary.size)
    weights = layout.require_tensors(open_weights(source.folder), places, (chameleon.VISION,))
    has_vision = any(name not in places for name in weights.tensors)
    codec = _image_codec(weights, source.vocabulary) if has_vision else None
    codecs = Codecs.of(source.vocabulary, chameleon.tokenizer_of(source), codec)
    modalities = chameleon.modalities_of(source.vocabulary)
    config = _run_config(source.model, modalities, source.sequence, out)
    summary = _convert("chameleon", weights, places, config, codecs, out, quiet)
    say = (lambda line: None) if quiet else print
    if codec is None:
        say(f"no tensors {chameleon.VISION}* in {folder}: pictures cannot be encoded, give ready codes")
    elif not codec.draws:
        line = "has no decoder, as Hugging Face publishes it: pictures become codes, not the other way"
        say(f"{chameleon.VISION}* {line}")
    if not codecs.tokenizer:
        say(f"no {TOKENIZER} in {folder}: text cannot be encoded, so no data can be prepared for this run")
    return summary


def from_language_model(
    family: str, folder: str, out: str, *, codec: str, seed: int = 0, quiet: bool = False
) -> dict[str, Any]:
    """Converts a Llama or a Qwen3 of Hugging Face to a dense run of 0 updates that has a codec's codes among its ids.

    Memory and disk: as `_convert`.

    Args:
      family: "llama" or "qwen3". folder: config.json, safetensors, tokenizer.json, tokenizer_config.json.
      codec: folder of an image tokenizer, or a store, whose image tokenizer is taken.
      out: the new run directory, on a local disk. seed: of the new ids' rows. quiet: print nothing.

    Returns:
      The run's summary, as in summary.json.

    Raises:
      InputError: the folder, the codec or `out` cannot be used; nothing was written then.
    """
    library()
    if seed < 0:
        raise InputError(f"--seed: must be 0 or more, is {seed}")
    source = read_language_model(Path(folder).expanduser(), FAMILIES[family])
    pictures = _codec_at(codec)
    modalities = modalities_of(source, pictures)
    vocabulary = contiguous(modalities)
    places = layout.places(source.model, source.ids, source.first, vocabulary.size)
    unused = (*UNUSED, *(layout.LAST if source.model.tied_embeddings else ()))
    weights = layout.require_tensors(open_weights(source.folder), places, unused)
    _require_tied(source.model, weights)
    codecs = Codecs.of(vocabulary, source.text.to_json().encode(), pictures)
    config = _run_config(source.model, modalities, min(source.sequence, LONGEST), out)
    summary = _convert(family, weights, places, config, codecs, out, quiet, lambda params: extend(params, source, seed))
    if not quiet:
        begin = "by its own mark" if source.begins else f"by <s>, a copy of {source.ending}, as it has no mark for it"
        print(f"documents begin {begin}; ids: {source.ids:,} of text of its own, {pictures.codebook:,} of pictures")
    return summary


def _convert(
    family: str,
    weights: Weights,
    places: dict[str, layout.Place],
    config: Config,
    codecs: Codecs,
    out: str,
    quiet: bool,
    complete: Callable[[dict[str, np.ndarray]], None] = lambda params: None,
) -> dict[str, Any]:
    """Writes the run; `complete` fills, in place, what the source's tensors do not.

    Memory: the largest tensor and some hundred MB, whatever the model's size. Float32 weights lie in files beside `out`
    meanwhile, so the disk holds the model twice.
    """
    say = (lambda line: None) if quiet else print
    folder, model, others = weights.folder, config.model, weights.tensors.keys() - places.keys()
    types = sorted({str(DTYPES[weights.tensors[name].dtype]) for name in places})
    shapes = layout.shapes(model, places)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    count = f"{sum(sizes.values()):,} parameters from {', '.join(types)}"
    say(f"{folder}: {model.layers} layers of width {model.width}, {count}")
    beside = sum(math.prod(weights.tensors[name].shape) for name in others)
    with new_directory(out, room=4 * (2 * sum(sizes.values()) + 2 * beside)) as begun:
        (begun / SCRATCH).mkdir()
        params = {
            name: _OnDisk(begun / SCRATCH / name.replace("/", "."), np.float32, "w+", shape=shape)
            for name, shape in shapes.items()
        }
        for name, place in places.items():
            params[place.parameter][place.index] = place.to_ours(weights.read(name))
        complete(params)
        (begun / family).mkdir()
        copy_descriptions(folder, begun / family)
        dtypes = {name: weights.tensors[name].dtype for name in places}
        RunDir(str(begun)).write_json(record_of(family), {"format_version": FORMAT_VERSION, "dtypes": dtypes})
        vision = {name: weights.read(name) for name in others if name.startswith(chameleon.VISION)}
        if vision:
            write_file(begun / family / VISION_FILE, vision)
        _write_vocabulary(Directory(str(begun / VOCABULARY)), codecs)
        summary = _write_run(RunDir(str(begun)), config, unflatten_dict(params, sep="/"), codecs, str(folder))
        shutil.rmtree(begun / SCRATCH)
    say(f"{out}: converted; go on with: moma upcycle {out} --model.ffn 4t4i --data.stores.0.path STORE --run.dir NEW")
    return summary


def _require_tied(model: ModelConfig, weights: Weights) -> None:
    """InputError where config.json says that one table is both, and the weights have another unembedding."""
    embedding, head = next(iter(layout.FIRST)), next(iter(layout.LAST))
    both = model.tied_embeddings and head in weights.tensors
    if both and not np.array_equal(weights.read(head), weights.read(embedding)):
        raise InputError(
            f"{weights.folder}: tie_word_embeddings is true, and {head} is not {embedding}; set it to false"
        )


def _codec_at(path: str) -> Codec:
    """The image tokenizer of a folder of its own, or of a store."""
    codecs = read_codecs(Directory(path))
    codec = open_codec(path) if codecs is None else image_codec(codecs)
    if codec is None:
        raise InputError(f"--codec: {path} is a store without an image tokenizer; give one of pictures")
    return codec


def _image_codec(weights: Weights, vocabulary: Vocabulary) -> VqganCodec:
    """The image tokenizer, model.vqmodel.*; InputError where it is damaged or of other codes than the vocabulary."""
    image = vocabulary.modalities[1]
    try:
        side = math.isqrt(image.span)
        codec = codec_of_tensors(tensors_of(weights, chameleon.VISION), lambda levels: side << (levels - 1))
    except InputError as error:
        raise InputError(f"{weights.folder}: {chameleon.VISION}*: {error}") from error
    if codec.codebook != image.size:
        raise InputError(
            f"{weights.folder}: {chameleon.VISION}* has {codec.codebook} codes, by config.json {image.size}; use "
            "weights and config of one model"
        )
    return codec


def _run_config(model: ModelConfig, modalities: tuple[Modality, ...], sequence: int, out: str) -> Config:
    """The run's config: its data are the vocabulary's store, which has no documents and is to be replaced."""
    store = StoreConfig("data", f"{out.rstrip('/')}/{VOCABULARY}")
    data = DataConfig(modalities=modalities, stores=(store,), sequence=sequence)
    return resolve(Config(model=model, data=data, train=TrainConfig(steps=1), run=RunConfig(dir=out)))


def _write_vocabulary(directory: Directory, codecs: Codecs) -> None:
    """A store without documents."""
    codecs.write(directory)
    modalities = [m.name for m in codecs.vocabulary.modalities]
    manifest = {"format_version": STORE_VERSION, "hashes": codecs.hashes, "modalities": modalities, "parts": []}
    counts = {"documents": 0, "broken": 0, "counts": {}, "token_dtype": codecs.vocabulary.token_dtype}
    directory.write_json("manifest.json", manifest | counts)


def _write_run(run: RunDir, config: Config, params: Any, codecs: Codecs, folder: str) -> dict[str, Any]:
    """Checkpoint 0 and the files beside it; returns the summary."""
    state = TrainState(np.int32(0), params, {}, first_routing_state(config))
    meta = {
        "config": to_json(config),
        "vocabulary": codecs.vocabulary.to_json(),
        "hashes": codecs.hashes,
        "router": rule_name(config.model.router),
        "versions": versions(),
        "commit": commit(),
        "counters": token_meter(config, step_sums).to_json(),
    }
    with Checkpoints(run, write=True, file_bytes=FILE_BYTES) as checkpoints:
        checkpoints.save(state, Saved(0, None, meta))
        checkpoints.wait()
    about = {name: meta[name] for name in ("router", "commit", "versions")}
    summary = {"steps": 0, "eval": {}, "wall_seconds": 0.0, "converted_from": folder, "command": command(), **about}
    run.write_json(CONFIG, to_json(config))
    run.write_json(SUMMARY, summary)
    Status(run, 0).write("complete")
    return summary
