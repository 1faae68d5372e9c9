"""Checkpoints that carry everything: state, data cursor, counters, config, vocabulary, versions (Orbax, asynchronous).

A checkpoint is a directory `checkpoints/STEP/` with three items: `state` (arrays, sharded, restorable onto any mesh),
`cursor` (where the data stream stands) and `meta` (plain values). It appears under its final name only when all of it
is written, so one that a kill interrupted is never seen.

Several processes write one checkpoint together, each the arrays of its own devices, and read what theirs need: mesh and
number of processes may be others each time.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import logging
import math
import os
import re
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from moma_jax import hosts
from moma_jax.errors import InputError
from moma_jax.fields import Count, read, shown
from moma_jax.runs.directory import RunDir
from moma_jax.storage.directory import first_line
from moma_jax.storage.lease import LeaseLost

FORMAT_VERSION = 1
SAVE_GB, RESTORE_GB = 32, 8
CHUNK_BYTES = 64 << 20
"""Arrays are stored in chunks of at most so much, so that a device reads little beside its own piece."""


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


class Checkpoints:
    """The checkpoints of one run. Writing, `restore` and `restore_params` are done by all processes together.

    Memory of a host: saving copies what its devices hold (what several of them hold, once), so that training goes on,
    and has at most SAVE_GB of that in the hands of the writer. Restoring has at most RESTORE_GB in flight, whatever
    the model's size, or twice the largest piece of an array that one device gets where that is more.
    """

    def __init__(
        self, run: RunDir, *, keep_last: int | None = None, keep_every: int | None = None, write: bool = False
    ):
        """Opens them; with `write`, keeps the newest `keep_last` and every multiple of `keep_every`."""
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports every phase; errors are raised here
        keep = [policies.LatestN(keep_last)] if keep_last else []
        keep += [policies.EveryNSteps(keep_every)] if keep_every else []
        options = ocp.CheckpointManagerOptions(
            create=write,
            read_only=not write,
            cleanup_tmp_directories=write,
            preservation_policy=policies.AnyPreservationPolicy(keep) if write and keep_last else None,
        )
        if not write and hosts.several():  # each process looks for itself
            me = jax.process_index()
            options.multiprocessing_options = ocp.options.MultiprocessingOptions(me, active_processes={me})
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add("state", ocp.args.StandardSave, ocp.StandardCheckpointHandler(save_concurrent_gb=SAVE_GB))
        self.path = run.join("checkpoints")
        require_plain(self.path)
        self._run = run
        self._manager = ocp.CheckpointManager(self.path, options=options, handler_registry=handlers)

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

    def save(self, state: Any, saved: Saved) -> None:
        """Begins to write a checkpoint; the arrays are copied before this returns, so the state may be donated.

        Raises:
          InputError: this one, or the one before, cannot be written.
          LeaseLost: another process became the directory's writer.
        """
        self._run.require_writer()
        arrays = _as_dict(state)
        in_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), arrays)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays, in_chunks),
            cursor=ocp.args.JsonSave(pack_arrays(saved.cursor)),
            meta=ocp.args.JsonSave({"format_version": FORMAT_VERSION, **saved.meta}),
        )
        with self._writing():
            self._manager.save(saved.step, args=items)

    def restore(self, step: int, target: Any) -> Any:
        """The state of a checkpoint, with the shapes, types and shardings of `target`, a dataclass of arrays.

        Raises:
          InputError: the checkpoint holds other arrays than `target`.
        """
        handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=_in_flight_gb(target))
        try:
            with ocp.Checkpointer(handler) as reader:
                args = ocp.args.StandardRestore(_as_dict(target))
                restored = reader.restore(f"{self.where(step)}/state", args=args)
        except ValueError as error:  # Orbax prints both trees
            raise InputError(
                f"{self.where(step)}: its arrays are not those of this run: another version of moma_jax, or "
                "another routing rule, made it; begin a new run with run.init_from"
            ) from error
        return type(target)(**restored)

    def restore_params(self, step: int, target: Any) -> Any:
        """Only the parameters of a checkpoint, with the shapes, types and shardings of `target`."""
        self._compare(step, target)
        return self._restore_part(step, {"params": target})["params"]

    def restore_param(self, step: int, path: str, target: Any) -> Any:
        """One parameter of a checkpoint, "layers/ffn_norm/scale_D", with the shape, type and sharding of `target`."""
        names = ("params", *path.split("/"))
        part = functools.reduce(lambda inner, name: {name: inner}, reversed(names), target)
        return functools.reduce(lambda tree, name: tree[name], names, self._restore_part(step, part))

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
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of threads; InputError where something cannot be written."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self):
        """What the disk refuses, as one line."""
        try:
            yield
        except (OSError, ValueError) as error:
            cause = first_line(error).rpartition(": ")[2]  # TensorStore says first where, then why
            raise InputError(f"{self.path}: cannot be written: {cause}") from error

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
        tree = self._shapes(step)["params"]
        have = {jax.tree_util.keystr(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        want = {jax.tree_util.keystr(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(target)}
        wrong = sorted(path for path in have.keys() | want.keys() if have.get(path) != want.get(path))
        if wrong:
            path = wrong[0]
            raise InputError(
                f"run.init_from: {self.where(step)} has {have.get(path)} at {path}, this model {want.get(path)}; "
                "give both runs the same model section"
            )


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
