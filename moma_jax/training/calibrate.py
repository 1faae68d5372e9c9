"""`moma routers calibrate`: thresholds of a finished model, so that each expert is entered by its share of tokens.

The running thresholds of training (routers/choice.py) average the cut-offs of many updates under weights that moved on,
and a mean of rows' cut-offs is not that of all their tokens. Here the final weights read some batches of training
under expert choice, every router counts its logits, and its threshold becomes their pooled quantile: as many tokens
pass it as the router took. Weights and checkpoints stay as they are; `load` reads what is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moma_jax import hosts, sharding
from moma_jax.checks import resolve
from moma_jax.config import Config, HostsConfig, MeshConfig, with_router
from moma_jax.data.stream import open_stream
from moma_jax.errors import InputError
from moma_jax.model.decoder import first_routing_state
from moma_jax.router import THRESHOLD, Quota, Routed, Score
from moma_jax.routers.choice import Choice, best_of, thresholds
from moma_jax.rules import rule_name, switched
from moma_jax.runs.directory import RunDir, commit, versions
from moma_jax.training.load import THRESHOLDS, THRESHOLDS_FORMAT, config_of, fingerprint, load
from moma_jax.training.step import make_program, put, run_decoder

BINS, REACH = 8192, 10.0
"""Logits are counted in bins of equal width in asinh(logit), from -REACH to REACH: a logit of 11,000 is still inside,
and near 0 a bin is 0.0024 wide, within which counts are taken to be even."""


def _place(asinh):
    """Where the bins have an asinh(logit): the number of its bin, and how far it is into it."""
    return (asinh + REACH) * (BINS / (2 * REACH))


@dataclass(frozen=True)
class Counting(Choice):
    """Expert choice that counts the logits of eligible tokens, and how many of them it takes."""

    def state(self, experts: int) -> dict[str, Any]:
        return {"count_EB": np.zeros((experts, BINS), np.float32), "taken_E": np.zeros(experts, np.float32)}

    def select(self, score: Score, eligible_T, quota: Quota, state: dict[str, Any], key) -> Routed:
        selection = best_of(score, eligible_T, quota)
        bin_ET = jnp.clip(_place(jnp.arcsinh(score.plain_TE)), 0, BINS - 1).astype(jnp.int32).T
        expert_E1 = jnp.arange(len(bin_ET))[:, None]
        count_EB = state["count_EB"].at[expert_E1, bin_ET].add(eligible_T.astype(jnp.float32))
        return Routed(selection, {"count_EB": count_EB, "taken_E": state["taken_E"] + selection.filled_EC.sum(1)})


def calibrate(
    run: str,
    *,
    batches: int = 16,
    step: int | None = None,
    router: Any = None,
    mesh: MeshConfig | None = None,
) -> dict[str, Any]:
    """Sets the thresholds of a run's checkpoint by the final weights, and writes them to RUN/thresholds.json.

    Args:
      run: run directory. batches: of training, from its beginning, each as large as an update.
      step: which checkpoint; None: the newest. router, mesh: as of `moma_jax.load`.

    Returns:
      What thresholds.json holds: "step", "model" (its fingerprint), "batches", "thresholds" {group: for each layer,
      for each expert}, "load_before" {group: passing over taken tokens under the thresholds of training, as the
      thresholds' own histogram has it, by layer and expert}, "versions", "commit".

    Raises:
      InputError: no such run or checkpoint, or its rule keeps no thresholds; nothing was written.
    """
    if batches < 1:
        raise InputError(f"--batches: {batches}; give 1 or more")
    hosts.join(HostsConfig())
    _require_thresholds(run, config_of(run))
    loaded = load(run, step=step, router=router, fitted=False, calibrated=False, mesh=mesh)
    _require_thresholds(run, loaded.config, loaded.routing_state)
    return write_thresholds(run, loaded.config, loaded.params, loaded.routing_state, loaded.step, batches)


def write_thresholds(
    run: str, config: Config, params: Any, routing_state: Any, step: int, batches: int
) -> dict[str, Any]:
    """`calibrate` for a model at hand: `params` after `step` updates of `config`; every process of a run calls it."""
    counts = _counted(config, params, batches)
    before = jax.device_get({name: routing_state[name] for name in counts})
    found = {
        "format_version": THRESHOLDS_FORMAT,
        "step": step,
        "model": fingerprint(params),
        "batches": batches,
        "thresholds": {name: thresholds_of(**state).tolist() for name, state in counts.items()},
        "load_before": {name: _loads(before[name], **state).tolist() for name, state in counts.items()},
        "versions": versions(),
        "commit": commit(),
    }
    if hosts.is_first():
        RunDir(run).write_json(THRESHOLDS, found)
    return found


def _require_thresholds(run: str, config: Config, routing_state: Any = None) -> None:
    """InputError where there are no thresholds to set."""
    if not config.routed:
        raise InputError(f"{run}: nothing to calibrate: model.ffn {config.model.ffn} has no router")
    if not has_thresholds(config, routing_state):
        rule = rule_name(config.model.router)
        raise InputError(f"{run}: nothing to calibrate: its routing rule {rule} keeps no such thresholds")


def has_thresholds(config: Config, routing_state: Any = None) -> bool:
    """Whether the model has routers with thresholds to calibrate; a rule derived from Choice may keep another state."""
    rule, states = config.model.router, (routing_state or {}).values()
    kept = all(isinstance(own, dict) and {"threshold_E", "updates"} <= own.keys() for own in states)
    return bool(config.routed) and THRESHOLD in rule.causal and isinstance(rule, Choice) and kept


def _counted(config: Config, params: Any, batches: int) -> dict[str, dict[str, np.ndarray]]:
    """The state of `Counting` by group of experts, stacked over layers, after some batches."""
    train = config.train  # one microbatch after the other, which is what fits
    batches *= train.accumulate
    train = dataclasses.replace(train, batch_rows=train.batch_rows // train.accumulate, accumulate=1)
    config = resolve(dataclasses.replace(config, train=train))
    config = with_router(config, switched(config.model.router, Counting()))
    program = make_program(config)

    def count(params, state, batch):
        group_G = jnp.arange(batch.token_BS.shape[0] // config.data.group_rows)
        return run_decoder(program, params, batch, jnp.int32(0), group_G, state, False).routing_state

    with sharding.use_mesh(program.mesh):
        state = jax.device_put(first_routing_state(config), sharding.replicated(program.mesh))
        counting = jax.jit(count, out_shardings=sharding.replicated(program.mesh))
        with contextlib.closing(open_stream(config)) as stream:
            for each in itertools.islice(stream, batches):
                state = counting(params, state, put(each.batch, program.mesh, whole=True))
    return jax.tree.map(np.asarray, jax.device_get(state))


# From counts to thresholds, NumPy -------------------------------------------------------------------------------------


def thresholds_of(count_EB, taken_E) -> np.ndarray:
    """The logit that as many counted tokens reach as were taken, float32; any axes before E and B.

    A router of which no token was counted keeps out everybody: infinity is what nobody reaches, and JSON has none, so
    it is the largest float32.
    """
    above_EB = np.cumsum(np.asarray(count_EB, np.float64)[..., ::-1], axis=-1)[..., ::-1]
    taken_E1 = np.asarray(taken_E, np.float64)[..., None]
    bin_E = np.maximum((above_EB >= taken_E1).sum(-1) - 1, 0)  # the highest that is reached by so many
    above_E = np.take_along_axis(above_EB, bin_E[..., None], -1)[..., 0]
    inside_E = np.take_along_axis(np.asarray(count_EB, np.float64), bin_E[..., None], -1)[..., 0]
    share_E = np.divide(above_E - np.asarray(taken_E), inside_E, out=np.zeros_like(above_E), where=inside_E > 0)
    logit_E = np.sinh((bin_E + share_E) * (2 * REACH / BINS) - REACH)
    return np.where(above_EB[..., 0] > 0, logit_E, np.finfo(np.float32).max).astype(np.float32)


def _loads(state: dict[str, Any], count_EB, taken_E) -> np.ndarray:
    """Counted tokens that the thresholds of training let pass, over those that were taken."""
    place_E1 = _place(np.arcsinh(np.asarray(thresholds(state))))[..., None]
    part_EB = np.clip(np.arange(1, BINS + 1) - place_E1, 0, 1)  # of each bin, what lies above
    return (count_EB * part_EB).sum(-1) / np.maximum(taken_E, 1e-9)
