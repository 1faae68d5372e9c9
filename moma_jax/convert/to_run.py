"""A Chameleon as a run; see layout.py for what becomes what.

A converted run is an ordinary dense run of 0 updates, with more in it:

    chameleon/       the files that describe the source: config, tokenizer, processor; its image tokenizer as it was
    chameleon.json   the types of the source's tensors
    vocabulary/      a store without documents, with id layout and tokenizers: for `moma prepare --vocabulary`

It has no optimizer moments and no data cursor, so it is not trained on in place, but begun from: `moma upcycle`, or
`run.init_from`.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from moma_jax.checks import resolve
from moma_jax.codec.vqgan import VqganCodec
from moma_jax.config import Config, DataConfig, ModelConfig, RunConfig, StoreConfig, TrainConfig
from moma_jax.config_json import to_json
from moma_jax.convert import layout
from moma_jax.convert.from_vqgan import codec_of_tensors, tensors_of
from moma_jax.convert.source import (
    FORMAT_VERSION,
    RECORD,
    SOURCE,
    TOKENIZER,
    VISION_FILE,
    VOCABULARY,
    CheckpointFiles,
    read_source,
    require_tensors,
    tokenizer_of,
)
from moma_jax.convert.weights import (
    DTYPES,
    Weights,
    copy_descriptions,
    library,
    new_directory,
    open_weights,
    write_file,
)
from moma_jax.data.parts import FORMAT_VERSION as STORE_VERSION
from moma_jax.data.store import Codecs
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
from moma_jax.vocab import Vocabulary

SCRATCH = ".float32"


class _OnDisk(np.memmap):
    """A parameter that lies in a file and that nobody changes any more, so saving it needs no copy in memory."""

    def __deepcopy__(self, memo: dict) -> _OnDisk:
        return self


def from_chameleon(folder: str, out: str, *, quiet: bool = False) -> dict[str, Any]:
    """Converts a folder of ChameleonForConditionalGeneration to a dense run of 0 updates.

    Memory: the checkpoint's bytes (compressed float32; that of bfloat16 is half of it) and one tensor. Float32 weights
    lie in files beside `out` meanwhile, so the disk holds the model twice.

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
    source = read_source(Path(folder).expanduser())
    model, vocabulary = source.model, source.vocabulary
    places = layout.places(model, vocabulary.size)
    weights = require_tensors(open_weights(source.folder), places)
    vision = [name for name in weights.tensors if name not in places]
    codec = _image_codec(weights, vocabulary) if vision else None
    codecs = Codecs.of(vocabulary, tokenizer_of(source), codec)
    config = _run_config(source, out)
    tensors = [weights.tensors[name] for name in places]
    parameters = sum(int(np.prod(tensor.shape)) for tensor in tensors)
    types = sorted({str(DTYPES[tensor.dtype]) for tensor in tensors})
    say = (lambda line: None) if quiet else print
    say(f"{folder}: {model.layers} layers of width {model.width}, {parameters:,} parameters in {', '.join(types)}")
    of_vision = sum(int(np.prod(weights.tensors[name].shape)) for name in vision)
    with new_directory(out, room=2 * 4 * (parameters + of_vision)) as begun:
        params = _read_params(weights, model, places, begun / SCRATCH)
        _write_source(begun, source.folder, {name: weights.tensors[name].dtype for name in places})
        if vision:
            write_file(begun / SOURCE / VISION_FILE, {name: weights.read(name) for name in vision})
        _write_vocabulary(Directory(str(begun / VOCABULARY)), codecs)
        summary = _write_run(RunDir(str(begun)), config, params, codecs, folder)
        shutil.rmtree(begun / SCRATCH)
    if codec is None:
        say(f"no tensors {layout.VISION}* in {folder}: pictures cannot be encoded, give ready codes")
    elif not codec.draws:
        say(f"{layout.VISION}* has no decoder, as Hugging Face publishes it: pictures become codes, not the other way")
    if not codecs.tokenizer:
        say(f"no {TOKENIZER} in {folder}: text cannot be encoded, so no data can be prepared for this run")
    say(f"{out}: converted; go on with: moma upcycle {out} --model.ffn 4t4i --data.stores.0.path STORE --run.dir NEW")
    return summary


def _image_codec(weights: Weights, vocabulary: Vocabulary) -> VqganCodec:
    """The image tokenizer, model.vqmodel.*; InputError where it is damaged or of other codes than the vocabulary."""
    image = vocabulary.modalities[1]
    try:
        side = math.isqrt(image.span)
        codec = codec_of_tensors(tensors_of(weights, layout.VISION), lambda levels: side << (levels - 1))
    except InputError as error:
        raise InputError(f"{weights.folder}: {layout.VISION}*: {error}") from error
    if codec.codebook != image.size:
        raise InputError(
            f"{weights.folder}: {layout.VISION}* has {codec.codebook} codes, by config.json {image.size}; use weights "
            "and config of one model"
        )
    return codec


def _run_config(source: CheckpointFiles, out: str) -> Config:
    """The run's config: its data are the vocabulary's store, which has no documents and is to be replaced."""
    store = StoreConfig("data", f"{out.rstrip('/')}/{VOCABULARY}")
    data = DataConfig(modalities=layout.modalities_of(source.vocabulary), stores=(store,), sequence=source.sequence)
    return resolve(Config(model=source.model, data=data, train=TrainConfig(steps=1), run=RunConfig(dir=out)))


def _read_params(
    weights: Weights, model: ModelConfig, places: dict[str, layout.Place], scratch: Path
) -> dict[str, Any]:
    """The decoder's parameters, float32, filled tensor by tensor, in files of the new directory `scratch`."""
    scratch.mkdir()
    shapes = layout.shapes(model, places).items()
    params = {name: _OnDisk(scratch / name.replace("/", "."), np.float32, "w+", shape=shape) for name, shape in shapes}
    for name, place in places.items():
        target = params[place.parameter]
        target[... if place.layer is None else place.layer] = place.to_ours(weights.read(name))
    return unflatten_dict(params, sep="/")


def _write_source(begun: Path, source: Path, dtypes: dict[str, str]) -> None:
    """Keeps what describes the source, for the way back."""
    (begun / SOURCE).mkdir()
    copy_descriptions(source, begun / SOURCE)
    RunDir(str(begun)).write_json(RECORD, {"format_version": FORMAT_VERSION, "dtypes": dtypes})


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
    with Checkpoints(run, write=True) as checkpoints:
        checkpoints.save(state, Saved(0, None, meta))
        checkpoints.wait()
    about = {name: meta[name] for name in ("router", "commit", "versions")}
    summary = {"steps": 0, "eval": {}, "wall_seconds": 0.0, "converted_from": folder, "command": command(), **about}
    run.write_json(CONFIG, to_json(config))
    run.write_json(SUMMARY, summary)
    Status(run, 0).write("complete")
    return summary
