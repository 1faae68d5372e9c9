"""Llamas and Qwen3s as runs with room for pictures, and back; test_convert_reference.py holds them to transformers."""

import dataclasses
import json
import sys

import chameleons
import languages
import numpy as np
import pytest
from chameleons import require_equal, tensors_of
from languages import IDS, SHIFT
from processes import output, spawn
from small_codecs import small_codec
from tiny import tiny

from moma_jax import recipe, sharding
from moma_jax.checks import resolve, round_up
from moma_jax.codec.folder import write_codec
from moma_jax.config import MeshConfig, RunConfig
from moma_jax.convert import from_language_model, to_chameleon, to_language_model
from moma_jax.convert.language import FAMILIES, extend, model_of, read_language_model
from moma_jax.data.store import open_store, text_codec
from moma_jax.errors import InputError
from moma_jax.training.load import config_of, load
from moma_jax.training.step import make_program
from moma_jax.upcycling.upcycle import require_growable, upcycle

KINDS = [("llama", False), ("llama", True), ("qwen3", False), ("qwen3", True)]
TEXTS = ["the cat sat", " two  spaces\n", "a <think> b", "na\u00efve 1234", "<image> and </s>"]


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("codec") / "codec")
    write_codec(path, small_codec())
    return path


@pytest.fixture(scope="module")
def made(codec, tmp_path_factory):
    """(folder, run) by kind."""
    root = tmp_path_factory.mktemp("language")
    found = {}
    for family, tied in KINDS:
        folder = languages.write(root / f"{family}-{tied}", family, tied=tied)
        from_language_model(family, str(folder), str(root / f"run-{family}-{tied}"), codec=codec, quiet=True)
        found[family, tied] = folder, root / f"run-{family}-{tied}"
    return found


def token_id(family, token):
    return languages.tokenizer(family).token_to_id(token)


@pytest.mark.parametrize("kind", KINDS)
def test_the_round_trip_is_bit_exact(kind, made, tmp_path):
    (family, tied), (folder, run) = kind, made[kind]
    files = to_language_model(family, str(run), str(tmp_path / "back"), like=str(folder), quiet=True)
    to_language_model(family, str(run), str(tmp_path / "alone"), quiet=True)
    for back in ("back", "alone"):
        require_equal(tensors_of(tmp_path / back), languages.weights(family, tied))
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / back / name).read_bytes() == (folder / name).read_bytes()
    assert files == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_keep_their_order_behind_the_marks(kind, made):
    (family, tied), (_, run) = kind, made[kind]
    loaded = load(str(run))
    text, image = loaded.vocabulary.modalities
    assert text.ranges == ((0, 384),) and image.ranges == ((384, 384 + 32),)  # 6 + 320, up to a multiple of 128
    assert (image.span, loaded.config.data.modalities[1].size) == (64, 32)
    table_VD, source_VD = (
        loaded.params["embedding"]["kernel_VD"],
        languages.weights(family)["model.embed_tokens.weight"],
    )
    np.testing.assert_array_equal(table_VD[SHIFT : SHIFT + IDS], source_VD.astype(np.float32))
    begin, end = {"llama": ("<|begin_of_text|>", "<|end_of_text|>"), "qwen3": ("<|im_end|>",) * 2}[family]
    for ours, token in ((loaded.vocabulary.begin_document, begin), (loaded.vocabulary.end_document, end)):
        np.testing.assert_array_equal(table_VD[ours], table_VD[SHIFT + token_id(family, token)])
    assert ("unembedding" in loaded.params) != tied


def test_new_rows_are_drawn_like_the_old_ones(made):
    _, run = made["llama", False]
    params = load(str(run)).params
    for table_VD in (params["embedding"]["kernel_VD"], params["unembedding"]["kernel_DV"].T):
        old_VD, new_VD = table_VD[SHIFT : SHIFT + IDS], table_VD[SHIFT + IDS :]
        assert len(np.unique(new_VD, axis=0)) == len(new_VD) == 58 + 32
        off_D = np.abs(new_VD.mean(0) - old_VD.mean(0)) / (old_VD.std(0) / np.sqrt(len(new_VD)))
        assert off_D.max() < 4 and np.all(np.abs(new_VD.std(0) / old_VD.std(0) - 1) < 0.4)  # 4 and 5 deviations


