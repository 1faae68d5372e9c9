"""What a checkpoint holds, which ones are kept, and what is refused."""

import contextlib
import dataclasses
import functools
import os
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moma_jax import sharding
from moma_jax.config import MeshConfig
from moma_jax.errors import InputError
from moma_jax.runs import checkpoint
from moma_jax.runs.checkpoint import Checkpoints, Saved, pack_arrays, unpack_arrays
from moma_jax.runs.directory import RunDir
from moma_jax.training.step import TrainState

CURSOR = {"lane": np.arange(3, dtype=np.int64) + 2**40, "waiting": {"kind": np.array([[1], [2]], np.uint8)}, "group": 7}


@pytest.fixture
def opened(tmp_path):
    """Opens the checkpoints of one directory; all are closed at the end."""
    with contextlib.ExitStack() as stack:

        def open_them(**settings):
            return stack.enter_context(contextlib.closing(Checkpoints(RunDir(tmp_path), **settings)))

        yield open_them


def state_at(step, routing_state=None):
    params = {"kernel_DV": jnp.full((4, 8), float(step)), "scale_D": jnp.arange(4.0)}
    moments = (jax.tree.map(lambda x: x / 3, params), jnp.int32(step))
    return TrainState(jnp.int32(step), params, moments, {} if routing_state is None else routing_state)


def target_of(state, place=None):
    place = sharding.replicated(sharding.make_mesh(MeshConfig(), 1)) if place is None else place
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


def saved_at(step):
    return Saved(step, CURSOR, {"router": "choice", "counters": {"total": {"tokens": [1, 2]}}})


def test_cursor_keeps_types_shapes_and_values():
    tree = {"a": {"b": np.array([], np.int64), "c": np.float32(1.5)}, "n": 3, "s": "text", "none": None}
    back = unpack_arrays(pack_arrays(tree))
    assert back["a"]["b"].dtype == np.int64 and back["a"]["b"].shape == (0,)
    assert back["a"]["c"].dtype == np.float32 and back["a"]["c"] == 1.5
    assert (back["n"], back["s"], back["none"]) == (3, "text", None)
    with pytest.raises(TypeError):
        pack_arrays({"x": np.array([object()])})


@pytest.mark.parametrize(
    "array", [["O", [1], "AAAA"], ["<i8", [10**12], ""], ["<i8", 1, ""], ["<i8", [-1], ""], ["<i8", [], "@"], [], "x"]
)
def test_what_is_no_array_is_refused(array):
    with pytest.raises(ValueError):
        unpack_arrays({"a": {"__array__": array}})


@pytest.mark.parametrize("routing_state", [{}, {"text": {"threshold_L": jnp.arange(2.0)}}])
def test_everything_comes_back(opened, routing_state):
    checkpoints = opened(keep_last=2, write=True)
    state = state_at(3, routing_state)
    checkpoints.save(state, saved_at(3))
    checkpoints.wait()
    found = opened()
    jax.tree.map(np.testing.assert_array_equal, found.restore(3, target_of(state)), state)
    saved = found.saved(3)
    jax.tree.map(np.testing.assert_array_equal, saved.cursor, CURSOR)
    assert saved.cursor["lane"].dtype == np.int64 and saved.meta["counters"] == {"total": {"tokens": [1, 2]}}
    place = sharding.replicated(sharding.make_mesh(MeshConfig(), 1))
    jax.tree.map(np.testing.assert_array_equal, found.routing_state(3, place), routing_state)


def test_a_state_may_be_donated_once_save_returns(opened):
    checkpoints = opened(keep_last=2, write=True)
    spoil = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    state = jax.tree.map(lambda x: x + 0, state_at(3))
    checkpoints.save(state, saved_at(3))
    for _ in range(3):
        state = spoil(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(3, target_of(state_at(3))), state_at(3))


def test_newest_and_milestones_are_kept(opened):
    checkpoints = opened(keep_last=2, keep_every=4, write=True)
    for step in range(1, 10):
        checkpoints.save(state_at(step), saved_at(step))
    checkpoints.wait()
    assert opened().steps() == [4, 8, 9]


def test_a_half_written_checkpoint_is_not_there(opened, tmp_path):
    checkpoints = opened(keep_last=2, write=True)
    checkpoints.save(state_at(1), saved_at(1))
    checkpoints.wait()
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "1", root / "2.orbax-checkpoint-tmp")
    shutil.rmtree(root / "2.orbax-checkpoint-tmp" / "meta")
    assert opened().latest() == 1
    again = opened(keep_last=2, write=True)  # the process that goes on sweeps up
    assert again.latest() == 1
    again.save(state_at(2), saved_at(2))
    again.wait()
    assert opened().steps() == [1, 2]


def test_parameters_alone_are_read_and_compared(opened):
    checkpoints = opened(keep_last=2, write=True)
    checkpoints.save(state_at(1), saved_at(1))
    checkpoints.wait()
    target = target_of(state_at(1).params)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_params(1, target), state_at(1).params)
    other = target | {"kernel_DV": jax.ShapeDtypeStruct((4, 9), jnp.float32)}
    with pytest.raises(InputError, match="init_from.*kernel_DV"):
        checkpoints.restore_params(1, other)


def test_files_that_are_cut_off_are_said_in_a_line(opened, tmp_path):
    checkpoints = opened(keep_last=2, write=True)
    checkpoints.save(state_at(1), saved_at(1))
    checkpoints.wait()
    state = tmp_path / "checkpoints" / "1" / "state"
    os.truncate(state / "_METADATA", 100)
    with pytest.raises(InputError, match=r"checkpoints/1: damaged \(.*\); move it away") as error:
        opened().restore_params(1, target_of(state_at(1).params))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["_METADATA", "array_metadatas/process_0", "manifest.ocdbt", "d"])
