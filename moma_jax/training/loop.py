"""The training loop: a stage in, a run directory with checkpoints, records and a summary out.

A stage says what a step is, what it learns from, what is evaluated and what is recorded: pre-training (pretrain.py),
the fitting of auxiliary routers (fit_routers.py) and the training of an image tokenizer (codec/stage.py) are stages. A
run that has a checkpoint goes on from it, exactly: batches, losses and
parameters are those of a run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from jax.sharding import Mesh

from moma_jax import hosts, sharding
from moma_jax.compiling import use_cache
from moma_jax.config import EvalSet
from moma_jax.data.stream import merge_cursors
from moma_jax.errors import InputError, RunError
from moma_jax.evaluation.telemetry import FOLDER as TELEMETRY
from moma_jax.evaluation.telemetry import TABLE
from moma_jax.runs.checkpoint import Checkpoints, Saved, pack_arrays, unpack_arrays
from moma_jax.runs.directory import RunDir, command, processor
from moma_jax.runs.journal import SKIPPED, finite, open_journal, records_of, sheet_file
from moma_jax.runs.profiler import Profiler, profile_warnings, require_local_profile
from moma_jax.runs.progress import RunProgress, time_shares
from moma_jax.runs.resume import finished
from moma_jax.runs.status import Status, last_good, watched
from moma_jax.storage.probe import require_usable
from moma_jax.training.metrics import Meter, Stragglers
from moma_jax.training.step import put

KEPT = ("ancestry",)
"""What a checkpoint's meta hands on to the next one."""

WARN_AFTER = 60.0
"""Seconds of a run before the share of its time that saving takes says something."""