def test_blocks_of_rows_change_no_moment(made, monkeypatch):
    folder, _ = made["llama", False]
    source = read_language_model(folder, FAMILIES["llama"])
    table_VD = np.random.default_rng(0).normal(2, 3, (416, 16)).astype(np.float32)
    whole = {"embedding/kernel_VD": table_VD.copy()}
    extend(whole, source, 0)
    monkeypatch.setattr("moma_jax.convert.language.ROWS", 7)
    parts = {"embedding/kernel_VD": table_VD.copy()}
    extend(parts, source, 0)
    np.testing.assert_allclose(parts["embedding/kernel_VD"], whole["embedding/kernel_VD"], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_text_has_the_tokens_that_it_had(family, made):
    """Merges are left out where the source leaves them out; its special tokens, and ours, are letters in a text."""
    _, run = made[family, False]
    codec, source = text_codec(open_store(str(run / "vocabulary")).codecs), languages.tokenizer(family)
    for text in TEXTS:
        np.testing.assert_array_equal(codec.encode(text), np.array(source.encode(text).ids) + SHIFT)
        assert codec.decode(codec.encode(text)) == text
    letters = codec.encode(languages.SPECIAL[family][0] + "<s><image></s>")
    assert letters.min() >= SHIFT and SHIFT + token_id(family, languages.SPECIAL[family][0]) not in letters


def test_what_marks_became_goes_back(made, tmp_path):
    """Training moves our marks' rows, not the source's: those of its bos and eos are ours then; of a token that only
    lent its row, none is changed."""
    folder, run = made["qwen3", True]
    loaded = load(str(run))
    run_of = dataclasses.replace(loaded.config.run, dir=str(tmp_path / "run"))
    chameleons.untrained_run(dataclasses.replace(loaded.config, run=run_of))  # other weights, as if it had been trained
    trained = load(str(tmp_path / "run"))
    options = {"like": str(folder), "dtype": "float32", "quiet": True}
    to_language_model("qwen3", str(tmp_path / "run"), str(tmp_path / "back"), **options)
    table_VD = trained.params["embedding"]["kernel_VD"]
    wanted_VD = np.array(table_VD[SHIFT : SHIFT + IDS])
    wanted_VD[token_id("qwen3", "<|im_end|>")] = table_VD[trained.vocabulary.end_document]
    wanted_VD[token_id("qwen3", "<|endoftext|>")] = table_VD[trained.vocabulary.pad]
    found_VD = tensors_of(tmp_path / "back")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(found_VD, wanted_VD)


@pytest.mark.slow
def test_a_checkpoint_of_several_devices_goes_back(made, tmp_path):
    output(spawn(__file__, made["llama", False][1], tmp_path / "run", devices=8))
    to_language_model("llama", str(tmp_path / "run"), str(tmp_path / "back"), dtype="float32", quiet=True)
    found, params = tensors_of(tmp_path / "back"), load(str(tmp_path / "run")).params
    down_FD = params["layers"]["ffn"]["all"]["down_EFD"][1, 0]
    np.testing.assert_array_equal(found["model.layers.1.mlp.down_proj.weight"], down_FD.T)
    np.testing.assert_array_equal(found["lm_head.weight"], params["unembedding"]["kernel_DV"][:, :384].T)


@pytest.mark.parametrize(("family", "norm"), [("llama", "none"), ("qwen3", "rms")])
def test_any_dense_run_of_its_kind_becomes_one(family, norm, codec, tmp_path):
    config = tiny(tmp_path / "run", model_ffn="dense", model_norm="pre", model_qk_norm=norm, model_kv_heads=1)
    chameleons.untrained_run(config)
    to_language_model(family, str(tmp_path / "run"), str(tmp_path / "folder"), quiet=True)
    described = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert described["vocab_size"] == config.data.modalities[0].size and described["bos_token_id"] == 0
    assert tensors_of(tmp_path / "folder")["model.embed_tokens.weight"].shape[0] == described["vocab_size"]
    with pytest.raises(InputError, match="model.qk_norm is .*; a .* has"):
        other = {"llama": "qwen3", "qwen3": "llama"}[family]
        to_language_model(other, str(tmp_path / "run"), str(tmp_path / "other"), quiet=True)
    with pytest.raises(InputError, match="to-chameleon: model.qk_norm is"):
        to_chameleon(str(tmp_path / "run"), str(tmp_path / "other"), quiet=True)


def test_it_is_grown_into_a_moma(made, tmp_path):
    _, run = made["qwen3", True]
    seed = load(str(run))
    config, model = seed.config, dataclasses.replace(seed.config.model, ffn="2t2i")
    run_of, train = RunConfig(dir=str(tmp_path / "grown")), dataclasses.replace(config.train, eval_sets=())
    upcycle(str(run), resolve(dataclasses.replace(config, model=model, train=train, run=run_of)), quiet=True)
    grown = load(str(tmp_path / "grown"))
    assert grown.config.model.qk_norm == "rms" and grown.config.model.tied_embeddings
    np.testing.assert_array_equal(grown.params["embedding"]["kernel_VD"], seed.params["embedding"]["kernel_VD"])


def on_several_devices(seed, new):
    """A new run like `seed`, saved by the devices that hold its parts."""
    config = config_of(seed)
    config = dataclasses.replace(config, run=RunConfig(dir=new), mesh=MeshConfig(data=1, fsdp=2, expert=1, tensor=2))
    with sharding.use_mesh(make_program(config).mesh):
        chameleons.untrained_run(config)


QWEN = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
"""What Qwen/Qwen3-1.7B-Base and meta-llama/Llama-3.1-8B have in config.json."""
LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "vocab_size": 128256,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip


@pytest.mark.parametrize(("name", "family", "described"), [("qwen3_1b7", "qwen3", QWEN), ("llama3_8b", "llama", LLAMA)])
def test_warm_recipes_have_the_shapes_of_their_seeds(name, family, described):
    """So the runs that these become can be grown by the recipe."""
    family, wanted = FAMILIES[family], recipe(f"configs/warm_{name}.py")
    model = model_of({**family.defaults, **described}, family, "config.json")
    config = resolve(dataclasses.replace(wanted, model=model))
    assert require_growable(config, wanted, "a seed").keys() == {"text", "image"}
    assert wanted.data.modalities[0].size == round_up(SHIFT + described["vocab_size"], 128)


# Refusals -------------------------------------------------------------------------------------------------------------

GATE = "model.layers.1.mlp.gate_proj.weight"
CONFIGS = {
    "model_type is 'mistral', not 'llama'": {"model_type": "mistral"},
    "model_type is 'qwen3', not 'llama'; moma convert from-qwen3 reads it": {"model_type": "qwen3"},
    "attention_bias is True; the decoder has none": {"attention_bias": True},
    "hidden_act is gelu": {"hidden_act": "gelu"},
    r"rotary positions are scaled \(yarn\)": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
    "low_freq_factor is None": {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
    "num_key_value_heads, 3, does not divide": {"num_key_value_heads": 3},
    "rms_norm_eps is 0": {"rms_norm_eps": 0},
    "num_hidden_layers is 300000, more than 1000": {"num_hidden_layers": 300000},
    "rms_norm_eps is 1000": {"rms_norm_eps": 10**400},
    "tie_word_embeddings is 'false'": {"tie_word_embeddings": "false"},
    "rope_parameters and rope_scaling disagree": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "token .* has id 293, and from vocab_size 200 on ids are a codec's codes": {"vocab_size": 200},
    "data.sequence: 40 positions cannot hold a span": {"max_position_embeddings": 40},
}


def refused(pattern, folder, codec, tmp_path, family="llama"):
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(InputError, match=pattern) as raised:
        from_language_model(family, str(folder), str(tmp_path / "new" / "run"), codec=codec, quiet=True)
    assert "\n" not in str(raised.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("pattern", CONFIGS)
def test_models_that_we_cannot_hold_are_refused(pattern, codec, tmp_path):
    refused(pattern, languages.write(tmp_path / "folder", "llama", **CONFIGS[pattern]), codec, tmp_path)


def test_damaged_folders_are_refused(codec, tmp_path):
    tensors = languages.weights("llama")
    for number, (pattern, changed) in enumerate({
        f"tensor {GATE} is missing": {k: v for k, v in tensors.items() if k != GATE},
        f"tensor {GATE} has shape": tensors | {GATE: np.zeros((2, 3), np.float32)},
        "tensor model.layers.0.mlp.bias is no part": tensors | {"model.layers.0.mlp.bias": np.zeros(3, np.float32)},
    }.items()):  # fmt: skip
        refused(pattern, languages.write(tmp_path / str(number), "llama", changed), codec, tmp_path)
    other = tensors | {"lm_head.weight": tensors["lm_head.weight"] * 2}
    folder = languages.write(tmp_path / "tied", "llama", other, tied=True)
    refused("lm_head.weight is not model.embed_tokens", folder, codec, tmp_path)
    folder = languages.write(tmp_path / "marks", "llama", marks={"bos_token": None, "eos_token": "<|gone|>"})
    refused("eos_token is '<|gone|>', which tokenizer.json has not", folder, codec, tmp_path)
    (folder / "tokenizer_config.json").write_text('{"eos_token": null}')
    refused("names no eos token", folder, codec, tmp_path)
    (folder / "tokenizer_config.json").write_text('{"eos_token": ["x"]}')
    refused("eos_token is", folder, codec, tmp_path)
    (folder / "tokenizer.json").unlink()
    refused("has no tokenizer.json", folder, codec, tmp_path)
    refused("no codec.json here; give a folder that moma codec import", folder.parent / "0", str(tmp_path), tmp_path)


def test_a_codec_that_was_changed_is_refused(made, codec, tmp_path):
    path = tmp_path / "codec"
    write_codec(str(path), small_codec())
    content = bytearray((path / "codec.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "codec.safetensors").write_bytes(content)
    refused("codec", made["llama", False][0], str(path), tmp_path)


if __name__ == "__main__":
    on_several_devices(*sys.argv[1:])