@pytest.mark.parametrize("damage", ["cut", "empty", "byte"])
def test_a_state_that_is_damaged_is_not_called_another_models(opened, tmp_path, name, damage):
    checkpoints = opened(write=True)
    checkpoints.save(state_at(1), saved_at(1))
    checkpoints.wait()
    path = tmp_path / "checkpoints" / "1" / "state" / name
    path = max(path.iterdir(), key=lambda each: each.stat().st_size) if path.is_dir() else path
    content = path.read_bytes()
    half = len(content) // 2
    flipped = content[:half] + bytes([content[half] ^ 128]) + content[half + 1 :]
    path.write_bytes({"cut": content[:half], "empty": b"", "byte": flipped}[damage])
    with pytest.raises(InputError, match=r"checkpoints/1: damaged \(.*\); move it away"):
        opened().restore(1, target_of(state_at(1)))


def test_arrays_of_another_model_are_no_damage(opened):
    checkpoints = opened(write=True)
    checkpoints.save(state_at(1), saved_at(1))
    checkpoints.wait()
    other = dataclasses.replace(state_at(1), params={"kernel_DV": jnp.zeros((4, 9)), "scale_D": jnp.zeros(4)})
    with pytest.raises(InputError, match="its arrays are not those of this run"):
        opened().restore(1, target_of(other))


def test_restores_onto_another_sharding(opened):
    checkpoints = opened(keep_last=2, write=True)
    checkpoints.save(state_at(1), saved_at(1))
    checkpoints.wait()
    mesh = sharding.make_mesh(MeshConfig(), 1)
    split = NamedSharding(mesh, PartitionSpec("data"))
    target = target_of(state_at(1))
    place = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split))
    restored = checkpoints.restore(1, target.replace(params=place(target.params)))
    assert restored.params["kernel_DV"].sharding == split
    jax.tree.map(np.testing.assert_array_equal, restored, state_at(1))


def test_arrays_are_stored_in_small_chunks_and_read_a_bounded_part_at_a_time(opened, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 64)
    checkpoints = opened(keep_last=2, write=True)
    checkpoints.save(state_at(1), saved_at(1))
    checkpoints.wait()
    assert checkpoints._shapes(1)["params"]["kernel_DV"].storage.chunk_shape == (4, 4)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, target_of(state_at(1))), state_at(1))
    target = target_of(state_at(1))
    assert checkpoint._in_flight_gb(target) == checkpoint.RESTORE_GB
    place = target.params["kernel_DV"].sharding
    target.params["kernel_DV"] = jax.ShapeDtypeStruct((1 << 20, 5000), jnp.float32, sharding=place)
    assert checkpoint._in_flight_gb(target) == 42  # twice 21 GB


@pytest.fixture
def faults(monkeypatch):
    """The next saves fail so many times, just before they would appear; the count can be set."""
    monkeypatch.setattr(checkpoint, "PAUSE", 0.01)
    left, write = [0], checkpoint.write_contents

    def failing(*arguments, **options):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        return write(*arguments, **options)

    monkeypatch.setattr(checkpoint, "write_contents", failing)
    return left


def test_the_last_save_is_tried_again_at_once(opened, faults):
    told = []
    checkpoints = opened(keep_last=2, write=True, retries=3, tell=lambda *each: told.append(each))
    faults[0] = 2
    checkpoints.save(state_at(1), saved_at(1))
    checkpoints.wait()
    assert opened().steps() == [1] and [step for step, _ in told] == [1, 1]
    assert all("No space left on device" in event for _, event in told)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, target_of(state_at(1))), state_at(1))
    ((step, size, seconds),) = checkpoints.written()
    assert step == 1 and size > 1000 and seconds > 0 and not checkpoints.written()


def test_a_save_that_failed_is_noticed_and_the_next_one_counts(opened, faults):
    checkpoints = opened(keep_last=2, write=True, retries=3)
    faults[0] = 1
    checkpoints.save(state := state_at(1), saved_at(1))
    end = time.monotonic() + 30
    while not checkpoints.failed() and time.monotonic() < end:
        time.sleep(0.01)
    jax.tree.map(lambda x: x.delete(), state)  # training went on and donated it
    checkpoints.wait()
    assert opened().steps() == []
    checkpoints.save(state_at(2), saved_at(2))
    checkpoints.wait()
    assert opened().steps() == [2] and not checkpoints.failed()


def test_too_many_failed_saves_in_a_row_end_it(opened, faults):
    checkpoints = opened(keep_last=2, write=True, retries=1)
    faults[0] = 2
    checkpoints.save(state_at(1), saved_at(1))
    with pytest.raises(InputError, match="checkpoints: cannot be written: .*No space left"):
        checkpoints.wait()
    checkpoints.save(state_at(2), saved_at(2))
    checkpoints.wait()
    assert opened().steps() == [2]


def test_a_last_save_that_fails_leaves_no_thread_behind(opened, faults):
    before = {thread.name for thread in threading.enumerate() if not thread.daemon}
    checkpoints = opened(write=True, retries=1)
    faults[0] = 2
    checkpoints.save(state_at(1), saved_at(1))
    with pytest.raises(InputError, match="cannot be written"):
        checkpoints.close()
    checkpoints.close()  # once is enough
    assert {thread.name for thread in threading.enumerate() if not thread.daemon} <= before


def test_the_cause_of_a_failed_save_holds_no_credentials():
    error = OSError("404: http://store/upload?name=run/1&key=AIzaSECRET&upload_id=7")
    assert checkpoint.cause_of(error) == "404: http://store/upload?name=run/1&key=...&upload_id=7"
