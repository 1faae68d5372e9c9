"""Prefill and cached decoding against teacher forcing, under both causal rules."""

import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import MODALITY_V, SEQUENCE, cached, extends, forced, rows_of
from jax.sharding import AxisType
from rival_rules import RIVALS
from tiers import long_but
from tiny import tiny

from moma_jax.config import RopeScaling
from moma_jax.errors import InputError
from moma_jax.model import decode
from moma_jax.model.decoder import first_routing_state
from moma_jax.router import CAUSAL
from moma_jax.routers.choice import Choice
from moma_jax.sharding import AXES
from moma_jax.training.step import create_state, make_program

TOLERANCE = 1e-4
VARIANTS = ("dense", "8x", "1t1i", "4t4i", "4t4i+1x", "4t4i+1t1i", "mod+dense", "mod+1t1i", "mod+4t4i+1x")


def model_of(ffn, norm="swin", **options):
    """Config, random parameters and thresholds near the middle of the logits."""
    config = tiny(model_ffn=ffn, model_router=Choice(auxiliary=True), model_norm=norm, **options)
    state = create_state(make_program(config), first_routing_state(config))
    key = jax.random.key(7)

    def drawn(path, leaf):
        # SiLU's outputs are positive on average, so this mean makes tokens of no, one and several experts.
        return jax.random.normal(key, leaf.shape) - 0.6 if "out_AE" in jax.tree_util.keystr(path) else leaf

    params = jax.tree_util.tree_map_with_path(drawn, state.params)
    routing_state = {
        name: own | {"threshold_E": 0.7 + 0.3 * jax.random.normal(key, own["threshold_E"].shape)}
        for name, own in state.routing_state.items()
    }
    return config, params, routing_state


@pytest.mark.parametrize("routing", long_but("threshold", of=["causal", "threshold"]))
@pytest.mark.parametrize("ffn", long_but("4t4i+1x", of=VARIANTS))
def test_prefill_and_cached_decoding_equal_teacher_forcing(ffn, routing):
    model = model_of(ffn)
    token_BS = rows_of(1, 4)
    expected_BSD, taken_3 = forced(model, routing, token_BS)
    if any(group.experts > 1 for group in model[0].experts.groups):
        assert np.all(taken_3 > 0)  # tokens of no, one and several experts all occur
    rows = [row[:length] for row, length in zip(token_BS, (16, 9, 1, 13), strict=True)]
    for splits in ([1] * 16, [16], [9, *[1] * 7], [3, 1, 8, 1, 3]):
        for row, hidden_SD, expected_SD in zip(rows, cached(model, routing, rows, splits), expected_BSD, strict=True):
            np.testing.assert_allclose(hidden_SD, expected_SD[: len(row)], atol=TOLERANCE)


def test_other_backbones_do():
    """Heads that share keys, of a width of their own, another norm of them, slowed rotations."""
    heads = {"model_heads": 4, "model_kv_heads": 2, "model_head_width": 6, "model_qk_norm": "rms"}
    model = model_of("mod+2t2i", model_rope_scaling=RopeScaling(positions=16), **heads)
    token_BS = rows_of(1, 2)
    expected_BSD, _ = forced(model, "causal", token_BS)
    for splits in ([1] * 16, [9, *[1] * 7], [3, 1, 8, 1, 3]):
        found = cached(model, "causal", list(token_BS), splits)
        np.testing.assert_allclose(np.stack(found), expected_BSD, atol=TOLERANCE)


OF_RULES = [*((name, "4t4i+1x") for name in RIVALS), ("token_choice", "mod+2t2i")]
FEW = [(name, "4t4i+1x") for name in ("null", "hash", "random")]


@pytest.mark.parametrize(("name", "ffn"), long_but(*FEW, ("token_choice", "mod+2t2i"), of=OF_RULES))
def test_so_do_rules_whose_tokens_choose(name, ffn):
    config = tiny(model_ffn=ffn, model_router=RIVALS[name])
    state = create_state(make_program(config), first_routing_state(config))
    model, token_BS = (config, state.params, state.routing_state), rows_of(1, 4)
    expected_BSD, _ = forced(model, CAUSAL, token_BS)
    rows = [row[:length] for row, length in zip(token_BS, (16, 9, 1, 13), strict=True)]
    for splits in ([1] * 16, [9, *[1] * 7]):
        for row, hidden_SD, expected_SD in zip(rows, cached(model, CAUSAL, rows, splits), expected_BSD, strict=True):
            np.testing.assert_allclose(hidden_SD, expected_SD[: len(row)], atol=TOLERANCE)


