"""The second stage: auxiliary routers are fitted to a trained model, which stays as it is (paper section 2.4, Table 6).

The routers of all layers learn by binary cross-entropy what the experts of the frozen model take of whole routing
groups, from the training data that follow the model's own. Nothing else has a gradient or moments. All of it lies in
RUN/routers/, which looks like a run of its own; the run's checkpoints are only read.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from moma_jax import hosts, sharding
from moma_jax.config import Config, HostsConfig, MeshConfig, RoutersConfig, resolve
from moma_jax.config_json import to_json
from moma_jax.data.stream import open_stream
from moma_jax.errors import InputError, RunError
from moma_jax.runs.checkpoint import Checkpoints, Saved
from moma_jax.runs.directory import RunDir, command, commit, versions
from moma_jax.runs.journal import finite, open_journal, read_metrics
from moma_jax.runs.progress import View, predictions
from moma_jax.runs.resume import finished, select_name
from moma_jax.runs.status import last_good, watched
from moma_jax.training.load import ROUTERS, Loaded, config_of, fingerprint, load, with_auxiliary
from moma_jax.training.loop import (
    hashes_of,
    require_same_stores,
    signals,
    use_compilation_cache,
    whole_cursor,
)
from moma_jax.training.metrics import Meter
from moma_jax.training.router_step import (
    HeldOut,
    abstract_routers,
    compile_routers_step,
    first_state,
    layer_figures,
    router_sums,
)
from moma_jax.training.step import Program, make_program, micro_groups, put, replicate

MAY_CHANGE = ("log_every", "checkpoint_every")
"""Settings of a stage that may differ when it goes on."""


def fit_routers(
    run: str,
    settings: RoutersConfig | None = None,
    *,
    quiet: bool = False,
    select: Callable | None = None,
    mesh: MeshConfig | None = None,
) -> dict[str, Any]:
    """Fits auxiliary routers to the newest checkpoint of a run, or goes on with it.

    Args:
      run: run directory; the routers go to `routers` in it, where `moma_jax.load` finds them.
      settings: of this stage; None: those of the run's config.
      quiet: print nothing.
      select: the run's own select function, where it was trained with one.
      mesh: devices to lay the model on; None: whole on every device.

    Returns:
      The stage's summary, as in RUN/routers/summary.json: "model_step", "steps", "final" and, by held-out set, "eval":
      cross-entropy in nats per (token, expert) pair, precision, recall, accuracy and load (predicted over taken pairs)
      by modality, and by modality and layer.

    Raises:
      InputError: the run has no routers, was trained with auxiliary ones, or has such of another step or other
        settings; nothing was written then.
      RunError: an update was not finite, the data ended, or files cannot be read or written any more.
      SystemExit: 143 after SIGTERM, 130 after SIGINT, when the checkpoint is written.
    """
    hosts.join(HostsConfig())
    _require_routers(run, config_of(run))
    loaded = load(run, select=select, fitted=False, mesh=mesh)
    stage = stage_of(loaded.config, loaded.config.routers if settings is None else settings)
    where = RunDir(f"{run.rstrip('/')}/{ROUTERS}")
    model = fingerprint(loaded.params)
    if stage.run.compilation_cache is not None:
        use_compilation_cache(stage.run.compilation_cache)
    with contextlib.ExitStack() as held, watched(where, stage.routers.steps) as status:
        summary = hosts.by_first(lambda: _take(where, loaded.step, model, stage, held))
        if summary is not None:
            View(0, 0, quiet=quiet).say(f"{where.path}: fitting is complete")
            return summary
        program = make_program(stage, loaded.vocabulary, select)
        with sharding.use_mesh(program.mesh), signals() as received, contextlib.ExitStack() as cleanup:
            session = _Session(where, loaded, program, status, cleanup)
            session.begin(select_name(select), quiet)
            session.run_steps(received)
            return session.finish()


def stage_of(config: Config, settings: RoutersConfig) -> Config:
    """The resolved config of the stage, as if it were training: a run's with the stage's length, batch and schedule.

    A microbatch holds no more routing groups than in training.
    """
    rows = config.train.batch_rows if settings.batch_rows is None else settings.batch_rows
    config = resolve(dataclasses.replace(config, routers=dataclasses.replace(settings, batch_rows=rows)))
    groups, most = rows // config.data.group_rows, micro_groups(config)
    accumulate = next(n for n in range(1, groups + 1) if groups % n == 0 and groups // n <= most)
    same = ("peak_lr", "end_lr", "schedule", "warmup_steps")
    optimizer = dataclasses.replace(config.optimizer, **{name: getattr(settings, name) for name in same})
    train = dataclasses.replace(
        config.train,
        steps=settings.steps,
        tokens=None,
        flops=None,
        batch_rows=rows,
        accumulate=accumulate,
        log_every=settings.log_every,
        checkpoint_every=settings.checkpoint_every,
    )
    return resolve(dataclasses.replace(with_auxiliary(config), optimizer=optimizer, train=train))


# Whether there is something to fit ------------------------------------------------------------------------------------


def _require_routers(run: str, config: Config) -> None:
    """InputError where no auxiliary router is missing."""
    if not config.routed:
        raise InputError(
            f"{run}: nothing to fit: model.ffn {config.model.ffn} has no router; its routing is causal already"
        )
    if config.model.auxiliary:
        raise InputError(
            f"{run}: nothing to fit: its auxiliary routers were trained beside the model (model.auxiliary); use them "
            "as they are, with --routing causal"
        )


def _take(where: RunDir, step: int, model: str, stage: Config, held: contextlib.ExitStack) -> dict[str, Any] | None:
    """Makes the directory this stage's, as long as `held` lasts; the summary of one that is complete."""
    _require_same(where, step, model, stage.routers)
    return finished(held.enter_context(where.locked()), stage)


