"""Routing that a token decides by itself, so that a model can be sampled from (paper section 2.4, and beyond it).

Expert choice ranks a token against later ones. Two rules do not: a token enters every expert

  * whose auxiliary router says so (`ByPrediction`, the paper's; model/auxiliary.py), or
  * whose running threshold its router logit reaches (`ByThreshold`; for text alone: arXiv 2603.11535). Each expert
    keeps an average over updates of the lowest logit, without noise, among the k_e tokens that expert choice takes:
    the score that its top share of its modality exceeds. It lives in the routing state, so in checkpoints, and is
    averaged over routing groups and devices. A group without the modality votes for what was there; how much of the
    average is still the 0 that it began with is kept beside it, and divided out.

Both give each expert a list of slots in the order of positions (of several rows, row by row within a position). Where
slots run out the latest positions are dropped, never the lowest scores: that would look ahead.

All are select functions (model/routing.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from moma_jax.config import Config, ModelConfig
from moma_jax.errors import InputError
from moma_jax.ffn import ExpertGroup
from moma_jax.model.routing import Quota, Score, Selection, expert_choice

State = dict[str, Any]
"""Of one group of experts, float32: `threshold_E`, the running average from 0; `unseen_E`, how much of it is still that
0; `updates` seen so far, a scalar; `load_E`, tokens that the threshold lets pass over those that expert choice takes;
`dropped_E`, share of passing tokens that found no slot. The last two are of the latest update."""


def first_thresholds(config: Config) -> dict[str, State]:
    """The routing state of a run that has not begun, by group of experts that have a router, stacked over layers; and
    by router of mixture of depths ("depth_text"), stacked over the layers that have it."""

    def state(group: ExpertGroup, layers: int) -> State:
        zero_LE = jnp.zeros((layers, group.experts), jnp.float32)
        seen = {"threshold_E": zero_LE, "unseen_E": zero_LE + 1, "updates": zero_LE[:, 0]}
        return seen | {"load_E": zero_LE, "dropped_E": zero_LE}

    layers = config.model.layers
    return {g.name: state(g, layers) for g in config.experts.groups if g.routed} | {
        g.name: state(g, layers // 2) for g in config.depth
    }


def training_select(config: Config):
    """The select function that a config trains its experts with."""
    return _rule(config.model, config.data.group_rows, config.model.gumbel)


def depth_select(model: ModelConfig):
    """The select function that a model trains its mixture of depths with, which looks at single rows."""
    return _rule(model, 1, False)


def _rule(model: ModelConfig, rows: int, noisy: bool):
    """The rule of training for routing groups of `rows` rows, on logits that bear noise or do not."""
    choice = Choice(model.threshold_decay, noisy)
    if model.routing == "choice":
        return choice
    return ThresholdTraining(rows, model.routing_warmup, model.routing_slack, choice)


# In training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Expert choice that keeps thresholds on the way.

    Attributes:
      decay: of the running thresholds, per update. noisy: the router's logits bear noise, which thresholds must not.
    """

    decay: float
    noisy: bool

    def __call__(self, score: Score, eligible_T, quota: Quota, state: State | None, key):
        selection, _, losses = expert_choice(score, eligible_T, quota, None, key)
        if state is not None:
            taken = _without_noise(score, eligible_T, quota) if self.noisy else selection
            state = follow(state, score, eligible_T, taken, self.decay)
        return selection, state, losses


@dataclass(frozen=True)
class ThresholdTraining:
    """Thresholds as the training rule, after a warm-up of expert choice.

    No expert can starve for long: its threshold follows the scores of all tokens of its modality, not of those it
    took, so where nothing passes it sinks to where the expert's share does.

    Attributes:
      rows: rows of a routing group. warmup: updates of expert choice. slack: slots over those of expert choice.
      choice: the rule of the warm-up.
    """

    rows: int
    warmup: int
    slack: float
    choice: Choice

    def __call__(self, score: Score, eligible_T, quota: Quota, state: State, key):
        slots = min(len(eligible_T), math.ceil(quota.slots * self.slack))
        chosen, followed, losses = self.choice(score, eligible_T, quota, state, key)
        chosen = Selection(*(jnp.pad(x_EC, ((0, 0), (0, slots - quota.slots))) for x_EC in chosen))
        passes_TE = eligible_T[:, None] & passes_threshold(score.plain_TE, state)
        passed = take_passing(passes_TE, score.logit_TE, self.rows, slots)
        warm = state["updates"] < self.warmup
        selection = Selection(*(jnp.where(warm, a, b) for a, b in zip(chosen, passed, strict=True)))
        count_E = jnp.maximum(passes_TE.sum(0), 1)
        dropped_E = jnp.where(warm, 0.0, 1.0 - jnp.minimum(count_E, slots) / count_E)
        return selection, followed | {"dropped_E": dropped_E}, losses


