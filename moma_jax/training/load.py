"""A run's trained model: parameters, vocabulary, and the routings that it can be used under."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from moma_jax import sharding
from moma_jax.checks import resolve
from moma_jax.compiling import use_cache
from moma_jax.config import Config, MeshConfig, StoreConfig, with_router
from moma_jax.config_json import from_json, of_record
from moma_jax.errors import InputError
from moma_jax.fields import shown
from moma_jax.geometry import rule_of
from moma_jax.model.auxiliary import SUFFIX
from moma_jax.model.decoder import Decoder, causal_decoder, evaluation_decoder
from moma_jax.router import CAUSAL, CAUSAL_ROUTINGS
from moma_jax.rules import bind, recorded_rule
from moma_jax.runs.checkpoint import Checkpoints
from moma_jax.runs.directory import RunDir
from moma_jax.runs.status import read_status
from moma_jax.training.step import Program, abstract_params, make_program
from moma_jax.vocab import Vocabulary

ROUTERS = "routers"
"""Directory, inside a run's, of the auxiliary routers that were fitted to it."""


THRESHOLDS = "thresholds.json"
"""File, in a run's directory, of the thresholds that `moma routers calibrate` set."""
THRESHOLDS_FORMAT = 1


@dataclass(frozen=True)
class Loaded:
    """A trained model.

    Attributes:
      run: its directory. config: its resolved config. vocabulary: its id layout.
      params: parameters, float32, those of auxiliary routers included where there are any.
      decoder: the model under the routing of training, `decoder.apply({"params": params}, ..., routing_state=...)`.
      routing_state: the routing rules' state.
      step: updates that made these parameters.
      program: what compiled functions are made of.
      hashes: of what makes ids mean something: layout, tokenizer and codec of the stores it was trained on.
      refused: why routers that lie there were not taken; None where they were, or there are none.
    """

    run: str
    config: Config
    vocabulary: Vocabulary
    params: Any
    decoder: Decoder
    routing_state: Any
    step: int
    program: Program
    hashes: dict[str, str | None]
    refused: str | None = None

    @property
    def routings(self) -> tuple[str, ...]:
        """Names of the routings that the model can be used under, that of training first."""
        rule = self.config.model.router
        causal = rule.causal if self.config.routed else CAUSAL_ROUTINGS
        return tuple(name for name in (rule.training_name, *causal) if self._lacks(name) is None)

    def under(self, routing: str) -> Decoder:
        """The decoder under a routing; `apply` takes `params` and `routing_state` as always.

        Raises:
          InputError: there is no such routing, or this run lacks what it needs.
        """
        if (reason := self._lacks(routing)) is not None:
            raise InputError(f"routing: {reason}")
        if routing == self.config.model.router.training_name:
            return evaluation_decoder(self.decoder)
        return causal_decoder(self.config, routing)

    def _lacks(self, routing: str) -> str | None:
        """Why this model cannot be used under a routing, and the remedy."""
        rule, config = self.config.model.router, self.config
        known = (rule.training_name, *CAUSAL_ROUTINGS)
        if routing not in known:
            return f"{routing!r} is none of {', '.join(known)}"
        if routing == rule.training_name:
            return None
        reason = lacks(config, routing, self.routing_state)
        if reason is not None and routing == CAUSAL and self.refused is not None:
            return self.refused
        return reason and f"{self.run} has {reason}".replace("RUN", self.run)


def lacks(config: Config, routing: str, routing_state: Any) -> str | None:
    """What a model lacks to be used under a causal routing, to stand behind "RUN has "; None where nothing."""
    asked = ((rule_of(config.model, group), routing_state.get(group.name, {})) for group in config.routed)
    lacking = (rule.lacks(routing, state) for rule, state in asked)
    return next((reason for reason in lacking if reason is not None), None)


