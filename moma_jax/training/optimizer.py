"""AdamW with warm-up and decay, as Chameleon and the paper train (paper Table 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moma_jax.config import Config, OptimizerConfig
from moma_jax.cost import total_steps
from moma_jax.model.auxiliary import SUFFIX

NOT_DECAYED = ("scale", "bias", "codebook")
"""Parameters whose own name begins so are not decayed: norms, biases, rows of a codebook. Matrices and embeddings
are."""


class Optimizer(NamedTuple):
    """An update rule and its learning rate.

    Attributes:
      transformation: gradient -> clipped, decayed Adam direction; multiply by minus the learning rate and add.
      learning_rate: update number, from 1 -> learning rate. It follows the step, not the count of applied updates, so
        that a skipped update does not shift the schedule.
    """

    transformation: optax.GradientTransformation
    learning_rate: Callable

    def moved(self, grads: Any, opt_state: Any, params: Any, step: Any) -> tuple[Any, Any]:
        """(parameters, moments) after the gradient of the update that follows `step` updates."""
        direction, opt_state = self.transformation.update(grads, opt_state, params)
        rate = self.learning_rate(step + 1)
        return jax.tree.map(lambda p, d: p - rate * d, params, direction), opt_state


def make_optimizer(config: Config) -> Optimizer:
    """The optimizer of a run; its schedule ends at `cost.total_steps`."""
    return optimizer_of(config.optimizer, total_steps(config))


def optimizer_of(settings: OptimizerConfig, steps: int) -> Optimizer:
    """The optimizer by these settings; its schedule ends at `steps`."""
    transformation = optax.chain(
        # Apart, so that the model is the same with auxiliary routers as without.
        optax.partition({part: optax.clip_by_global_norm(settings.clip_norm) for part in PARTS}, part_of),
        optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon),
        optax.add_decayed_weights(settings.weight_decay, mask=decay_mask),
    )
    return Optimizer(transformation, make_schedule(settings, steps))


def make_schedule(settings: OptimizerConfig, total: int) -> Callable:
    """Update number, from 1 -> learning rate: up to peak_lr at update `warmup_steps`, down to end_lr at `total`."""
    warmup, peak, end = settings.warmup_steps, settings.peak_lr, settings.end_lr

    def learning_rate(update):
        update = jnp.asarray(update, jnp.float32)
        progress = jnp.clip((update - warmup) / max(total - warmup, 1), 0, 1)
        if settings.schedule == "cosine":
            progress = (1 - jnp.cos(jnp.pi * progress)) / 2
        decayed = peak + (end - peak) * progress
        return jnp.where(update < warmup, peak * update / max(warmup, 1), decayed)

    return learning_rate


def warmup_warnings(
    warmup: int, total: int, field: str = "optimizer.warmup_steps", whose: str = "run", option: str | None = None
) -> list[str]:
    """A line where the learning rate never comes down; none where it does.

    Args:
      field, option: what says how long it rises; option None: the field's own. whose: what has `total` steps.
    """
    if warmup < total:
        return []
    option = option or f"--{field.replace('_', '-')}"
    return [
        f"warning: {field} {warmup} is not below the {whose}'s {total} steps, so the learning rate still rises at the "
        f"last one; set {option} {total // 10}"
    ]


PARTS = ("model", "auxiliary")


def part_of(params):
    """ "auxiliary" for the parameters of auxiliary routers, "model" for all others."""

    def part(path, _) -> str:
        return PARTS[any(_name(key).endswith(SUFFIX) for key in path)]

    return jax.tree_util.tree_map_with_path(part, params)


def norm_of(grads, part: str) -> jax.Array:
    """Global norm of the gradients of one of PARTS."""
    leaves = zip(jax.tree.leaves(grads), jax.tree.leaves(part_of(grads)), strict=True)
    return optax.tree.norm([jnp.float32(0), *(leaf for leaf, own in leaves if own == part)])


def decay_mask(params):
    """True for every parameter that weight decay touches, by its own name (see NOT_DECAYED)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not _name(path[-1]).startswith(NOT_DECAYED), params)


def router_norm(grads) -> jax.Array | None:
    """Global norm of the gradients of the routers (parameters called router...); None where there are none."""
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    routers = [leaf for path, leaf in leaves if _name(path[-1]).startswith("router")]
    return optax.tree.norm(routers) if routers else None


def _name(key) -> str:
    """The text of one step of a tree path."""
    return str(getattr(key, "key", getattr(key, "name", key)))
