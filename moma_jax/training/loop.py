"""The training loop: a config in, a run directory with checkpoints, metrics and a summary out.

A run started in a directory that has a checkpoint goes on from it, exactly: batches, losses and parameters are those
of a run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from moma_jax import hosts, sharding
from moma_jax.config import Config, EvalSet, HostsConfig, resolve
from moma_jax.config_json import to_json
from moma_jax.cost import flops_per_token, peak_flops, total_steps
from moma_jax.data.store import open_store
from moma_jax.data.stream import merge_cursors, open_stream, require_held_out, vocabulary_of
from moma_jax.errors import InputError, RunError
from moma_jax.evaluation.evaluate import Evaluator, gap_percent, scheduled, unigram
from moma_jax.evaluation.tables import held_out_lines
from moma_jax.runs.checkpoint import Checkpoints, Saved, pack_arrays, unpack_arrays
from moma_jax.runs.directory import RunDir, command, commit, versions
from moma_jax.runs.journal import Journal, finite, open_journal, read_metrics
from moma_jax.runs.progress import View
from moma_jax.runs.resume import finished, require_resumable, select_name
from moma_jax.runs.status import last_good, watched
from moma_jax.training.metrics import Hardware, Meter, step_sums, threshold_figures, train_record
from moma_jax.training.step import (
    Program,
    TrainState,
    abstract_params,
    abstract_state,
    compile_step,
    create_state,
    first_routing_state,
    make_program,
    put,
    with_dtype,
)


def train(
    config: Config, *, select: Callable | None = None, routing_state: Any = None, quiet: bool = False
) -> dict[str, Any]:
    """Trains, or goes on training, the run in `config.run.dir`; every process of a run calls it (`config.hosts`).

    Args:
      config: a resolved config (`moma_jax.recipe`).
      select: a routing function of your own for experts (see model/routing.py); its name goes into the run's record.
        Mixture of depths keeps the rule of the config.
      routing_state: its first state, stacked over layers, by group of experts; None where it has none.
      quiet: print nothing.

    Returns:
      The run's summary, as in summary.json.

    Raises:
      InputError: the config contradicts itself, the run in this directory was begun with another one, or it holds
        files of another program; nothing was written then.
      RunError: the loss stopped being a number (`train.on_nan`), the data ended, or files cannot be read or written
        any more.
      SystemExit: 143 after SIGTERM, 130 after SIGINT, when the checkpoint is written.
    """
    hosts.join(config.hosts)
    config = with_dtype(resolve(dataclasses.replace(config, hosts=HostsConfig())))  # who is who is no part of a run
    if config.run.dir is None:
        raise InputError("run.dir: name the directory of the run, such as runs/first")
    if config.run.compilation_cache is not None:
        use_compilation_cache(config.run.compilation_cache)
    run = RunDir(config.run.dir)
    with contextlib.ExitStack() as held, watched(run, total_steps(config)) as status:
        summary = hosts.by_first(lambda: _take(run, config, select, quiet, held))
        if summary is not None:
            View(0, 0, quiet=quiet).say(f"{config.run.dir}: training is complete")
            return summary
        vocabulary = vocabulary_of(config)
        require_held_out(config)
        program = make_program(config, vocabulary, select)
        with sharding.use_mesh(program.mesh), signals() as received, contextlib.ExitStack() as cleanup:
            session = _Session(run, program, select_name(select), vocabulary, status, cleanup)
            session.begin(first_routing_state(config, select) if routing_state is None else routing_state, quiet)
            session.run_steps(received)
            return session.finish()


def _take(run: RunDir, config: Config, select: Callable | None, quiet: bool, held: contextlib.ExitStack) -> Any:
    """Makes the run this one's, as long as `held` lasts, and what it needs; the summary of a run that is complete."""
    require_resumable(config, select)
    held.enter_context(run.locked())
    if (summary := finished(run, config)) is None:
        prepare_missing_stores(config, progress=not quiet)
    return summary


