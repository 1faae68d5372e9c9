"""Mixture of depths against NumPy, forward and gradient; what it must equal, keep and refuse."""

import dataclasses
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from decoders import KEY, MODALITIES, ROWS, SEQUENCE, make, random_params, rows, run
from jaxprs import product_flops, step_jaxpr
from jaxprs import tiny as sized
from tiers import long_but
from tiny import tiny

from moma_jax import cost, sharding
from moma_jax.data.stream import open_stream
from moma_jax.errors import InputError
from moma_jax.ffn import parse_ffn
from moma_jax.geometry import GroupRows, depth_shape
from moma_jax.model.decoder import first_routing_state
from moma_jax.model.depth import by_token, ordered
from moma_jax.router import Quota, Selection
from moma_jax.routers.choice import Choice, thresholds
from moma_jax.routers.threshold import Threshold
from moma_jax.training.step import compile_step, create_state, make_program, put

SHARE = 0.5
BLIND = {"depth_by": "all"}
AWARE = {"depth_by": "modality"}
GROUPS = AWARE | {"depth_over": "group", "depth_room": 1.0}
"""Ranked over two rows, with room for 6 of a row's 12 positions, where one row would take 7."""


def decoder_with(ffn, norm="swin", **model):
    return make(ffn=ffn, norm=norm, depth_capacity=SHARE, **model)


def by_hand(decoder, params, inputs):
    """(hidden_BSD, who entered) of one pair of layers, written out in NumPy; padding is left out of the rows."""
    token_BS, segment_BS, position_BS, modality_BS = inputs
    model, layers = decoder.model, jax.tree.map(lambda w: np.asarray(w[0], np.float64), params["layers"])
    layout, (jitter_key, _) = parse_ffn(model.ffn, MODALITIES), jax.random.split(KEY)
    groups = [(g.name, g.modalities, g.experts) for g in layout.groups]
    seeds = [int(jax.random.bits(jax.random.fold_in(jitter_key, n))) for n in range(3)]
    x_BSD = np.asarray(params["embedding"]["kernel_VD"], np.float64)[token_BS]
    real = [np.flatnonzero(segment_S > 0) for segment_S in segment_BS]
    about = [tuple(part[r][s] for part in (x_BSD, segment_BS, position_BS, modality_BS)) for r, s in enumerate(real)]
    at = [(*row, s) for row, s in zip(about, real, strict=True)]

    def of_layer(seed):
        jitter = lambda r, place, e: 1e-3 * oracles.jitter(seed, r, place, e)  # noqa: E731
        return {"norm": model.norm, "group_rows": decoder.group_rows, "rank_jitter": jitter}

    modalities = {"depth_all": (0, 1), "depth_text": (0,), "depth_image": (1,)}
    routers = [(own["router_DE"][:, 0], modalities[name]) for name, own in layers["depth"].items()]
    depth = {"share": SHARE, "depth_jitter": lambda r, place: 1e-3 * oracles.jitter(seeds[2], r, place, 0)}
    if model.depth_over == "group":
        shape = depth_shape(model, GroupRows(MODALITIES, decoder.quotas, decoder.group_rows, SEQUENCE))
        depth |= {"over": decoder.group_rows, "most": shape.inside.sequence}
    xs, entered = oracles.skipping_layer(at, layers["even"], routers, groups, **depth, **of_layer(seeds[0]))
    at = [(x, *row[1:]) for x, row in zip(xs, at, strict=True)]
    xs = oracles.layer(at, layers["odd"], groups, **of_layer(seeds[1]))
    hidden_BSD = np.zeros_like(x_BSD)
    for r, (x, own) in enumerate(zip(xs, real, strict=True)):
        hidden_BSD[r, own] = oracles.rms_norm(x, np.asarray(params["final_norm"]["scale_D"], np.float64))
        entered[r] = own[entered[r]].tolist()
    return hidden_BSD, entered


