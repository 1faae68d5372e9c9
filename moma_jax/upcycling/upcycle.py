"""A trained run with more experts: a new run that goes on from its weights (paper section 2.5).

Every expert of the seed is copied, so that the function stays nearly the same (upcycling/copies.py). The learning-rate
schedule starts anew, the position in the data is kept, thresholds and auxiliary routers are fresh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from moma_jax import hosts, sharding
from moma_jax.checks import resolve
from moma_jax.config import Config, HostsConfig
from moma_jax.config_json import as_recorded, from_json, to_json
from moma_jax.cost import flops_per_token
from moma_jax.data.stream import require_held_out, vocabulary_of
from moma_jax.errors import InputError
from moma_jax.evaluation.evaluate import Evaluator
from moma_jax.fields import differences
from moma_jax.model.decoder import decoder_of, evaluation_decoder, first_routing_state
from moma_jax.rules import rule_name
from moma_jax.runs.checkpoint import Checkpoints, Saved
from moma_jax.runs.directory import RunDir, commit, versions
from moma_jax.runs.journal import finite
from moma_jax.runs.progress import losses
from moma_jax.runs.resume import hashes_of, require_same_stores
from moma_jax.storage import lease
from moma_jax.storage.directory import first_line
from moma_jax.training.load import fingerprint
from moma_jax.training.metrics import step_sums, token_meter
from moma_jax.training.step import (
    Program,
    TrainState,
    abstract_params,
    abstract_state,
    make_program,
    with_dtype,
)
from moma_jax.upcycling.copies import Copied, copied_groups, grown_state

ANCESTRY = "ancestry.json"
MOMENTS = ("reset", "tile")
MAY_CHANGE = (
    "model.ffn",
    "model.ffn_width",  # of which only the hidden size matters
    "model.capacity",
    "model.router",
    "model.attention_weights",
    "model.dropout",
    "model.dtype",
)
"""Fields of the model that the parameters taken over do not depend on, or are copied for."""


def upcycle(
    seed_run: str,
    config: Config,
    *,
    moments: str = "reset",
    perturb: float = 0.0,
    perturb_seed: int = 0,
    fresh: Collection[str] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes a run with more experts than its seed into `config.run.dir`; `moma_jax.train(config)` goes on from there.

    It holds config.json, ancestry.json and checkpoint 0. Every process of a run calls this (`config.hosts`).

    Args:
      seed_run: directory of the run whose newest checkpoint is taken.
      config: of the new run, resolved. Its data and all of the model but MAY_CHANGE are the seed's.
      moments: "reset": the optimizer starts anew. "tile": its moments are taken over, for a copy scaled as its gradient
        is, with their number of updates; those of new routers are zero.
      perturb: standard deviation of noise that is added to copied experts, over that of the weight (one expert's
        matrix). perturb_seed: of that noise.
      fresh: modalities whose experts are drawn as in a new run instead of copied, such as pictures' where the seed is a
        language model.
      quiet: print nothing.

    Returns:
      The content of ancestry.json: "seed_run", "seed_step", "seed_ffn", "ffn"; "seed_tokens" (positions) and
      "seed_flops" (`cost`) of the seed and all its own seeds; the same without padding, as journals count:
      "seed_real_tokens", "seed_real_flops"; "seed_wall_seconds"; "fingerprint" of the seed's parameters; "moments",
      "perturbation", "fresh"; "jump": held-out losses before and after (`_jump`), None without an evaluation set;
      "seed_ancestry": that of the seed, None where it was not upcycled.

    Raises:
      InputError: the two models or their data do not agree, there is no such seed, or the directory is not free;
        nothing was written then.
    """
    hosts.join(config.hosts)
    free = dataclasses.replace(config.run, init_from=None)
    config = with_dtype(resolve(dataclasses.replace(config, hosts=HostsConfig(), run=free)))
    _check_options(config, moments, perturb, perturb_seed)
    run, seed = RunDir(config.run.dir), _read_seed(seed_run)
    if moments == "tile" and seed.saved.cursor is None:
        raise InputError(f"moments: {seed_run} was never trained and has none to tile; reset them")
    copied = require_growable(seed.config, config, seed.run, fresh)
    _require_same_data(seed, config)
    hosts.by_first(lambda: _unfinished(run))
    vocabulary = vocabulary_of(config)
    require_held_out(config)
    hashes = hashes_of(config, vocabulary)
    require_same_stores(hashes, seed.known_hashes, seed.where)
    program = make_program(config)
    with sharding.use_mesh(program.mesh):
        state, figures = _grown(seed, program, vocabulary, copied, moments, (perturb, perturb_seed))
        ancestry = finite(_ancestry(seed, config) | {"moments": moments, "fresh": sorted(fresh)} | figures)
        _write(run, state, Saved(0, seed.saved.cursor, _meta(config, vocabulary, hashes, ancestry)))
    if not quiet and hosts.is_first():
        print(*_lines(config, ancestry), sep="\n")
    return ancestry


