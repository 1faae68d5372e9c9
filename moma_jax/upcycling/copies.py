"""Parameters and moments of a model with more experts, from those of one with fewer (paper section 2.5).

Every expert is copied into `times` experts of the new group, which may serve fewer modalities than the old one. So that
the layer's output stays the old one's, a mean over tokens, the copies' down-projections are multiplied by

    scale = (c * g) / (times * c' * g')

with the share c of the group's tokens that an expert takes and its gate g, before and after (primes). A group that had
one expert had no router: c = g = 1. Its new router is zero, so g' = 1/2 under expert choice, and k experts have
2 / (k * c'): 2 for 1t1i -> 4t4i; 1/2 with model.capacity 1.0, where the output is the old one token by token. Where
there is a router its columns are copied with the experts: g = g', and with equal capacity all copies take what the
expert took.

Rules whose tokens choose would give them all to the first of equal experts. There a new router is SMALL times a fresh
one, and a router's columns cannot be copied.

Where modalities get attention weights of their own (`model.attention_weights`) each begins with the seed's: the same
function of every token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moma_jax import sharding
from moma_jax.config import Config
from moma_jax.errors import InputError
from moma_jax.geometry import group_capacity
from moma_jax.model.auxiliary import SUFFIX
from moma_jax.model.decoder import first_routing_state
from moma_jax.model.parameters import MATRICES, OWNED
from moma_jax.router import Router, name_of
from moma_jax.training.step import Program, TrainState, abstract_state, init_params

SMALL = 0.01
"""Of a fresh router: logits of 0.01 tell equal experts apart, and change gates by a percent."""


@dataclass(frozen=True)
class Copied:
    """Where the experts of a group come from: expert j is a copy of expert j // times of the seed's group `source`.

    `scale` is the factor of their down-projections. Where they are `fresh` they are drawn instead. What the rule keeps
    beside the model is the seed's where it `goes_on`.
    """

    source: str
    times: int
    scale: float
    fresh: bool = False
    goes_on: bool = False


def copied_groups(seed: Config, config: Config, fresh: Collection[str] = ()) -> dict[str, Copied]:
    """By name of the new model's groups of experts, of which those in `fresh` are drawn; InputError naming a group that
    cannot be made of the seed's."""
    before, after, names = seed.experts, config.experts, f"{seed.model.ffn} -> {config.model.ffn}"
    shared = [{group.name: group.width for group in layout.shared} for layout in (before, after)]
    for what, one, other in (("shared experts", *shared), ("mod+", before.depth, after.depth)):
        if one != other:
            raise InputError(f"model.ffn: {names}: {what} must be the seed's ({one} -> {other})")
    weights = [each.model.attention_weights for each in (seed, config)]
    if weights == ["by_modality", "shared"]:
        raise InputError(
            "model.attention_weights: the seed's modalities have weights of their own; leave it by_modality"
        )
    if before == after and weights[0] == weights[1]:
        raise InputError(f"model.ffn: {names} makes no experts; name more of them, or train with run.init_from")
    groups = [group.name for group in after.groups]
    if unknown := sorted(set(fresh) - set(groups)):
        known = f"it has {', '.join(groups)}"
        raise InputError(f"fresh: {unknown[0]} has no experts of its own in {config.model.ffn}; {known}")
    copied = {}
    for group in after.groups:
        source = next((g for g in before.groups if set(group.modalities) <= set(g.modalities)), None)
        if source is None:
            raise InputError(f"model.ffn: {names}: the seed keeps modalities apart; name experts for each")
        times, rest = divmod(group.experts, source.experts)
        if rest or not times:
            raise InputError(
                f"model.ffn: {names}: {group.experts} experts for {group.name} are no multiple of the seed's "
                f"{source.experts}; use {max(times, 1) * source.experts}"
            )
        rule = config.model.router
        if source.experts > 1:
            _require_same_rule(seed.model.router, rule, group.name)
        if 1 < source.experts < group.experts and not rule.starts_from_zero:
            raise InputError(
                f"model.ffn: {names}: under {name_of(rule)} copies would not share the tokens of their expert; grow a "
                f"seed with one expert for {group.name}"
            )
        gate = rule.first_gate(group.experts) if source.experts == 1 < group.experts else 1
        share = group_capacity(config.model, group) * times * gate
        scale = float(group_capacity(seed.model, source) / share)
        goes_on = source.experts > 1 and not rule.starts_from_zero and group.name not in fresh
        copied[group.name] = Copied(source.name, times, scale, group.name in fresh, goes_on)
    return copied


