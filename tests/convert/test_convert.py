"""`moma convert`: Chameleon checkpoints to runs and back, bit for bit; what it refuses leaves the disk as it was."""

import dataclasses
import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="the extra [convert] is not installed")
import chameleons  # noqa: E402
from chameleons import everything_below, require_equal, tensors_of, untrained_run
from safetensors.numpy import load_file, save_file  # noqa: E402
from tiny import tiny  # noqa: E402

from moma_jax import prepare, recipe, train  # noqa: E402
from moma_jax.commands import run as run_command  # noqa: E402
from moma_jax.config import PrepareConfig, StoreConfig  # noqa: E402
from moma_jax.convert import from_chameleon, to_chameleon  # noqa: E402
from moma_jax.data.store import open_store  # noqa: E402
from moma_jax.errors import InputError  # noqa: E402
from moma_jax.runs.checkpoint import Checkpoints  # noqa: E402
from moma_jax.runs.directory import RunDir  # noqa: E402
from moma_jax.training.load import load  # noqa: E402
from moma_jax.upcycling.upcycle import upcycle  # noqa: E402


def vision(tensors):
    return {name: value for name, value in tensors.items() if "vqmodel" in name}


# There and back -------------------------------------------------------------------------------------------------------


def test_the_round_trip_is_bit_exact(folder, run, tmp_path):
    original = chameleons.weights()
    back = tmp_path / "deep" / "back"
    files = to_chameleon(str(run), str(back), like=str(folder), shard_gb=9e-6, quiet=True)
    require_equal(tensors_of(back), original)
    assert files == sorted(path.name for path in back.iterdir()) and os.listdir(back.parent) == ["back"]
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()
    index = json.loads((back / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in back.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards and len(shards) > 3
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in original.values())
    for shard in shards:
        held = load_file(back / shard)
        assert set(held) == {name for name, file in index["weight_map"].items() if file == shard}
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= 9000

    again = tmp_path / "again"
    from_chameleon(str(back), str(again), quiet=True)
    require_equal(tensors_of(again / "chameleon"), vision(original))
    assert load(str(again)).hashes == load(str(run)).hashes


def test_nothing_is_missing_without_the_original(folder, run, tmp_path):
    to_chameleon(str(run), str(tmp_path / "back"), quiet=True)
    require_equal(tensors_of(tmp_path / "back"), chameleons.weights())
    assert everything_below(tmp_path / "back") == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
    ]
    assert (tmp_path / "back" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_another_type_is_rounded_and_said_in_the_config(run, tmp_path):
    """The decoder's; the image tokenizer is as it was."""
    to_chameleon(str(run), str(tmp_path / "back"), dtype="bfloat16", quiet=True)
    tensors = chameleons.weights()
    others = vision(tensors)
    wanted = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()} | others
    require_equal(tensors_of(tmp_path / "back"), wanted)
    to_chameleon(str(run), str(tmp_path / "wide"), dtype="float32", quiet=True)
    wanted = {name: value.astype(np.float32) for name, value in tensors.items()} | others
    require_equal(tensors_of(tmp_path / "wide"), wanted)
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("norm", ["pre", "swin"])
def test_any_dense_run_becomes_a_chameleon(norm, tmp_path):
    config = tiny(tmp_path / "run", model_ffn="dense", model_norm=norm, model_rope_theta=100.0)
    untrained_run(config)
    trained = load(str(tmp_path / "run"))
    to_chameleon(str(tmp_path / "run"), str(tmp_path / "chameleon"), quiet=True)
    from_chameleon(str(tmp_path / "chameleon"), str(tmp_path / "again"), quiet=True)
    again = load(str(tmp_path / "again"))
    assert again.vocabulary == trained.vocabulary and again.config.data.sequence == config.data.sequence
    for name in ("norm", "rope_theta", "hidden", "layers", "width", "heads", "norm_epsilon"):
        assert getattr(again.config.model, name) == getattr(config.model, name)
    assert fingerprints(again.params) == fingerprints(trained.params)