def _require_same(where: RunDir, step: int, model: str, settings: RoutersConfig) -> None:
    """InputError where routers lie that were fitted to another step or another model, or by other settings."""
    with contextlib.closing(Checkpoints(where)) as checkpoints:
        if (latest := checkpoints.latest()) is None:
            return
        meta = checkpoints.saved(latest).meta
    if "model_step" not in meta:
        raise InputError(f"{where.path}: holds a run, no auxiliary routers; move it away")
    if meta["model_step"] != step:
        raise InputError(
            f"{where.path}: fitted to the model of step {meta['model_step']}, and the run is at step {step}; "
            f"remove {where.path} to fit anew"
        )
    if meta.get("model") != model:
        raise InputError(f"{where.path}: fitted to another model; remove {where.path} to fit anew")
    before = meta["config"]["routers"]
    now = {name: value for name, value in dataclasses.asdict(settings).items() if name not in MAY_CHANGE}
    changed = [f"routers.{name}: {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        raise InputError(
            f"{where.path}: fitted by other settings ({'; '.join(changed)}); change them back, or remove {where.path} "
            "to fit anew"
        )


# The stage ------------------------------------------------------------------------------------------------------------


class _Session:
    """One process's share of the stage: the state, where it stands, and where its records go."""

    def __init__(self, directory: RunDir, loaded: Loaded, program: Program, status, cleanup: contextlib.ExitStack):
        self.directory, self.loaded, self.program, self.config = directory, loaded, program, program.config
        self.status, self.cleanup, self.total = status, cleanup, program.config.routers.steps
        self.names = [m.name for m in self.config.data.modalities]
        # The stage's batch may split over other devices than the run's.
        self.frozen = jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(program.mesh, x.sharding.spec)), loaded.params
        )
        self.routing_state = replicate(loaded.routing_state, program.mesh)
        self.judge = HeldOut(program)

    def begin(self, select: str, quiet: bool) -> None:
        """Restores the newest checkpoint or makes fresh routers; opens data and journal there; compiles."""
        run, config = self.loaded.run, self.config
        with contextlib.closing(Checkpoints(RunDir(run))) as of_model:
            model = of_model.saved(self.loaded.step)
            require_same_stores(
                hashes_of(config, self.loaded.vocabulary), model.meta["hashes"], of_model.where(model.step)
            )
        self.meta = {
            "config": to_json(dataclasses.replace(self.loaded.config, routers=config.routers)),
            "model_step": self.loaded.step,
            "model": fingerprint(self.loaded.params),
            **{name: model.meta[name] for name in ("vocabulary", "hashes")},
            "select": select,
            "versions": versions(),
            "commit": commit(),
        }
        opened = Checkpoints(self.directory, keep_last=config.train.keep_last, write=True)
        self.checkpoints = self.cleanup.enter_context(opened)
        latest = hosts.by_first(self.checkpoints.latest)
        saved = None if latest is None else self.checkpoints.saved(latest)
        self.step = 0 if latest is None else latest
        own = sharding.own_groups(self.program.mesh, config.train.batch_rows // config.data.group_rows)
        stream = open_stream(config, cursor=model.cursor if saved is None else saved.cursor, mine=own)
        self.stream = self.cleanup.enter_context(contextlib.closing(stream))
        if saved is None:
            self.state = first_state(self.program, self.routing_state)
        else:
            self.state = self.checkpoints.restore(latest, abstract_routers(self.program, self.routing_state))
        self.directory.write_json("config.json", self.meta["config"])
        self.status.step = self.step
        self.status.write("running")
        self.view = View(self.total, self.step, quiet=quiet)
        begins = "goes on from" if self.step else "starts at"
        self.view.say(f"{self.directory.path}: fits routers to step {self.loaded.step}, {begins} step {self.step}")
        if config.routers.warmup_steps >= self.total:
            self.view.say(
                f"warning: routers.warmup_steps {config.routers.warmup_steps} is not below the stage's {self.total} "
                f"steps, so the learning rate still rises at the last one; set --warmup-steps {self.total // 10}"
            )
        tensorboard = config.run.tensorboard and self.directory.local is not None
        journal = open_journal(self.directory, step=self.step, tensorboard=tensorboard, view=self.view)
        self.journal = self.cleanup.enter_context(contextlib.closing(journal))
        self.meter = Meter(config, router_sums, None if saved is None else saved.meta["counters"])
        arguments = (self.program, self.state, self.frozen, self.routing_state)
        self.update = self.meter.timed(lambda: compile_routers_step(*arguments))
        hosts.meet()

    def run_steps(self, received: list[int]) -> None:
        """Fits to the last step, or to the step after a signal."""
        settings, packed_batches = self.config.routers, iter(self.stream)
        stops = hosts.Stops(self.program.mesh)
        while self.step < self.total:
            packed = next(packed_batches, None)
            if packed is None:
                raise RunError(f"step {self.step}: the training data ended; prepare more documents")
            batch = put(packed.batch, self.program.mesh)
            self.state, report = self.update(self.state, self.frozen, self.routing_state, batch)
            self.step += 1
            self.status.step = self.step
            self.meter.add(self.step, report)
            last = self.step == self.total
            stop, log = stops(received[0] if received else 0), last or self.step % settings.log_every == 0
            due = last or self.step % settings.checkpoint_every == 0
            self._guard(self.meter.settle(leave=0 if log or due or stop else 1))
            if log:
                self._log(packed.epochs)
            if due:
                self.meter.timed(self._evaluate)
            if due or stop:
                self._save(whole_cursor(packed.cursor))
            if stop and not last:
                self._stop(stop)

    def finish(self) -> dict[str, Any]:
        """Waits for the last checkpoint; writes and prints the summary."""
        self.checkpoints.wait()
        self.journal.close()
        summary = hosts.by_first(lambda: finite(self._summary()))
        self.directory.write_json("summary.json", summary)
        self.status.write("complete")
        for name, result in summary["eval"].items():
            self.view.say(f"held out, {name}:  {predictions(result)}")
        return summary

    def _guard(self, bad_steps: list[int]) -> None:
        """Stops at an update that was not finite."""
        if bad_steps:
            self.checkpoints.wait()
            raise RunError(
                f"step {bad_steps[0]}: the cross-entropy or its gradient is not finite; last good checkpoint: "
                f"{last_good(self.directory)}; lower routers.peak_lr, for which {self.directory.path} must be removed"
            )

    def _log(self, epochs: dict[str, float]) -> None:
        seen = self.meter.interval()
        record = {
            "kind": "routers",
            "step": self.step,
            "loss": float(seen["loss"] / seen["steps"]),
            "grad_norm": float(seen["grad_norm"] / seen["steps"]),
            "learning_rate": float(self.program.optimizer.learning_rate(self.step)),
            **self.meter.cumulative(),
            "wall_seconds": self.meter.wall_seconds(),
            **{f"epoch_{name}": float(value) for name, value in epochs.items()},
            **self.meter.speed(seen),
        }
        self.journal.write(record | layer_figures(self.config, seen["predicted_LM4"], seen.get("entered_PM4")))
        self.status.write("running")

    def _evaluate(self) -> None:
        for eval_set in self.config.train.eval_sets:
            result = self.judge(self.state.params, self.frozen, self.routing_state, eval_set)
            self.journal.write({"kind": "routers_eval", "step": self.step, "eval_set": eval_set.name, **result})

    def _save(self, cursor: Any) -> None:
        """Begins a checkpoint; what the journal says so far belongs to it."""
        self.journal.seal(self.step)
        self.checkpoints.save(self.state, Saved(self.step, cursor, self.meta | {"counters": self.meter.to_json()}))

    def _stop(self, number: int) -> None:
        """Ends the process by the signal's exit code once the checkpoint is written."""
        self.checkpoints.wait()
        self.status.write("stopped")
        self.view.say(f"stopped at step {self.step}; the same command goes on from there")
        raise SystemExit(128 + number)

    def _summary(self) -> dict[str, Any]:
        """Final figures, and what they depend on."""
        records = read_metrics(self.directory.path)
        keys = ("schema", "kind", "time", "step", "eval_set")
        final, judged = [], {}
        for record in records:
            figures = {name: value for name, value in record.items() if name not in keys}
            match record["kind"]:
                case "routers":
                    final = figures
                case "routers_eval":
                    judged[record["eval_set"]] = figures
        device = self.program.mesh.devices.flat[0]
        return {
            "steps": self.step,
            "model_step": self.loaded.step,
            "final": final,
            "eval": judged,
            **{name: self.meta[name] for name in ("select", "versions", "commit")},
            "device": {"kind": device.device_kind, "count": self.program.mesh.size},
            "wall_seconds": self.meter.wall_seconds(),
            "command": command(),
        }
