"""Expert choice: every expert takes its best tokens of the routing group (paper section 2.2).

It ranks a token against later ones, so a trained model is used causally by one of two decisions of single tokens: the
auxiliary routers' (paper section 2.4), or running thresholds (for text alone: arXiv 2603.11535). Each expert keeps a
threshold of its logits without noise, which a controller moves after every update until as many tokens pass it as
expert choice takes: up where more passed, down where fewer did (integral control, as of a load-following bias). It
lives in the routing state, so in checkpoints. Counts are pooled over routing groups, so one with few tokens of the
modality says little and one without any says nothing. At the end of training thresholds are set by the final weights
(training/calibrate.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from moma_jax.errors import InputError
from moma_jax.fields import setting
from moma_jax.late import jax, jnp
from moma_jax.router import CAUSAL, THRESHOLD, Quota, Routed, Router, Score, Selection

GAIN = 0.25
"""Of a threshold's distance from logits, the part that it moves where twice as many tokens passed as were taken, or
none. 0.25 and 0.5 hold loads alike, 1 swings (docs/causality.md)."""

State = dict[str, Any]
"""Of one group of experts, float32: `threshold_E`, as it was in the latest update; of that update, means over routing
groups of `passed_E`, eligible tokens that reached it, `taken_E`, those that expert choice takes, `distance_E`, the sum
over eligible tokens of how far their logits lie from it, and `eligible`, a scalar; `dropped_E`, share of passing tokens
that found no slot; `updates` seen so far, a scalar."""


@dataclass(frozen=True)
class Choice(Router):
    """Expert choice that keeps running thresholds on the way."""

    jitter: float = setting(1e-3, least=0)
    """Size of the fixed tie-breaking term added to logits for ranking only; never in the gate."""
    gumbel: bool = False
    """Gumbel-Sigmoid noise on router scores in training (paper Eq. 5)."""
    gumbel_until: float | None = setting(0.5, above=0, most=1)
    """Share of training at which the noise has faded to 0, linearly; None: it stays, as in the paper."""
    auxiliary: bool = False
    """Train auxiliary routers (paper section 2.4) beside the model, on stopped gradients; else `moma routers fit`."""

    causal: ClassVar[tuple[str, ...]] = (CAUSAL, THRESHOLD)
    exact: ClassVar[bool] = True
    paper: ClassVar[str] = "MoMa 2407.21770, expert choice 2202.09368"
    training_name: ClassVar[str] = "choice"

    def state(self, experts: int) -> State:
        zero_E, zero = np.zeros(experts, np.float32), np.float32(0)
        counts = {"threshold_E": zero_E, "passed_E": zero_E, "taken_E": zero_E, "distance_E": zero_E}
        return counts | {"dropped_E": zero_E, "eligible": zero, "updates": zero}

    def select(self, score: Score, eligible_T, quota: Quota, state: State | None, key) -> Routed:
        selection = best_of(score, eligible_T, quota)
        if state:
            taken = _without_noise(score, eligible_T, quota) if self.gumbel else selection
            state = follow(state, score, eligible_T, taken)
        return Routed(selection, state)

    def decide(self, score: Score, state: State, routing: str):
        match routing:
            case "causal":
                enters_NE = score.predicted_TE > 0  # their sigmoid exceeds 0.5
            case "threshold" if not state:
                raise InputError(
                    "routing_state: threshold routing needs the model's thresholds; pass its routing_state"
                )
            case "threshold":
                enters_NE = passes_threshold(score.plain_TE, state)
        return enters_NE, jax.nn.sigmoid(score.logit_TE)

    def lacks(self, routing: str, state: State) -> str | None:
        match routing:
            case "causal" if not self.auxiliary:
                return "no auxiliary routers; fit them with: moma routers fit RUN"
            case "threshold" if state is not None and not (state and np.all(np.asarray(state["updates"]) > 0)):
                return "no thresholds: it was not trained under this rule, or not far enough"
        return super().lacks(routing, state)

    def for_depth(self) -> Router:
        return replace(self, gumbel=False)


def best_of(score: Score, eligible_T, quota: Quota) -> Selection:
    """Each expert's k_e best eligible tokens, (E, C); equal ranks go to the lower token.

    Args:
      score: float32 logits and ranks, (T, E) each. quota: k_e = ceil(count * capacity) of the true count.
    """
    rank_ET = jnp.where(eligible_T, score.rank_TE.T, -jnp.inf)
    _, index_EC = jax.lax.top_k(jax.lax.stop_gradient(rank_ET), quota.slots)
    k = quota.take(jnp.sum(eligible_T, dtype=jnp.int32))
    filled_EC = jnp.broadcast_to(jnp.arange(quota.slots) < k, index_EC.shape)
    gate_EC = jax.nn.sigmoid(jnp.take_along_axis(score.logit_TE.T, index_EC, axis=1))
    return Selection(index_EC, jnp.where(filled_EC, gate_EC, 0.0), filled_EC)


def follow(state: State, score: Score, eligible_T, taken: Selection) -> State:
    """The state after this update: where the thresholds stood in it, and what this routing group says of them.

    The thresholds are the same in every routing group, and all else is a sum over its tokens, so the mean over routing
    groups and devices is exact.

    Args:
      taken: what expert choice takes of this routing group by `score.plain_TE`.
    """
    plain_TE, threshold_E = jax.lax.stop_gradient(score.plain_TE), thresholds(state)
    eligible_T1 = eligible_T[:, None]
    return state | {
        "threshold_E": threshold_E,
        "passed_E": jnp.sum(eligible_T1 & (plain_TE >= threshold_E), axis=0, dtype=jnp.float32),
        "taken_E": taken.filled_EC.sum(axis=1, dtype=jnp.float32),
        "distance_E": jnp.sum(jnp.where(eligible_T1, jnp.abs(plain_TE - threshold_E), 0.0), axis=0),
        "eligible": jnp.sum(eligible_T, dtype=jnp.float32),
        "updates": state["updates"] + 1.0,
    }


def passes_threshold(logit_TE, state: State):
    """Tokens and experts whose threshold the token's logit reaches."""
    return logit_TE >= thresholds(state)


def thresholds(state: State):
    """The logit that lets a token enter each expert, (..., E): moved by what the latest update says of it.

    States of versions of this package that kept averages of cut-offs have `unseen_E`, how much of `threshold_E` was
    still the 0 that it began with, and are divided by the rest.
    """
    threshold_E = state["threshold_E"]
    if "unseen_E" in state:
        seen_E = 1.0 - state["unseen_E"]
        return jnp.where(seen_E > 0, threshold_E / jnp.where(seen_E > 0, seen_E, 1.0), 0.0)
    surplus_E = jnp.clip(loads(state) - 1.0, -1.0, 1.0)
    mean_E = state["distance_E"] / jnp.maximum(state["eligible"][..., None], 1e-6)
    return threshold_E + jnp.where(state["taken_E"] > 0, GAIN * mean_E * surplus_E, 0.0)


def loads(state: State):
    """Tokens that the thresholds let pass over those that expert choice takes, in the latest update, (..., E)."""
    return state["passed_E"] / jnp.maximum(state["taken_E"], 1e-6)


def _without_noise(score: Score, eligible_T, quota: Quota) -> Selection:
    """What expert choice takes by the logits without noise."""
    plain_TE = jax.lax.stop_gradient(score.plain_TE)
    return best_of(Score(plain_TE, plain_TE, plain_TE), eligible_T, quota)
