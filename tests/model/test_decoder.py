"""The whole decoder against NumPy, and what must change nothing: padding, microbatches, remat."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from decoders import KEY, MODALITIES, MODEL, ROWS, SEQUENCE, make, random_params, rows, run
from tiers import long_but

from moma_jax import sharding
from moma_jax.checks import resolve
from moma_jax.config import Config, DataConfig, TrainConfig
from moma_jax.ffn import parse_ffn
from moma_jax.model import parameters
from moma_jax.model.decoder import decoder_of
from moma_jax.model.precision import compute_dtype
from moma_jax.routers.choice import Choice


@pytest.mark.parametrize("norm", ["swin", "pre"])
@pytest.mark.parametrize("ffn", long_but("3t2i+1x", of=["3t2i+1x", "dense", "1t1i"]))
def test_equals_the_layers_written_out_in_numpy(norm, ffn):
    decoder, inputs = make(norm=norm, ffn=ffn), rows()
    params = random_params(decoder)
    token_BS, segment_BS, position_BS, modality_BS = inputs
    modality_GT = np.where(segment_BS > 0, modality_BS, -1 if ffn != "dense" else 0).reshape(ROWS // 2, -1)
    groups = [(g.name, g.modalities, g.experts) for g in parse_ffn(ffn, MODALITIES).groups]
    x_BSD = params["embedding"]["kernel_VD"][token_BS].astype(np.float64)
    for number in range(2):
        layer = jax.tree.map(lambda w, number=number: w[number].astype(np.float64), params["layers"])
        seed = int(jax.random.bits(jax.random.fold_in(jax.random.split(KEY)[0], number)))

        def attention(x_BSD, layer=layer):
            each = zip(x_BSD, segment_BS, position_BS, strict=True)
            return np.stack([oracles.attention(x, s, p, layer["attention"]) for x, s, p in each])

        def jitter(g, t, e, seed=seed):
            return 1e-3 * oracles.jitter(seed, 2 * g + t // SEQUENCE, t % SEQUENCE, e)

        def ffn_of(x_BSD, layer=layer, jitter=jitter):
            x_GTD = x_BSD.reshape(ROWS // 2, -1, 16)
            return oracles.moma_ffn(x_GTD, modality_GT, groups, layer["ffn"], rank_jitter=jitter)[0].reshape(
                x_BSD.shape
            )

        for sub_layer, scale in ((attention, "attention_norm"), (ffn_of, "ffn_norm")):
            scale_D = layer[scale]["scale_D"]
            after = (
                oracles.rms_norm(sub_layer(x_BSD), scale_D)
                if norm == "swin"
                else sub_layer(oracles.rms_norm(x_BSD, scale_D))
            )
            x_BSD = x_BSD + after
    hidden_BSD = oracles.rms_norm(x_BSD, params["final_norm"]["scale_D"])
    real = segment_BS > 0
    np.testing.assert_allclose(run(decoder, params, inputs).hidden_BSD[real], hidden_BSD[real], atol=2e-4)


def test_parameters_are_the_documented_ones_with_known_logical_axes():
    axes = {name for name, _ in sharding.RULES}
    for ffn in ("dense", "3t2i+1x", "3t2i+1t1i"):
        decoder = make(ffn=ffn, layers=1, router=Choice(auxiliary=True))
        boxed = jax.eval_shape(lambda decoder=decoder: decoder.init(KEY, *rows(), key=KEY))["params"]
        for path, box in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
            name = re.sub(
                "/(shared_)?(text|image|all|shared)(_auxiliary)?/", r"/<group>\3/", "/".join(k.key for k in path)
            )
            assert re.search(
                rf"^    {name} +\[{', '.join(str(a or '-') for a in box.names)}\]", parameters.__doc__, re.M
            )
            assert len(box.names) == box.value.ndim and set(box.names) <= axes | {None}
            assert box.value.dtype == jnp.float32
            if name.startswith("layers"):
                assert box.names[0] == "layers" and box.value.shape[0] == 1


def test_more_padding_changes_nothing_for_real_tokens():
    decoder = make(quotas=(24, 24))
    params, real = random_params(decoder), rows()[1] > 0
    before = run(decoder, params, rows())
    token_BS, *rest, modality_BS = rows()
    other = run(decoder, params, (np.where(real, token_BS, 31), *rest, np.where(real, modality_BS, 1)))
    np.testing.assert_array_equal(other.hidden_BSD[real], before.hidden_BSD[real])
    longer = run(decoder, params, rows(sequence=20))
    np.testing.assert_allclose(longer.hidden_BSD[:, :SEQUENCE][real], before.hidden_BSD[real], atol=1e-5)
    for name, selection in before.selections.items():
        places = [
            np.where(s.filled_EC, s.index_EC // width * 100 + s.index_EC % width, -1)
            for s, width in ((selection, SEQUENCE), (longer.selections[name], 20))
        ]
        np.testing.assert_array_equal(*places)
    for report in (other.report, longer.report):
        jax.tree.map(np.testing.assert_array_equal, report, before.report)


def test_microbatches_draw_the_same_noise():
    decoder = make(router=Choice(gumbel=True), dropout=0.2, layers=1)
    params, inputs = random_params(decoder), rows()
    whole = run(decoder, params, inputs, train=True, group_G=np.arange(4))
    for half in range(2):
        part = [x[half * 4 : half * 4 + 4] for x in inputs]
        micro = run(decoder, params, part, train=True, group_G=np.arange(2) + 2 * half)
        np.testing.assert_allclose(micro.hidden_BSD, whole.hidden_BSD[half * 4 : half * 4 + 4], atol=1e-5)
        for name, selection in micro.selections.items():
            expected = whole.selections[name].index_EC[:, half * 2 : half * 2 + 2]
            np.testing.assert_array_equal(selection.index_EC, expected)


def test_noise_is_of_the_step_and_of_training_only():
    noisy, quiet = make(router=Choice(gumbel=True), dropout=0.2, layers=1), make(layers=1)
    params, inputs = random_params(quiet), rows()
    first, again, later = (run(noisy, params, inputs, train=True, step=step).hidden_BSD for step in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - later).max() > 0.1
    evaluated = run(noisy, params, inputs, step=1).hidden_BSD
    np.testing.assert_array_equal(evaluated, run(quiet, params, inputs, step=2).hidden_BSD)


def test_jitter_does_not_change_with_the_step_but_with_the_run():
    decoder = make(ffn="4x")
    params = jax.tree.map(np.zeros_like, random_params(decoder))  # every token ties with every other
    index = [
        run(decoder, params, rows(), train=True, step=step, key=jax.random.key(seed)).selections["all"].index_EC
        for step, seed in ((1, 0), (2, 0), (1, 1))
    ]
    np.testing.assert_array_equal(index[0], index[1])
    assert (index[0] != index[2]).any() and (index[0][0] != index[0][1]).any()


@pytest.mark.parametrize("norm", long_but("pre", of=["swin", "pre"]))
def test_gradients_are_finite_with_padded_rows_and_equal_under_every_remat(norm):
    inputs = list(rows())
    inputs[1][2:4] = 0  # a routing group of padding
    params, gradients = random_params(make(ffn="2x")), {}
    for remat in ("none", "dots", "full") if norm == "swin" else ("none",):
        decoder = make(norm=norm, remat=remat, ffn="2x", attention_chunk=5 if norm == "swin" else 512)

        def total(params, decoder=decoder):
            hidden_BSD = decoder.apply({"params": params}, *inputs, key=KEY, train=True).hidden_BSD
            return jnp.sum(jnp.sin(hidden_BSD) * (inputs[1] > 0)[..., None])

        gradients[remat] = jax.device_get(jax.jit(jax.grad(total))(params))
        for gradient, expected in zip(*(jax.tree.leaves(gradients[r]) for r in (remat, "none")), strict=True):
            assert np.isfinite(gradient).all()
            np.testing.assert_allclose(gradient, expected, atol=1e-4 * max(1e-3, np.abs(expected).max()))
    assert np.abs(gradients["none"]["layers"]["ffn"]["all"]["router_DE"]).max() > 0


@pytest.mark.parametrize("ffn", ["dense", "1t1i"])
def test_without_experts_to_choose_nothing_leaks(ffn):
    decoder, (token_BS, *rest) = make(ffn=ffn), rows()
    params = random_params(decoder)
    changed = token_BS.copy()
    changed[:, 7] = (changed[:, 7] // 20 * 20) + (changed[:, 7] + 1) % 12  # same modality
    same = np.ones(SEQUENCE, bool)
    same[7:10] = False  # that token and what follows in its document
    before, after = (run(decoder, params, (tokens, *rest)).hidden_BSD for tokens in (token_BS, changed))
    real = rest[0] > 0
    np.testing.assert_array_equal(after[real & same], before[real & same])
    assert (after[0, 7:10] != before[0, 7:10]).any(-1).all()


def test_the_report_and_selections_have_a_layer_axis():
    decoder, inputs = make(), rows()
    output = run(decoder, random_params(decoder), inputs)
    assert output.selections["text"].index_EC.shape == (2, 4, 2, 12)
    real, modality_BS = inputs[1] > 0, inputs[3]
    count_M = [np.sum(real & (modality_BS == m)) for m in range(2)]
    np.testing.assert_array_equal(output.report.count_LM, [count_M] * 2)
    np.testing.assert_array_equal(output.report.taken_LM3.sum(-1), output.report.count_LM)
    alone = run(make(ffn="1t1i"), random_params(make(ffn="1t1i")), inputs).report
    np.testing.assert_array_equal(alone.taken_LM3[..., 1], alone.count_LM)
    assert run(decoder, random_params(decoder), inputs, return_selections=False).selections is None


def test_compute_type_is_the_configs_and_parameters_stay_float32():
    decoder, inputs = make(dtype="bfloat16", ffn="dense"), rows()
    params, real = random_params(decoder), inputs[1] > 0
    hidden_BSD = run(decoder, params, inputs).hidden_BSD
    assert hidden_BSD.dtype == jnp.bfloat16
    exact = run(make(ffn="dense"), params, inputs).hidden_BSD
    assert np.median(np.abs(hidden_BSD[real].astype(np.float32) - exact[real])) < 0.05
    assert compute_dtype(dataclasses.replace(MODEL, dtype="auto")) in (jnp.float32, jnp.bfloat16)


def test_built_from_a_config():
    data = DataConfig(kind="synthetic", modalities=MODALITIES, sequence=SEQUENCE, group_rows=2)
    config = resolve(Config(MODEL, data, train=TrainConfig(steps=1, batch_rows=8, eval_sets=())))
    decoder = decoder_of(config)
    assert decoder.quotas == config.quotas
    assert decoder.model.router == Choice() and decoder.causal is None and decoder.group_rows == 2
