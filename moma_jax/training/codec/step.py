"""One update of an image tokenizer: its losses, the critic's, the codebook's running means, the report.

Every device works on its own pictures, and what they have in common (gradients, use of the codebook) is summed over
them, so that the mesh changes speed alone. Axes: as in codec/network.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from moma_jax import sharding
from moma_jax.codec.network import Reconstruction, Vqgan, convolution, to_pixels
from moma_jax.codec.quality import LEAST_ERROR
from moma_jax.codec.vqgan import to_network
from moma_jax.compiling import compiled_for
from moma_jax.errors import InputError
from moma_jax.rules import named
from moma_jax.training.codec.config import CodecConfig
from moma_jax.training.codec.critic import Critic, hinge
from moma_jax.training.optimizer import Optimizer, optimizer_of

MOST_ADAPTIVE = 1e4
"""Largest ratio of gradients that the critic's weight is multiplied by."""


@flax.struct.dataclass
class CodecState:
    """Everything that an update changes.

    Attributes:
      step: int32 scalar, updates made or skipped so far.
      params: the network's parameters, float32. opt_state: the optimizer's moments.
      critic, critic_opt: the same of the critic; {} where there is none.
      usage_V: running use of the codebook's rows, in latents of an update; 0 before the first one.
      sum_VC: running sums of the latents that chose each row; {} where rows follow a gradient.
    """

    step: Any
    params: Any
    opt_state: Any
    critic: Any
    critic_opt: Any
    usage_V: Any
    sum_VC: Any


class CodecReport(NamedTuple):
    """What one update says about itself.

    Attributes:
      pictures_M: int32 (1,), pictures of the update.
      losses: float32 means by name, unweighted: reconstruction, commitment, and codebook, perceptual, adversarial
        (the network's), critic, adversarial_weight where there is such a thing.
      psnr: float32 mean over pictures, in dB. chosen_V: int32 latents by row. restarted: int32 rows put on latents.
      grad_norm: float32, of the network, before clipping. finite: bool; where False the update was skipped.
    """

    pictures_M: Any
    losses: dict[str, Any]
    psnr: Any
    chosen_V: Any
    restarted: Any
    grad_norm: Any
    finite: Any


class CodecProgram(NamedTuple):
    """What the compiled functions of a training are made of."""

    config: CodecConfig
    network: Vqgan
    critic: Critic
    optimizer: Optimizer
    perceptual: Callable | None
    mesh: Mesh


def make_codec_program(config: CodecConfig, devices: Sequence[Any] | None = None) -> CodecProgram:
    """The parts of a training from its resolved config.

    Raises:
      InputError: the batch does not split over the mesh, or the perceptual loss is no function that can be found.
    """
    loss, perceptual = config.loss, None
    if loss.perceptual is not None:
        perceptual = named(loss.perceptual, "loss.perceptual")
        if not callable(perceptual):
            raise InputError(f"loss.perceptual: {loss.perceptual} is no function; give one of (drawn, truth)")
        _require_distances(perceptual, loss.perceptual, config.network.side)
    mesh = sharding.make_mesh(config.mesh, config.train.batch, devices, what="pictures of train.batch")
    critic = Critic(loss.critic_channels, loss.critic_layers)
    return CodecProgram(
        config, Vqgan(config.network), critic, optimizer_of(config.optimizer, config.train.steps), perceptual, mesh
    )


def _require_distances(perceptual: Callable, name: str, side: int) -> None:
    """InputError where a user's function does not give a number for each pair of pictures."""
    pixels = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    try:
        found = jax.eval_shape(perceptual, pixels, pixels)
    except Exception as error:  # whatever a user's function raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(
            f"loss.perceptual: {name} of (drawn, truth) raises {type(error).__name__}: {reason}"
        ) from error
    if getattr(found, "shape", None) != (2,):
        raise InputError(
            f"loss.perceptual: {name} gives {found} of two pairs of pictures; give a number for each, (B,)"
        )


# The state ------------------------------------------------------------------------------------------------------------


def create_codec_state(program: CodecProgram) -> CodecState:
    """A fresh state from `train.seed`, whole on every device."""
    return jax.jit(functools.partial(_fresh, program), out_shardings=sharding.replicated(program.mesh))()


