"""A run as a folder that others can load: safetensors, plain JSON, a model card, and one file of PyTorch that reads it.

    config.json            the decoder, how tokens are routed, the id layout
    model.safetensors      the parameters, layer by layer; or shards with an index
    tokenizer.json, codec-image.json, codec-image.safetensors, vocabulary.json    as a store has them
    moma_torch.py          moma_jax/convert/moma_torch.py: logits in PyTorch
    README.md              the model card

A tensor is called as its parameter (moma_jax/model/parameters.py), with dots, and with the number of its layer behind
`layers`: layers.3.ffn.text.gate_EDF (E, D, F). What routing needs besides is layers.3.state.text.threshold_E or bias_E.
With mixture of depths the even layers, 0, 2, ..., have layers.0.depth.depth_text.router_DE.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from moma_jax.convert.card import card
from moma_jax.convert.weights import (
    CONFIG,
    DTYPES,
    cast,
    dtype_named,
    library,
    new_directory,
    shard_bytes,
    write_weights,
)
from moma_jax.data.store import Codecs, open_store
from moma_jax.errors import InputError
from moma_jax.geometry import depth_rule, rule_of
from moma_jax.model.auxiliary import SUFFIX
from moma_jax.model.decode import layer_part
from moma_jax.model.parameters import ATTENTION_AXES, MATRICES
from moma_jax.router import CAUSAL, THRESHOLD, Router, name_of
from moma_jax.routers.choice import Choice, thresholds
from moma_jax.routers.token_choice import TokenChoice
from moma_jax.storage.directory import Directory
from moma_jax.training.load import Loaded, load

FORMAT_VERSION = 1
REFERENCE = "moma_torch.py"
NARROW = (*ATTENTION_AXES, *MATRICES, "kernel_VD", "kernel_DV")
"""Arrays that may be stored in another type; norms, routers and thresholds stay float32."""


def to_folder(
    run: str,
    out: str,
    *,
    routing: str | None = None,
    dtype: str = "float32",
    shard_gb: float = 0.5,
    step: int | None = None,
    quiet: bool = False,
) -> list[str]:
    """Exports a run of any FFN.

    Memory: the model in float32, and two shards.

    Args:
      run: run directory. out: the new folder, on a local disk.
      routing: the causal routing that the folder's model has, "causal" or "threshold"; None: the first that the run can
        be used under.
      dtype: "float32", "bfloat16" or "float16", of matrices. shard_gb: gigabytes (1e9) of one file.
      step: which checkpoint; None: the newest. quiet: print nothing.

    Returns:
      Names of the files written.

    Raises:
      InputError: the run has no such routing, or a rule that the reference does not know; nothing was written then.
    """
    library()
    file_bytes, narrow = shard_bytes(shard_gb), dtype_named(dtype)
    loaded = load(run, step=step)
    routing = _routing(loaded, routing)
    described = _described(loaded, routing)
    arrays = dict(_tensors(loaded, described))
    kinds = {name: narrow if name.rpartition(".")[2] in NARROW else "F32" for name in arrays}
    sizes = {name: math.prod(array.shape) * DTYPES[kinds[name]].itemsize for name, array in arrays.items()}
    with new_directory(out, room=sum(sizes.values())) as begun:
        read = functools.partial(_read, arrays, kinds)
        write_weights(begun, sizes, read, file_bytes)
        (begun / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
        codecs = _codecs(loaded)
        if codecs is not None:
            codecs.write(Directory(str(begun)))
        shutil.copyfile(Path(__file__).with_name(REFERENCE), begun / REFERENCE)
        (begun / "README.md").write_text(card(loaded, routing, dtype, Path(out).name))
        files = sorted(path.name for path in begun.iterdir())
    if not quiet:
        if codecs is None:
            print(f"{out}: has no tokenizer and no image tokenizer, as the stores of {run} are not here")
        begin = loaded.vocabulary.begin_document
        print(f"{out}: step {loaded.step} of {run}; try: python {out}/{REFERENCE} {out} {begin}")
    return files


def _read(arrays: dict[str, Any], kinds: dict[str, str], name: str) -> np.ndarray:
    return cast(name, np.asarray(arrays[name]), kinds[name])


def _routing(loaded: Loaded, asked: str | None) -> str:
    """The causal routing of the folder's model."""
    known = [name for name in (CAUSAL, THRESHOLD) if name in loaded.routings]
    routing = asked or (known or [CAUSAL])[0]
    loaded.under(routing)  # says what it lacks
    if routing not in known:
        raise InputError(f"--routing: {routing!r} sees later tokens; give one of {', '.join(known)}")
    return routing