class _Session:
    """One process's share of a run: the state, where it stands, and where its records go."""

    def __init__(self, run: RunDir, program: Program, select: str, vocabulary, status, cleanup: contextlib.ExitStack):
        self.run, self.program, self.config = run, program, program.config
        self.select, self.vocabulary, self.status, self.cleanup = select, vocabulary, status, cleanup
        self.total = total_steps(self.config)
        self.hashes = hashes_of(self.config, vocabulary)

    def begin(self, routing_state: Any, quiet: bool) -> None:
        """Restores the newest checkpoint or makes a fresh state; opens data and journal there; compiles."""
        config = self.config
        self.evaluate = Evaluator(self.program, self.vocabulary, scheduled(self.program, routing_state))
        keep = {"keep_last": config.train.keep_last, "keep_every": config.train.keep_every}
        self.checkpoints = self.cleanup.enter_context(Checkpoints(self.run, **keep, write=True))
        latest = hosts.by_first(self.checkpoints.latest)
        saved = None if latest is None else self.checkpoints.saved(latest)
        if saved is not None:
            require_same_stores(self.hashes, saved.meta["hashes"], self.checkpoints.where(latest))
        self.step = 0 if latest is None else latest
        own = sharding.own_groups(self.program.mesh, config.train.batch_rows // config.data.group_rows)
        stream = open_stream(config, cursor=None if saved is None else saved.cursor, mine=own)
        self.stream = self.cleanup.enter_context(contextlib.closing(stream))
        if saved is not None:
            self.state = self.checkpoints.restore(latest, abstract_state(self.program, routing_state))
        elif config.run.init_from is not None:
            self.state = _from_other_run(self.program, routing_state, self.hashes, config.run.init_from)
        else:
            self.state = create_state(self.program, routing_state)
        self.run.write_json("config.json", to_json(config))
        self.status.step = self.step
        self.status.write("running")
        self.view = View(self.total, self.step, quiet=quiet)
        self.view.say(f"{config.run.dir}: {'goes on from' if self.step else 'starts at'} step {self.step}")
        if (warmup := config.optimizer.warmup_steps) >= self.total:
            self.view.say(
                f"warning: optimizer.warmup_steps {warmup} is not below the run's {self.total} steps, so the learning "
                f"rate still rises at the last one; set --optimizer.warmup-steps {self.total // 10}"
            )
        if config.model.routing == "threshold" and config.model.routing_warmup >= self.total:
            self.view.say(
                f"warning: model.routing_warmup {config.model.routing_warmup} is not below the run's {self.total} "
                f"steps, so experts choose to the end; set --model.routing-warmup {self.total // 10}"
            )
        tensorboard = config.run.tensorboard and self.run.local is not None
        journal = open_journal(self.run, step=self.step, tensorboard=tensorboard, view=self.view)
        self.journal: Journal = self.cleanup.enter_context(contextlib.closing(journal))
        counters = None if saved is None else saved.meta["counters"]
        self.kept = {} if saved is None else {n: saved.meta[n] for n in ("ancestry",) if n in saved.meta}
        self.hardware = Hardware(flops_per_token(config), _peak(self.program))
        self.meter = Meter(config, step_sums, counters)
        self.train_step = self.meter.timed(lambda: compile_step(self.program, self.state))
        hosts.meet()

    def run_steps(self, received: list[int]) -> None:
        """Trains to the last step, or to the step after a signal."""
        config = self.config.train
        packed_batches, stops = iter(self.stream), hosts.Stops(self.program.mesh)
        while self.step < self.total:
            packed = next(packed_batches, None)
            if packed is None:
                raise RunError(f"step {self.step}: the training data ended; prepare more documents")
            self.state, report = self.train_step(self.state, put(packed.batch, self.program.mesh))
            self.step += 1
            self.status.step = self.step
            self.meter.add(self.step, report)
            last = self.step == self.total
            stop, log = stops(received[0] if received else 0), last or self.step % config.log_every == 0
            sets = [s for s in config.eval_sets if last or self.step % (s.every or config.eval_every) == 0]
            save = last or stop or self.step % config.checkpoint_every == 0
            # One step behind, unless somebody is about to read: the device never waits for the host.
            self._guard(self.meter.settle(leave=0 if log or sets or save else 1))
            if log:
                self._log(packed.epochs)
            for eval_set in sets:
                self.meter.timed(lambda eval_set=eval_set: self._evaluate(eval_set))
            if save:
                self._save(whole_cursor(packed.cursor))
            if stop and not last:
                self._stop(stop)

    def finish(self) -> dict[str, Any]:
        """Waits for the last checkpoint; writes and prints the summary."""
        self.checkpoints.wait()
        self.journal.close()
        summary = hosts.by_first(lambda: finite(self._summary()))
        self.run.write_json("summary.json", summary)
        self.status.write("complete")
        for name, result in summary["eval"].items():
            for line in held_out_lines(name, result):
                self.view.say(line)
        return summary

    def _guard(self, bad_steps: list[int]) -> None:
        """Stops at an update that was not finite, or records that it was skipped."""
        for step in bad_steps:
            if self.config.train.on_nan == "stop":
                self.checkpoints.wait()
                raise RunError(
                    f"step {step}: the loss or its gradient is not finite; last good checkpoint: "
                    f"{last_good(self.run)}; lower optimizer.peak_lr, or set train.on_nan=skip in a new run"
                )
            self.journal.write({"kind": "event", "step": step, "event": "update skipped: loss or gradient not finite"})

    def _log(self, epochs: dict[str, float]) -> None:
        rate = float(self.program.optimizer.learning_rate(self.step))
        thresholds = threshold_figures(jax.device_get(self.state.routing_state))
        record = train_record(self.config, self.meter, self.hardware, self.step, rate, epochs)
        self.journal.write(record | thresholds)
        self.status.write("running")

    def _evaluate(self, eval_set: EvalSet) -> None:
        results = self.evaluate(self.state.params, self.state.routing_state, eval_set)
        gaps = gap_percent(results)
        for routing, figures in results.items():
            names = {"kind": "eval", "step": self.step, "eval_set": eval_set.name, "routing": routing}
            gap = {"gap_percent": gaps[routing]["loss"]} if routing in gaps else {}
            self.journal.write({**names, **figures, **gap})

    def _save(self, cursor: Any) -> None:
        """Begins a checkpoint; what the journal says so far belongs to it."""
        self.journal.seal(self.step)
        meta = {
            "config": to_json(self.config),
            "vocabulary": self.vocabulary.to_json(),
            "hashes": self.hashes,
            "select": self.select,
            "versions": versions(),
            "commit": commit(),
            "counters": self.meter.to_json(),
            **self.kept,
        }
        self.checkpoints.save(self.state, Saved(self.step, cursor, meta))

    def _stop(self, number: int) -> None:
        """Ends the process by the signal's exit code once the checkpoint is written."""
        self.checkpoints.wait()
        self.status.write("stopped")
        self.view.say(f"stopped at step {self.step}; the same command goes on from there")
        raise SystemExit(128 + number)

    def _summary(self) -> dict[str, Any]:
        """Final figures, and what they depend on."""
        records = read_metrics(self.config.run.dir)
        figures = [r for r in records if r["kind"] == "train"][-1]
        held_out: dict[str, Any] = {}
        for eval_set in self.config.train.eval_sets:
            of_set = [r for r in records if r["kind"] == "eval" and r["eval_set"] == eval_set.name]
            about = ("schema", "kind", "step", "eval_set", "routing", "gap_percent", "time")
            results = {
                r["routing"]: {k: v for k, v in r.items() if k not in about} for r in of_set if r["step"] == self.step
            }
            baseline = unigram(self.config, self.vocabulary, eval_set)
            held_out[eval_set.name] = results | {"gap_percent": gap_percent(results), "unigram": baseline}
        device = self.program.mesh.devices.flat[0]
        return {
            "steps": self.step,
            "final": {k: v for k, v in figures.items() if k not in ("schema", "kind", "time")},
            "eval": held_out,
            "select": self.select,
            "commit": commit(),
            "versions": versions(),
            "device": {"kind": device.device_kind, "count": self.program.mesh.size},
            "wall_seconds": figures["wall_seconds"],
            "command": command(),
        }


# Before the first step ------------------------------------------------------------------------------------------------


def prepare_missing_stores(config: Config, progress: bool) -> None:
    """Makes the stores' directories that do not exist, where the config says how."""
    if config.data.kind != "store" or config.data.prepare is None:
        return
    from moma_jax.data.prepare import prepare

    for path in dict.fromkeys(store.path for store in config.data.stores):
        if RunDir(path).read("manifest.json") is None:
            prepare(config.data.prepare, path, modalities=config.data.modalities, progress=progress)


def hashes_of(config: Config, vocabulary) -> dict[str, str | None]:
    """What makes ids mean the same: layout, tokenizer and codec of the stores (they are equal in all of them)."""
    if config.data.kind == "synthetic":
        return {"vocabulary": vocabulary.hash}
    return open_store(config.data.stores[0].path).codecs.hashes


def require_same_stores(hashes: dict[str, str | None], before: dict[str, str | None], where: str) -> None:
    """InputError where the stores are no longer those of the checkpoint `where`, which had the hashes `before`."""
    for name, value in before.items():
        if hashes.get(name) != value:
            raise InputError(
                f"data.stores: their {name} is not that of {where}; restore the stores or choose another run.dir"
            )


def _from_other_run(program: Program, routing_state: Any, hashes: dict[str, str | None], path: str) -> TrainState:
    """A fresh state with the newest parameters of another run; its ids must mean the same."""
    with contextlib.closing(Checkpoints(RunDir(path))) as checkpoints:
        if (latest := checkpoints.latest()) is None:
            raise InputError(f"run.init_from: {path} has no checkpoint; give the directory of a run that was saved")
        theirs = checkpoints.saved(latest).meta["hashes"]
        for name, value in theirs.items():
            if hashes.get(name) != value:
                raise InputError(f"run.init_from: the {name} of {path} is not that of this run's stores; use the same")
        params = checkpoints.restore_params(latest, abstract_params(program, routing_state))
    return dataclasses.replace(create_state(program, routing_state), params=params)


def _peak(program: Program) -> float | None:
    """FLOP/s that all devices together could do; None where unknown."""
    peak = peak_flops(program.mesh.devices.flat[0].device_kind)
    return None if peak is None else peak * program.mesh.size


def use_compilation_cache(path: str) -> None:
    """Keeps every compiled program."""
    jax.config.update("jax_compilation_cache_dir", os.path.abspath(path) if "://" not in path else path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # it may have been set up, or found missing, before


# While it runs --------------------------------------------------------------------------------------------------------


def whole_cursor(cursor: dict[str, Any]) -> dict[str, Any]:
    """The cursor of all processes' lanes; all of them have to call it after the same batch."""
    return merge_cursors([unpack_arrays(each) for each in hosts.gathered(pack_arrays(cursor))])


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """A list that receives SIGTERM and SIGINT; a second one of them acts as usual."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(number, frame):
        received.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread, as in some notebooks: signals are not ours there
        pass
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
