"""A checkpoint of one mesh goes on, exactly, on any other and on several processes."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from loopback import Processes, config_of

import moma_jax
from moma_jax import hosts, sharding
from moma_jax.config import MeshConfig
from moma_jax.config_json import from_json
from moma_jax.data.stream import open_stream
from moma_jax.model.decoder import first_routing_state
from moma_jax.runs.checkpoint import Checkpoints
from moma_jax.runs.directory import RunDir
from moma_jax.training.loop import whole_cursor
from moma_jax.training.step import abstract_state, compile_step, make_program, put

pytestmark = pytest.mark.long  # processes over loopback

SAVED_AT, STEPS = 2, 4
MESHES = {"one": {"data": 1}, "eight": {"data": 8}, "four_by_two": {"data": 4, "fsdp": 2}}
"""Beside two processes of one device each, which tensor crosses, so that both read all rows; the checkpoint is of 2 x 4
devices in one process."""


def one_mesh(config):
    """On config.mesh: the arrays of the first checkpoint are those that were saved; goes on from there by itself.

    Returns:
      {"losses": of the next steps, "cursors": after reading the checkpoint and after these steps}, as JSON.
    """
    program = make_program(config)
    with sharding.use_mesh(program.mesh), contextlib.closing(Checkpoints(RunDir(config.run.dir))) as checkpoints:
        state = checkpoints.restore(SAVED_AT, abstract_state(program, first_routing_state(config)))
        cursor = checkpoints.saved(SAVED_AT).cursor
        for leaf, whole in zip(jax.tree.leaves(state), _whole(config), strict=True):
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, whole[shard.index])
        step, losses = compile_step(program, state), []
        own = sharding.own_groups(program.mesh, config.train.batch_rows // config.data.group_rows)
        with open_stream(config, cursor=cursor, mine=own) as batches:
            for _, packed in zip(range(SAVED_AT, STEPS), batches, strict=False):
                state, report = step(state, put(packed.batch, program.mesh))
                losses.append(float(report.sums.cross_entropy_J.sum() / report.sums.weight_J.sum()))
        cursors = [{k: v.tolist() for k, v in each.items()} for each in (cursor, whole_cursor(packed.cursor))]
    return {"losses": losses, "cursors": cursors}


def _whole(config):
    """Every array of the train state as it was saved."""
    with np.load(Path(config.run.dir).parent / "whole.npz") as file:
        return [file[f"arr_{i}"] for i in range(len(file.files))]


def keep_whole(monkeypatch):
    """Has the first checkpoint's arrays also written to a file, as they were in memory."""
    save = Checkpoints.save

    def keeping(self, state, saved):
        if saved.step == SAVED_AT:
            np.savez(Path(self.path).parents[1] / "whole.npz", *map(np.asarray, jax.tree.leaves(state)))
        save(self, state, saved)

    monkeypatch.setattr(Checkpoints, "save", keeping)


def main(content, _):
    """A process of two; or, alone, the one that saves on its eight devices and restores on some of them."""
    config, results = from_json(content), {}
    hosts.join(config.hosts)
    if hosts.several():
        results["two_processes"] = one_mesh(config)
    else:
        with pytest.MonkeyPatch.context() as monkeypatch:
            keep_whole(monkeypatch)
            moma_jax.train(config, quiet=True)
        with contextlib.closing(Checkpoints(RunDir(config.run.dir))) as checkpoints:
            last = checkpoints.saved(STEPS).cursor
        results["saved"] = {"cursors": [None, {k: v.tolist() for k, v in last.items()}]}
        for name, sizes in MESHES.items():
            results[name] = one_mesh(dataclasses.replace(config, mesh=MeshConfig(**sizes)))
    if hosts.is_first():
        path = Path(config.run.dir).parent / "results.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | results))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    fields = {"train_steps": STEPS, "train_batch_rows": 16, "train_log_every": 1, "train_checkpoint_every": SAVED_AT}
    config = config_of(folder, "run", mesh_data=2, mesh_fsdp=4, **fields, train_eval_sets=())
    for mesh, count, devices in ((config.mesh, 1, 8), (MeshConfig(data=1, tensor=2), 2, 1)):
        there = dataclasses.replace(config, mesh=mesh)
        codes, outputs = Processes(there, count, devices=devices, script=__file__).ended()
        assert codes == [0] * count, outputs
    losses = [r["loss"] for r in moma_jax.read_metrics(config.run.dir) if r["kind"] == "train"]
    found = json.loads((folder / "results.json").read_text())
    return found | {"saved": found["saved"] | {"losses": losses[SAVED_AT:]}}


@pytest.mark.parametrize("name", [*MESHES, "two_processes"])
def test_a_run_goes_on_elsewhere(results, name):
    """Arrays are compared in the processes themselves."""
    there, saved = results[name], results["saved"]
    assert len(saved["losses"]) == STEPS - SAVED_AT
    assert there["losses"] == pytest.approx(saved["losses"], rel=1e-5)
    assert there["cursors"][0] == results["one"]["cursors"][0]
    assert there["cursors"][1] == saved["cursors"][1] != there["cursors"][0]


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
