"""What `moma convert` refuses: in one line that names the tensor or the field, and the disk stays as it was."""

import dataclasses
import json
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="the extra [convert] is not installed")
import chameleons  # noqa: E402
from chameleons import everything_below, untrained_run  # noqa: E402
from tiny import tiny  # noqa: E402

from moma_jax.config import Modality  # noqa: E402
from moma_jax.convert import from_chameleon, to_chameleon  # noqa: E402
from moma_jax.convert.weights import Weights  # noqa: E402
from moma_jax.errors import InputError  # noqa: E402

AUDIO = Modality("audio", "a", size=8, span=4, quota=0.5)


def without(name):
    return {key: value for key, value in chameleons.weights().items() if key != name}


def replaced(name, value):
    return chameleons.weights() | {name: value}


UP = "model.layers.1.mlp.up_proj.weight"
TENSORS = {
    f"tensor {UP} is missing": without(UP),
    rf"tensor {UP} has shape \[2, 3\], by config.json \[24, 16\]": replaced(UP, np.zeros((2, 3), np.float32)),
    f"tensor {UP} is I32": replaced(UP, np.zeros((24, 16), np.int32)),
    "tensor model.layers.3.mlp.up_proj.weight is no part": replaced("model.layers.3.mlp.up_proj.weight", np.zeros(1)),
}
CONFIGS = {
    "num_key_value_heads, 4, does not divide num_attention_heads, 2": {"num_key_value_heads": 4},
    "model_type is 'llama'": {"model_type": "llama"},
    "rms_norm_eps is 1e-06": {"rms_norm_eps": 1e-6},
    "tie_word_embeddings is True": {"tie_word_embeddings": True},
    "attention_bias is True": {"attention_bias": True},
    "hidden_act is gelu": {"hidden_act": "gelu"},
    r"rotary positions are scaled \(linear\)": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "num_hidden_layers is 'two'": {"num_hidden_layers": "two"},
    "max_position_embeddings is 0": {"max_position_embeddings": 0},
    "names 12 image codes, vq_config.num_embeddings is 8192": {"vq_config": {"resolution": 4}},
    "vq_config.channel_multiplier is 2, not a list": {"vq_config": {"num_embeddings": 12, "channel_multiplier": 2}},
    "vq_config is 'big', not an object": {"vq_config": "big"},
    "rope_theta is 'x', not a positive number": {"rope_theta": "x"},
    "vq_config.resolution is None": {"vq_config": {"num_embeddings": 12, "resolution": None}},
    "token '<s>' is 7 there, 0 in tokenizer.json": {"vocabulary_map": {"<s>": 7}},
    "token 'IMGIMGxZ' names no image code": {"vocabulary_map": {"IMGIMGxZ": 33}},
    "which is not below vocab_size 290": {"vocab_size": 290},
    "data.sequence: 6 positions cannot hold a span": {"max_position_embeddings": 6},
}


def refused(pattern, folder, tmp_path):
    before = everything_below(tmp_path)
    with pytest.raises(InputError, match=pattern) as raised:
        from_chameleon(str(folder), str(tmp_path / "new" / "run"), quiet=True)
    assert "\n" not in str(raised.value)
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("pattern", TENSORS)
def test_wrong_tensors_are_named(pattern, tmp_path):
    refused(pattern, chameleons.write(tmp_path / "chameleon", TENSORS[pattern]), tmp_path)


@pytest.mark.parametrize("pattern", CONFIGS)
def test_models_that_we_cannot_hold_are_refused(pattern, tmp_path):
    refused(pattern, chameleons.write(tmp_path / "chameleon", **CONFIGS[pattern]), tmp_path)


def test_a_vocabulary_without_names_is_refused(tmp_path):
    folder = chameleons.write(tmp_path / "a", with_tokenizer=False, vocabulary_map=None)
    refused("no vocabulary_map, and no tokenizer.json", folder, tmp_path)
    names = {name: n for name, n in chameleons.described()["vocabulary_map"].items() if name != "<eoss>"}
    folder = chameleons.write(tmp_path / "b", with_tokenizer=False, vocabulary_map=names)
    refused("the vocabulary has no token <eoss>", folder, tmp_path)
    folder = chameleons.write(tmp_path / "c")
    (folder / "tokenizer.json").write_text('{"model": {}}')
    refused("has no tokens", folder, tmp_path)
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    refused("tokenizer.json: cannot be used", folder, tmp_path)


def cut(folder, keep):
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:keep])


def index(folder, change):
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


SHARD = "model-00002-of-00003.safetensors"
DAMAGE = {
    rf"{SHARD}: missing \(tensor lm_head.weight and [0-9]+ others\)": lambda f: (f / SHARD).unlink(),
    rf"{SHARD}: damaged or cut off \(tensor model.layers.2.self_attn.v_proj.weight\)": lambda f: cut(f, -1),
    rf"{SHARD}: damaged or cut off \(tensor lm_head.weight and": lambda f: cut(f, 100),
    f"{SHARD}: has no tensor model.extra": lambda f: index(f, lambda m: m.update({"model.extra": SHARD})),
    f"{SHARD}: has tensor lm_head.weight, which": lambda f: index(f, lambda m: m.pop("lm_head.weight")),
    r"lm_head.weight is said to stand in '../x.safetensors'": lambda f: index(
        f, lambda m: m.update({"lm_head.weight": "../x.safetensors"})
    ),
    "x.bin: a pickle, which can run code": lambda f: index(f, lambda m: m.update({"lm_head.weight": "x.bin"})),
    "index.json: has no weight_map": lambda f: (f / "model.safetensors.index.json").write_text("{}"),
    "index.json: not JSON": lambda f: (f / "model.safetensors.index.json").write_text("{"),
    "config.json: No such file": lambda f: (f / "config.json").unlink(),
}


