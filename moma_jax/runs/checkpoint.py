"""Checkpoints that carry everything: state, data cursor, counters, config, vocabulary, versions (Orbax, asynchronous).

A checkpoint is a directory `checkpoints/STEP/` with three items: `state` (arrays, sharded, restorable onto any mesh),
`cursor` (where the data stream stands) and `meta` (plain values). It appears under its final name only when all of it
is written, so one that a kill interrupted is never seen.

Before it appears, what was written is read back and listed by size and CRC-32C in contents.json (`storage.contents`),
and on an object store the lease is asked for once more. A save that failed is tried again with the state of then.

Several processes write one checkpoint together, each the arrays of its own devices, and read what theirs need: mesh and
number of processes may be others each time.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, TypedDict

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import checkpoint_managers as policies

from moma_jax import hosts
from moma_jax.addresses import without_credentials
from moma_jax.errors import InputError
from moma_jax.fields import Count, read, shown
from moma_jax.runs.directory import RunDir
from moma_jax.storage.contents import read_contents, verify, write_contents
from moma_jax.storage.directory import Directory, first_line
from moma_jax.storage.lease import LeaseLost

FORMAT_VERSION = 1
SAVE_GB, RESTORE_GB = 32, 8
CHUNK_BYTES = 64 << 20
"""Arrays are stored in chunks of at most so much, so that a device reads little beside its own piece."""
PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the last save is tried again, doubled each time."""
AFTER_LIST = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""Files that Orbax writes after the list, and nobody needs to restore."""


def belongs_to_checkpoint(name: str) -> bool:
    """Whether a checkpoint's list names a file."""
    return name not in AFTER_LIST


class Meta(TypedDict):
    """The item meta, as far as every kind of run has it."""

    config: NotRequired[dict[str, Any]]
    vocabulary: NotRequired[dict[str, Any]]
    hashes: NotRequired[dict[str, str | None]]
    counters: NotRequired[dict[str, Any]]
    ancestry: NotRequired[dict[str, Any]]
    select: NotRequired[str]


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds beside the train state.

    Attributes:
      step: updates made.
      cursor: the data stream's cursor.
      meta: plain values: config, vocabulary and its hash, router, versions, counters.
    """

    step: int
    cursor: Any
    meta: dict[str, Any]


def require_plain(path: str) -> None:
    """InputError for a path that Orbax, which looks files up by patterns, could write to and not read from."""
    whole = path if "://" in path else os.path.abspath(path)
    if marks := [mark for mark in "[]*?" if mark in whole]:
        raise InputError(
            f"run.dir: {whole.removesuffix('/checkpoints')} has {' '.join(marks)} in it, where checkpoints cannot be "
            "read again; name another directory"
        )


class Written(NamedTuple):
    """A checkpoint that was written: of which step, bytes, and seconds to its list, mostly beside training."""

    of_step: int
    bytes: int
    seconds: float


class _StateHandler(ocp.StandardCheckpointHandler):
    """Orbax's. It merges what the processes wrote as a listing shows it, and would leave out what is not shown yet."""

    def __init__(self, run: RunDir, file_bytes: int | None):
        super().__init__(save_concurrent_gb=SAVE_GB)
        self._run, self._file_bytes = run, file_bytes

    async def async_save(self, directory: Any, *_: Any, args: ocp.args.StandardSave, **__: Any) -> Any:
        """Orbax's, in files of a size, which its own arguments cannot say: a file is in memory until it is full."""
        settings = {"ocdbt_target_data_file_size": self._file_bytes} if self._file_bytes else {}
        own = ocp.args.PyTreeSave(args.item, args.save_args, **settings)
        return await self._impl.async_save(directory, args=own)

    def finalize(self, directory: Any) -> None:
        self._run.await_listing()
        super().finalize(directory)


