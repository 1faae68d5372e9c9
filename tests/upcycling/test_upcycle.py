"""A run with more experts goes on where its seed stopped: the same function, the next data, a record of where from."""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from processes import output, spawn
from programs import batch_of, logits, program_of
from runs import changed_batches, parameters, records
from tiers import long_but
from tiny import MODALITIES, tiny

import moma_jax
from moma_jax import commands, sharding
from moma_jax.config import MeshConfig, Modality, PrepareConfig, StoreConfig
from moma_jax.config_json import to_json
from moma_jax.cost import flops_per_token
from moma_jax.data import stream as stream_lib
from moma_jax.data.prepare import prepare
from moma_jax.data.stream import open_stream, vocabulary_of
from moma_jax.errors import InputError
from moma_jax.model.decoder import first_routing_state
from moma_jax.runs.checkpoint import Checkpoints, Saved
from moma_jax.runs.directory import RunDir
from moma_jax.training.load import fingerprint
from moma_jax.training.step import abstract_state, create_state
from moma_jax.upcycling.upcycle import upcycle

NORMS = ("swin", "pre")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Complete seed runs by norm placement, each trained when it is first asked for."""
    home = tmp_path_factory.mktemp("seeds")

    @functools.cache
    def seed(norm):
        config = tiny(home / norm, model_ffn="1t1i", model_norm=norm, train_steps=4)
        moma_jax.train(config, quiet=True)
        return config

    return seed


@pytest.fixture
def seed(seeds):
    return seeds("swin")


class Killed(BaseException):
    """Nothing is cleaned up after it."""


def grown(directory, **fields):
    return tiny(directory, **{"model_ffn": "4t4i", "train_steps": 4} | fields)


# The function ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", long_but("swin", of=NORMS))
def test_logits_are_the_seeds_right_after(seeds, tmp_path, norm):
    config = grown(tmp_path, model_capacity=1.0, model_norm=norm)
    upcycle(seeds(norm).run.dir, config, quiet=True)
    before, after = (moma_jax.load(str(path)) for path in (seeds(norm).run.dir, tmp_path))
    assert (after.step, after.config.model.ffn) == (0, "4t4i")
    for name in ("text", "image"):
        assert not np.any(after.params["layers"]["ffn"][name]["router_DE"])
    batch = batch_of(config)
    expected, found = (logits(x.program, x.params, batch) for x in (before, after))
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("norm", long_but("swin", of=NORMS))
def test_the_jump_is_that_of_the_held_out_losses(seeds, tmp_path, norm):
    ancestry = upcycle(seeds(norm).run.dir, grown(tmp_path, model_norm=norm, router_gumbel=True), quiet=True)
    jump = ancestry["jump"]
    for run, name in ((seeds(norm).run.dir, "seed"), (str(tmp_path), "upcycled")):
        found = moma_jax.evaluate(run, routing=("choice",))["choice"]
        for measure, value in jump[name].items():
            assert value == (None if found[measure] is None else pytest.approx(found[measure], rel=1e-5))
    assert (jump["eval_set"], jump["routing"]) == ("heldout", "choice")
    assert jump["difference"]["loss"] == jump["upcycled"]["loss"] - jump["seed"]["loss"] != 0


# Moments --------------------------------------------------------------------------------------------------------------


def adam(state):
    return next(part for part in state.opt_state if isinstance(part, optax.ScaleByAdamState))


def restored(run, step):
    program = program_of(dataclasses.replace(moma_jax.recipe(run), mesh=MeshConfig()))
    with sharding.use_mesh(program.mesh), Checkpoints(RunDir(run)) as checkpoints:
        return checkpoints.restore(step, abstract_state(program, first_routing_state(program.config)))


@pytest.mark.parametrize("moments", ["reset", "tile"])
def test_moments(seed, tmp_path, moments):
    config = grown(tmp_path, router_auxiliary=True)
    assert upcycle(seed.run.dir, config, moments=moments, quiet=True)["moments"] == moments
    old, new = restored(seed.run.dir, 4), restored(str(tmp_path), 0)
    before, after = jax.device_get(adam(old)), jax.device_get(adam(new))
    assert int(new.step) == 0 and int(after.count) == (4 if moments == "tile" else 0)
    jax.tree.map(np.testing.assert_array_equal, new.routing_state, first_routing_state(config))
    if moments == "reset":
        assert not any(np.any(x) for x in jax.tree.leaves((after.mu, after.nu)))
        return
    for name, part in (("text", "gate_EDF"), ("image", "up_EDF"), ("text", "down_EFD")):
        a = 1 / 8 if part == "down_EFD" else 1 / 4  # 1 / copies, and 1 / the scale 2
        for power, x, y in ((1, before.mu, after.mu), (2, before.nu, after.nu)):
            x, y = (tree["layers"]["ffn"][name][part] for tree in (x, y))
            assert np.any(x)
            np.testing.assert_allclose(y, np.repeat(x, 4, axis=1) * a**power, rtol=1e-6)
    for tree in (after.mu, after.nu):
        ffn = tree["layers"]["ffn"]
        assert not np.any(ffn["text"]["router_DE"]) and not np.any(ffn["text_auxiliary"]["in_DA"])
    np.testing.assert_array_equal(after.nu["embedding"]["kernel_VD"], before.nu["embedding"]["kernel_VD"])
    assert np.any(new.params["layers"]["ffn"]["text_auxiliary"]["in_DA"])  # fresh


# Going on -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("store") / "scenes")
    settings = PrepareConfig(source="scenes", documents=160, text_size=700, image_side=4, colours=8, parts=1)
    modalities = (Modality("text", "t", size=700, quota=0.6), Modality("image", "i", size=8, span=16, quota=0.6))
    prepare(settings, path, modalities=modalities, progress=False)
    sizes = [m.size for m in stream_lib.open_store(path).vocabulary.modalities]
    return path, tuple(dataclasses.replace(m, size=size) for m, size in zip(modalities, sizes, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4, 6])
def test_no_document_is_seen_twice(store, tmp_path, monkeypatch, rows):
    """Neither where the new run's batches are larger."""
    path, modalities = store
    data = {"data_kind": "store", "data_stores": (StoreConfig("scenes", path),), "data_modalities": modalities,
            "data_sequence": 64, "data_lanes": 2, "train_eval_sets": (), "train_checkpoint_every": 2}  # fmt: skip
    seed = tiny(tmp_path / "seed", model_ffn="1t1i", train_steps=3, train_batch_rows=4, **data)
    config = grown(tmp_path / "new", train_steps=3, train_batch_rows=rows, **data)
    planned, used = [], []

    class Noted(stream_lib.Reader):
        def packed(self, plan):
            packed = super().packed(plan)
            planned.append((packed.batch, plan.piece_N6))
            return packed

    def note(number, batch):
        used.append(next(pieces for of_batch, pieces in planned if of_batch is batch))
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(stream_lib, "Reader", Noted)
        changed_batches(patch, note)
        moma_jax.train(seed, quiet=True)
        assert upcycle(seed.run.dir, config, quiet=True)["jump"] is None
        summary = moma_jax.train(config, quiet=True)
    assert len(used) == 6 and summary["final"]["epoch_scenes"] < 1
    pieces = np.concatenate([piece_N6[:, :4] for piece_N6 in used])
    _, document_N, start_N, stop_N = pieces.T
    seen = np.concatenate([n * 10_000 + np.arange(a, b) for n, a, b in zip(document_N, start_N, stop_N, strict=True)])
    assert len(np.unique(seen)) == len(seen) > 1000, "a token was seen twice"
    with open_stream(seed, rows=2) as groups:  # and none was left out
        whole = np.concatenate([next(groups).batch.token_BS for _ in range((3 * 4 + 3 * rows) // 2)])
    found = np.concatenate([next(b.token_BS for b, p in planned if p is pieces) for pieces in used])
    np.testing.assert_array_equal(found, whole)


@pytest.fixture(scope="module")
def undisturbed(seeds, tmp_path_factory):
    config = grown(tmp_path_factory.mktemp("calm"), train_checkpoint_every=2, router_gumbel=True, train_eval_sets=())
    upcycle(seeds("swin").run.dir, config, quiet=True)
    return config, moma_jax.train(config, quiet=True)


@pytest.mark.slow
def test_training_goes_on_afresh(seed, undisturbed):
    config, summary = undisturbed
    assert summary["steps"] == 4 and summary["final"]["tokens"] == 4 * 128  # counters begin anew
    rates = {r["step"]: r["learning_rate"] for r in records(config.run.dir) if r["kind"] == "train"}
    assert rates[2] == pytest.approx(1e-2)  # so does the schedule
    meta = Checkpoints(RunDir(config.run.dir)).saved(4).meta
    written = RunDir(config.run.dir).read_json("ancestry.json")
    assert meta["ancestry"] == written  # checkpoint 0 is gone
    assert written["fingerprint"] == fingerprint(moma_jax.load(seed.run.dir).params)
    assert (written["seed_run"], written["seed_step"]) == (seed.run.dir, 4)
    assert (written["seed_ffn"], written["ffn"]) == ("1t1i", "4t4i")
    assert moma_jax.train(config, quiet=True) == json.loads(json.dumps(summary))


@pytest.mark.slow
@pytest.mark.parametrize("at", long_but(3, of=[1, 3]))
def test_a_run_that_is_killed_goes_on(seed, undisturbed, tmp_path, monkeypatch, at):
    """Before its first own checkpoint, and after it."""
    calm, _ = undisturbed
    config = dataclasses.replace(calm, run=dataclasses.replace(calm.run, dir=str(tmp_path)))
    upcycle(seed.run.dir, config, quiet=True)

    def kill(number, batch):
        if number > at:
            raise Killed
        return batch

    with monkeypatch.context() as patch:
        changed_batches(patch, kill)
        with pytest.raises(Killed):
            moma_jax.train(config, quiet=True)
    assert Checkpoints(RunDir(tmp_path)).latest() == at // 2 * 2
    moma_jax.train(moma_jax.recipe(tmp_path), quiet=True)  # as `moma train NEW` does
    assert records(tmp_path) == records(calm.run.dir)
    jax.tree.map(np.testing.assert_array_equal, parameters(tmp_path), parameters(calm.run.dir))


@pytest.mark.slow
def test_a_converted_seed_has_no_position_in_the_data(tmp_path):
    """Parameters alone: any data of the same ids will do."""
    seed = tiny(tmp_path / "seed", model_ffn="dense")
    program = program_of(seed)
    with sharding.use_mesh(program.mesh):
        state = create_state(program, first_routing_state(seed))
    vocabulary = vocabulary_of(seed)
    meta = {"config": to_json(seed), "vocabulary": vocabulary.to_json(), "router": "choice",
            "hashes": {"vocabulary": vocabulary.hash, "image_codec": None},
            "counters": {"total": {"tokens": [0, 0], "wall_seconds": 0.0}, "interval": {}}}  # fmt: skip
    with Checkpoints(RunDir(seed.run.dir), write=True) as checkpoints:
        checkpoints.save(dataclasses.replace(state, opt_state={}), Saved(0, None, meta))
    RunDir(seed.run.dir).write_json("config.json", meta["config"])
    fields = {"data_seed": 7, "train_batch_rows": 4, "train_steps": 2, "train_eval_sets": ()}
    with pytest.raises(InputError, match="moments: .* never trained"):
        upcycle(seed.run.dir, grown(tmp_path / "new", **fields), moments="tile")
    config = grown(tmp_path / "new", **fields)
    ancestry = upcycle(seed.run.dir, config, quiet=True)
    assert (ancestry["seed_flops"], ancestry["seed_step"]) == (0, 0)
    assert moma_jax.train(config, quiet=True)["final"]["tokens"] == 2 * 64


@pytest.mark.slow
def test_two_generations_add_up(seed, tmp_path):
    few = {"train_eval_sets": ()}
    second, third = grown(tmp_path / "b", model_ffn="2t2i", train_steps=3, **few), grown(tmp_path / "c", **few)
    one = upcycle(seed.run.dir, second, quiet=True)
    moma_jax.train(second, quiet=True)
    two = upcycle(second.run.dir, third, quiet=True)
    costs = [flops_per_token(config) for config in (seed, second)]
    assert costs[0] != costs[1]
    assert (one["seed_tokens"], one["seed_flops"]) == (512, 512 * costs[0])
    assert (two["seed_tokens"], two["seed_flops"]) == (896, 512 * costs[0] + 384 * costs[1])
    assert two["seed_ancestry"] == one == RunDir(second.run.dir).read_json("ancestry.json")
    assert two["seed_step"] == 3 and two["seed_wall_seconds"] > one["seed_wall_seconds"] > 0
    counted = [[r for r in records(c.run.dir) if r["kind"] == "train"][-1] for c in (seed, second)]
    assert two["seed_real_tokens"] == sum(r["tokens"] for r in counted)
    assert two["seed_real_flops"] == pytest.approx(sum(r["flops"] for r in counted))


# What is refused ------------------------------------------------------------------------------------------------------

OTHER_TEXT = (dataclasses.replace(MODALITIES[0], quota=0.75), MODALITIES[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_layers": 3}, "model.layers: 2 -> 3"),
        ({"model_width": 32, "model_hidden": 32}, r"model.width: 16 -> 32; model.hidden: 16 -> 32"),
        ({"model_heads": 4}, "model.heads: 2 -> 4"),
        ({"model_norm": "pre"}, "model.norm: swin -> pre"),
        ({"data_seed": 5}, "data.seed: 0 -> 5"),
        ({"data_modalities": OTHER_TEXT}, "data.modalities.0.quota: 0.5 -> 0.75"),
        ({"train_batch_rows": 16}, "train.batch_rows: 8 -> 16"),
        ({"model_ffn": "1t1i"}, "1t1i -> 1t1i makes no experts"),
        ({"model_ffn": "8x"}, "1t1i -> 8x: the seed keeps modalities apart"),
        ({"model_ffn": "4t4i+1x"}, r"shared experts must be the seed's \({} -> {'shared': 1}\)"),
        ({"moments": "keep"}, "moments: 'keep' is none of reset, tile"),
        ({"perturb": -0.1}, "perturb: must be 0 or more"),
        ({"perturb": float("nan")}, "perturb: must be 0 or more"),
        ({"perturb_seed": -1}, "perturb_seed: must be 0 or more"),
        ({"mesh_tensor": 3, "mesh_data": 1}, "mesh"),
    ],
)
def test_refusals_leave_nothing(seed, tmp_path, fields, message):
    asked = {name: fields[name] for name in ("moments", "perturb", "perturb_seed") if name in fields}
    config = grown(tmp_path / "new", **{name: value for name, value in fields.items() if name not in asked})
    with pytest.raises(InputError, match=message) as error:
        upcycle(seed.run.dir, config, **asked)
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


def test_a_seed_that_is_none(seed, tmp_path):
    with pytest.raises(InputError, match="no checkpoint"):
        upcycle(str(tmp_path / "nowhere"), grown(tmp_path / "new"))
    assert not (tmp_path / "new").exists() and not (tmp_path / "nowhere").exists()


@pytest.mark.slow
def test_the_directory_must_be_free(seed, undisturbed, tmp_path):
    for taken in (seed, undisturbed[0]):
        before = {name: RunDir(taken.run.dir).read(name) for name in ("config.json", "metrics.jsonl")}
        with pytest.raises(InputError, match="run.dir: .* holds .*choose a new directory"):
            upcycle(seed.run.dir, grown(taken.run.dir))
        assert {name: RunDir(taken.run.dir).read(name) for name in before} == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds notes.txt"):
        upcycle(seed.run.dir, grown(tmp_path))
    with pytest.raises(InputError):
        upcycle(seed.run.dir, grown(tmp_path / "notes.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_one_that_was_interrupted_is_made_anew(seed, tmp_path, monkeypatch):
    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "wait", die)
        with pytest.raises(Killed):
            upcycle(seed.run.dir, grown(tmp_path), quiet=True)
    assert (tmp_path / "ancestry.json").exists() and not (tmp_path / "config.json").exists()
    upcycle(seed.run.dir, grown(tmp_path, model_capacity=1.0), quiet=True)
    assert moma_jax.load(str(tmp_path)).config.model.capacity == 1.0
    with pytest.raises(InputError, match="choose a new directory"):
        upcycle(seed.run.dir, grown(tmp_path), quiet=True)


def test_a_disk_that_refuses_leaves_nothing(seed, tmp_path, monkeypatch):
    def refuse(*_):
        raise InputError("checkpoints: cannot be written: no space left")

    monkeypatch.setattr(Checkpoints, "save", refuse)
    with pytest.raises(InputError, match="no space left"):
        upcycle(seed.run.dir, grown(tmp_path / "new"), quiet=True)
    assert not (tmp_path / "new").exists()


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command(seed, tmp_path, capsys):
    words = [seed.run.dir, "--model.ffn", "4t4i", "--run.dir", str(tmp_path / "new"), "--train.tokens", "1000"]
    ancestry = commands.run(["upcycle", *words, "--moments", "tile", "--perturb", "0.01", "--perturb-seed", "3"])
    config = moma_jax.recipe(tmp_path / "new")
    assert (config.model.router.gumbel, config.train.steps, config.train.tokens) == (True, None, 1000)
    assert config.optimizer == seed.optimizer and config.data == seed.data
    assert ancestry["perturbation"] == {"relative": 0.01, "seed": 3}
    out = capsys.readouterr().out
    assert "4t4i from" in out and f"loss {ancestry['jump']['difference']['loss']:.4f}" in out
    assert f"moma train {tmp_path / 'new'}" in out
    words[4] = str(tmp_path / "quiet")
    commands.run(["upcycle", *words, "--model.router.gumbel", "False"])
    assert moma_jax.recipe(tmp_path / "quiet").model.router.gumbel is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a run first"),
        (["RUN", "--run.dir", "NEW"], "model.ffn: 1t1i -> 1t1i makes no experts"),
        (["RUN", "--model.ffn", "4t4i"], "run.dir: name the directory"),
        (["RUN", "--model.ffn=4t4i", "--run.dir=NEW", "--perturbed", "1"], "no such option; did you mean --perturb"),
        (["RUN", "--model.ffn=4t4z", "--run.dir=NEW"], "modality 'z'"),
        (["NEW", "--model.ffn=4t4i", "--run.dir=NEW"], "no config.json here"),
        (["RUN", "--model.ffn=4t4i", "--run.dir=RUN"], "choose a new directory"),
    ],
)
def test_the_command_refuses_in_a_line(seed, tmp_path, words, message):
    places = {"RUN": seed.run.dir, "NEW": str(tmp_path / "new")}
    words = [places.get(w, w).replace("=NEW", f"={places['NEW']}").replace("=RUN", f"={places['RUN']}") for w in words]
    with pytest.raises(InputError, match=message) as error:
        commands.run(["upcycle", *words])
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())


# Other meshes ---------------------------------------------------------------------------------------------------------


def on_a_mesh(home, **mesh):
    config = dataclasses.replace(grown(home / "new", train_steps=2, train_eval_sets=()), mesh=MeshConfig(**mesh))
    upcycle(str(home / "seed"), config, moments="tile", perturb=0.01, quiet=True)
    return config


@pytest.mark.slow
def test_a_mesh_grows_the_same(seed, tmp_path):
    folders = [tmp_path / name for name in ("one", "eight")]
    for folder in folders:
        folder.mkdir()
        (folder / "seed").symlink_to(seed.run.dir)
    on_a_mesh(folders[0])
    output(spawn(__file__, folders[1], devices=8))
    one, eight = (jax.device_get(restored(str(folder / "new"), 0)) for folder in folders)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), one, eight)
    assert RunDir(folders[1] / "new").read_json("summary.json")["device"]["count"] == 4


if __name__ == "__main__":
    moma_jax.train(on_a_mesh(Path(sys.argv[1]), data=1, fsdp=2, expert=2), quiet=True)