def follow(state: State, score: Score, eligible_T, taken: Selection, decay: float) -> State:
    """The state after this update: a plain mean of the first ones, then an exponential one.

    Linear in this routing group's part, so that the mean over routing groups and devices is exact.

    Args:
      taken: what expert choice takes of this routing group by `score.plain_TE`.
    """
    plain_ET = jax.lax.stop_gradient(score.plain_TE.T)
    taken_EC = jnp.take_along_axis(plain_ET, taken.index_EC, axis=1)
    lowest_E = jnp.where(taken.filled_EC, taken_EC, jnp.inf).min(axis=1)
    old_E, updates = state["threshold_E"], state["updates"]
    weight = jnp.maximum(1.0 / (updates + 1.0), 1.0 - decay)
    seen_E = jnp.where(jnp.isfinite(lowest_E), weight, 0.0)
    threshold_E = old_E + jnp.where(seen_E > 0, seen_E * (lowest_E - old_E), 0.0)
    passed_E = jnp.sum(eligible_T & passes_threshold(plain_ET.T, state).T, axis=1)
    load_E = passed_E / jnp.maximum(taken.filled_EC.sum(axis=1), 1)
    unseen_E = state["unseen_E"] * (1.0 - seen_E)
    return state | {"threshold_E": threshold_E, "unseen_E": unseen_E, "updates": updates + 1.0, "load_E": load_E}


def _without_noise(score: Score, eligible_T, quota: Quota) -> Selection:
    """What expert choice takes by the logits without noise."""
    plain_TE = jax.lax.stop_gradient(score.plain_TE)
    return expert_choice(Score(plain_TE, plain_TE, plain_TE), eligible_T, quota, None, None)[0]


# At inference ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByThreshold:
    """Every token enters the experts whose threshold its logit reaches; every one finds a slot.

    Attributes: rows: rows of a routing group.
    """

    rows: int

    def __call__(self, score: Score, eligible_T, quota: Quota, state: State, key):
        passes_TE = passes_threshold(score.plain_TE, state) & eligible_T[:, None]
        return take_passing(passes_TE, score.logit_TE, self.rows, len(eligible_T)), state, {}


@dataclass(frozen=True)
class ByPrediction:
    """Every token enters the experts that its auxiliary router names; every one finds a slot (paper section 2.4).

    Attributes: rows: rows of a routing group.
    """

    rows: int

    def __call__(self, score: Score, eligible_T, quota: Quota, state, key):
        passes_TE = passes_prediction(score.predicted_TE) & eligible_T[:, None]
        return take_passing(passes_TE, score.logit_TE, self.rows, len(eligible_T)), state, {}


def passes_threshold(logit_TE, state: State):
    """Tokens and experts whose threshold the token's logit reaches."""
    if state is None:
        raise InputError("routing_state: threshold routing needs the model's thresholds; pass its routing_state")
    seen_E = 1.0 - state["unseen_E"]
    return logit_TE >= jnp.where(seen_E > 0, state["threshold_E"] / jnp.where(seen_E > 0, seen_E, 1.0), 0.0)


def passes_prediction(predicted_TE):
    """Tokens and experts for which the auxiliary router's sigmoid exceeds 0.5."""
    return predicted_TE > 0


def take_passing(passes_TE, logit_TE, rows: int, slots: int) -> Selection:
    """The Selection (E, slots) of all tokens that pass, by position, then row; the latest are dropped where it is full.

    A token's slot depends on earlier positions alone, so not even rounding knows about later ones.

    Args:
      passes_TE: bool. logit_TE: float32, whose sigmoid is the gate. rows: of the routing group, one after the other.
    """
    tokens, experts = passes_TE.shape
    order_T = jnp.arange(tokens).reshape(rows, -1).T.reshape(-1)  # position first
    passes_ET = passes_TE[order_T].T
    slot_ET = jnp.where(passes_ET, jnp.cumsum(passes_ET, axis=1) - 1, slots)
    expert_E1 = jnp.arange(experts)[:, None]
    token_ET = jnp.broadcast_to(order_T, passes_ET.shape).astype(jnp.int32)
    index_EC = jnp.zeros((experts, slots), jnp.int32).at[expert_E1, slot_ET].set(token_ET, mode="drop")
    filled_EC = jnp.arange(slots) < passes_ET.sum(axis=1)[:, None]
    gate_EC = jax.nn.sigmoid(jnp.take_along_axis(logit_TE.T, index_EC, axis=1))
    return Selection(index_EC, jnp.where(filled_EC, gate_EC, 0.0), filled_EC)


ROUTINGS = ("choice", "causal", "threshold")
"""Names of routings at evaluation and generation: expert choice, by prediction, by threshold."""


def inference_select(routing: str, rows: int):
    """The select function of a causal routing by name, for routing groups of `rows` rows."""
    match routing:
        case "causal":
            return ByPrediction(rows)
        case "threshold":
            return ByThreshold(rows)
    raise ValueError(f"{routing} is no causal routing")
