"""Pre-training: the decoder learns to predict the next token of packed documents."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from moma_jax import hosts, sharding
from moma_jax.checks import resolve
from moma_jax.config import Config, EvalSet, HostsConfig, with_router
from moma_jax.config_json import as_recorded, from_json, to_json
from moma_jax.cost import flops_per_token, peak_flops, total_steps
from moma_jax.data.stream import require_held_out, vocabulary_of
from moma_jax.errors import InputError
from moma_jax.evaluation.documents import DOCUMENTS
from moma_jax.evaluation.evaluate import Evaluator, gap_percent, scheduled, unigram
from moma_jax.evaluation.tables import held_out_lines, uncalibrated
from moma_jax.model.decoder import first_routing_state
from moma_jax.rules import as_named, as_rule, recorded_rule, rule_name, switched
from moma_jax.runs.checkpoint import Checkpoints
from moma_jax.runs.directory import RunDir, commit, versions
from moma_jax.runs.journal import user_sinks
from moma_jax.runs.resume import hashes_of, require_resumable
from moma_jax.training.calibrate import has_thresholds, write_thresholds
from moma_jax.training.load import THRESHOLDS, Loaded, belong, with_thresholds
from moma_jax.training.loop import run_stage
from moma_jax.training.metrics import Hardware, Meter, step_sums, threshold_figures, token_meter, train_record
from moma_jax.training.optimizer import warmup_warnings
from moma_jax.training.step import (
    Program,
    TrainState,
    abstract_params,
    abstract_state,
    compile_step,
    create_state,
    make_program,
    with_dtype,
)
from moma_jax.training.token_stage import TokenStage
from moma_jax.vocab import Vocabulary


def train(
    config: Config,
    *,
    select: Callable | None = None,
    routing_state: Any = None,
    sink: Any = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains, or goes on training, the run in `config.run.dir`; every process of a run calls it (`config.hosts`).

    Args:
      config: a resolved config (`moma_jax.recipe`).
      select: the short form of a routing rule of your own for experts, a function (moma_jax/router.py); it takes the
        place of `config.model.router`.
      routing_state: its first state, stacked over layers, by group of experts; None: that of the routing rule.
      sink: an object with `write(record)`, or a function of a record: receives every record on process 0, as it is
        written to metrics.jsonl (runs/journal.py says which there are). A run that goes on from a checkpoint hands over
        again what it had recorded after it.
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
    sinks = user_sinks(sink)
    hosts.join(config.hosts)
    if select is not None:
        config = with_router(config, switched(config.model.router, as_rule(select)))
    config = with_dtype(resolve(dataclasses.replace(config, hosts=HostsConfig())))  # who is who is no part of a run
    if config.run.dir is None:
        raise InputError("run.dir: name the directory of the run, such as runs/first")

    def make_stage() -> Pretraining:
        hosts.by_first(lambda: prepare_missing_stores(config, progress=not quiet))
        vocabulary = vocabulary_of(config)
        require_held_out(config)
        program = make_program(config)
        first = first_routing_state(config) if routing_state is None else routing_state
        return Pretraining(program, vocabulary, first)

    run, check = RunDir(config.run.dir), lambda: require_resumable(config)
    return run_stage(run, config, total_steps(config), check, make_stage, sinks, quiet)


class Pretraining(TokenStage):
    """The stage of `train` (`loop.Stage`)."""

    cursor, doing = None, ""
    not_finite = (
        "the loss or its gradient",
        "go on with train.on_nan=skip, or lower optimizer.peak_lr in a new run",
    )

    def __init__(self, program: Program, vocabulary: Vocabulary, routing_state: Any):
        """Args: `routing_state` is the first one."""
        super().__init__(program)
        self.vocabulary, self.routing_state = vocabulary, routing_state
        config = program.config
        self.meta = {
            "config": to_json(config),
            "vocabulary": vocabulary.to_json(),
            "hashes": hashes_of(config, vocabulary),
            "router": rule_name(config.model.router),
            "versions": versions(),
            "commit": commit(),
        }
        self.warnings = _warnings(config)
        self._samples, drawn_by_nobody = config.train.samples, None
        if config.data.kind != "store":
            drawn_by_nobody = "random tokens are no text and no pictures, so none are drawn"
        elif hosts.several():
            drawn_by_nobody = "several hosts draw none; moma generate does, afterwards"
        if self._samples and drawn_by_nobody:
            self._samples = ()
            self.warnings.append(f"warning: train.samples: {drawn_by_nobody}")
        elif self._samples:
            from moma_jax.generation.samples import require_drawable  # runs without samples go without

            require_drawable(config, vocabulary)
        self._thresholds: dict[str, Any] | None = None
        self._training = config.model.router.training_name
        self._evaluator = Evaluator(program, vocabulary, scheduled(program, routing_state), config.train.telemetry)
        peak = peak_flops(program.mesh.devices.flat[0].device_kind)
        self._hardware = Hardware(flops_per_token(config), None if peak is None else peak * program.mesh.size)

    def abstract_state(self) -> TrainState:
        """See `loop.Stage`."""
        return abstract_state(self.program, self.routing_state)

    def create_state(self) -> TrainState:
        """A fresh state; what run.init_from learned stands in it where that is given."""
        path = self.program.config.run.init_from
        learned = {} if path is None else self._learned_by(path)
        return dataclasses.replace(create_state(self.program, self.routing_state), **learned)

    def compile_step(self, state: TrainState) -> Callable:
        """See `loop.Stage`."""
        return compile_step(self.program, state)

    def meter(self, saved: dict[str, Any] | None) -> Meter:
        """See `loop.Stage`."""
        return token_meter(self.config, step_sums, saved)

    def record(self, meter: Meter, state: TrainState, step: int, epochs: dict[str, float]) -> dict[str, Any]:
        """A train record."""
        rate = float(self.program.optimizer.learning_rate(step))
        thresholds = threshold_figures(jax.device_get(state.routing_state))
        return train_record(self.program.config, meter, self._hardware, step, rate, epochs) | thresholds

    def settle(self, run: RunDir, state: TrainState) -> None:
        """Sets the thresholds by the final weights (`train.calibrate`)."""
        config = self.program.config
        if config.train.calibrate and has_thresholds(config, state.routing_state):
            state = (state.params, state.routing_state, total_steps(config))
            self._thresholds = write_thresholds(run.path, config, *state, config.train.calibrate)

    def evaluate(self, state: TrainState, eval_set: EvalSet) -> list[dict[str, Any]]:
        """An eval record for each routing, and an event for every group whose thresholds are out of calibration."""
        results = self._evaluator(state.params, self._calibrated(state.routing_state), eval_set)
        gaps = gap_percent(results, self._training)
        records = [
            {"kind": "eval", "routing": routing, **figures}
            | ({"gap_percent": gaps[routing]["loss"]} if routing in gaps else {})
            for routing, figures in results.items()
        ]
        records[0] |= {"telemetry": self._evaluator.telemetry(eval_set.name)}
        return records + [{"kind": "event", "event": line} for line in uncalibrated(results)]

    def sampled(self, state: TrainState, step: int, last: bool) -> Iterator[tuple[str, Any, Any]]:
        """The samples that are due (`train.samples`), by the weights and thresholds of now."""
        due = [each for each in self._samples if last or (each.every and step % each.every == 0)]
        if not due:
            return
        from moma_jax.generation.samples import draw_samples

        state_now = (state.params, self.program.decoder, self._calibrated(state.routing_state), step)
        where, hashes = self.config.run.dir, self.meta["hashes"]
        model = Loaded(where, self.config, self.vocabulary, *state_now, self.program, hashes)
        for each in due:
            yield each.name, *draw_samples(model, each)

    def _calibrated(self, routing_state: Any) -> Any:
        """The routing state with the thresholds that were set by the final weights, once they are."""
        if self._thresholds is None:
            return routing_state
        return with_thresholds(routing_state, self._thresholds, self.program)

    def export(self, run: RunDir, state: TrainState) -> None:
        """Writes the last evaluation's losses by document; makes it where this process went on from the very end."""
        sets = self.program.config.train.eval_sets
        if sets and not self._evaluator.evaluated:
            self._thresholds = run.read_json(THRESHOLDS)
            if not belong(self._thresholds, total_steps(self.program.config), state.params):
                self._thresholds = None
                self.settle(run, state)
            for eval_set in sets:
                self.evaluate(state, eval_set)
        if sets and hosts.is_first():
            run.write(DOCUMENTS, self._evaluator.documents())

    def summary(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """The last train record, and the last evaluation of each set beside the losses of a unigram model."""
        final = [r for r in records if r["kind"] == "train"][-1]
        held_out: dict[str, Any] = {}
        for eval_set in self.program.config.train.eval_sets:
            about = ("schema", "kind", "step", "eval_set", "routing", "gap_percent", "time")
            results = {
                r["routing"]: {k: v for k, v in r.items() if k not in about}
                for r in records
                if (r["kind"], r["step"]) == ("eval", final["step"]) and r["eval_set"] == eval_set.name
            }
            baseline = unigram(self.program.config, self.vocabulary, eval_set)
            held_out[eval_set.name] = results | {
                "gap_percent": gap_percent(results, self._training),
                "unigram": baseline,
            }
        return {"final": {k: v for k, v in final.items() if k not in ("schema", "kind", "time")}, "eval": held_out}

    held_out_lines = staticmethod(held_out_lines)

    def _learned_by(self, path: str) -> dict[str, Any]:
        """The newest parameters of another run, whose ids must mean the same, and what its rule keeps beside them.

        That goes on under the same rule, as biases belong to weights; thresholds of expert choice follow theirs anew.
        """
        with contextlib.closing(Checkpoints(RunDir(path))) as checkpoints:
            if (latest := checkpoints.latest()) is None:
                raise InputError(f"run.init_from: {path} has no checkpoint; give the directory of a run that was saved")
            saved = checkpoints.saved(latest).meta
            for name, value in saved["hashes"].items():
                if self.meta["hashes"].get(name) != value:
                    raise InputError(
                        f"run.init_from: the {name} of {path} is not that of this run's stores; use the same"
                    )
            if self.config.run.verify:
                hosts.by_first(lambda: checkpoints.require_whole(latest))
            learned = {"params": checkpoints.restore_params(latest, abstract_params(self.program, self.routing_state))}
            if not self.config.model.router.starts_from_zero and self._has_this_rule(saved):
                placed = sharding.replicated(self.program.mesh)
                learned["routing_state"] = checkpoints.routing_state(latest, placed)
            return learned

    def _has_this_rule(self, saved: Mapping[str, Any]) -> bool:
        """Whether a checkpoint, by its meta, was trained under this run's routing rule with its options."""
        recorded = recorded_rule(from_json(saved["config"]).model.router, saved)
        renamed = with_router(self.config, as_named(recorded, self.config.model.router))
        return as_recorded(renamed) == as_recorded(self.config)


def _warnings(config: Config) -> list[str]:
    """Settings that can be meant but rarely are."""
    total = total_steps(config)
    warnings = warmup_warnings(config.optimizer.warmup_steps, total)
    if (advice := config.model.router.advice(total)) is not None:
        warnings.append(f"warning: {advice}")
    return warnings


def prepare_missing_stores(config: Config, progress: bool) -> None:
    """Makes the stores' directories that do not exist, where the config says how."""
    if config.data.kind != "store" or config.data.prepare is None:
        return
    from moma_jax.data.prepare import prepare

    for path in dict.fromkeys(store.path for store in config.data.stores):
        if RunDir(path).read("manifest.json") is None:
            prepare(config.data.prepare, path, modalities=config.data.modalities, progress=progress)
