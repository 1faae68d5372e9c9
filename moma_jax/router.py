"""The contract of routing rules: who takes which token (paper sections 2.2 to 2.4). Imports no JAX.

A rule is one frozen dataclass in one file: its fields are its options, and its methods say everything that the project
needs to know of it, in the order of a forward pass. `moma_jax/routers/` holds the built-in rules; your own goes into a
file of yours and is named in a recipe or on the command line, `model.router = "my_rule.py:MyRule"`.

    parameters    the score network's parameters                 logits    tokens -> router logits
    state         what lives beside parameters in a checkpoint   select    one routing group's tokens, in training
    decide        a token by itself, at inference                flops     what a score costs

`select` is mapped over routing groups, and what it returns is averaged over them, over microbatches and devices. An
expert computes on a `Selection` and does not know who chose.

Axes: G routing groups, T tokens of a group, N any tokens, E experts of one group of experts, C slots of one expert.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

from moma_jax.fields import setting
from moma_jax.late import jax, jnp

CAUSAL, THRESHOLD = CAUSAL_ROUTINGS = ("causal", "threshold")
"""Names of causal routings: by auxiliary routers or by the rule's nature, and by running thresholds."""
MOST = 65_536
"""Experts of a token or of a group, or times an even share, that an option of a rule may ask for."""


@dataclass(frozen=True)
class Quota:
    """How much one expert may take.

    Attributes:
      tokens: hard bound on the eligible tokens of one routing group; the packer keeps it.
      capacity: share of the eligible tokens that each expert takes, exact.
      down: the share is rounded down, so that shares of several modalities never add up to more than that of all.
    """

    tokens: int
    capacity: Fraction
    down: bool = False

    def with_slack(self, slack: float, tokens: int) -> int:
        """Slots of an expert that tokens enter one by one: `slack` times as many, as far as so many tokens can fill."""
        return min(tokens, self.tokens, math.ceil(self.slots * slack))

    @property
    def slots(self) -> int:
        """Slots C of one expert, static: what it takes when the quota is full."""
        return self.take(self.tokens)

    def take(self, count):
        """Tokens k_e = ceil(count * capacity) for `count` eligible ones (floor if `down`), in exact integers.

        `count` may be a Python int or a traced int32 scalar; split so that products stay far below 2^31.
        """
        over, under = self.capacity.numerator, self.capacity.denominator
        whole, rest = count // under, count % under
        return whole * over + (rest * over + (0 if self.down else under - 1)) // under