def test_a_run_of_ours_takes_its_tokenizer_along(tmp_path):
    settings = {"text_size": 300, "codebook": chameleons.CODES, "codes_per_image": 4}
    lines, store = documents(tmp_path / "documents.jsonl"), str(tmp_path / "store")
    prepare(PrepareConfig(str(lines), "codes", **settings), store, progress=False)
    opened = open_store(store)
    sizes = zip(tiny().data.modalities, opened.vocabulary.modalities, strict=True)
    modalities = tuple(dataclasses.replace(ours, size=made.size, span=made.span) for ours, made in sizes)
    stores = (StoreConfig("data", store),)
    config = tiny(
        tmp_path / "run", model_ffn="dense", data_modalities=modalities, data_kind="store", data_stores=stores
    )
    untrained_run(config, opened.codecs.hashes)
    to_chameleon(str(tmp_path / "run"), str(tmp_path / "chameleon"), quiet=True)
    from_chameleon(str(tmp_path / "chameleon"), str(tmp_path / "again"), quiet=True)
    again = open_store(str(tmp_path / "again" / "vocabulary"))
    assert again.vocabulary == opened.vocabulary
    text = "no 12 and <image> is no picture"
    np.testing.assert_array_equal(again.text_codec().encode(text), opened.text_codec().encode(text))


def fingerprints(params):
    return {
        jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree_util.tree_leaves_with_path(params)
    }


# A converted run is a run ---------------------------------------------------------------------------------------------


def test_ids_are_read_from_the_files(run):
    vocabulary = load(str(run)).vocabulary
    text, image = vocabulary.modalities
    assert dict(enumerate(image.code_ids.tolist())) == chameleons.code_ids()
    assert image.ranges == ((12, 18), (5, 11)) and image.span == 4
    assert (image.begin, image.end) == (chameleons.BEGIN_IMAGE, chameleons.END_IMAGE)
    assert text.size == chameleons.IDS - chameleons.CODES and vocabulary.size == chameleons.IDS
    special = (vocabulary.begin_document, vocabulary.pad, vocabulary.end_document, vocabulary.unknown)
    assert special == (0, 1, 2, 3)


def test_text_never_encodes_to_a_code_or_a_mark(run):
    codec = open_store(str(run / "vocabulary")).text_codec()
    name = chameleons.code_name(3)
    assert chameleons.tokenizer().encode(name).ids == [chameleons.code_ids()[3]], "the source's own does"
    text = f"a {name} and <eoss> or <s> in a text of more than eight tokens"
    ids = codec.encode(text)
    assert len(ids) == len(text) and ids.min() >= chameleons.BYTES and codec.decode(ids) == text


def documents(path):
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for number in range(60):
            codes = rng.integers(0, chameleons.CODES, 4).tolist()
            file.write(json.dumps({"segments": [{"text": f"no {number}"}, {"codes": codes}]}) + "\n")
    return path


@pytest.mark.slow
def test_a_converted_run_is_upcycled_and_begun_from(run, tmp_path):
    store = str(tmp_path / "store")
    lines = documents(tmp_path / "documents.jsonl")
    prepare(PrepareConfig(str(lines), "codes", vocabulary=str(run / "vocabulary"), held_out=0.3), store, progress=False)
    assert open_store(store).vocabulary == load(str(run)).vocabulary

    changed = {
        "data.stores.0.path": store,
        "data.modalities.0.quota": 0.75,
        "data.group_rows": 2,
        "train.batch_rows": 4,
        "train.steps": 1,
        "train.loss_chunk": 64,
        "optimizer.warmup_steps": 0,
        "run.tensorboard": False,
    }
    config = recipe(run, changed)
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=str(tmp_path / "on"), init_from=str(run)),
        train=dataclasses.replace(config.train, eval_sets=()),
    )
    summary = train(config, quiet=True)
    assert summary["steps"] == 1 and np.isfinite(summary["final"]["loss"])

    grown = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, ffn="2t2i"),
        run=dataclasses.replace(config.run, dir=str(tmp_path / "grown"), init_from=None),
    )
    ancestry = upcycle(str(run), grown, quiet=True)
    assert ancestry["seed_step"] == ancestry["seed_tokens"] == 0 and ancestry["seed_ffn"] == "dense"
    seed, grown = load(str(run)), load(str(tmp_path / "grown"))
    assert grown.hashes == seed.hashes
    down_LEFD = grown.params["layers"]["ffn"]["image"]["down_EFD"]
    assert down_LEFD.shape[1] == 2
    np.testing.assert_array_equal(grown.params["embedding"]["kernel_VD"], seed.params["embedding"]["kernel_VD"])


