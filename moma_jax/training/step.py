"""One optimizer update: the state, its gradient over microbatches of whole routing groups, the guard, the report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moma_jax import sharding
from moma_jax.batch import Batch
from moma_jax.compiling import compiled_for, compiled_once
from moma_jax.config import Config
from moma_jax.cost import total_steps
from moma_jax.geometry import micro_groups, require_split
from moma_jax.model.decoder import decoder_of
from moma_jax.model.moe import as_before
from moma_jax.model.parameters import unembedding_of
from moma_jax.model.precision import compute_dtype
from moma_jax.rules import require_loaded
from moma_jax.training import objective
from moma_jax.training.optimizer import Optimizer, make_optimizer, norm_of, router_norm


@flax.struct.dataclass
class TrainState:
    """Everything that an update changes.

    Attributes:
      step: int32 scalar, updates made or skipped so far.
      params: the decoder's parameters, float32.
      opt_state: the optimizer's moments.
      routing_state: the routing rules' state, stacked over layers, by group of experts; {} where they have none.
    """

    step: Any
    params: Any
    opt_state: Any
    routing_state: Any


class StepReport(NamedTuple):
    """What one update says about itself: sums over its tokens, on the device.

    Attributes:
      sums: cross-entropy, weights and squared log-partition (`objective.Sums`).
      tokens_M: int32 real tokens (padding apart) by modality.
      masked_2: int32 tokens that follow another in their row and have no weight in the loss, and all that follow one.
      taken_M3: int32 (token, layer) pairs by modality of the token, taken by 0, 1, 2 or more experts.
      predicted_M4, entered_M4: the auxiliary routers' (token, expert) pairs, and those of mixture of depths
        (`RoutingReport`), summed over layers.
      grad_norm: float32 global norm before clipping, auxiliary routers apart.
      grad_norm_router: the same of the routers' gradients; None where there are no routers.
      routing_losses: the routing rule's losses; routing_metrics: what it only records.
      finite: bool; where False the update was skipped.
    """

    sums: objective.Sums
    tokens_M: Any
    masked_2: Any
    taken_M3: Any
    predicted_M4: Any
    entered_M4: Any
    grad_norm: Any
    grad_norm_router: Any
    routing_losses: dict[str, Any]
    routing_metrics: dict[str, Any]
    finite: Any


class Program(NamedTuple):
    """What the compiled functions of a run are made of.

    Attributes:
      config: the resolved config. decoder: the model. optimizer: the update rule. mesh: the devices.
    """

    config: Config
    decoder: Any
    optimizer: Optimizer
    mesh: Mesh


def make_program(config: Config, devices: Sequence[Any] | None = None) -> Program:
    """The parts of a run from its resolved config.

    `devices` are those to compile for; None: the ones that are here.

    Raises:
      InputError: the mesh does not fit the devices, the model's sizes or the routing groups of a microbatch; or the
        code of the config's routing rule was not loaded.
    """
    require_loaded(config.model.router)
    mesh = sharding.make_mesh(config.mesh, micro_groups(config), devices)
    require_split(config, mesh.shape)
    return Program(config, decoder_of(config), make_optimizer(config), mesh)


def with_dtype(config: Config) -> Config:
    """The config with `model.dtype` auto replaced by what this hardware computes in."""
    if config.model.dtype != "auto":
        return config
    dtype = compute_dtype(config.model).name
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


# The state ------------------------------------------------------------------------------------------------------------


def abstract_state(program: Program, routing_state: Any) -> TrainState:
    """Shapes, types and shardings of the train state: what a checkpoint is restored onto."""
    return abstract_state_of(program, abstract_params(program, routing_state), routing_state)


def abstract_state_of(program: Program, params: Any, routing_state: Any) -> TrainState:
    """`abstract_state` where `params`, abstract, are the ones that are trained."""
    whole = sharding.replicated(program.mesh)
    moments = jax.eval_shape(program.optimizer.transformation.init, params)
    moments = optax.tree_utils.tree_map_params(
        program.optimizer.transformation,
        lambda moment, param: jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=param.sharding),
        moments,
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    )
    rest = jax.eval_shape(lambda: (jnp.int32(0), jax.tree.map(jnp.asarray, routing_state)))
    step, routing = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), rest)
    return TrainState(step, params, moments, routing)


def abstract_params(program: Program, routing_state: Any) -> Any:
    """Shapes, types and shardings of the parameters; `routing_state` is one that the decoder takes."""
    boxed = jax.eval_shape(lambda: init_params(program, routing_state))
    plain = jax.eval_shape(lambda: sharding.unboxed(init_params(program, routing_state)))
    shardings = sharding.shardings_of(boxed, program.mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plain, shardings)


def create_state(program: Program, routing_state: Any) -> TrainState:
    """A fresh state from `train.seed`, born with its shardings; `routing_state` is the routing rules' first one."""
    return state_maker(program, routing_state)()