class Above(Choice):
    """A rule with a causal decision of its own, which notes who enters, and of which of a layer's two groups.

    A layer needs the one before, but its groups run in any order. The note is a pure function for JAX: layers are
    traced more often than they run, and newer JAX keeps every effect of a trace.
    """

    causal: ClassVar[tuple[str, ...]] = (CAUSAL,)
    noted: ClassVar[list[tuple[int, np.ndarray]]] = []
    traced: ClassVar[itertools.count] = itertools.count()

    def decide(self, score, state, routing):
        assert routing == CAUSAL
        group = next(self.traced) % 2

        def note(enters_NE):
            self.noted.append((group, np.array(enters_NE)))
            return np.asarray(enters_NE)

        enters_NE = score.plain_TE > 0.3
        enters_NE = jax.pure_callback(note, jax.ShapeDtypeStruct(enters_NE.shape, bool), enters_NE)
        return enters_NE, 2 * jax.nn.sigmoid(score.logit_TE)


def test_whole_rows_and_cached_decoding_decide_by_the_same_rule():
    """The same tokens enter the same experts of every layer, whether rows are read whole, at once or one by one."""
    config = tiny(model_router=Above())
    state = create_state(make_program(config), first_routing_state(config))
    model, token_BS = (config, state.params, state.routing_state), rows_of(5, 4)

    def noted(run):
        Above.noted.clear()
        result = run()
        jax.effects_barrier()
        calls, groups = len(config.routed) * config.model.layers, len(config.routed)
        layers = [
            sorted(Above.noted[at : at + groups], key=lambda n: n[0]) for at in range(0, len(Above.noted), groups)
        ]
        in_order = [enters_NE for layer in layers for _, enters_NE in layer]
        steps = [in_order[start : start + calls] for start in range(0, len(in_order), calls)]
        pieces = [np.stack(step).reshape(calls, len(token_BS), -1, 2) for step in steps]
        return result, np.concatenate(pieces, axis=2)

    (expected_BSD, taken_3), enters_XBSE = noted(lambda: forced(model, CAUSAL, token_BS))
    assert np.all(taken_3 > 0)
    for splits in ([SEQUENCE], [1] * SEQUENCE):
        found_BSD, same_XBSE = noted(lambda splits=splits: cached(model, CAUSAL, list(token_BS), splits))
        np.testing.assert_array_equal(same_XBSE, enters_XBSE)
        np.testing.assert_allclose(found_BSD, expected_BSD, atol=TOLERANCE)


@pytest.mark.slow
def test_pre_norm_and_blocks_of_many_tokens():
    for norm in ("pre", "swin"):
        model = model_of("2t2i+1x", norm)
        token_BS = rows_of(2, 4)
        expected_BSD, _ = forced(model, "threshold", token_BS)
        found = cached(model, "threshold", list(token_BS), [13, 1, 2])
        np.testing.assert_allclose(found, expected_BSD, atol=TOLERANCE)


def test_layers_called_from_the_host_are_those_of_one_program():
    """Six layers, so that two programs have four and two of them; the cache is given away."""
    config, params, routing_state = model_of("mod+2t2i", model_layers=6)
    weights, row = decode.unstack(params, config, routing_state), rows_of(5, 2)
    found = []
    for jit in (jax.jit, lambda function: function):
        cache, extend = decode.new_cache(config, 2, SEQUENCE), extends(config, "threshold", jit)
        _, cache = extend(weights, cache, row[:, :9], np.array([9, 4]))
        hidden_BQD, cache = extend(weights, cache, row[:, 9:10], np.array([1, 1]))
        found.append((hidden_BQD, cache))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE)