def test_a_trained_chameleon_goes_back(folder, run, tmp_path):
    """A run begun from a converted one keeps no files of the source; --like gives them, and their types."""
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.json", "checkpoints"):
        os.symlink(run / name, moved / name)
    to_chameleon(str(moved), str(tmp_path / "back"), like=str(folder), quiet=True)
    require_equal(tensors_of(tmp_path / "back"), chameleons.weights())


def test_it_sees_pictures_and_cannot_draw_them(run):
    codec = open_store(str(run / "vocabulary")).image_codec()
    assert (codec.side, codec.codes_per_image, codec.codebook) == (4, 4, chameleons.CODES)
    codes = codec.encode([np.full((5, 9, 3), grey, np.uint8) for grey in range(0, 256, 16)])
    assert codes.shape == (16, 4) and codes.min() >= 0 and codes.max() < chameleons.CODES
    with pytest.raises(InputError, match="no decoder"):
        codec.decode(codes)


def test_an_image_tokenizer_may_be_missing_but_not_in_part(tmp_path, capsys):
    tensors = chameleons.weights()
    without = {name: value for name, value in tensors.items() if "vqmodel" not in name}
    from_chameleon(str(chameleons.write(tmp_path / "a", without)), str(tmp_path / "run"))
    assert "no tensors model.vqmodel.*" in capsys.readouterr().out
    assert open_store(str(tmp_path / "run" / "vocabulary")).image_codec() is None
    to_chameleon(str(tmp_path / "run"), str(tmp_path / "back"))
    assert "has no image tokenizer (model.vqmodel.*); --like DIR" in capsys.readouterr().out
    require_equal(tensors_of(tmp_path / "back"), without)
    cut = {name: value for name, value in tensors.items() if not name.endswith("vqmodel.encoder.conv_out.weight")}
    with pytest.raises(InputError, match="model.vqmodel.*tensor encoder.conv_out.weight is missing"):
        from_chameleon(str(chameleons.write(tmp_path / "b", cut)), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_it_cannot_be_trained_in_place(run):
    before = everything_below(run)
    with pytest.raises(InputError, match="choose another run.dir .with run.init_from"):
        train(recipe(run), quiet=True)
    with Checkpoints(RunDir(str(run))) as checkpoints:
        assert checkpoints.saved(0).cursor is None
    assert set(everything_below(run)) - set(before) <= {".lock"}


def test_without_a_tokenizer_it_says_what_is_lost(tmp_path, capsys):
    folder = chameleons.write(tmp_path / "chameleon", with_tokenizer=False)
    from_chameleon(str(folder), str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert "no tokenizer.json" in said and "text cannot be encoded" in said
    with pytest.raises(InputError, match="this vocabulary came without one"):
        open_store(str(tmp_path / "run" / "vocabulary")).text_codec()
    to_chameleon(str(tmp_path / "run"), str(tmp_path / "back"))
    assert "has no tokenizer.json" in capsys.readouterr().out


def test_the_command(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_command(["convert", "from-chameleon", str(folder), "--out", "run"])
    assert "go on with: moma upcycle run --model.ffn 4t4i --data.stores.0.path STORE" in capsys.readouterr().out
    run_command(["convert", "to-chameleon", "run", "--out", "back", "--like", str(folder), "--dtype", "float32"])
    assert "step 0 of run in float32" in capsys.readouterr().out
    for words in ([], ["to-mistral"]):
        with pytest.raises(InputError, match="moma convert.*from-chameleon, from-llama, from-qwen3, to-chameleon"):
            run_command(["convert", *words])
    with pytest.raises(InputError, match="--out"):
        run_command(["convert", "from-chameleon", str(folder)])


def test_one_file_before_shards_as_transformers_reads_them(tmp_path):
    folder = chameleons.write(tmp_path / "chameleon", shards=2)
    save_file(chameleons.weights(1), folder / "model.safetensors")
    from_chameleon(str(folder), str(tmp_path / "run"), quiet=True)
    to_chameleon(str(tmp_path / "run"), str(tmp_path / "back"), quiet=True)
    require_equal(tensors_of(tmp_path / "back"), chameleons.weights(1))