def _grown(
    seed: Seed, program: Program, vocabulary, copied: dict[str, Copied], moments: str, noise: tuple[float, int]
) -> tuple[TrainState, dict[str, Any]]:
    """The new run's first state, and what is known from parameters only; `noise` is how much and of which seed."""
    of_seed = _program_of_seed(program, seed.config)
    before = _restored(seed, of_seed, moments)
    state = grown_state(program, before, copied, *noise)
    jump = _jump((of_seed, before), (program, state), vocabulary)
    perturbation = {"relative": noise[0], "seed": noise[1]}
    return state, {"fingerprint": fingerprint(before.params), "perturbation": perturbation, "jump": jump}


def _meta(config: Config, vocabulary, hashes: dict[str, str | None], ancestry: dict[str, Any]) -> dict[str, Any]:
    """What every checkpoint holds beside state and cursor, and the ancestry."""
    return {
        "config": to_json(config),
        "vocabulary": vocabulary.to_json(),
        "hashes": hashes,
        "router": rule_name(config.model.router),
        "versions": versions(),
        "commit": commit(),
        "counters": token_meter(config, step_sums).to_json(),
        "ancestry": ancestry,
    }


# The seed -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seed:
    """A run that another one grows from: directory, resolved config, newest checkpoint and where that lies.

    One that was converted and never trained has neither cursor nor moments, and may know less about its ids.
    """

    run: str
    config: Config
    saved: Saved
    where: str

    @property
    def known_hashes(self) -> dict[str, str | None]:
        """What the stores must agree with."""
        trained = self.saved.cursor is not None
        return {name: value for name, value in self.saved.meta["hashes"].items() if trained or value is not None}


def _read_seed(path: str) -> Seed:
    with contextlib.closing(Checkpoints(RunDir(path))) as checkpoints:
        if (latest := checkpoints.latest()) is None:
            raise InputError(f"{path}: no checkpoint here; give the directory of a run that was saved")
        saved, where = checkpoints.saved(latest), checkpoints.where(latest)
        config = from_json(saved.meta["config"])
        if config.run.verify:
            checkpoints.require_whole(latest)
    return Seed(path, config, saved, where)


def _restored(seed: Seed, program: Program, moments: str) -> TrainState:
    """The seed's state on the devices of `program`, the optimizer's None where it is not wanted."""
    step, first = seed.saved.step, first_routing_state(program.config)
    with contextlib.closing(Checkpoints(RunDir(seed.run))) as checkpoints:
        if moments == "tile":
            return checkpoints.restore(step, abstract_state(program, first))
        params = checkpoints.restore_params(step, abstract_params(program, first))
        return TrainState(step, params, None, checkpoints.routing_state(step, sharding.replicated(program.mesh)))


def _program_of_seed(program: Program, seed: Config) -> Program:
    """The seed's model with the new run's batches, computed as the new run computes."""
    same = ("dtype", "remat", "attention_chunk")
    model = dataclasses.replace(seed.model, **{name: getattr(program.config.model, name) for name in same})
    config = dataclasses.replace(program.config, model=model)
    return program._replace(config=config, decoder=decoder_of(config))


# What must agree ------------------------------------------------------------------------------------------------------


def _check_options(config: Config, moments: str, perturb: float, perturb_seed: int) -> None:
    if config.run.dir is None:
        raise InputError("run.dir: name the directory of the new run, such as runs/upcycled")
    if moments not in MOMENTS:
        raise InputError(f"moments: {moments!r} is none of {', '.join(MOMENTS)}")
    if not 0 <= perturb < math.inf:
        raise InputError(f"perturb: must be 0 or more, such as 0.01; is {perturb}")
    if perturb_seed < 0:
        raise InputError(f"perturb_seed: must be 0 or more, is {perturb_seed}")


def require_growable(seed: Config, config: Config, where: str, fresh: Collection[str] = ()) -> dict[str, Copied]:
    """What `copied_groups` returns; InputError where the model cannot be made of that of the seed, named by `where`."""
    changed = [(line.partition(":")[0], line) for line in differences(as_recorded(seed), as_recorded(config))]
    wrong = [line for name, line in changed if name.startswith("model.") and name not in MAY_CHANGE]
    if wrong:
        raise InputError(f"{where}: the seed has another model ({'; '.join(wrong)}); leave these as they are there")
    return copied_groups(seed, config, fresh)