def abstract_codec_state(program: CodecProgram) -> CodecState:
    """Shapes, types and shardings of the state: what a checkpoint is restored onto."""
    whole = sharding.replicated(program.mesh)
    abstract = jax.eval_shape(functools.partial(_fresh, program))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), abstract)


def _fresh(program: CodecProgram) -> CodecState:
    config, network = program.config, program.config.network
    picture = jnp.zeros((1, network.side, network.side, 3))
    key, critic_key = jax.random.split(jax.random.key(config.train.seed))
    params = program.network.init(key, picture)["params"]
    critic = program.critic.init(critic_key, picture)["params"] if config.loss.adversarial else {}
    begin = program.optimizer.transformation.init
    usage_V = jnp.zeros(network.codebook)
    sum_VC = jnp.zeros_like(params["codebook_VC"]) if config.loss.codebook == "average" else {}
    critic_opt = begin(critic) if config.loss.adversarial else {}
    return CodecState(jnp.int32(0), params, begin(params), critic, critic_opt, usage_V, sum_VC)


# Losses ---------------------------------------------------------------------------------------------------------------


def _likeness(program: CodecProgram, drawn_BHW3, truth_BHW3) -> dict[str, Any]:
    """How far drawn pictures are from the truth: the losses that need no codebook and no critic."""
    difference = drawn_BHW3 - truth_BHW3
    error = jnp.square(difference) if program.config.loss.reconstruction == "squared" else jnp.abs(difference)
    losses = {"reconstruction": jnp.mean(error)}
    if program.perceptual is not None:
        scale = 2 / (1 - program.config.network.lowest)  # the function has pixels from -1 to 1
        ranged = ((x - 1) * scale + 1 for x in (drawn_BHW3, truth_BHW3))
        losses["perceptual"] = jnp.mean(program.perceptual(*ranged))
    return losses


def _weighted(program: CodecProgram, likeness: dict[str, Any]):
    """The sum of `_likeness`'s losses that is minimised."""
    return likeness["reconstruction"] + program.config.loss.perceptual_weight * likeness.get("perceptual", 0.0)


def _adaptive(program: CodecProgram, params, critic, features_BHWC, truth_BHW3):
    """The likeness's gradient over the critic's, as norms at the kernel of the decoder's last layer (Esser et al.,
    2021, equation 7)."""
    patch = program.config.network.patch
    last = convolution(3 * patch**2, "conv_out")
    rest, kernel = {k: v for k, v in params.items() if k != "kernel"}, params["kernel"]

    def norm_of(loss: Callable):
        def of_kernel(kernel):
            return loss(to_pixels(last.apply({"params": {**rest, "kernel": kernel}}, features_BHWC), patch))

        return jnp.linalg.norm(sharding.pmean(jax.grad(of_kernel)(kernel), *sharding.BATCH))

    ours = norm_of(lambda drawn: _weighted(program, _likeness(program, drawn, truth_BHW3)))
    its = norm_of(lambda drawn: -jnp.mean(program.critic.apply({"params": critic}, drawn)))
    return jnp.clip(ours / (its + 1e-4), 0, MOST_ADAPTIVE)


def _objective(program: CodecProgram, params, critic, truth_BHW3, adversarial: bool):
    """(loss of the network on these pictures, (its parts by name, the Reconstruction))."""
    config = program.config.loss
    seen, kept = program.network.apply({"params": params}, truth_BHW3, method="reconstruct", mutable=["intermediates"])
    losses = _likeness(program, seen.pixels_BHW3, truth_BHW3)
    total = _weighted(program, losses)
    latent_BKC, row_BKC = seen.latent_BKC, seen.row_BKC
    losses["commitment"] = jnp.mean(jnp.square(latent_BKC - jax.lax.stop_gradient(row_BKC)))
    total += config.commitment * losses["commitment"]
    if config.codebook == "gradient":
        losses["codebook"] = jnp.mean(jnp.square(jax.lax.stop_gradient(latent_BKC) - row_BKC))
        total += config.codebook_weight * losses["codebook"]
    if config.adversarial:
        losses |= {"adversarial": jnp.float32(0), "adversarial_weight": jnp.float32(0)}
    if adversarial:
        losses["adversarial"] = -jnp.mean(program.critic.apply({"params": critic}, seen.pixels_BHW3))
        weight = jnp.float32(config.adversarial)
        if config.adaptive:
            (features_BHWC,) = kept["intermediates"]["decoder"]["last"]
            fixed = jax.lax.stop_gradient((params["decoder"]["conv_out"], critic, features_BHWC))
            weight *= _adaptive(program, *fixed, truth_BHW3)
        losses["adversarial_weight"] = jax.lax.stop_gradient(weight)
        total += losses["adversarial_weight"] * losses["adversarial"]
    return total, (losses, seen)