def state_maker(program: Program, routing_state: Any) -> Callable[[], TrainState]:
    """`create_state`, compiled."""

    def create():
        params = sharding.unboxed(init_params(program, routing_state))
        opt_state = program.optimizer.transformation.init(params)
        return TrainState(jnp.int32(0), params, opt_state, jax.tree.map(jnp.asarray, routing_state))

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(program, routing_state))
    return compiled_once(create, program.mesh, out_shardings=shardings)


def init_params(program: Program, routing_state):
    """The decoder's boxed parameters from `train.seed`; only shapes of the routing state matter."""
    config = program.config
    rows = micro_groups(config) * config.data.group_rows
    zero_BS = jnp.zeros((rows, config.data.sequence), jnp.int32)
    variables = program.decoder.init(
        jax.random.fold_in(jax.random.key(config.train.seed), 0),
        zero_BS,
        zero_BS,
        zero_BS,
        zero_BS,
        **_noise(config, jnp.int32(0), jnp.arange(micro_groups(config))),
        routing_state=routing_state,
        train=False,
    )
    return variables["params"]


def _noise(config: Config, step, group_G) -> dict[str, Any]:
    """The decoder's arguments that fix all of its randomness: the run's seed, the step, how far noise has faded by
    then, the group within the update."""
    key = jax.random.fold_in(jax.random.key(config.train.seed), 1)
    noise = config.model.router.noise_at(step / total_steps(config))
    return {"key": key, "step": step, "noise": noise, "group_G": group_G}


# Forward --------------------------------------------------------------------------------------------------------------


def run_decoder(program: Program, params, batch: Batch, step, group_G, routing_state, train: bool, **asked):
    """The DecoderOutput of a microbatch, whose routing groups are those of `group_G` within the update.

    `asked` is handed to the decoder, such as return_selections=True.
    """
    return program.decoder.apply(
        {"params": params},
        batch.token_BS,
        batch.segment_BS,
        batch.position_BS,
        batch.modality_BS,
        **_noise(program.config, step, group_G),
        routing_state=routing_state,
        train=train,
        **asked,
    )


def _forward(program: Program, params, batch: Batch, step, group_G, routing_state):
    """(total nats with z-loss, Sums by modality, DecoderOutput) of a microbatch."""
    config = program.config
    output = run_decoder(program, params, batch, step, group_G, routing_state, True)
    with jax.named_scope("loss"):
        total, sums = objective.cross_entropy(
            output.hidden_BSD,
            unembedding_of(params),
            batch.target_BS,
            batch.weight_BS,
            batch.target_modality_BS,
            kinds=len(config.data.modalities),
            chunk=config.train.loss_chunk,
            z_loss=config.train.z_loss,
        )
    return total, sums, output


# The update -----------------------------------------------------------------------------------------------------------


def make_train_step(program: Program) -> Callable:
    """(state, batch) -> (state, StepReport); compile it with `compile_step`, which donates the state."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        grads, sums, routed, routing_state = _gradient(program, state, batch)
        grad_norm, auxiliary_norm = norm_of(grads, "model"), norm_of(grads, "auxiliary")
        *_, routing_losses, _ = routed
        losses = (sums.cross_entropy_J, routing_losses)
        finite = jnp.isfinite(grad_norm + auxiliary_norm) & jnp.isfinite(
            sum(jnp.sum(x) for x in jax.tree.leaves(losses))
        )
        new_state = update(program, state, grads, routing_state, finite)
        tokens_M = tokens_by_modality(program, batch)
        norms = grad_norm, router_norm(grads)
        report = StepReport(sums, tokens_M, masked_in(batch), *routed[:3], *norms, *routed[3:], finite)
        return new_state, report

    return train_step


def compile_step(program: Program, state: TrainState) -> Callable:
    """The training step, compiled for `state` and the config's batch; it donates the state."""
    shardings = (jax.tree.map(lambda x: x.sharding, state), sharding.replicated(program.mesh))
    step = jax.jit(make_train_step(program), donate_argnums=0, out_shardings=shardings)
    return compiled_for(step.lower(state, abstract_batch(program)), program.mesh, program.config.run.compiler_options)


def abstract_batch(program: Program) -> Batch:
    """Shapes, types and shardings of an update's batch."""
    config = program.config
    shape = (config.train.batch_rows, config.data.sequence)
    rows = sharding.rows(program.mesh)
    types = Batch(*(jnp.int32,) * 4, jnp.float32, jnp.int8, jnp.int8)
    return Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in types))