def _require_same_data(seed: Seed, config: Config) -> None:
    """InputError where the position in the data cannot be taken over, with every field that differs."""
    if seed.saved.cursor is None:  # converted, never trained
        return
    wrong = differences(seed.config.data, config.data, "data")
    if wrong:
        raise InputError(
            f"{seed.run}: its position in the data is kept, so the data must be the same ({'; '.join(wrong)}); leave "
            "these as they are there"
        )
    rows = [each.train.batch_rows for each in (seed.config, config)]
    if config.data.kind == "synthetic" and rows[0] != rows[1]:
        raise InputError(
            f"train.batch_rows: {rows[0]} -> {rows[1]}: random tokens are numbered by batch; keep {rows[0]}"
        )


def _unfinished(run: RunDir) -> bool:
    """Whether the directory, which has to be free, holds what an interrupted `upcycle` left; InputError if it is not.

    ancestry.json is written first and config.json last.
    """
    try:
        names = {name.partition("/")[0] for name in run.names("")} - {".lock", lease.FILE}
    except ValueError as error:  # a file lies there
        raise InputError(f"run.dir: {first_line(error)}; choose a new directory") from error
    begun = ANCESTRY in names and names <= {ANCESTRY, "checkpoints"}
    if names and not begun:
        raise InputError(f"run.dir: {run.path} holds {min(names)}; choose a new directory")
    return begun


# The record -----------------------------------------------------------------------------------------------------------


def _ancestry(seed: Seed, config: Config) -> dict[str, Any]:
    """What `upcycle` returns, less what is known of parameters only; its sums run over all generations."""
    meta, flops = seed.saved.meta, flops_per_token(seed.config)
    before, counted = meta.get("ancestry"), meta["counters"]["total"]
    positions, tokens = seed.saved.step * seed.config.batch_tokens, sum(counted["tokens"])
    own = {
        "seed_tokens": positions,
        "seed_flops": positions * flops,
        "seed_real_tokens": tokens,
        "seed_real_flops": tokens * flops,
        "seed_wall_seconds": counted["wall_seconds"],
    }
    return {
        "seed_run": seed.run,
        "seed_step": seed.saved.step,
        "seed_ffn": seed.config.model.ffn,
        "ffn": config.model.ffn,
        **{name: value + (before[name] if before else 0) for name, value in own.items()},
        "seed_ancestry": before,
    }


def _jump(before: tuple[Program, TrainState], after: tuple[Program, TrainState], vocabulary) -> dict[str, Any] | None:
    """Held-out losses of the seed and of the new model under the routing of training, without noise.

    Returns:
      {"eval_set", "routing", "seed": losses, "upcycled": losses, "difference": losses}; None without a held-out set.
    """
    sets = after[0].config.train.eval_sets
    if not sets:
        return None
    found = []
    for program, state in (before, after):
        name = program.config.model.router.training_name
        evaluator = Evaluator(program, vocabulary, {name: evaluation_decoder(program.decoder)})
        figures = evaluator(state.params, state.routing_state, sets[0])[name]
        found.append({name: value for name, value in figures.items() if name.startswith("loss")})
    difference = {n: None if value is None else found[1][n] - value for n, value in found[0].items()}
    return {
        "eval_set": sets[0].name,
        "routing": after[0].config.model.router.training_name,
        "seed": found[0],
        "upcycled": found[1],
        "difference": difference,
    }


def _write(run: RunDir, state: TrainState, saved: Saved) -> None:
    """ancestry.json, checkpoint 0, and config.json last; all or, where something cannot be written, nothing."""
    with contextlib.ExitStack() as held:
        hosts.by_first(lambda: _take(run, held))
        try:
            run.write_json(ANCESTRY, saved.meta["ancestry"])
            with Checkpoints(run, write=True) as checkpoints:
                checkpoints.save(state, saved)
                checkpoints.wait()
            run.write_json("config.json", saved.meta["config"])
        except InputError:
            if hosts.is_first():
                _clear(run)
            raise
    hosts.meet()


def _take(run: RunDir, held: contextlib.ExitStack) -> None:
    """Makes the directory this process's, as long as `held` lasts, and clears it of what an interrupted one left."""
    held.enter_context(run.locked())
    if _unfinished(run):
        _clear(run)


def _clear(run: RunDir) -> None:
    run.clear("checkpoints")
    run.delete(ANCESTRY)


def _lines(config: Config, ancestry: dict[str, Any]) -> list[str]:
    """What is printed."""
    origin = f"{ancestry['seed_run']} ({ancestry['seed_ffn']}, step {ancestry['seed_step']})"
    lines = [f"{config.run.dir}: {config.model.ffn} from {origin}, optimizer moments {ancestry['moments']}"]
    if (jump := ancestry["jump"]) is None:
        lines.append("no jump in loss to report: train.eval_sets names no held-out set")
    else:
        where = f"held out, {jump['eval_set']} ({jump['routing']})"
        lines += [f"{where}  {name}: {losses(jump[name])}" for name in ("seed", "upcycled", "difference")]
    return [*lines, f"go on with: moma train {config.run.dir}"]