# The codebook ---------------------------------------------------------------------------------------------------------


class _Codebook(NamedTuple):
    """Rows, their running use, the running sums of their latents or {}."""

    row_VC: Any
    usage_V: Any
    sum_VC: Any


def _followed(program: CodecProgram, book: _Codebook, seen: Reconstruction, chosen_V, key):
    """(the codebook after an update's latents: running means, dead rows restarted; how many were)."""
    config, rows = program.config.loss, len(book.row_VC)
    latent_NC = seen.latent_BKC.reshape(-1, seen.latent_BKC.shape[-1])
    decay, usage_V, row_VC, sum_VC = config.average_decay, book.usage_V, book.row_VC, book.sum_VC
    usage_V = decay * usage_V + (1 - decay) * chosen_V
    if config.codebook == "average":
        added_VC = jnp.zeros_like(row_VC).at[seen.code_BK.ravel()].add(latent_NC)
        sum_VC = decay * sum_VC + (1 - decay) * sharding.psum(added_VC, *sharding.BATCH)
        row_VC = jnp.where(usage_V[:, None] > 0, sum_VC / jnp.maximum(usage_V, 1e-20)[:, None], row_VC)
    if not config.dead_below:
        return _Codebook(row_VC, usage_V, sum_VC), jnp.int32(0)
    mean_use = jnp.sum(chosen_V) / rows
    dead_V1 = (usage_V < config.dead_below * mean_use)[:, None]
    latents_VC = far_latents(latent_NC, seen.row_BKC.reshape(latent_NC.shape), rows, key)
    row_VC = jnp.where(dead_V1, latents_VC, row_VC)
    if config.codebook == "average":
        sum_VC = jnp.where(dead_V1, latents_VC * mean_use, sum_VC)
    return _Codebook(row_VC, jnp.where(dead_V1[:, 0], mean_use, usage_V), sum_VC), jnp.sum(dead_V1)


def far_latents(latent_NC, row_NC, count: int, key):
    """`count` latents of all devices, drawn in proportion to their squared distance from the rows that they chose."""
    axes = sharding.split_axes(*sharding.BATCH)
    # All may lie on their rows.
    distance_N = jnp.sum(jnp.square(latent_NC - row_NC), axis=-1) + 1e-20
    distance_A = jax.lax.all_gather(distance_N, axes, tiled=True) if axes else distance_N
    total_A = jnp.cumsum(distance_A)
    drawn_V = jnp.searchsorted(total_A, jax.random.uniform(key, (count,)) * total_A[-1], side="right")
    own_V = drawn_V - (jax.lax.axis_index(axes) * len(latent_NC) if axes else 0)
    here_V = (own_V >= 0) & (own_V < len(latent_NC))
    found_VC = jnp.where(here_V[:, None], latent_NC[jnp.clip(own_V, 0, len(latent_NC) - 1)], 0)
    return sharding.psum(found_VC, *sharding.BATCH)


# The update -----------------------------------------------------------------------------------------------------------


