"""Thresholds in training: after a warm-up of expert choice a token enters every expert whose threshold it reaches.

From then on training is causal, as every token decides by itself. The thresholds are the running ones of expert choice.
No expert can starve for long: its threshold follows the scores of all tokens of its modality, not of those it took, so
where nothing passes it sinks to where the expert's share does. Noise on scores is for the warm-up alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from moma_jax.fields import setting
from moma_jax.late import jax, jnp
from moma_jax.router import MOST, Quota, Routed, Router, Score, Selection, take_entering
from moma_jax.routers.choice import Choice, State, passes_threshold


@dataclass(frozen=True)
class Threshold(Choice):
    """Expert choice for `warmup` updates, then the thresholds that it left, which go on following it."""

    warmup: int = setting(1000, least=1, unit="updates")
    """Updates of expert choice before thresholds decide."""
    slack: float = setting(1.25, least=1, most=MOST)
    """Slots of an expert over those of expert choice; beyond them the latest positions are dropped."""

    exact: ClassVar[bool] = False
    paper: ClassVar[str] = "ours; for text alone 2603.11535"

    def select(self, score: Score, eligible_T, quota: Quota, state: State, key) -> Routed:
        slots = self.slots(quota, len(eligible_T))
        chosen, followed, *_ = super().select(score, eligible_T, quota, state, key)
        chosen = Selection(*(jnp.pad(x_EC, ((0, 0), (0, slots - quota.slots))) for x_EC in chosen))
        passes_TE = eligible_T[:, None] & passes_threshold(score.plain_TE, state)
        gate_TE = jax.nn.sigmoid(score.plain_TE)  # noise would multiply gates and explore nothing
        passed = take_entering(passes_TE, gate_TE, score.order_T, slots)
        warm = state["updates"] < self.warmup
        selection = Selection(*(jnp.where(warm, a, b) for a, b in zip(chosen, passed, strict=True)))
        count_E = jnp.maximum(passes_TE.sum(0), 1)
        dropped_E = jnp.where(warm, 0.0, 1.0 - jnp.minimum(count_E, slots) / count_E)
        return Routed(selection, followed | {"dropped_E": dropped_E})

    def slots(self, quota: Quota, tokens: int) -> int:
        return quota.with_slack(self.slack, tokens)

    def for_evaluation(self) -> Router:
        return Choice(**{field.name: getattr(self, field.name) for field in fields(Choice)})

    def advice(self, steps: int) -> str | None:
        if self.warmup < steps:
            return None
        return (
            f"model.router.warmup {self.warmup} is not below the run's {steps} steps, so experts choose to the end; "
            f"set --model.router.warmup {steps // 10}"
        )
