"""`moma codec train`: an image tokenizer learns to give pictures back, as a stage of the training loop.

Records: `codec` (every `train.log_every` steps: the losses, PSNR, use and perplexity of the codebook over the steps
since the last one, dead rows restarted) and `codec_eval` (held-out pictures: PSNR, SSIM, use, perplexity), the latter
with a contact sheet of truth above reconstruction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from moma_jax import hosts, sharding
from moma_jax.checks import round_up
from moma_jax.codec.folder import write_codec
from moma_jax.codec.quality import Quality, sheet_of, use_of
from moma_jax.codec.vqgan import VqganCodec, from_network, to_network
from moma_jax.config import EvalSet, HostsConfig
from moma_jax.data.stream import Stream
from moma_jax.errors import InputError
from moma_jax.fields import differences
from moma_jax.runs.directory import RunDir, commit, versions
from moma_jax.runs.journal import user_sinks
from moma_jax.runs.progress import quality
from moma_jax.runs.resume import began_with, require_unchanged
from moma_jax.training.codec.config import CodecConfig, from_json, resolve, to_json
from moma_jax.training.codec.pictures import Pictures
from moma_jax.training.codec.step import (
    CodecProgram,
    CodecReport,
    CodecState,
    abstract_codec_state,
    compile_codec_step,
    create_codec_state,
    make_codec_program,
)
from moma_jax.training.loop import run_stage
from moma_jax.training.metrics import Meter, last_figures, mean
from moma_jax.training.optimizer import warmup_warnings
from moma_jax.training.step import put

EVAL_BATCH = 32
"""Held-out pictures that are drawn at once, or a few more, so that devices share them."""


def train_codec(config: CodecConfig, *, sink: Any = None, quiet: bool = False) -> dict[str, Any]:
    """Trains, or goes on training, the image tokenizer in `config.run.dir`; every process of a run calls it.

    The directory is that of a run (checkpoints, metrics.jsonl, tensorboard, config.json, summary.json), with contact
    sheets in sheets/; when it is complete, it is also the folder of the codec (codec.json, codec.safetensors).

    Args:
      config: a config (moma_jax/training/codec/config.py).
      sink: receives every record on process 0, as that of `moma_jax.train`.
      quiet: print nothing.

    Returns:
      The run's summary, as in summary.json.

    Raises:
      InputError, RunError, SystemExit: as `moma_jax.train`.
    """
    sinks = user_sinks(sink)
    hosts.join(config.hosts)
    config = resolve(dataclasses.replace(config, hosts=HostsConfig()))  # who is who is no part of a run
    if config.run.dir is None:
        raise InputError("run.dir: name the directory of the run, such as runs/codec")
    run = RunDir(config.run.dir)

    def check() -> None:
        if (found := began_with(run, from_json)) is not None:
            require_unchanged(run, differences(found[0], config))

    def make_stage() -> CodecTraining:
        return CodecTraining(make_codec_program(config), Pictures(config.data))

    return run_stage(run, config, config.train.steps, check, make_stage, sinks, quiet)


class CodecTraining:
    """The stage of `train_codec` (`loop.Stage`)."""

    cursor, doing, eval_sets = None, "", (EvalSet(),)
    not_finite = ("a loss or its gradient", "lower optimizer.peak_lr, or go on with train.on_nan=skip")

    def __init__(self, program: CodecProgram, pictures: Pictures):
        """Decodes the held-out pictures; InputError where there are none."""
        self.program, self.config, self.mesh = program, program.config, program.mesh
        self.steps, self._pictures = self.config.train.steps, pictures
        pictures.require_some()
        self._reader = VqganCodec(self.config.network, {}).read
        self._held_out_BHW3 = np.concatenate(list(pictures.held_out(self._reader, self.config.train.eval_pictures)))
        self.meta = {
            "config": to_json(self.config),
            "hashes": {"pictures": pictures.fingerprint},
            "versions": versions(),
            "commit": commit(),
        }
        self.warnings = warmup_warnings(self.config.optimizer.warmup_steps, self.steps)
        self._drawn = jax.jit(self._reconstructed(), out_shardings=sharding.replicated(self.mesh))

    def require_same_data(self, before: dict[str, Any], where: str) -> None:
        """See `loop.Stage`."""
        if before.get("pictures") != self.meta["hashes"]["pictures"]:
            raise InputError(
                f"data.source: its pictures are not those of {where}; restore them or choose another run.dir"
            )

    def open_data(self, cursor: Any) -> Stream:
        """See `loop.Stage`."""
        batch = self.config.train.batch
        return self._pictures.stream(self._reader, batch, sharding.own_groups(self.mesh, batch), cursor)

    def abstract_state(self) -> CodecState:
        """See `loop.Stage`."""
        return abstract_codec_state(self.program)

    def create_state(self) -> CodecState:
        """A fresh state."""
        return create_codec_state(self.program)

    def compile_step(self, state: CodecState) -> Callable:
        """See `loop.Stage`."""
        return compile_codec_step(self.program, state)

    def meter(self, saved: dict[str, Any] | None) -> Meter:
        """See `loop.Stage`."""
        return Meter(_sums, saved, counted="pictures")

    def record(self, meter: Meter, state: CodecState, step: int, epochs: dict[str, float]) -> dict[str, Any]:
        """A record of kind "codec"."""
        seen = meter.interval()
        steps = seen.pop("finite_steps", 0.0)
        names = [name for name in seen if name.startswith("loss_") or name in ("psnr", "grad_norm")]
        record = {"kind": "codec", "step": step} | {n.removeprefix("loss_"): mean(seen[n], steps) for n in names}
        if "chosen_V" in seen:
            record |= use_of(np.asarray(seen["chosen_V"]))
        record["restarted"] = int(seen.get("restarted", 0))
        record["learning_rate"] = float(self.program.optimizer.learning_rate(step))
        record |= {**meter.cumulative(), "wall_seconds": meter.wall_seconds(), "epoch": float(epochs["pictures"])}
        return record | meter.speed(seen)

    def evaluate(self, state: CodecState, eval_set: EvalSet) -> list[dict[str, Any]]:
        """A record of kind "codec_eval", and a sheet."""
        judged, shown, most = Quality(self.config.network.codebook), [], self.config.train.sheet_pictures
        batch = round_up(EVAL_BATCH, sharding.shards(self.mesh))
        for start in range(0, len(self._held_out_BHW3), batch):
            truth = self._held_out_BHW3[start : start + batch]
            filled = np.concatenate([truth, np.repeat(truth[:1], batch - len(truth), axis=0)])
            drawn, codes = self._drawn(state.params, put(filled, self.mesh, whole=True))
            drawn, codes = np.asarray(drawn)[: len(truth)], np.asarray(codes)[: len(truth)]
            judged.add(truth, drawn, codes)
            shown += list(zip(truth, drawn, strict=True))[: most - len(shown)]
        sheet = {"sheet": sheet_of(*zip(*shown, strict=True))} if shown else {}
        return [{"kind": "codec_eval", **judged.figures(), **sheet}]

    def settle(self, run: RunDir, state: CodecState) -> None:
        """Nothing."""

    def sampled(self, state: CodecState, step: int, last: bool) -> tuple:
        """Nothing: evaluations have sheets."""
        return ()

    def export(self, run: RunDir, state: CodecState) -> None:
        """Writes the codec."""
        params = jax.tree.map(lambda x: np.asarray(x, np.float32), state.params)
        if hosts.is_first():
            write_codec(run.path, VqganCodec(self.config.network, params))

    def summary(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """The last record of each kind."""
        return last_figures(records, "codec", "codec_eval")

    def held_out_lines(self, name: str, result: dict[str, Any]) -> list[str]:
        """See `loop.Stage`."""
        return [f"held out, {name}:  {quality(result)}"]

    def _reconstructed(self) -> Callable:
        """(params, uint8 pixels) -> (uint8 pixels, codes), each device its own pictures."""
        network = self.config.network

        def body(params, pixels_BHW3):
            truth_BHW3 = to_network(network, pixels_BHW3)
            seen = self.program.network.apply({"params": params}, truth_BHW3, method="reconstruct")
            return from_network(network, seen.pixels_BHW3), seen.code_BK

        rows, whole = sharding.spec("batch"), PartitionSpec()
        return lambda params, pixels: sharding.shard_map(body, (whole, rows), (rows, rows), check=False)(params, pixels)


def _sums(report: CodecReport) -> dict[str, Any]:
    """What is added up of an update."""
    sums = {f"loss_{name}": value for name, value in report.losses.items()}
    return sums | {name: getattr(report, name) for name in ("psnr", "grad_norm", "chosen_V", "restarted")}