class Stage(Protocol):
    """What is trained, and what is said about it.

    Attributes:
      config: its `train` says how often the stage records, evaluates and saves, its `run` where.
      steps: updates that it takes. mesh: the devices. eval_sets: what is held out.
      meta: what every checkpoint holds beside state, cursor and counters: plain values, among them config, hashes,
        router, versions and commit.
      cursor: where the data of a fresh state begin; None: at their start.
      doing: what the first line says before "starts at step 0", such as "fits routers to step 6, ".
      warnings: lines to print before the first step.
      not_finite: what a loss that is not finite is called, and the remedy.
    """

    config: Any
    steps: int
    mesh: Mesh
    eval_sets: Sequence[EvalSet]
    meta: dict[str, Any]
    cursor: Any
    doing: str
    warnings: Sequence[str]
    not_finite: tuple[str, str]

    def require_same_data(self, before: dict[str, Any], where: str) -> None:
        """InputError where the data are not those of the checkpoint `where`, whose meta has the hashes `before`."""

    def open_data(self, cursor: Any) -> Any:
        """This process's batches from a cursor on, None being the start: a closable iterator of `batch` (arrays of the
        rows that lie on this process's devices), the `cursor` after it, and passes so far by name, `epochs`."""

    def abstract_state(self) -> Any:
        """Shapes, types and shardings of the state: what a checkpoint is restored onto."""

    def create_state(self) -> Any:
        """The state before the first step, a dataclass of arrays."""

    def compile_step(self, state: Any) -> Callable:
        """(state, batch) -> (state, report), compiled; it donates the state. `meter` reads the report."""

    def meter(self, saved: dict[str, Any] | None) -> Meter:
        """What adds up reports between two records, where `Meter.to_json` left it."""

    def record(self, meter: Meter, state: Any, step: int, epochs: dict[str, float]) -> dict[str, Any]:
        """The record of the steps since the last one."""

    def settle(self, run: RunDir, state: Any) -> None:
        """After the last update, before it is evaluated: what the final weights decide."""

    def evaluate(self, state: Any, eval_set: EvalSet) -> list[dict[str, Any]]:
        """Records about a held-out set, `step` and `eval_set` apart. Not recorded but kept as files are "sheet", a
        picture, and "telemetry", files by the ends of their names."""

    def sampled(self, state: Any, step: int, last: bool) -> Iterable[tuple[str, Any, Any]]:
        """What the model writes and draws at this step: name, picture of it, and it as plain values."""

    def export(self, run: RunDir, state: Any) -> None:
        """Writes what else the last state is for."""

    def summary(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Final figures: "final", which has "wall_seconds", and "eval", by held-out set."""

    def held_out_lines(self, name: str, result: dict[str, Any]) -> list[str]:
        """What is printed of the summary's figures of a held-out set."""


def run_stage(
    run: RunDir,
    config: Any,
    steps: int,
    check: Callable[[], None],
    make_stage: Callable[[], Stage],
    sinks: Sequence[Any] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Begins a stage in a directory, or goes on with it, to its summary; every process of a run calls it.

    Args:
      run: the stage's directory. config, steps: as `Stage` has them.
      check: raises InputError where the directory is not this stage's; it is called on process 0, before the directory
        is locked. make_stage: is called once the directory is this process's, unless the stage is complete.
      sinks: further ones of the journal. quiet: print nothing.
    """
    require_local_profile(run, config.train.profile_steps)
    use_cache(config.run.compilation_cache)
    with contextlib.ExitStack() as lock, watched(run, steps) as status:

        def take_directory() -> dict[str, Any] | None:
            require_usable(run.path, checkpoints=True)
            check()
            lock.enter_context(run.locked())
            return finished(run, steps)

        if (summary := hosts.by_first(take_directory)) is not None:
            RunProgress(0, 0, quiet=quiet).say(f"{run.path}: complete")
            return summary
        stage = make_stage()
        with sharding.use_mesh(stage.mesh), signals() as received, contextlib.ExitStack() as cleanup:
            loop = Loop(run, stage, status, cleanup, sinks, quiet)
            loop.run_steps(received)
            return loop.finish()


class Loop:
    """One process's share of a stage: the state, the step it stands at, and where its records go."""

    def __init__(
        self,
        run: RunDir,
        stage: Stage,
        status: Status,
        cleanup: contextlib.ExitStack,
        sinks: Sequence[Any] = (),
        quiet: bool = False,
    ):
        """Restores the newest checkpoint or makes a fresh state; opens data and journal there; compiles.

        `cleanup` closes what is opened. Call it under `sharding.use_mesh`.
        """
        self.run, self.stage, self.status, self.warned = run, stage, status, False
        self.config = config = stage.config
        self.checkpoints = cleanup.enter_context(
            Checkpoints(
                run,
                keep_last=config.train.keep_last,
                keep_every=config.train.keep_every,
                write=True,
                retries=config.run.save_retries,
                tell=self._event,
            )
        )
        latest = hosts.by_first(self._whole_checkpoint)
        saved = Saved(0, stage.cursor, {}) if latest is None else self.checkpoints.saved(latest)
        self.step, self.total = saved.step, stage.steps
        self.meta = stage.meta | {name: saved.meta[name] for name in KEPT if name in saved.meta}
        if latest is not None:
            stage.require_same_data(saved.meta["hashes"], self.checkpoints.where(latest))
        self.data = cleanup.enter_context(contextlib.closing(stage.open_data(saved.cursor)))
        self.progress = RunProgress(self.total, self.step, quiet=quiet)
        if latest is None:
            self.state = stage.create_state()
        else:
            self.progress.say(f"reads {self.checkpoints.where(latest)}, {self.checkpoints.size(latest)}")
            self.state = self.checkpoints.restore(latest, stage.abstract_state())
        run.write_json("config.json", stage.meta["config"])
        status.step = self.step
        status.write("running")
        begins = "goes on from" if self.step else "starts at"
        self.progress.say(f"{run.path}: {stage.doing}{begins} step {self.step}")
        for line in (*stage.warnings, *profile_warnings(config.train.profile_steps, self.step, self.total)):
            self.progress.say(line)
        tensorboard = config.run.tensorboard and run.local is not None
        told = {"wandb": config.run.wandb, "config": stage.meta["config"], "sinks": (self.progress, *sinks)}
        journal = open_journal(run, step=self.step, tensorboard=tensorboard, **told)
        self.journal = cleanup.enter_context(contextlib.closing(journal))
        cleanup.push(self._leave_checkpoints)  # before it: a last save is told of
        self.profiler = cleanup.enter_context(contextlib.closing(Profiler(run, config.train.profile_steps)))
        self.meter, self._stragglers = stage.meter(saved.meta.get("counters")), Stragglers()
        self.progress.say("compiling the step")
        before = time.monotonic()
        self.train_step = self.meter.timed("compile", lambda: stage.compile_step(self.state))
        self.progress.say(f"compiled in {time.monotonic() - before:.1f} s")
        hosts.meet()

    def _whole_checkpoint(self) -> int | None:
        """Step of the newest checkpoint, None without one; InputError where it is damaged: bytes that a disk changed
        would be trained on, and nobody would know."""
        latest = self.checkpoints.latest()
        if latest is not None and self.config.run.verify:
            self.checkpoints.require_whole(latest)
        return latest

    def run_steps(self, received: list[int]) -> None:
        """Trains to the last step, or to the step after a signal."""
        config, batches, stops = self.config.train, iter(self.data), hosts.Stops(self.stage.mesh)
        # A CPU is device and host, and would hold the memory of two steps.
        ahead = self.stage.mesh.devices.flat[0].platform != "cpu"
        while self.step < self.total:
            self.profiler.before(self.step + 1)
            packed = self.meter.timed("data", lambda: next(batches, None), apart=False)
            if packed is None:
                raise RunError(f"step {self.step}: the training data ended; prepare more documents")
            self.state, report = self.train_step(self.state, put(packed.batch, self.stage.mesh))
            self.step += 1
            self.status.step = self.step
            self.meter.add(self.step, report)
            self.profiler.after(self.step, report)
            last = self.step == self.total
            stop, log = stops(received[0] if received else 0), last or self.step % config.log_every == 0
            sets = [s for s in self.stage.eval_sets if last or self.step % (s.every or config.eval_every) == 0]
            save = last or stop or self.step % config.checkpoint_every == 0 or (log and self._save_failed())
            # One step behind, unless somebody is about to read: the device never waits for the host.
            self._check_finite(self.meter.settle(leave=int(ahead and not (log or sets or save))))
            if log:
                self._log(packed.epochs)
            if last:
                self.meter.timed("evaluation", lambda: self.stage.settle(self.run, self.state))
            for eval_set in sets:
                self._evaluate(eval_set)
            if save:
                self.meter.timed("checkpoint", lambda at=packed.cursor: self._save(whole_cursor(at)), apart=False)
            self.meter.timed("samples", lambda last=last: self._draw(last))
            if stop and not last:
                self._stop(stop)

    def finish(self) -> dict[str, Any]:
        """Waits for the last checkpoint; writes and prints the summary."""
        self._end_saves()
        self.checkpoints.close()
        self.stage.export(self.run, self.state)
        self.journal.close()
        summary = hosts.by_first(lambda: finite(self._summary()))
        self.run.write_json("summary.json", summary)
        self.status.write("complete")
        self.progress.say(time_shares(self._time()))
        for name, result in summary["eval"].items():
            for line in self.stage.held_out_lines(name, result):
                self.progress.say(line)
        return summary

    def _check_finite(self, bad_steps: list[int]) -> None:
        """Stops at an update that was not finite, or records that it was skipped."""
        for step in bad_steps:
            if self.config.train.on_nan == "stop":
                what, remedy = self.stage.not_finite
                self.checkpoints.wait()
                raise RunError(
                    f"step {step}: {what} is not finite; last good checkpoint: {last_good(self.run)}; {remedy}"
                )
            self._event(step, SKIPPED)

    def _event(self, step: int, event: str) -> None:
        """Records what happened."""
        self.journal.write({"kind": "event", "step": step, "event": event})

    def _log(self, epochs: dict[str, float]) -> None:
        self.journal.write(self.stage.record(self.meter, self.state, self.step, epochs))
        self._tell_of_saves()
        if line := self._stragglers.told(hosts.gathered([socket.gethostname(), *self.meter.data_wait])):
            self._event(self.step, line)
        self.status.write("running")

    def _save_failed(self) -> bool:
        """Whether some process's newest save came to nothing; all of them have to ask."""
        return any(hosts.gathered(self.checkpoints.failed()))

    def _tell_of_saves(self) -> None:
        """Records what was written since it was told last, and once where saving takes more than its share."""
        self._record_saves()
        time, most = self._time(), self.config.run.save_share
        share = time.get("spent_checkpoint", 0.0) / max(time["wall_seconds"], 1e-9)
        if share > most and time["wall_seconds"] > WARN_AFTER and not self.warned:
            self.warned = True
            remedy = "raise train.checkpoint_every, or run.save_share if that is well"
            self._event(self.step, f"saving took {share:.0%} of the time, more than {most:.0%}; {remedy}")

    def _record_saves(self) -> None:
        for written in self.checkpoints.written():
            self.journal.write({"kind": "checkpoint", "step": self.step, **written._asdict()})

    def _leave_checkpoints(self, *error: Any) -> None:
        """Closes the checkpoints while the journal can still say what became of them."""
        self.checkpoints.__exit__(*error)
        self._record_saves()

    def _evaluate(self, eval_set: EvalSet) -> None:
        for record in self.meter.timed("evaluation", lambda: self.stage.evaluate(self.state, eval_set)):
            if (sheet := record.pop("sheet", None)) is not None:
                self.journal.draw(eval_set.name, self.step, sheet)
            for end, content in (files := record.pop("telemetry", {})).items():
                self.run.write(f"{TELEMETRY}{eval_set.name}-{self.step:08d}{end}", content)
            if files:
                self.journal.experts(eval_set.name, self.step, files[TABLE])
            self.journal.write({"kind": record["kind"], "step": self.step, "eval_set": eval_set.name, **record})

    def _draw(self, last: bool) -> None:
        """Keeps samples; training goes on where they cannot be drawn, and says why."""
        try:
            for name, sheet, written in self.stage.sampled(self.state, self.step, last):
                self.journal.draw(name, self.step, sheet)
                self.run.write_json(sheet_file(name, self.step, ".json"), written)
                where = self.run.join(sheet_file(name, self.step))
                self._event(self.step, f"{name}: {where}")
        except (InputError, RunError) as error:
            self._event(self.step, f"train.samples: nothing was drawn: {error}")

    def _save(self, cursor: Any) -> None:
        """Begins a checkpoint; what the journal says so far belongs to it."""
        self.journal.seal(self.step)
        meta = self.meta | {"counters": self.meter.to_json()}
        self.checkpoints.save(self.state, Saved(self.step, cursor, meta))

    def _end_saves(self) -> None:
        """Waits for the last checkpoint; what is told of it, and of those before it, belongs to it."""
        self.checkpoints.wait()
        self._tell_of_saves()
        self.journal.seal(self.step)

    def _stop(self, number: int) -> None:
        """Ends the process by the signal's exit code once the checkpoint is written."""
        self._end_saves()
        self.status.write("stopped")
        self.progress.say(f"stopped at step {self.step}; the same command goes on from there")
        raise SystemExit(128 + number)

    def _time(self) -> dict[str, float]:
        """Seconds of the run so far, the last evaluation's and checkpoint's too."""
        return {"wall_seconds": self.meter.wall_seconds(), **self.meter.spent()}

    def _summary(self) -> dict[str, Any]:
        """Final figures, and what they depend on."""
        figures = self.stage.summary(records_of(self.run) or [])
        device = self.stage.mesh.devices.flat[0]
        return {
            "steps": self.step,
            **figures,
            **{name: self.meta[name] for name in ("router", "commit", "versions") if name in self.meta},
            "device": {"kind": device.device_kind, "count": self.stage.mesh.size},
            "processor": processor(),
            "wall_seconds": figures["final"]["wall_seconds"],
            "time": self._time(),
            "command": command(),
        }


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