def test_a_rewound_row_forgets():
    config, params, routing_state = model = model_of("2t2i")
    (row,) = rows_of(3, 1)
    extend, weights = extends(config, "causal"), decode.unstack(params, config, routing_state)
    _, cache = extend(weights, decode.new_cache(config, 1, SEQUENCE), row[None], np.array([16]))
    cache = cache._replace(length_B=jnp.array([3]))
    hidden_BQD, cache = extend(weights, cache, row[None, 8:12], np.array([4]))
    expected_BSD, _ = forced(model, "causal", np.tile(np.concatenate([row[:3], row[8:12], row[:9]]), (2, 1)))
    np.testing.assert_allclose(hidden_BQD, expected_BSD[:1, 3:7], atol=TOLERANCE)
    assert cache.length_B.tolist() == [7]


@pytest.mark.slow
def test_a_rewound_row_forgets_layers_that_it_does_not_enter():
    """Images alone enter the even layers; behind the place to which the row goes back text comes first."""
    config, params, state = model_of("mod+2t2i")
    for name, reached in (("depth_text", 1e9), ("depth_image", -1e9)):
        state[name] |= {"threshold_E": jnp.full_like(state[name]["threshold_E"], reached)}
    model = config, params, state
    (text, *_), row = (np.flatnonzero(np.asarray(MODALITY_V) == m)[-8:] for m in (0, 1))
    extend, weights = extends(config, "threshold"), decode.unstack(params, config, state)
    _, cache = extend(weights, decode.new_cache(config, 1, SEQUENCE), row[None], np.array([8]))
    cache = cache._replace(length_B=jnp.array([3]))
    _, cache = extend(weights, cache, np.array([[text, text]]), np.array([2]))
    hidden_BQD, _ = extend(weights, cache, row[None, -1:], np.array([1]))
    expected_BSD, _ = forced(model, "threshold", np.tile([*row[:3], text, text, row[-1], *row], (2, 1)))
    np.testing.assert_allclose(hidden_BQD[0, 0], expected_BSD[0, 5], atol=TOLERANCE)


def test_a_cache_can_be_given_away():
    """Generation donates it, and no two layers may share a buffer."""
    cache = decode.new_cache(tiny(model_ffn="mod+2t2i", model_layers=4), 2, SEQUENCE)
    assert [memory.position_BP is None for memory in cache.memories] == [False, True] * 2
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)]
    assert len(set(buffers)) == len(buffers)


def test_devices_that_divide_no_heads_are_refused():
    config, params, routing_state = model_of("1t1i")
    mesh = jax.sharding.AbstractMesh((1, 2, 1, 2), AXES, axis_types=(AxisType.Auto,) * 4)
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(InputError, match="4 devices, which do not divide model.heads 2"),
    ):
        decode.unstack(params, config, routing_state)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_unembedding(tied):
    config, params, routing_state = model_of("1t1i", model_tied_embeddings=tied)
    table_DV = params["embedding"]["kernel_VD"].T if tied else params["unembedding"]["kernel_DV"]
    weights = decode.unstack(params, config, routing_state)
    hidden_BD = np.random.default_rng(0).normal(size=(3, config.model.width)).astype(np.float32)
    expected_BV = hidden_BD @ np.asarray(table_DV)
    np.testing.assert_allclose(decode.logits(weights, hidden_BD), expected_BV, atol=1e-5)


def test_weights_of_experts_that_no_token_enters_are_not_touched():
    """A weight that is not a number shows whether it was read."""
    config, params, routing_state = model_of("2t2i")
    never = {
        n: s | {"threshold_E": jnp.full_like(s["threshold_E"], 1e9).at[:, 0].set(-1e9)}
        for n, s in routing_state.items()
    }
    weights = decode.unstack(params, config, never)
    broken = jax.tree.map(lambda x: x, weights)
    for layer in broken["layers"]:
        for name, (first, second) in layer["experts"].items():
            layer["experts"][name] = (first, jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), second))
    extend = extends(config, "threshold")
    rows = (rows_of(4, 2), np.array([16, 16]))
    whole, _ = extend(weights, decode.new_cache(config, 2, SEQUENCE), *rows)
    found, _ = extend(broken, decode.new_cache(config, 2, SEQUENCE), *rows)
    np.testing.assert_array_equal(found, whole)
    assert np.isfinite(whole).all()