def config_of(run: str) -> Config:
    """The resolved config of a run; InputError where there is no run."""
    home = RunDir(run)
    if (written := home.read_json("config.json")) is None:
        raise InputError(f"{run}: no config.json here; give a run directory")
    config = from_json(written)
    return with_stores(dataclasses.replace(config, run=of_record(config.run)), home)


def with_stores(config: Config, run: RunDir) -> Config:
    """The config with its stores' paths as they are from here: those of a run are relative to where it was started."""
    folder = read_status(run.path).get("folder", ".")

    def found(store: StoreConfig) -> StoreConfig:
        there = os.path.join(folder, store.path)
        away = "://" not in store.path and not os.path.exists(store.path) and os.path.exists(there)
        return dataclasses.replace(store, path=there) if away else store

    stores = tuple(found(store) for store in config.data.stores)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, stores=stores))


def load(
    run: str,
    *,
    step: int | None = None,
    router: Any = None,
    fitted: bool = True,
    calibrated: bool = True,
    mesh: MeshConfig | None = None,
) -> Loaded:
    """The model of a run.

    Args:
      run: run directory. step: which checkpoint; None: the newest.
      router: the run's own routing rule, where it was trained with one: a Router, its class, a select function, or a
        name "file.py:attribute"; the code that a run names is never run for that alone.
      fitted: take the auxiliary routers that `moma routers fit` left there. calibrated: take the thresholds that
        `moma routers calibrate` left there, where they are of this checkpoint.
      mesh: devices to lay the parameters on, which need not be those of training; None: whole on every device.

    Raises:
      InputError: no such run or checkpoint, or the code of the run's routing rule was not named.
    """
    config = resolve(dataclasses.replace(config_of(run), mesh=MeshConfig() if mesh is None else mesh))
    use_cache(config.run.compilation_cache)
    with contextlib.closing(Checkpoints(RunDir(run))) as checkpoints:
        steps = checkpoints.steps()
        step = max(steps, default=None) if step is None else step
        if step not in steps:
            if not steps:
                raise InputError(f"{run}: no checkpoint yet; train it to its first one (train.checkpoint_every)")
            raise InputError(f"{run}: no checkpoint of step {step}; it has: {', '.join(map(str, steps))}")
        meta = checkpoints.saved(step).meta
        config = with_router(config, bind(recorded_rule(config.model.router, meta), router))
        vocabulary = Vocabulary.from_json(meta["vocabulary"])
        program = make_program(config)
        with sharding.use_mesh(program.mesh):
            routing_state = checkpoints.routing_state(step, sharding.replicated(program.mesh))
            params = checkpoints.restore_params(step, abstract_params(program, routing_state))
    hashes = meta["hashes"]
    if calibrated:
        routing_state = _calibrated(RunDir(run), step, params, routing_state, program)
    model = Loaded(str(run), config, vocabulary, params, program.decoder, routing_state, step, program, hashes)
    return _with_fitted_routers(model) if fitted and not config.model.router.auxiliary else model


def with_auxiliary(config: Config) -> Config:
    """The config of the same model with auxiliary routers."""
    return with_router(config, dataclasses.replace(config.model.router, auxiliary=True))


def fingerprint(params: Any) -> str:
    """SHA-256, as hex, of the embedding's first rows and of the norms' scales: which model these parameters are of."""
    layers = params["layers"]
    norms = layers.get("odd", layers)["ffn_norm"]  # one, or each modality's
    parts = [params["embedding"]["kernel_VD"][:8], params["final_norm"]["scale_D"], *jax.tree.leaves(norms)]
    whole = [part if part.is_fully_addressable else process_allgather(part, tiled=True) for part in parts]
    return hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in whole)).hexdigest()


def joined(params: Any, routers: Any) -> Any:
    """Parameters with those of auxiliary routers, as `auxiliary_params` gives them, in their places."""
    return params | {
        name: own if name not in params or name.endswith(SUFFIX) else joined(params[name], own)
        for name, own in routers.items()
    }