class Parameter(NamedTuple):
    """One array of a score network, float32: its shape, the logical axes it is stored along (sharding.RULES; None:
    whole on every device), and the standard deviation of its normal initial values (0: zeros)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    deviation: float


class Score(NamedTuple):
    """What a router says about T tokens and the E experts of one group.

    Attributes:
      logit_TE: float32 router logits, noise included where it is on; gates are made of them.
      rank_TE: float32, what experts rank tokens by: the logits (a sigmoid saturates, so it would tie) plus a small
        fixed jitter, because packed documents share exact prefixes and so tie exactly; no gradient.
      plain_TE: float32 logits without noise and jitter: a function of the token alone.
      predicted_TE: float32 logits of the auxiliary router, where there is one.
      order_T: int32 tokens of the routing group by position, then row: the order in which `take_entering` gives slots
        away; in training alone.
      id_T: int32 ids of the tokens. position_T: int32 positions in their documents.
    """

    logit_TE: Any
    rank_TE: Any
    plain_TE: Any
    predicted_TE: Any = None
    order_T: Any = None
    id_T: Any = None
    position_T: Any = None


class Selection(NamedTuple):
    """Tokens that each expert took. Axes may be preceded by layers L and routing groups G.

    Attributes:
      index_EC: int32 token of each slot; a valid token also where the slot is not filled.
      gate_EC: float32 weight of the expert's output; exactly 0 where the slot is not filled.
      filled_EC: bool, True where the slot holds a token.
    """

    index_EC: Any
    gate_EC: Any
    filled_EC: Any


class Routed(NamedTuple):
    """What `select` returns.

    Attributes:
      selection: who takes which token.
      state: the state after this update, of the same shapes and types as before.
      losses: float32 scalars by name that are added to the objective; summed over layers.
      metrics: float32 scalars by name that are only recorded, as <name>_<group of experts>; averaged over layers.
    """

    selection: Selection
    state: Any
    losses: dict[str, Any] = {}
    metrics: dict[str, Any] = {}


@dataclass(frozen=True)
class Router:
    """A routing rule. Subclasses are frozen dataclasses whose fields, their options, have defaults.

    `jitter`, `gumbel`, `gumbel_until` and `auxiliary` are facts that the layer asks of every rule; a subclass that
    declares them as fields makes them options.

    Attributes:
      jitter: size of the fixed tie-breaking term of `Score.rank_TE`.
      gumbel: Gumbel-Sigmoid noise on logits in training (paper Eq. 5).
      gumbel_until: share of training at which the noise has faded to 0, linearly; None: it stays as it is.
      auxiliary: auxiliary routers (paper section 2.4) train beside the model, on stopped gradients.
      causal: which of the causal routings, `CAUSAL` and `THRESHOLD`, `decide` knows.
      exact: `select` takes `quota.take(count)` of every `count` eligible tokens, never more.
      sees_later: `select` decides about a token by tokens behind it, too.
      starts_from_zero: a score network whose last weights are 0 is a fair start, as ranks break ties.
      losses: names of the losses that `select` may return.
      paper: where the rule is from.
      training_name: what the routing of training is called in evaluations.
    """

    jitter = 1e-3
    gumbel = False
    gumbel_until = None
    auxiliary = False
    causal: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = False
    sees_later: ClassVar[bool] = True
    starts_from_zero: ClassVar[bool] = True
    losses: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = ""
    training_name: ClassVar[str] = "training"

    def noise_at(self, share):
        """The size of the noise, 1 for that of Eq. 5, after a share of training."""
        return 1.0 if self.gumbel_until is None else jnp.maximum(0.0, 1.0 - share / self.gumbel_until)

    def parameters(self, width: int, experts: int) -> dict[str, Parameter]:
        """The score network of a group of experts; names end in their axes."""
        return {"router_DE": Parameter((width, experts), ("embed", None), 1 / math.sqrt(width))}

    def logits(self, x_ND, weights: dict[str, Any]):
        """Router logits (..., E), float32 on every platform, of tokens (..., D) in compute type."""
        return linear_logits(x_ND, weights["router_DE"])

    def auxiliary_parameters(self, width: int, experts: int) -> dict[str, Parameter]:
        """The auxiliary router's network (paper section 2.4); it starts at "half of everything enters"."""
        inner = width // 2
        return {
            "in_DA": Parameter((width, inner), ("embed", None), width**-0.5),
            "out_AE": Parameter((inner, experts), (None, None), 0.0),
        }

    def predict(self, x_ND, weights: dict[str, Any]):
        """The auxiliary router's logits (..., E), float32 on every platform; no gradient flows to the tokens."""
        x_ND, exact = jax.lax.stop_gradient(x_ND).astype(jnp.float32), jax.lax.Precision.HIGHEST
        inner_NA = jax.nn.silu(jnp.matmul(x_ND, weights["in_DA"], precision=exact))
        return jnp.matmul(inner_NA, weights["out_AE"], precision=exact)

    def state(self, experts: int) -> dict[str, Any]:
        """The first state of one layer's group of experts, NumPy arrays by name; it lives in checkpoints."""
        return {}

    def select(self, score: Score, eligible_T, quota: Quota, state: Any, key) -> Routed:
        """Who takes which token of one routing group in training.

        Args:
          score: (T, E) each. eligible_T: bool, tokens of the group's modalities; padding is never eligible.
          quota: hard bound and capacity. state: of `state`. key: PRNG key of this step, layer, routing group and group
            of experts.

        Returns:
          Routed, with a Selection of (E, `slots(quota, T)`).

        Raises:
          InputError: the rule needs its state, and there is none.
        """
        raise NotImplementedError

    def decide(self, score: Score, state: Any, routing: str):
        """(enters_NE bool, gate_NE float32) of every token by itself; no noise.

        Args:
          score: (N, E) each. state: of `state`, as the latest update left it. routing: one of `causal`.

        Raises:
          InputError: the rule needs its state, and there is none.
        """
        raise NotImplementedError

    def copies(self, score: Score, state: Any):
        """float32 (N,) weight of each token's own input in the layer's output, by experts that pass it on unchanged;
        None where the rule has none of these. In training and at inference; `state` as for `decide`."""
        return None

    def refuses(self, experts: int, asked: Fraction | None) -> str | None:
        """Why the rule cannot route to a group of so many experts with its options and `model.capacity`, to stand
        behind "model."; None where it can."""
        return None

    def lacks(self, routing: str, state: Any) -> str | None:
        """What a model lacks to be used under a causal routing, to stand behind "RUN has "; None where nothing.

        Args:
          state: of one group of experts, stacked over layers; None where training has not begun.
        """
        return None if routing in self.causal else f"no causal decision {routing!r}: its rule {name_of(self)} has none"

    def capacity(self, experts: int, asked: Fraction | None) -> Fraction:
        """Share of eligible tokens that one expert takes on average; `asked` is `model.capacity`, None by default."""
        return Fraction(1, experts) if asked is None else asked

    def slots(self, quota: Quota, tokens: int) -> int:
        """Slots C that `select` fills of one expert in a routing group of `tokens` positions, static."""
        return quota.slots

    def flops(self, width: int, experts: int) -> int:
        """FLOPs of scoring one token, forward."""
        return 2 * width * experts

    def first_gate(self, experts: int) -> Fraction:
        """The gate of a token that entered where the score network's last weights are 0, as in an upcycled model: the
        sum of a token's gates, over as many experts as `capacity` says.

        Raises:
          InputError: such a network lets nothing through.
        """
        return Fraction(1, 2)

    def for_depth(self) -> Router | None:
        """The rule of the routers of mixture of depths in front of experts under this rule; None: expert choice."""
        return None

    def for_evaluation(self) -> Router:
        """The rule that evaluations call `training_name`: what training sees, without noise."""
        return self

    def advice(self, steps: int) -> str | None:
        """What is odd about these options for a run of so many updates; None where nothing is."""
        return None