def put(tree: Any, mesh: Mesh, whole: bool = False) -> Any:
    """A batch, or another tree of arrays (B, ...), on the devices, rows split over them.

    Args:
      tree: the rows of this process's routing groups (`sharding.own_groups`), in order; with `whole` those of all
        processes, of which every one has the same.
    """
    place, parts = sharding.rows(mesh), sharding.shards(mesh)
    held = range(parts) if whole else sharding.own_groups(mesh, parts)

    def one(x):
        rows = len(x) // len(held)  # of one part

        def of_part(index):
            at = held.index((index[0].start or 0) // rows) * rows
            return x[at : at + rows]

        return jax.make_array_from_callback((rows * parts, *x.shape[1:]), place, of_part)

    return jax.tree.map(one, tree)


def replicate(value: Any, mesh: Mesh) -> Any:
    """A number or a tree of arrays, whole on every device; every process gives the same."""
    place = sharding.replicated(mesh)

    def one(x):
        if isinstance(x, jax.Array) and x.is_fully_addressable == place.is_fully_addressable:
            return jax.device_put(x, place)
        return jax.make_array_from_callback(np.shape(x), place, lambda index: np.asarray(x)[index])

    return jax.tree.map(one, value)


def _gradient(program: Program, state: TrainState, batch: Batch):
    """(gradient, Sums, (taken_M3, predicted_M4, entered_M4, routing losses, routing metrics), routing_state), averaged
    over the update's weight."""
    accumulate = program.config.train.accumulate
    weight = jnp.sum(batch.weight_BS)
    weight = jnp.where(weight > 0, weight, 1)  # an update of nothing but masked tokens has no loss, and no gradient

    def objective_of(params, micro: Batch, group_G):
        total, sums, output = _forward(program, params, micro, state.step, group_G, state.routing_state)
        routing_losses, routing_metrics = jax.tree.map(lambda x: x / accumulate, (output.losses, output.metrics))
        value = total / weight + sum(routing_losses.values(), jnp.float32(0))
        report = output.report
        counts = [jnp.sum(x, axis=0) for x in (report.taken_LM3, report.predicted_LM4, report.entered_PM4)]
        # Flags and small integers are int32 until the mean over microbatches is taken, so that their sum fits.
        routing_state = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.int32)), output.routing_state)
        return value, (sums, (*counts, routing_losses, routing_metrics), routing_state)

    differentiate = functools.partial(jax.grad(objective_of, has_aux=True), state.params)
    grads, (sums, routed, routing_state) = over_microbatches(program, differentiate, batch)
    return grads, sums, routed, _mean_state(routing_state, accumulate, state.routing_state)


def over_microbatches(program: Program, function: Callable, batch: Batch):
    """The sum of function(microbatch, group_G), a tree of arrays, over the microbatches of an update."""
    accumulate = program.config.train.accumulate
    group_G = jnp.arange(micro_groups(program.config) * accumulate)
    if accumulate == 1:
        return function(batch, group_G)

    def one(carry, micro):
        return jax.tree.map(jnp.add, carry, function(*micro)), None

    micros = _microbatches(program, (batch, group_G))
    first = jax.tree.map(lambda x: x[0], micros)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *first))
    total, _ = jax.lax.scan(one, zeros, micros)
    return total


def _mean_state(total, accumulate: int, before):
    """The routing rules' new state: the mean over microbatches of their sum, in the types of the state before."""

    def one(total, before):
        return as_before(total if accumulate == 1 else total / accumulate, before)

    return jax.tree.map(one, total, before)


def _microbatches(program: Program, tree):
    """Splits leading axes into (microbatch, its part), every device keeping the rows that it has."""
    shards, accumulate = sharding.shards(program.mesh), program.config.train.accumulate
    split = NamedSharding(program.mesh, PartitionSpec(None, sharding.BATCH))

    def one(x):
        part = x.shape[0] // (shards * accumulate)
        x = x.reshape(shards, accumulate, part, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x.reshape(accumulate, shards * part, *x.shape[3:]), split)

    return jax.tree.map(one, tree)


def update(program: Program, state: TrainState, grads, routing_state, finite) -> TrainState:
    """The next state; where the gradient is not finite, all but the step stays as it is."""
    with jax.named_scope("optimizer"):
        params, opt_state = program.optimizer.moved(grads, state.opt_state, state.params, state.step)
    old = (state.params, state.opt_state, state.routing_state)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), (params, opt_state, routing_state), old)
    return TrainState(state.step + 1, *new)


def masked_in(batch: Batch) -> jax.Array:
    """Tokens that follow one of their document in their row and have weight 0, and all that follow one: int32 (2,)."""
    follows_BS = (batch.segment_BS[:, 1:] == batch.segment_BS[:, :-1]) & (batch.segment_BS[:, 1:] > 0)
    masked_BS = follows_BS & (batch.weight_BS[:, :-1] == 0)
    return jnp.stack([jnp.sum(masked_BS), jnp.sum(follows_BS)]).astype(jnp.int32)


def tokens_by_modality(program: Program, batch: Batch):
    """Real tokens of a batch by modality, int32 (M,)."""
    is_modality_MBS = batch.modality_BS == jnp.arange(len(program.config.data.modalities))[:, None, None]
    return jnp.sum(is_modality_MBS & (batch.segment_BS > 0), axis=(1, 2), dtype=jnp.int32)