class Checkpoints:
    """The checkpoints of one run. Writing, `restore` and `restore_params` are done by all processes together.

    Memory of a host: saving copies what its devices hold (what several of them hold, once), so that training goes on,
    and has at most SAVE_GB of that in the hands of the writer. Restoring has at most RESTORE_GB in flight, whatever
    the model's size, or twice the largest piece of an array that one device gets where that is more.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        write: bool = False,
        retries: int = 0,
        file_bytes: int | None = None,
        tell: Callable[[int, str], None] = lambda step, event: None,
    ):
        """Opens them.

        Args:
          write: whether to write, and then keep the newest `keep_last` and every multiple of `keep_every`.
          retries: failed saves in a row that are put up with. tell: is given the step and cause of each.
          file_bytes: of a file of arrays, some of which are in memory at a time; Orbax's own where None.
        """
        for name in ("absl", "gcsfs"):  # Orbax reports every phase, gcsfs every attempt; errors are raised here
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.path = run.join("checkpoints")
        require_plain(self.path)
        self._run, self._retries, self._tell = run, retries, tell
        self._failed = 0  # saves in a row
        self._newest: tuple[Any, Saved] | None = None  # what the last save was given
        self._began, self._lost, self._closed = 0.0, False, False
        self._written: list[Written] = []
        self._file_bytes = file_bytes
        self._open = functools.partial(self._opened, keep_last, keep_every, write)
        self._manager = self._open()

    def _opened(self, keep_last: int | None, keep_every: int | None, write: bool) -> ocp.CheckpointManager:
        keep = [policies.LatestN(keep_last)] if keep_last else []
        keep += [policies.EveryNSteps(keep_every)] if keep_every else []
        options = ocp.CheckpointManagerOptions(
            create=write,
            read_only=not write,
            cleanup_tmp_directories=write,
            preservation_policy=policies.AnyPreservationPolicy(keep) if write and keep_last else None,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._before_commit),
        )
        if not write and hosts.several():  # each process looks for itself
            me = jax.process_index()
            options.multiprocessing_options = ocp.options.MultiprocessingOptions(me, active_processes={me})
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add("state", ocp.args.StandardSave, _StateHandler(self._run, self._file_bytes))
        return ocp.CheckpointManager(self.path, options=options, handler_registry=handlers)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, *error: object) -> None:
        # One that fails among several must not wait for the others, who may wait for it; one that lost its lease must
        # not remove checkpoints of before.
        if kind in (None, SystemExit) or not (hosts.several() or kind is LeaseLost):
            self.close()

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints."""
        return sorted(self._manager.all_steps())

    def where(self, step: int) -> str:
        """Directory of the checkpoint of `step`."""
        return f"{self.path}/{step}"

    def require_whole(self, step: int) -> None:
        """Reads a checkpoint against its list; InputError where a file is not as it was written."""
        found = verify(Directory(self.where(step)))
        if found is not None and found.damages:
            raise InputError(f"{self.where(step)}: damaged ({' '.join(found.damages[0])}); move it away")

    def size(self, step: int) -> str:
        """What restoring a checkpoint reads at most, in words."""
        sizes = [size for size, _ in (read_contents(Directory(self.where(step))) or {}).values()]
        return f"{sum(sizes) / 1e9:.3f} GB in {len(sizes)} files" if sizes else "of unknown size"

    def save(self, state: Any, saved: Saved) -> None:
        """Begins to write a checkpoint; the arrays are copied before this returns, so the state may be donated.

        Raises:
          InputError: this one, or the one before, cannot be written.
          LeaseLost: another process became the directory's writer.
        """
        self._run.require_writer()
        self._settle()
        self._newest = state, saved
        self._begin()

    def failed(self) -> bool:
        """Whether the newest save came to nothing, so that another should begin; does not wait."""
        if not self._manager.is_saving_in_progress():
            self._settle()
        return self._lost

    def written(self) -> list[Written]:
        """What process 0 wrote since it was asked last; a checkpoint counts once it has appeared."""
        last = self._newest[1].step if self._manager.is_saving_in_progress() else None
        written = []
        while self._written and self._written[0].of_step != last:
            written.append(self._written.pop(0))
        return written

    def _begin(self) -> None:
        """Begins to write the newest state; a failure is counted."""
        state, saved = self._newest
        arrays = _as_dict(state)
        in_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), arrays)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays, in_chunks),
            cursor=ocp.args.JsonSave(pack_arrays(saved.cursor)),
            meta=ocp.args.JsonSave({"format_version": FORMAT_VERSION, **saved.meta}),
        )
        with self._counting():
            if self._lost:
                self._reopen()
            self._began = time.monotonic()
            self._manager.save(saved.step, args=items)
            self._lost = False

    def _settle(self) -> None:
        """Waits for what was begun; a failure is counted."""
        with self._counting():
            self._manager.wait_until_finished()

    def _reopen(self) -> None:
        """Leaves a manager that failed, with what it left behind."""
        with contextlib.suppress(Exception):  # it says again what it said before
            self._manager.close()
        self._manager = self._open()

    def _before_commit(self) -> None:
        """Lists what was written; called by the thread of process 0 that then lets the checkpoint appear."""
        self._run.require_writer()
        step = self._newest[1].step
        names = {name.partition("/")[0] for name in Directory(self.path).names(str(step))}
        unfinished = max((name for name in names if name.startswith(f"{step}.")), default=str(step))  # a disk's is "7."
        size = write_contents(Directory(f"{self.path}/{unfinished}"), belongs=belongs_to_checkpoint)
        self._written.append(Written(step, size, time.monotonic() - self._began))
        self._failed = 0

    @contextlib.contextmanager
    def _counting(self):
        """Counts a failed save and tells of it; InputError where there were more in a row than are put up with."""
        before = sys.exc_info()[1]  # a run that ends by another error waits for its last save
        try:
            yield
        except LeaseLost:
            raise
        except Exception as error:  # whatever the disk, the store and the libraries between make of it
            self._failed, self._lost = self._failed + 1, True
            if self._failed > self._retries:
                raise InputError(f"{self.path}: cannot be written: {cause_of(error, before)}") from error
            step = self._newest[1].step if self._newest else 0
            self._tell(step, f"checkpoint of step {step} not written, to be tried again: {cause_of(error, before)}")

    def restore(self, step: int, target: Any) -> Any:
        """The state of a checkpoint, with the shapes, types and shardings of `target`, a dataclass of arrays.

        Raises:
          InputError: the checkpoint holds other arrays than `target`, or is damaged.
        """
        self._require_same_arrays(step, _as_dict(target))
        handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=_in_flight_gb(target))
        with self._reading(step), ocp.Checkpointer(handler) as reader:
            args = ocp.args.StandardRestore(_as_dict(target))
            restored = reader.restore(f"{self.where(step)}/state", args=args)
        return type(target)(**restored)

    def restore_params(self, step: int, target: Any) -> Any:
        """Only the parameters of a checkpoint, with the shapes, types and shardings of `target`."""
        self._compare(step, target)
        return self._restore_part(step, {"params": target})["params"]

    def copy_param(self, step: int, path: str, into: np.ndarray) -> None:
        """Copies one parameter, "layers/ffn_norm/scale_D", into an array of its shape, a stored chunk at a time."""
        store = {"driver": "ocdbt", "base": Directory(self.where(step)).kvstore("state")}
        spec = {"driver": "zarr", "kvstore": store | {"path": ".".join(("params", *path.split("/")))}}
        with self._reading(step):
            array = ts.open(spec, read=True).result()
            if array.shape != into.shape:
                raise ValueError(f"{path} has shape {array.shape}, not {into.shape}")
            steps = array.chunk_layout.read_chunk.shape
            for corner in itertools.product(*map(range, (0,) * array.rank, array.shape, steps)):
                ends = np.minimum(np.add(corner, steps), array.shape)
                part = tuple(map(slice, corner, ends.tolist()))
                into[part] = array[part].read().result()

    def saved(self, step: int) -> Saved:
        """Cursor and plain values of a checkpoint; InputError where it is none of ours, or its format is another."""
        try:
            meta = self._restore(step, "meta", ocp.args.JsonRestore())
            version = read(Meta, meta).get("format_version")
            cursor = unpack_arrays(self._restore(step, "cursor", ocp.args.JsonRestore()))
        except (KeyError, ValueError, OSError, RecursionError) as error:
            raise InputError(
                f"{self.where(step)}: no checkpoint of moma, or damaged ({first_line(error)}); move it away"
            ) from error
        if version != FORMAT_VERSION:
            raise InputError(
                f"{self.where(step)}: checkpoint format {shown(version)}; this version of moma_jax reads "
                f"{FORMAT_VERSION}"
            )
        return Saved(step, cursor, meta)

    def wait(self) -> None:
        """Returns when everything begun is written; InputError where it cannot be."""
        self._settle()
        while self._lost and self._newest_is_there():
            time.sleep(min(PAUSE * 2**self._failed, LONGEST_PAUSE))
            self._begin()
            self._settle()

    def close(self) -> None:
        """Waits and lets go of threads, once; InputError where something cannot be written."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._newest is not None:
                self.wait()
        except BaseException:
            with contextlib.suppress(Exception):  # its threads would keep the process
                self._manager.close()
            raise
        try:
            self._manager.close()
        except Exception as error:
            raise InputError(f"{self.path}: cannot be written: {cause_of(error)}") from error

    def _newest_is_there(self) -> bool:
        """Whether no later step took over the arrays of the newest save."""
        arrays = jax.tree.leaves(_as_dict(self._newest[0])) if self._newest else []
        return bool(arrays) and not any(isinstance(x, jax.Array) and x.is_deleted() for x in arrays)

    def _restore(self, step: int, item: str, args: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]

    def routing_state(self, step: int, placed: jax.sharding.Sharding) -> Any:
        """The routing rules' state of a checkpoint, placed as told."""
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), self._shapes(step)["routing_state"]
        )
        return self._restore_part(step, {"routing_state": target})["routing_state"] if jax.tree.leaves(target) else {}

    def _shapes(self, step: int) -> Any:
        """The saved state's tree with shapes and types."""
        with self._reading(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.metadata(f"{self.where(step)}/state").item_metadata.tree

    def _restore_part(self, step: int, target: dict[str, Any]) -> dict[str, Any]:
        args = ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
        )
        handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_in_flight_gb(target))
        with self._reading(step), ocp.Checkpointer(handler) as reader:
            return reader.restore(f"{self.where(step)}/state", args=args)

    @contextlib.contextmanager
    def _reading(self, step: int):
        """What Orbax makes of files that are cut off or gone, as one line."""
        try:
            yield
        except Exception as error:
            cause = error.__cause__ if type(error) is Exception else error  # for an array Orbax raises a bare one
            if not isinstance(cause, (AttributeError, KeyError, OSError, ValueError)):
                raise
            raise InputError(f"{self.where(step)}: damaged ({first_line(cause)}); move it away") from error

    def _compare(self, step: int, target: Any) -> None:
        """InputError where the checkpoint's parameters are not those of `target`."""
        have, want = (_shapes_by_path(tree) for tree in (self._shapes(step)["params"], target))
        wrong = sorted(path for path in have.keys() | want.keys() if have.get(path) != want.get(path))
        if wrong:
            path = wrong[0]
            raise InputError(
                f"run.init_from: {self.where(step)} has {have.get(path)} at {path}, this model {want.get(path)}; "
                "give both runs the same model section"
            )

    def _require_same_arrays(self, step: int, target: Any) -> None:
        """InputError where the checkpoint's arrays are not those of `target`; what Orbax raises later is damage."""
        simple = {"simple": True, "separator": "/"}  # optax's states have fields, which are saved as keys
        if _shapes_by_path(self._shapes(step), **simple) != _shapes_by_path(target, **simple):
            raise InputError(
                f"{self.where(step)}: its arrays are not those of this run: another version of moma_jax, or "
                "another routing rule, made it; begin a new run with run.init_from"
            )


