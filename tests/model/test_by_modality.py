"""Attention weights of each modality's own (Mixture-of-Transformers): equal ones are shared ones."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from decoding import SEQUENCE, cached, forced, rows_of
from flax.traverse_util import flatten_dict, unflatten_dict
from tiers import long_but
from tiny import tiny

import moma_jax
from moma_jax import sharding
from moma_jax.data.stream import open_stream
from moma_jax.ffn import ExpertGroup
from moma_jax.geometry import GroupSlots, LayerShape, layer_of
from moma_jax.model.attention import attend_rows, rotary_angles
from moma_jax.model.by_modality import sort_by_modality
from moma_jax.model.decoder import first_routing_state
from moma_jax.router import Quota
from moma_jax.routers.token_choice import TokenChoice
from moma_jax.training.step import create_state, make_program, run_decoder

FFNS = ("dense", "4t4i", "1t1i+1x", "mod+2t2i")
OWNED = ("attention", "attention_norm", "ffn_norm")


def own_paths(path, names=("text", "image")):
    """Where a parameter of the model with shared weights is in the other: once for each modality, or once."""
    place = next((at + 1 for at, part in enumerate(path) if part in OWNED), None)
    return [(*path[:place], name, *path[place:]) for name in names] if place else [path]


def copied(params, names=("text", "image")):
    """Parameters of a model whose modalities have equal weights of their own."""
    found = {}
    for path, leaf in flatten_dict(params).items():
        found |= dict.fromkeys(own_paths(path, names), leaf)
    return unflatten_dict(found)


@functools.cache
def both(ffn, norm="pre", **options):
    """(config, parameters) of a model with shared weights and of the same one with each modality's own."""
    shared, own = (
        tiny(model_ffn=ffn, model_norm=norm, model_attention_weights=kind, **options)
        for kind in ("shared", "by_modality")
    )
    params = create_state(make_program(shared), first_routing_state(shared)).params
    return (shared, params), (own, copied(params))


def padded(config):
    """A batch whose rows end in padding."""
    batch = next(iter(open_stream(config))).batch
    segment_BS = np.array(batch.segment_BS)
    segment_BS[:, -3:] = 0
    return batch._replace(segment_BS=segment_BS)