def _require_same_rule(seed: Router, rule: Router, group: str) -> None:
    """InputError where the seed's experts would take other tokens, or with other gates, than they were trained on.

    Rules of expert choice take the same ones, whatever their options are.
    """
    related = isinstance(seed, type(rule)) or isinstance(rule, type(seed))
    if seed != rule and not (related and seed.starts_from_zero and rule.starts_from_zero):
        other = "with other options" if name_of(seed) == name_of(rule) else f"under {name_of(seed)}"
        raise InputError(
            f"model.router: {name_of(rule)}: the seed's experts for {group} were trained {other}; leave the rule as it "
            f"is there, or grow a seed with one expert for {group}"
        )


def grown_state(
    program: Program, seed: TrainState, copied: dict[str, Copied], perturb: float, perturb_seed: int
) -> TrainState:
    """The state that the new run begins with, born with its shardings.

    Args:
      program: the new run's. seed: the seed's state; without an optimizer's state (None) there is a fresh one.
    """
    kept = {name: seed.routing_state[own.source] for name, own in copied.items() if own.goes_on}
    routing_state = first_routing_state(program.config) | jax.device_get(kept)

    def make(old, old_moments):
        fresh = sharding.unboxed(init_params(program, routing_state))
        first = 0.0 if program.config.model.router.starts_from_zero else SMALL
        params = grown(old, fresh, copied, lambda own, down: own.scale if down else 1.0, first)
        params = perturbed(params, copied, perturb, perturb_seed)
        opt_state = program.optimizer.transformation.init(params)
        if old_moments is not None:
            opt_state = _tiled(opt_state, old_moments, copied)
        return TrainState(jnp.int32(0), params, opt_state, jax.tree.map(jnp.asarray, routing_state))

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(program, routing_state))
    return jax.jit(make, out_shardings=shardings)(seed.params, seed.opt_state)


def grown(
    old: Any, fresh: Any, copied: dict[str, Copied], scale: Callable[[Copied, bool], float], first: float = 0.0
) -> Any:
    """Parameters, or their moments, of the new model from those of the seed.

    Args:
      fresh: a tree of the new model; auxiliary routers stay what they are in it.
      scale: (group, whether it is a down-projection) -> factor of its experts' and their router's arrays.
      first: factor of a fresh router's arrays where there was none.
    """

    def experts(old, name, weights):
        if name.endswith(SUFFIX):
            return weights
        if name not in copied:  # always-on experts
            return old[name]
        own = copied[name]
        if own.fresh:
            return weights
        return {weight: array(old[own.source].get(weight), weight, own, like) for weight, like in weights.items()}

    def array(given, weight, own, like):
        if given is None:  # a router where there was none
            return first * like
        axis = -3 if weight in MATRICES else -1  # of the experts; a router's columns are its last
        return scale(own, weight.startswith("down")) * jnp.repeat(given, own.times, axis=axis)

    result = {}
    for name, part in fresh.items():
        if name in OWNED and (new := set(part) - set(old[name])):  # modalities, where one was for all
            factor = scale(Copied(name, len(new), 1.0), False)
            result[name] = dict.fromkeys(part, jax.tree.map(lambda leaf, by=factor: by * leaf, old[name]))
        elif name == "ffn":
            result[name] = {group: experts(old[name], group, weights) for group, weights in part.items()}
        elif isinstance(part, dict):  # auxiliary routers are also those of mixture of depths
            result[name] = part if name.endswith(SUFFIX) else grown(old[name], part, copied, scale, first)
        else:
            result[name] = old[name]
    return result


def perturbed(params: Any, copied: dict[str, Copied], perturb: float, seed: int) -> Any:
    """Normal noise of `perturb` standard deviations of each matrix on the experts of groups with several copies."""
    if not perturb:
        return params
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)

    def one(number, path, weight):
        names = [entry.key for entry in path]
        own = copied.get(names[-2]) if "ffn" in names else None
        copies = own is not None and own.times > 1 and not own.fresh
        if not copies or names[-1] not in MATRICES:
            return weight
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), weight.shape, weight.dtype)
        return weight + perturb * weight.std(axis=(-2, -1), keepdims=True) * noise

    return jax.tree.unflatten(tree, [one(number, path, weight) for number, (path, weight) in enumerate(leaves)])


def _tiled(fresh: Any, old: Any, copied: dict[str, Copied]) -> Any:
    """The optimizer's state with the seed's moments and their count.

    The gradient of a copy is 1/times of the expert's, that of its scaled down-projection 1/(times * scale), means over
    tokens; first moments are scaled by that factor, second ones by its square.
    """

    def factor(power):
        return lambda own, down: (1.0 / (own.times * (own.scale if down else 1.0))) ** power

    (adam,) = (part for part in old if isinstance(part, optax.ScaleByAdamState))

    def one(part):
        if not isinstance(part, optax.ScaleByAdamState):
            return part
        mu, nu = (grown(a, b, copied, factor(power)) for power, a, b in ((1, adam.mu, part.mu), (2, adam.nu, part.nu)))
        return part._replace(count=adam.count, mu=mu, nu=nu)

    return tuple(one(part) for part in fresh)