def _shapes_by_path(tree: Any, **how: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path, **how): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def cause_of(error: BaseException, before: BaseException | None = None) -> str:
    """What lies under an error of a save, in one line: its own kind and words, not only an address, and of that no
    credentials, as it is recorded. `before`: an error that was there already, and is no cause of it."""
    while (cause := error.__cause__ or error.__context__) not in (None, before) and not isinstance(error, OSError):
        error = cause
    words = first_line(error).rpartition(": ")[2] if isinstance(error, ValueError) else first_line(error)
    plain = isinstance(error, InputError | OSError | ValueError) and not words.startswith("http")
    return without_credentials(words if plain else f"{type(error).__name__} {words}".strip())


def _in_flight_gb(target: Any) -> int:
    """What may be read at a time, in GB; each array of `target` has a sharding."""
    pieces = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(target)]
    return max(RESTORE_GB, 1 + 2 * max(pieces, default=0) // 10**9)


def _as_dict(state: Any) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def pack_arrays(tree: Any) -> Any:
    """A nest of dictionaries of arrays and plain values as JSON values, exactly, whatever the arrays' types."""
    if isinstance(tree, dict):
        return {str(key): pack_arrays(value) for key, value in tree.items()}
    if tree is None or isinstance(tree, (str, bool, int, float)):
        return tree
    array = np.asarray(tree)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"cannot save an array of {array.dtype}")
    return {"__array__": [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode()]}


def unpack_arrays(tree: Any) -> Any:
    """The inverse of `pack_arrays`; ValueError where an array is none of its."""
    if not isinstance(tree, dict):
        return tree
    if "__array__" not in tree:
        return {key: unpack_arrays(value) for key, value in tree.items()}
    dtype, shape, content = read(tuple[str, list[Count], str], tree["__array__"], "__array__")
    if not re.fullmatch("[<>|][biuf][0-9]{1,2}", dtype):
        raise ValueError(f"an array of {shown(dtype)}")
    return np.frombuffer(base64.b64decode(content, validate=True), dtype).reshape(shape).copy()