def _described(loaded: Loaded, routing: str) -> dict[str, Any]:
    """The content of config.json."""
    model, layout = loaded.config.model, loaded.config.experts
    groups = [
        {"name": g.name, "modalities": list(g.modalities), "experts": g.experts, "routed": g.routed, "width": g.width}
        for g in (*layout.groups, *layout.shared)
    ]
    routed = any(group.routed for group in layout.groups)
    return {
        "format_version": FORMAT_VERSION,
        "model_type": "moma",
        "ffn": model.ffn,
        "layers": model.layers,
        "width": model.width,
        "heads": model.heads,
        "kv_heads": model.key_heads,
        "head_width": model.head_size,
        "hidden": model.hidden,
        "norm": model.norm,
        "qk_norm": model.qk_norm,
        "norm_epsilon": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_scaling": model.rope_scaling and dataclasses.asdict(model.rope_scaling),
        "tied_embeddings": model.tied_embeddings,
        "by_modality": model.attention_weights == "by_modality",
        "groups": groups,
        "decision": _decision(model.router, routing) if routed else None,
        "depth_groups": [{"name": g.name, "modalities": list(g.modalities)} for g in loaded.config.depth],
        "depth_decision": _decision(depth_rule(model), routing) if loaded.config.depth else None,
        "vocabulary_size": loaded.vocabulary.size,
        **{key: value for key, value in loaded.vocabulary.to_json().items() if key != "format_version"},
    }


def _decision(rule: Router, routing: str) -> dict[str, Any]:
    """How tokens decide; InputError where the reference does not know the rule."""
    if isinstance(rule, Choice):
        return {"kind": "auxiliary" if routing == CAUSAL else "threshold"}
    if type(rule) is TokenChoice:
        normalise = rule.normalise and rule.top > 1
        return {"kind": "top", "top": rule.top, "gates": rule.gates, "normalise": normalise}
    known = "choice, threshold and token_choice have"
    raise InputError(f"to-folder: the rule {name_of(rule)} has no form in {REFERENCE}; {known}")


def _tensors(loaded: Loaded, described: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name and array of all that the folder's model needs."""
    params, config = loaded.params, loaded.config
    for name in ("embedding", "final_norm", "unembedding"):
        for path, array in flatten_dict(params.get(name, {}), sep=".").items():
            yield f"{name}.{path}", array
    kinds = {own and own["kind"] for own in (described["decision"], described["depth_decision"])}
    for number in range(config.model.layers):
        own, state = _layer(loaded, number)
        for path, array in flatten_dict(own, sep=".").items():
            if "auxiliary" in kinds or f"{SUFFIX}." not in path:
                yield f"layers.{number}.{path}", array
        for group, arrays in state.items():
            for name, array in arrays.items():
                yield f"layers.{number}.state.{group}.{name}", array


def _layer(loaded: Loaded, number: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Parameters of a layer, and what its groups' decisions keep beside them."""
    own, depth, state = layer_part(loaded.params, loaded.routing_state, loaded.config, number)
    groups = [*loaded.config.experts.groups, *(loaded.config.depth if depth else ())]
    kept = {g.name: _kept(rule_of(loaded.config.model, g), state[g.name]) for g in groups if g.name in state}
    return own | ({"depth": depth} if depth else {}), kept


def _kept(rule: Router, state: dict[str, Any]) -> dict[str, Any]:
    """Of a group's routing state what its decision needs."""
    if isinstance(rule, Choice):
        return {"threshold_E": thresholds(state)}
    return {name: value for name, value in rule.moved(state).items() if name == "bias_E"}


def _codecs(loaded: Loaded) -> Codecs | None:
    """Tokenizer and image tokenizer of the run's stores; None where these are gone or random."""
    if loaded.config.data.kind != "store":
        return None
    try:
        codecs = open_store(loaded.config.data.stores[0].path).codecs
    except InputError:
        return None
    return codecs if codecs.hashes["vocabulary"] == loaded.vocabulary.hash else None