def _calibrated(run: RunDir, step: int, params: Any, routing_state: Any, program: Program) -> Any:
    """The routing state with the thresholds of `moma routers calibrate`, where they belong to these parameters; says so
    where they do not."""
    if (found := run.read_json(THRESHOLDS)) is None:
        return routing_state
    path = run.join(THRESHOLDS)
    if not belong(found, step, params):
        of = f"step {shown(found.get('step'))}" if found.get("step") != step else "another model"
        logging.getLogger(__name__).warning(
            "%s: set for %s, this is step %d, so they are not used; moma routers calibrate %s", path, of, step, run.path
        )
        return routing_state
    try:
        return with_thresholds(routing_state, found, program)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: does not fit the run's routers; remove it and calibrate again") from error


def belong(found: Any, step: int, params: Any) -> bool:
    """Whether the content of a thresholds.json (None without one) was set for these parameters after `step` updates."""
    return isinstance(found, dict) and (found.get("step"), found.get("model")) == (step, fingerprint(params))


def with_thresholds(routing_state: Any, found: dict[str, Any], program: Program) -> Any:
    """The routing state with the thresholds that `calibrate` found; ValueError and the like where they do not fit."""
    state = dict(routing_state)
    known = {name for name, own in state.items() if "threshold_E" in own}
    if found["format_version"] != THRESHOLDS_FORMAT or found["thresholds"].keys() != known:
        raise ValueError(f"format {found['format_version']}")
    for name, values in found["thresholds"].items():
        threshold_E = np.asarray(values, np.float32)
        if state[name]["threshold_E"].shape != threshold_E.shape or not np.all(np.isfinite(threshold_E)):
            raise ValueError(name)
        still = ("unseen_E", "passed_E", "taken_E")  # of either kind of state: nothing moves them
        own = {"threshold_E": threshold_E} | {key: np.zeros_like(threshold_E) for key in still if key in state[name]}
        state[name] = state[name] | jax.device_put(own, sharding.replicated(program.mesh))
    return state


def _with_fitted_routers(model: Loaded) -> Loaded:
    """The model with the routers of `moma routers fit`, where they lie in the run's directory and belong to it."""
    where = RunDir(f"{model.run.rstrip('/')}/{ROUTERS}")
    if where.read_json("config.json") is None:
        return model
    with contextlib.closing(Checkpoints(where)) as checkpoints:
        if (latest := checkpoints.latest()) is None:
            return model
        meta = checkpoints.saved(latest).meta
        if meta["model_step"] != model.step:
            reason = f"the auxiliary routers of {model.run} were fitted at step {meta['model_step']}, not {model.step}"
            remedy = f"use that step, or remove {where.path} and fit them again: moma routers fit {model.run}"
            return dataclasses.replace(model, refused=f"{reason}; {remedy}")
        if meta.get("model") != fingerprint(model.params):
            reason = f"the auxiliary routers in {where.path} were fitted to another model"
            remedy = f"remove them and fit again: moma routers fit {model.run}"
            return dataclasses.replace(model, refused=f"{reason}; {remedy}")
        if where.read_json("summary.json") is None:
            reason = f"the auxiliary routers of {model.run} are fitted in part, up to step {latest}"
            return dataclasses.replace(model, refused=f"{reason}; go on with: moma routers fit {model.run}")
        config = with_auxiliary(model.config)
        program = make_program(config)
        with sharding.use_mesh(program.mesh):
            target = auxiliary_params(abstract_params(program, model.routing_state))
            routers = checkpoints.restore_params(latest, target)
    params = joined(model.params, routers)
    return dataclasses.replace(model, config=config, program=program, decoder=program.decoder, params=params)


def auxiliary_params(params: Any) -> dict[str, Any]:
    """Those of auxiliary routers alone, at their places in the tree."""
    inside = {
        name: own if name.endswith(SUFFIX) else auxiliary_params(own)
        for name, own in params.items()
        if isinstance(own, dict)
    }
    return {name: own for name, own in inside.items() if own}
