"""Expert choice: every expert takes its best tokens of the routing group (paper section 2.2).

It ranks a token against later ones, so a trained model is used causally by one of two decisions of single tokens: the
auxiliary routers' (paper section 2.4), or running thresholds (for text alone: arXiv 2603.11535). Each expert keeps an
average over updates of the lowest logit, without noise, among the k_e tokens that expert choice takes: the score that
its top share of its modality exceeds. It lives in the routing state, so in checkpoints. A routing group without the
modality votes for what was there; how much of the average is still the 0 that it began with is kept beside it, and
divided out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from moma_jax.errors import InputError
from moma_jax.fields import setting
from moma_jax.late import jax, jnp
from moma_jax.router import CAUSAL, THRESHOLD, Quota, Routed, Router, Score, Selection

State = dict[str, Any]
"""Of one group of experts, float32: `threshold_E`, the running average from 0; `unseen_E`, how much of it is still that
0; `updates` seen so far, a scalar; `load_E`, tokens that the threshold lets pass over those that expert choice takes;
`dropped_E`, share of passing tokens that found no slot. The last two are of the latest update."""


@dataclass(frozen=True)
class Choice(Router):
    """Expert choice that keeps running thresholds on the way."""

    jitter: float = setting(1e-3, least=0)
    """Size of the fixed tie-breaking term added to logits for ranking only; never in the gate."""
    gumbel: bool = False
    """Gumbel-Sigmoid noise on router scores in training (paper Eq. 5)."""
    gumbel_until: float | None = setting(0.5, above=0, most=1)
    """Share of training at which the noise has faded to 0, linearly; None: it stays, as in the paper."""
    decay: float = setting(0.98, least=0, below=1)
    """Decay per update of the running thresholds, 0 to 1."""
    auxiliary: bool = False
    """Train auxiliary routers (paper section 2.4) beside the model, on stopped gradients; else `moma routers fit`."""

    causal: ClassVar[tuple[str, ...]] = (CAUSAL, THRESHOLD)
    exact: ClassVar[bool] = True
    training_name: ClassVar[str] = "choice"

    def state(self, experts: int) -> State:
        zero_E = np.zeros(experts, np.float32)
        return {
            "threshold_E": zero_E,
            "unseen_E": zero_E + 1,
            "updates": np.float32(0),
            "load_E": zero_E,
            "dropped_E": zero_E,
        }

    def select(self, score: Score, eligible_T, quota: Quota, state: State | None, key) -> Routed:
        selection = best_of(score, eligible_T, quota)
        if state:
            taken = _without_noise(score, eligible_T, quota) if self.gumbel else selection
            state = follow(state, score, eligible_T, taken, self.decay)
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


def follow(state: State, score: Score, eligible_T, taken: Selection, decay: float) -> State:
    """The thresholds after this update: a plain mean of the first ones, then an exponential one.

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


def passes_threshold(logit_TE, state: State):
    """Tokens and experts whose threshold the token's logit reaches."""
    return logit_TE >= thresholds(state)


def thresholds(state: State):
    """The logit that lets a token enter each expert, (..., E): the average without what is left of its first 0."""
    seen_E = 1.0 - state["unseen_E"]
    return jnp.where(seen_E > 0, state["threshold_E"] / jnp.where(seen_E > 0, seen_E, 1.0), 0.0)


def _without_noise(score: Score, eligible_T, quota: Quota) -> Selection:
    """What expert choice takes by the logits without noise."""
    plain_TE = jax.lax.stop_gradient(score.plain_TE)
    return best_of(Score(plain_TE, plain_TE, plain_TE), eligible_T, quota)