@pytest.mark.parametrize("ffn", long_but("mod+3t2i+1x", of=["mod+3t2i+1x", "mod+dense", "mod+1t1i"]))
@pytest.mark.parametrize(("norm", "by"), [("swin", AWARE), ("pre", BLIND), ("pre", GROUPS)])
def test_equals_the_layers_written_out_in_numpy(ffn, norm, by):
    decoder, inputs = decoder_with(ffn, norm, **by), rows()
    params = random_params(decoder)
    hidden_BSD, entered = by_hand(decoder, params, inputs)
    output, real = run(decoder, params, inputs), inputs[1] > 0
    index_BC, _, filled_BC = (x[0, :, 0] for x in output.selections["depth"])
    assert [index[filled].tolist() for index, filled in zip(index_BC, filled_BC, strict=True)] == entered
    assert entered[3] == [] and all(len(own) > 2 for own in entered[:3]), "row 3 is padding"
    if "depth_over" in by:
        counts = [len(own) for own in entered[4:]]
        assert len(set(counts)) > 1 and max(counts) == 6, "rows differ, and one would take more"
    np.testing.assert_allclose(output.hidden_BSD[real], hidden_BSD[real], atol=2e-4)


@pytest.mark.parametrize(
    ("norm", "by"), long_but(("swin", BLIND), of=[("swin", BLIND), ("pre", AWARE), ("swin", GROUPS)])
)
def test_gradients_equal_those_of_the_loop(norm, by):
    """Along a random direction of each array, against differences of the loop in float64."""
    decoder, inputs = decoder_with("mod+2t2i", norm, **by), rows()
    params, real = random_params(decoder), inputs[1] > 0
    weight_BSD = np.random.default_rng(3).normal(size=(ROWS, SEQUENCE, 16)) * real[..., None]

    def loss(params):
        options = {"key": KEY, "step": 3, "group_G": np.arange(ROWS // 2)}
        return jnp.sum(decoder.apply({"params": params}, *inputs, **options).hidden_BSD * weight_BSD)

    grads = jax.jit(jax.grad(loss))(params)
    rng, step = np.random.default_rng(4), 1e-6
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for number, (path, w) in enumerate(leaves):
        if "unembedding" in str(path):
            continue
        direction = rng.normal(size=w.shape) / np.sqrt(w.size)
        ends = []
        for sign in (1, -1):
            moved = [leaf.astype(np.float64) for _, leaf in leaves]
            moved[number] = moved[number] + sign * step * direction
            moved = jax.tree.unflatten(jax.tree.structure(params), moved)
            ends.append(np.sum(by_hand(decoder, moved, inputs)[0] * weight_BSD))
        slope = np.sum(np.asarray(jax.tree.leaves(grads)[number], np.float64) * direction)
        expected = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(slope, expected, rtol=2e-3, atol=2e-3, err_msg=str(path))


class GateOne(Choice):
    """Expert choice whose routers of mixture of depths let tokens enter with gate 1."""

    def for_depth(self):
        return OfDepth()


class OfDepth(Choice):
    def select(self, score, eligible_T, quota, state, key):
        routed = super().select(score, eligible_T, quota, state, key)
        chosen = routed.selection
        return routed._replace(selection=chosen._replace(gate_EC=chosen.filled_EC.astype(jnp.float32)))


@pytest.mark.slow
@pytest.mark.parametrize("by", [AWARE, BLIND])
@pytest.mark.parametrize("ffn", ["3t2i+1x", "dense"])
def test_everyone_at_gate_one_is_the_plain_model(ffn, by):
    with jax.enable_x64(True):
        plain = make(ffn=ffn, norm="pre", dtype="float64", layers=4)
        fields = {"norm": "pre", "dtype": "float64", "layers": 4, "depth_capacity": 1.0, "router": GateOne()}
        deep = make(ffn=f"mod+{ffn}", **fields, **by)
        params, inputs = random_params(plain), rows()
        layers = {
            "even": jax.tree.map(lambda w: w[0::2], params["layers"]),
            "odd": jax.tree.map(lambda w: w[1::2], params["layers"]),
            "depth": random_params(deep)["layers"]["depth"],
        }
        expected = run(plain, params, inputs).hidden_BSD
        found = run(deep, params | {"layers": layers}, inputs).hidden_BSD
    assert found.dtype == np.float64
    real = inputs[1] > 0
    np.testing.assert_allclose(found[real], expected[real], atol=1e-12, rtol=0)


def test_what_enters_keeps_order_and_quota():
    tokens, slots = 12, 6
    halves = [
        Selection(np.array([[9, 2, 4]]), np.array([[0.5, 0.25, 0.0]], np.float32), np.array([[True, True, False]])),
        Selection(np.array([[3, 11, 0]]), np.array([[0.75, 0.125, 0.0]], np.float32), np.array([[True, True, False]])),
    ]
    index_C, gate_C, filled_C = ordered(*by_token(halves, tokens), slots)
    assert index_C[:4].tolist() == [2, 3, 9, 11] and filled_C.tolist() == [True] * 4 + [False] * 2
    assert gate_C.tolist() == [0.25, 0.75, 0.5, 0.125, 0, 0]
    # Where there are more than fit, as thresholds may let in, the latest stay out.
    assert ordered(*by_token(halves, tokens), 3)[0].tolist() == [2, 3, 9]


def test_modalities_keep_their_share_of_the_quotas():
    """Rows of random mixtures that fill the routing group's quotas never need more slots than there are."""
    rng, model = np.random.default_rng(0), dataclasses.replace(tiny().model, depth_capacity=0.3)
    share, sequence, number = Fraction(3, 10), 40, 4
    for _ in range(200):
        text = rng.integers(0, number * sequence + 1)
        modality_BS = rng.permutation(np.arange(number * sequence) >= text).reshape(number, sequence)
        quotas = (text, number * sequence - text)
        shape = depth_shape(model, GroupRows(MODALITIES, quotas, number, sequence))
        inside = shape.inside.quotas
        assert shape.inside.sequence == 12
        row = Quota(sequence, share, down=True)
        for m in range(2):
            assert sum(row.take(int(c)) for c in (modality_BS == m).sum(axis=1)) <= inside[m]
        assert all(sum(row.take(int((own == m).sum())) for m in range(2)) <= 12 for own in modality_BS)
        grouped = dataclasses.replace(model, depth_over="group")
        over = depth_shape(grouped, GroupRows(MODALITIES, quotas, number, sequence))
        assert (over.rows, over.inside.sequence, over.inside.quotas) == (number, 24, inside)
        assert [own.slots for own in over.routers] == [max(0, 3 * quota // 10) for quota in quotas]
    blind = dataclasses.replace(model, depth_by="all")
    assert depth_shape(blind, GroupRows(MODALITIES, (160, 20), number, sequence)).inside.quotas == (48, 20)


@pytest.mark.slow
def test_more_padding_and_other_microbatches_change_nothing():
    decoder = decoder_with("mod+2t2i")
    params, real = random_params(decoder), rows()[1] > 0
    before = run(decoder, params, rows())
    longer = run(decoder, params, rows(sequence=20))
    np.testing.assert_allclose(longer.hidden_BSD[:, :SEQUENCE][real], before.hidden_BSD[real], atol=1e-5)
    half = [x[4:] for x in rows()]
    later = run(decoder, params, half, group_G=np.arange(2, 4))
    np.testing.assert_allclose(later.hidden_BSD[real[4:]], before.hidden_BSD[4:][real[4:]], atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, longer.report, before.report)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(remat):
    params = None
    grads = []
    for policy in ("none", remat):
        decoder = decoder_with("mod+2t2i", remat=policy)
        params = random_params(decoder)

        def loss(params, decoder=decoder):
            return jnp.sum(decoder.apply({"params": params}, *rows(), key=KEY).hidden_BSD ** 2)

        grads.append(jax.jit(jax.grad(loss))(params))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-3, rtol=2e-4), *grads)


@pytest.mark.slow
def test_the_state_of_routing_is_by_layer_and_router():
    config = tiny(model_ffn="mod+2t2i", model_layers=4, model_router=Choice(auxiliary=True))
    program = make_program(config)
    batch = next(iter(open_stream(config))).batch
    with sharding.use_mesh(program.mesh):
        state = create_state(program, first_routing_state(config))
        state, report = compile_step(program, state)(state, put(batch, program.mesh))
    shapes = {name: own["threshold_E"].shape for name, own in state.routing_state.items()}
    assert shapes == {"text": (4, 2), "image": (4, 2), "depth_text": (2, 1), "depth_image": (2, 1)}
    for name, own in state.routing_state.items():
        assert np.asarray(own["taken_E"]).all() and np.asarray(thresholds(own)).any(), name
    tokens_M, entered_M4 = np.asarray(report.tokens_M), np.asarray(report.entered_M4)
    assert (entered_M4[:, 3] == 2 * tokens_M).all() and (entered_M4[:, 2] <= 2 * 0.25 * tokens_M).all()
    assert (np.asarray(report.taken_M3).sum(-1) == 2 * tokens_M + entered_M4[:, 2]).all()
    assert float(report.routing_losses["auxiliary"]) > 0


# Counts and refusals --------------------------------------------------------------------------------------------------

TABLE_1 = {"paper_90m_mod": (110e6, 317e6), "paper_435m_mod": (635e6, 3e9), "paper_1b4_mod": (2.3e9, 12e9)}


@pytest.mark.parametrize("recipe", TABLE_1)
def test_parameters_are_those_of_table_1_and_flops_those_of_the_dense_partner(recipe):
    from moma_jax import recipes

    path = f"{oracles.__file__.rpartition('/tests/')[0]}/configs/{recipe}"
    dense = cost(recipes.recipe(f"{path.removesuffix('_mod')}.py", {"model.ffn": "dense"}))
    for ffn, parameters in zip(("mod+dense", "mod+4t4i"), TABLE_1[recipe], strict=True):
        own = cost(recipes.recipe(f"{path}.py", {"model.ffn": ffn}))
        assert own["parameters"]["total"] == pytest.approx(parameters, rel=0.025)
        assert own["flops_per_token"]["train"] == pytest.approx(dense["flops_per_token"]["train"], rel=0.05)


def test_ranking_all_modalities_together_costs_slots():
    fields = {"model_ffn": "mod+2t2i", "model_layers": 4, "data_sequence": 64, "model_depth_capacity": 0.25}
    aware, blind = (cost(tiny(model_depth_by=by, **fields))["flops_per_token"] for by in ("modality", "all"))
    assert aware["train"] == blind["train"] and aware["executed"] == pytest.approx(aware["train"], rel=0.02)
    # As many slots as tokens enter, for each modality; and one column of routers less.
    more = 3 * (aware["by_part"]["experts"] / 5 - aware["by_part"]["depth_router"])
    assert blind["executed"] - aware["executed"] == pytest.approx(more)


@pytest.mark.parametrize(
    ("ffn", "auxiliary"),
    long_but(
        ("mod+4t4i", True),
        ("mod+1t1i+1x", False),
        of=[("mod+dense", True), ("mod+4t4i", False), ("mod+4t4i", True), ("mod+1t1i+1x", False)],
    ),
)
def test_counted_parameters_are_those_of_the_model(ffn, auxiliary):
    config = tiny(model_ffn=ffn, model_layers=4, model_router=Choice(auxiliary=auxiliary))
    program = make_program(config)
    params = jax.eval_shape(lambda: create_state(program, first_routing_state(config)).params)
    counted = cost(config)["parameters"]
    assert counted["total"] + counted["auxiliary"] == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("ffn", "fields"),
    [
        pytest.param("mod+2t2i", {"router": Choice(auxiliary=True)}, marks=pytest.mark.slow),
        ("mod+dense", {"sequence": 50, "depth_capacity": 0.3}),
        pytest.param("mod+2t2i+1x", {"depth_by": "all", "router": Threshold()}, marks=pytest.mark.slow),
    ],
)
def test_executed_flops_are_those_of_the_steps_jaxpr(ffn, fields):
    config = sized(ffn, **fields)
    counted = product_flops(step_jaxpr(config)) / config.batch_tokens
    assert cost(config)["flops_per_token"]["executed"] == pytest.approx(counted, rel=1e-3)


def test_no_modality_is_called_like_a_router():
    modalities = (tiny().data.modalities[0], dataclasses.replace(tiny().data.modalities[1], name="depth_text"))
    with pytest.raises(InputError, match=r"^data.modalities: depth_text begins like the routers of mod\+2t2i"):
        tiny(model_ffn="mod+2t2i", data_modalities=modalities)
    assert tiny(data_modalities=modalities).model.ffn == "2t2i"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_layers": 3}, "model.layers: 3 layers do not pair up"),
        ({"model_depth_capacity": 0.0}, "model.depth_capacity: must be above 0"),
        ({"model_depth_capacity": 1.5}, "model.depth_capacity: must be above 0 and at most 1"),
        ({"model_depth_capacity": 0.01}, "lets nobody in; use 0.0625 or more"),
        ({"model_depth_by": "row"}, "model.depth_by: 'row' is not one of modality, all"),
        ({"model_ffn": "mod+"}, "is not an FFN"),
        ({"model_ffn": "mod+mod+2t2i"}, "is not an FFN"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(InputError, match="^model") as refusal:
        tiny(**{"model_ffn": "mod+2t2i", "model_layers": 4} | fields)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