@pytest.mark.parametrize("pattern", DAMAGE)
def test_damaged_folders_name_the_tensor(pattern, tmp_path):
    folder = chameleons.write(tmp_path / "chameleon", shards=3)
    DAMAGE[pattern](folder)
    refused(pattern, folder, tmp_path)


def test_a_single_file_that_is_cut_off_names_the_tensor(tmp_path):
    folder = chameleons.write(tmp_path / "chameleon")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-20000])
    refused(r"model.safetensors: damaged or cut off \(tensor [a-z]+\S+\): .*incomplete", folder, tmp_path)


def test_pickles_and_empty_folders_are_refused(tmp_path):
    folder = chameleons.write(tmp_path / "chameleon")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused("pytorch_model.bin: a pickle, which can run code when it is read; save the model as", folder, tmp_path)
    (folder / "pytorch_model.bin").unlink()
    refused("has neither model.safetensors nor model.safetensors.index.json", folder, tmp_path)


def test_what_fails_half_way_leaves_nothing(folder, tmp_path, monkeypatch):
    whole = Weights.read

    def read(self, name):
        if name == "lm_head.weight":
            raise InputError(f"tensor {name} cannot be read")
        return whole(self, name)

    monkeypatch.setattr(Weights, "read", read)
    refused("lm_head.weight cannot be read", folder, tmp_path)


def test_a_disk_without_room_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**5))
    refused("--out: .* needs 0.0 GB of disk", folder, tmp_path)


def test_out_must_be_new(folder, run, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="--out: .*there is there already"):
        from_chameleon(str(folder), str(tmp_path / "there"))
    with pytest.raises(InputError, match="--out: .*there is there already"):
        to_chameleon(str(run), str(tmp_path / "there"))
    with pytest.raises(InputError, match="--out: gs://b/run is no local directory"):
        from_chameleon(str(folder), "gs://b/run", quiet=True)
    assert everything_below(tmp_path) == ["there"]


@pytest.mark.slow
def test_runs_that_are_no_chameleon_are_refused(folder, run, tmp_path):
    untrained_run(tiny(tmp_path / "routed"))
    text, image = tiny().data.modalities
    long = tiny(tmp_path / "long", model_ffn="dense", data_modalities=(text, dataclasses.replace(image, span=5)))
    untrained_run(long)
    untrained_run(tiny(tmp_path / "third", model_ffn="dense", data_modalities=(text, image, AUDIO)))
    untrained_run(tiny(tmp_path / "epsilon", model_ffn="dense", model_norm_epsilon=1e-6))
    newer = run.parent / "newer"
    shutil.copytree(run, newer)
    (newer / "chameleon.json").write_text('{"format_version": 2}')
    small = chameleons.write(tmp_path / "small", rope_theta=10.0)
    names = {**chameleons.described()["vocabulary_map"], chameleons.code_name(0): 5, chameleons.code_name(6): 12}
    other = chameleons.write(tmp_path / "other", with_tokenizer=False, vocabulary_map=names)
    big = run.parent / "big"
    tensors = replaced("lm_head.weight", np.full((chameleons.IDS, chameleons.WIDTH), 1e5, np.float32))
    from_chameleon(str(chameleons.write(tmp_path / "large", tensors)), str(big), quiet=True)
    before = everything_below(tmp_path)
    for settings, pattern in [
        (("routed",), "model.ffn is 2t2i; only dense runs fit"),
        (("long",), "pictures are square; 5 codes of image are not"),
        (("third",), "this run has other modalities"),
        (("epsilon",), "model.norm_epsilon is 1e-06; Chameleon has 1e-05"),
        ((newer,), "chameleon.json: format 2; this moma_jax reads 1"),
        (("nothing",), "no config.json here"),
        ((run, {"like": small}), "rope_theta is 10.0, that of .* 500.0"),
        ((run, {"like": other}), "its ids do not mean what those of"),
        ((run, {"like": tmp_path / "none"}), "none/config.json: No such file"),
        ((run, {"step": 5}), "no checkpoint of step 5; it has: 0"),
        ((run, {"shard_gb": 0.0}), "--shard-gb: must be positive"),
        ((run, {"dtype": "int8"}), "--dtype: 'int8' is none of float32, float16, bfloat16"),
        ((big, {"dtype": "float16"}), "tensor lm_head.weight has values beyond float16"),
    ]:
        name, changed = settings[0], settings[1] if len(settings) > 1 else {}
        changed = {key: str(value) if key == "like" else value for key, value in changed.items()}
        with pytest.raises(InputError, match=pattern):
            to_chameleon(str(tmp_path / name), str(tmp_path / "out"), quiet=True, **changed)
    assert everything_below(tmp_path) == before


def test_without_safetensors_it_says_what_to_install(folder, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for convert, given in ((from_chameleon, folder), (to_chameleon, run)):
        with pytest.raises(InputError, match=r'pip install "moma_jax\[convert\]"'):
            convert(str(given), str(tmp_path / "out"))
    assert not os.listdir(tmp_path)