def outputs(config, params, batch):
    """Hidden states and the gradient of a sum along a random direction, by parameter."""
    program = make_program(config)
    way_BSD = jnp.asarray(
        np.random.default_rng(0).normal(size=(*batch.token_BS.shape, config.model.width)), jnp.float32
    )
    state = jax.tree.map(jnp.asarray, first_routing_state(config))
    real_BS1 = (batch.segment_BS > 0)[..., None]

    def total(params):
        groups = jnp.arange(len(batch.token_BS) // config.data.group_rows)
        hidden_BSD = run_decoder(program, params, batch, 0, groups, state, False).hidden_BSD
        return jnp.sum(jnp.where(real_BS1, hidden_BSD * way_BSD, 0)), jnp.where(real_BS1, hidden_BSD, 0)

    with sharding.use_mesh(program.mesh):
        (_, hidden_BSD), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return np.asarray(hidden_BSD), flatten_dict(jax.device_get(gradient))


@pytest.mark.parametrize("norm", ["pre", "swin"])
@pytest.mark.parametrize("ffn", long_but("4t4i", "mod+2t2i", of=FFNS))
def test_with_equal_weights_it_is_the_shared_model(ffn, norm):
    (shared, params), (own, params_of_own) = both(ffn, norm)
    batch = padded(shared)
    hidden_BSD, gradient = outputs(shared, params, batch)
    own_BSD, own_gradient = outputs(own, params_of_own, batch)
    np.testing.assert_allclose(own_BSD, hidden_BSD, atol=1e-6 * np.abs(hidden_BSD).max())
    largest = max(np.abs(value).max() for value in gradient.values())
    for path, value in gradient.items():
        parts = [own_gradient[own] for own in own_paths(path)]
        assert len(parts) == 1 or all(np.abs(part).max() > 0 for part in parts), path
        found = sum(parts)  # each modality's tokens tell its own weights
        # Behind a swin norm a router's gradient is what is left of large terms that cancel.
        atol = 1e-5 * max(np.abs(value).max(), 0.01 * largest)
        np.testing.assert_allclose(found, value, atol=atol, err_msg=str(path))


def test_beyond_a_quota_the_latest_positions_have_no_slot():
    """Two rows of four in a routing group, with slots for four pictures' tokens of six."""
    modality_GT = jnp.array([[1, 1, 0, 1, 1, 1, 1, -1]])
    slots = [
        GroupSlots(ExpertGroup(name, (m,), 1), Quota(4, Fraction(1)), 4) for m, name in enumerate(("text", "image"))
    ]
    found = sort_by_modality(LayerShape(4, 8, (4, 4), (), tuple(slots)), modality_GT)
    # By position, then row: image tokens 0, 4, 1, 5 have the slots 4 to 7; 6 and 3 have none, nor has padding.
    np.testing.assert_array_equal(found.slot_GT, [[4, 6, 0, 8, 5, 7, 8, 8]])
    np.testing.assert_array_equal(found.token_GS, [[2, 8, 8, 8, 0, 4, 1, 5]])


def test_tokens_pass_the_weights_of_their_modality_and_attend_to_all():
    """Against slow NumPy, whose tokens are projected by the weights of their own modality."""
    config = tiny(model_attention_weights="by_modality", model_ffn="dense")
    program, rng = make_program(config), np.random.default_rng(0)
    batch = padded(config)
    params = jax.device_get(create_state(program, first_routing_state(config)).params)
    weights = jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape[1:]).astype(np.float32), params["layers"]["attention"])
    x_BSD = rng.normal(size=(*batch.token_BS.shape, config.model.width)).astype(np.float32)
    rows = batch.token_BS, batch.segment_BS, batch.position_BS, batch.modality_BS
    groups = jnp.arange(len(x_BSD) // config.data.group_rows)
    angles = rotary_angles(batch.position_BS, config.model)
    sort = layer_of(config).projections, program.decoder.tokens(*map(jnp.asarray, rows), groups).by_modality
    found_BSD = jax.jit(
        lambda x, w: attend_rows(x, w, batch.segment_BS, batch.position_BS, angles, config.model, sort)
    )(x_BSD, weights)
    for row in range(len(x_BSD)):
        slow_SD = oracles.attention_by_modality(
            x_BSD[row], batch.segment_BS[row], batch.position_BS[row],
            [("text", "image")[m] for m in batch.modality_BS[row]], weights,
        )  # fmt: skip
        real_S = batch.segment_BS[row] > 0
        np.testing.assert_allclose(found_BSD[row][real_S], slow_SD[real_S], atol=2e-5)
        assert not np.asarray(found_BSD[row])[~real_S].any()


@pytest.mark.parametrize("ffn", long_but("4t4i", "mod+2t2i", of=FFNS))
def test_cached_decoding_equals_teacher_forcing(ffn):
    rule = {"model_router": TokenChoice()} if ffn == "4t4i" else {}
    config = tiny(model_ffn=ffn, model_attention_weights="by_modality", **rule)
    state = create_state(make_program(config), first_routing_state(config))
    routing_state = {
        name: own | ({"threshold_E": np.zeros_like(own["threshold_E"]), "updates": np.ones_like(own["updates"])}
                     if "updates" in own else {})
        for name, own in jax.device_get(state.routing_state).items()
    }  # fmt: skip
    model, token_BS = (config, state.params, routing_state), rows_of(1, 4)
    routing = "causal" if rule else "threshold"
    expected_BSD, _ = forced(model, routing, token_BS)
    rows = [row[:length] for row, length in zip(token_BS, (16, 9, 1, 13), strict=True)]
    for splits in ([1] * SEQUENCE, [9, *[1] * 7]):
        for row, hidden_SD, expected_SD in zip(rows, cached(model, routing, rows, splits), expected_BSD, strict=True):
            np.testing.assert_allclose(hidden_SD, expected_SD[: len(row)], atol=1e-4)


@pytest.mark.slow
def test_a_run_of_it_is_calibrated_saved_loaded_evaluated_and_grows(tmp_path):
    fields = {"model_attention_weights": "by_modality", "train_steps": 4, "train_eval_every": 4}
    moma_jax.train(tiny(tmp_path / "run", model_ffn="1t1i", **fields), quiet=True)
    grown = tiny(tmp_path / "grown", model_ffn="2t2i", **fields)
    moma_jax.upcycle(str(tmp_path / "run"), grown, quiet=True)
    moma_jax.train(grown, quiet=True)
    assert (tmp_path / "grown" / "thresholds.json").exists()
    found = moma_jax.evaluate(str(tmp_path / "grown"))
    assert found["threshold"]["loss"] == pytest.approx(found["choice"]["loss"], rel=0.1)
    norms = moma_jax.load(str(tmp_path / "grown")).params["layers"]["ffn_norm"]
    assert not np.array_equal(norms["text"]["scale_D"], norms["image"]["scale_D"])  # each learned its own