@dataclass(frozen=True)
class Function(Router):
    """The short form of a rule: its `select` alone, a function (score, eligible_T, quota, state, key) ->
    (Selection, state, losses). It scores by a linear router, keeps the state that it is given, and cannot be used
    causally."""

    function: Callable | None = setting(None, opaque=True)
    jitter: float = setting(1e-3, least=0)
    """As of `Choice`."""
    gumbel: bool = False
    """As of `Choice`."""
    gumbel_until: float | None = setting(0.5, above=0, most=1)
    """As of `Choice`."""
    training_name: ClassVar[str] = "choice"

    def select(self, score, eligible_T, quota, state, key) -> Routed:
        answer = self.function(score, eligible_T, quota, state, key)
        short = isinstance(answer, tuple) and len(answer) == 3 and not isinstance(answer, Selection)
        return Routed(*answer) if short else answer


def name_of(router: Router) -> str:
    """How a rule is called in records: a built-in one by its file, another as it was named, or by where it is defined,
    FILE.py:CLASS or MODULE:CLASS."""
    own = router.function if isinstance(router, Function) else type(router)
    module = own.__module__ or "__main__"  # of code that was run from a string
    package, _, file = module.rpartition(".")
    if package == "moma_jax.routers":
        return file
    where = getattr(sys.modules.get(module), "__moma_file__", module)
    defined = f"{where}:{getattr(own, '__qualname__', type(own).__qualname__)}"
    return getattr(own, "__dict__", {}).get("__moma_name__", defined)  # no attribute: a subclass has another name


def mixed_bits(bits):
    """uint32 hashes of whole numbers by the finaliser of MurmurHash3: every input bit flips every output bit about half
    of the time."""
    bits = jnp.asarray(bits).astype(jnp.uint32)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def take_entering(enters_TE, gate_TE, order_T, slots: int) -> Selection:
    """The Selection (E, slots) of all tokens that enter, in the order `order_T`; beyond the slots they are dropped.

    A token's slot depends on earlier positions alone, so not even rounding knows about later ones.

    Args:
      enters_TE: bool. gate_TE: float32. order_T: `Score.order_T`.
    """
    enters_ET = enters_TE[order_T].T
    slot_ET = jnp.where(enters_ET, jnp.cumsum(enters_ET, axis=1) - 1, slots)
    expert_E1 = jnp.arange(len(enters_ET))[:, None]
    token_ET = jnp.broadcast_to(order_T, enters_ET.shape).astype(jnp.int32)
    index_EC = jnp.zeros((len(enters_ET), slots), jnp.int32).at[expert_E1, slot_ET].set(token_ET, mode="drop")
    filled_EC = jnp.arange(slots) < enters_ET.sum(axis=1)[:, None]
    gate_EC = jnp.take_along_axis(gate_TE.T, index_EC, axis=1)
    return Selection(index_EC, jnp.where(filled_EC, gate_EC, 0.0), filled_EC)


def linear_logits(x_ND, router_DE):
    """Logits (..., E) of tokens (..., D) by one matrix, float32 on every platform, so that all choose alike; their
    gradients are as exact as all others are."""
    return _linear()(x_ND, router_DE)


@functools.cache
def _linear() -> Callable:
    """Made when first used, as it needs JAX."""

    def logits(x_ND, router_DE):
        wide_ND = x_ND.astype(jnp.promote_types(x_ND.dtype, jnp.float32))
        return jnp.matmul(wide_ND, router_DE, precision=jax.lax.Precision.HIGHEST)

    def gradients(saved, d_logit_NE):
        x_ND, router_DE = saved
        d_x_ND = jnp.matmul(d_logit_NE, router_DE.T).astype(x_ND.dtype)
        leading = tuple(range(x_ND.ndim - 1))
        d_router_DE = jnp.tensordot(x_ND, d_logit_NE, (leading, leading), preferred_element_type=jnp.float32)
        return d_x_ND, d_router_DE

    linear = jax.custom_vjp(logits)
    linear.defvjp(lambda *operands: (logits(*operands), operands), gradients)
    return linear
