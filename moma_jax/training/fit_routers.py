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

from moma_jax import hosts
from moma_jax.checks import resolve
from moma_jax.config import Config, EvalSet, HostsConfig, MeshConfig, RoutersConfig
from moma_jax.config_json import from_json, to_json
from moma_jax.errors import InputError
from moma_jax.fields import differences
from moma_jax.geometry import micro_groups
from moma_jax.router import CAUSAL
from moma_jax.rules import Unloaded, options_of, rule_name
from moma_jax.runs.checkpoint import Checkpoints, Saved
from moma_jax.runs.directory import RunDir, commit, versions
from moma_jax.runs.journal import user_sinks
from moma_jax.runs.progress import predictions
from moma_jax.runs.resume import hashes_of, require_same_stores
from moma_jax.training.load import ROUTERS, Loaded, config_of, fingerprint, load, with_auxiliary
from moma_jax.training.loop import run_stage
from moma_jax.training.metrics import Meter, last_figures, token_meter
from moma_jax.training.optimizer import warmup_warnings
from moma_jax.training.router_step import (
    HeldOut,
    abstract_routers,
    compile_routers_step,
    first_state,
    router_sums,
    routers_record,
)
from moma_jax.training.step import Program, TrainState, make_program, replicate
from moma_jax.training.token_stage import TokenStage


def fit_routers(
    run: str,
    settings: RoutersConfig | None = None,
    *,
    quiet: bool = False,
    router: Any = None,
    mesh: MeshConfig | None = None,
    sink: Any = None,
) -> dict[str, Any]:
    """Fits auxiliary routers to the newest checkpoint of a run, or goes on with it.

    Args:
      run: run directory; the routers go to `routers` in it, where `moma_jax.load` finds them.
      settings: of this stage; None: those of the run's config.
      quiet: print nothing.
      router: the run's own routing rule, where it was trained with one (`moma_jax.load`).
      mesh: devices to lay the model on; None: whole on every device.
      sink: receives every record on process 0, as that of `moma_jax.train`.

    Returns:
      The stage's summary, as in RUN/routers/summary.json: "model_step", "steps", "final" and, by held-out set, "eval":
      cross-entropy in nats per (token, expert) pair, precision, recall, accuracy and load (predicted over taken pairs)
      by modality, and by modality and layer.

    Raises:
      InputError: the run has no routers, was trained with auxiliary ones, or has such of another step or other
        settings; nothing was written then.
      RunError: an update was not finite (unless the run has train.on_nan=skip), the data ended, or files cannot be read
        or written any more.
      SystemExit: 143 after SIGTERM, 130 after SIGINT, when the checkpoint is written.
    """
    sinks = user_sinks(sink)
    hosts.join(HostsConfig())
    _require_routers(run, config_of(run))
    loaded = load(run, router=router, fitted=False, calibrated=False, mesh=mesh)
    _require_routers(run, loaded.config)
    config = stage_of(loaded.config, loaded.config.routers if settings is None else settings)
    directory, model = RunDir(f"{run.rstrip('/')}/{ROUTERS}"), fingerprint(loaded.params)

    def make_stage() -> RouterFitting:
        with contextlib.closing(Checkpoints(RunDir(run))) as checkpoints:
            saved = checkpoints.saved(loaded.step)
            if config.run.verify:
                hosts.by_first(lambda: checkpoints.require_whole(loaded.step))
            hashes = hashes_of(config, loaded.vocabulary)
            require_same_stores(hashes, saved.meta["hashes"], checkpoints.where(saved.step))
        program = make_program(config)
        return RouterFitting(program, loaded, saved, directory.path)

    def check() -> None:
        _require_same(directory, loaded.step, model, config.routers)

    return run_stage(directory, config, config.train.steps, check, make_stage, sinks, quiet)


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
        eval_every=settings.checkpoint_every,
        eval_sets=tuple(dataclasses.replace(each, every=None) for each in config.train.eval_sets),
        checkpoint_every=settings.checkpoint_every,
        keep_every=None,
        profile_steps=(),
    )
    return resolve(dataclasses.replace(with_auxiliary(config), optimizer=optimizer, train=train))


# Whether there is something to fit ------------------------------------------------------------------------------------