def make_codec_step(program: CodecProgram) -> Callable:
    """(state, pixels (B, N, N, 3) uint8) -> (state, CodecReport); compile it with `compile_codec_step`."""
    loss = program.config.loss

    def body(state: CodecState, pixels_BHW3) -> tuple[CodecState, CodecReport]:
        truth_BHW3 = to_network(program.config.network, pixels_BHW3)
        plain = functools.partial(_updated, program, adversarial=False)
        if not loss.adversarial:
            return plain(state, truth_BHW3)
        both = functools.partial(_updated, program, adversarial=True)
        if not loss.adversarial_from:
            return both(state, truth_BHW3)
        return jax.lax.cond(state.step >= loss.adversarial_from, both, plain, state, truth_BHW3)

    whole, rows = PartitionSpec(), sharding.spec("batch")
    return lambda state, pixels_BHW3: sharding.shard_map(body, (whole, rows), (whole, whole), check=False)(
        state, pixels_BHW3
    )


def _updated(program: CodecProgram, state: CodecState, truth_BHW3, adversarial: bool):
    """(next state, report) of one device's share of the pictures."""
    differentiate = jax.grad(lambda p: _objective(program, p, state.critic, truth_BHW3, adversarial), has_aux=True)
    grads, (losses, seen) = differentiate(state.params)
    grads = sharding.pmean(grads, *sharding.BATCH)
    params, opt_state = program.optimizer.moved(grads, state.opt_state, state.params, state.step)
    critic, critic_opt, critic_norm = state.critic, state.critic_opt, jnp.float32(0)
    if adversarial:
        drawn_BHW3 = jax.lax.stop_gradient(seen.pixels_BHW3)

        def told_apart(critic):
            true, drawn = (program.critic.apply({"params": critic}, x) for x in (truth_BHW3, drawn_BHW3))
            return hinge(true, drawn)

        losses["critic"], critic_grads = jax.value_and_grad(told_apart)(critic)
        critic_grads = sharding.pmean(critic_grads, *sharding.BATCH)
        critic_norm = optax.tree.norm(critic_grads)
        critic, critic_opt = program.optimizer.moved(critic_grads, critic_opt, critic, state.step)
    elif program.config.loss.adversarial:
        losses["critic"] = jnp.float32(0)
    chosen_V = jnp.zeros(program.config.network.codebook, jnp.int32).at[seen.code_BK.ravel()].add(1)
    chosen_V = sharding.psum(chosen_V, *sharding.BATCH)
    key = jax.random.fold_in(jax.random.key(program.config.train.seed), state.step)
    book = _Codebook(params["codebook_VC"], state.usage_V, state.sum_VC)
    book, restarted = _followed(program, book, seen, chosen_V, key)
    params = {**params, "codebook_VC": book.row_VC}
    losses = sharding.pmean(losses, *sharding.BATCH)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm + critic_norm + sum(losses.values()))
    new = (params, opt_state, critic, critic_opt, book.usage_V, book.sum_VC)
    old = (state.params, state.opt_state, state.critic, state.critic_opt, state.usage_V, state.sum_VC)
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    psnr = sharding.pmean(jnp.mean(psnr_of(program.config.network, seen.pixels_BHW3, truth_BHW3)), *sharding.BATCH)
    pictures = jnp.full(1, len(truth_BHW3) * sharding.size(*sharding.BATCH), jnp.int32)
    report = CodecReport(pictures, losses, psnr, chosen_V, restarted, grad_norm, finite)
    return CodecState(state.step + 1, *kept), report


def psnr_of(network, drawn_BHW3, truth_BHW3):
    """Peak signal-to-noise ratio of each picture (B,), in dB, of what can be shown; both as the network has pixels."""
    difference = (jnp.clip(drawn_BHW3, network.lowest, 1) - truth_BHW3) / (1 - network.lowest)
    error_B = jnp.square(difference).reshape(len(difference), -1).mean(axis=1)
    return -10 * jnp.log10(jnp.maximum(error_B, LEAST_ERROR))


def compile_codec_step(program: CodecProgram, state: CodecState) -> Callable:
    """The update, compiled for `state` and the config's batch; it donates the state."""
    whole, side = sharding.replicated(program.mesh), program.config.network.side
    pixels = jax.ShapeDtypeStruct(
        (program.config.train.batch, side, side, 3), jnp.uint8, sharding=sharding.rows(program.mesh)
    )
    step = jax.jit(make_codec_step(program), donate_argnums=0, out_shardings=(whole, whole))
    return compiled_for(step.lower(state, pixels), program.mesh)