def _require_routers(run: str, config: Config) -> None:
    """InputError where no auxiliary router is missing."""
    if not config.routed:
        raise InputError(
            f"{run}: nothing to fit: model.ffn {config.model.ffn} has no router; its routing is causal already"
        )
    rule = config.model.router
    if isinstance(rule, Unloaded):
        return
    if rule.auxiliary:
        raise InputError(
            f"{run}: nothing to fit: its auxiliary routers were trained beside the model (model.router.auxiliary); use "
            "them as they are, with --routing causal"
        )
    if CAUSAL not in rule.causal or "auxiliary" not in options_of(rule):
        raise InputError(f"{run}: nothing to fit: its routing rule {rule_name(rule)} has no auxiliary routers")


def _require_same(directory: RunDir, step: int, model: str, settings: RoutersConfig) -> None:
    """InputError where routers lie that were fitted to another step or another model, or by other settings."""
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        if (latest := checkpoints.latest()) is None:
            return
        meta = checkpoints.saved(latest).meta
    if "model_step" not in meta:
        raise InputError(f"{directory.path}: holds a run, no auxiliary routers; move it away")
    if meta["model_step"] != step:
        raise InputError(
            f"{directory.path}: fitted to the model of step {meta['model_step']}, and the run is at step {step}; "
            f"remove {directory.path} to fit anew"
        )
    if meta.get("model") != model:
        raise InputError(f"{directory.path}: fitted to another model; remove {directory.path} to fit anew")
    changed = differences(from_json(meta["config"]).routers, settings, "routers")
    if changed:
        raise InputError(
            f"{directory.path}: fitted by other settings ({'; '.join(changed)}); change them back, or remove "
            f"{directory.path} to fit anew"
        )


# The stage ------------------------------------------------------------------------------------------------------------


class RouterFitting(TokenStage):
    """The stage of `fit_routers` (`loop.Stage`)."""

    def __init__(self, program: Program, loaded: Loaded, saved: Saved, directory: str):
        """Args: `saved` is the model's checkpoint, `directory` the stage's."""
        super().__init__(program)
        config = program.config
        self.meta = {
            "config": to_json(dataclasses.replace(loaded.config, routers=config.routers)),
            "model_step": loaded.step,
            "model": fingerprint(loaded.params),
            **{name: saved.meta[name] for name in ("vocabulary", "hashes")},
            "router": rule_name(config.model.router),
            "versions": versions(),
            "commit": commit(),
        }
        self.cursor, self.doing = saved.cursor, f"fits routers to step {loaded.step}, "
        settings = config.routers
        self.warnings = warmup_warnings(
            settings.warmup_steps, settings.steps, "routers.warmup_steps", "stage", "--warmup-steps"
        )
        remedy = f"lower routers.peak_lr, for which {directory} must be removed"
        self.not_finite = ("the cross-entropy or its gradient", remedy)
        # The stage's batch may split over other devices than the run's.
        on_mesh = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(program.mesh, x.sharding.spec)), loaded.params)
        self._model = (on_mesh, replicate(loaded.routing_state, program.mesh))
        self._judge = HeldOut(program)

    def abstract_state(self) -> TrainState:
        """See `loop.Stage`."""
        return abstract_routers(self.program, self._model[1])

    def create_state(self) -> TrainState:
        """Fresh routers."""
        return first_state(self.program, self._model[1])

    def compile_step(self, state: TrainState) -> Callable:
        """See `loop.Stage`."""
        compiled = compile_routers_step(self.program, state, *self._model)
        return lambda state, batch: compiled(state, *self._model, batch)

    def meter(self, saved: dict[str, Any] | None) -> Meter:
        """See `loop.Stage`."""
        return token_meter(self.config, router_sums, saved)

    def record(self, meter: Meter, state: TrainState, step: int, epochs: dict[str, float]) -> dict[str, Any]:
        """A record of kind "routers"."""
        rate = float(self.program.optimizer.learning_rate(step))
        return routers_record(self.program.config, meter, step, rate, epochs)

    def evaluate(self, state: TrainState, eval_set: EvalSet) -> list[dict[str, Any]]:
        """A record of kind "routers_eval"."""
        return [{"kind": "routers_eval", **self._judge(state.params, *self._model, eval_set)}]

    def summary(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """The last record, and the last evaluation of each set."""
        return {"model_step": self.meta["model_step"], **last_figures(records, "routers", "routers_eval")}

    def held_out_lines(self, name: str, result: dict[str, Any]) -> list[str]:
        """See `loop.Stage`."""
        return [f"held out, {name}:  {predictions(result)}"]
