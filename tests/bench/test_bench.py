"""The benches measure what they say: structure, arithmetic, sane figures. No test depends on how fast a machine is."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import run as moma
from small_codecs import small_codec
from tiny import tiny
from top_two import TopTwo, first_come

from moma_jax import bench
from moma_jax.bench import step as step_bench
from moma_jax.bench.ffn import _half_and_half
from moma_jax.bench.parts import PARTS
from moma_jax.bench.timing import differentiated, in_turns, summarise
from moma_jax.codec.folder import write_codec
from moma_jax.config import StoreConfig
from moma_jax.cost import cost
from moma_jax.errors import InputError
from moma_jax.model import moe
from moma_jax.model.parameters import weights_of
from moma_jax.recipes import override
from moma_jax.studies import Study, Variant


@pytest.fixture(scope="module")
def slack_config():
    """Tiny, accumulating, with quotas of 0.625 each: some slots stay empty."""
    config = tiny(train_accumulate=2)
    modalities = tuple(dataclasses.replace(m, quota=0.625) for m in config.data.modalities)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, modalities=modalities))


@pytest.fixture(scope="module")
def measured(slack_config):
    """One small `bench_step` for all tests of it."""
    return bench.bench_step(slack_config, ("dense", "4t4i"), repeats=2)


@pytest.mark.slow
def test_step_reports_every_variant(measured, slack_config):
    assert list(measured["variants"]) == ["dense", "4t4i"]
    assert measured["update"]["tokens"] == slack_config.batch_tokens and measured["update"]["accumulate"] == 2
    for figures in measured["variants"].values():
        assert figures["tokens_per_second"] == pytest.approx(slack_config.batch_tokens / figures["step_seconds"])
        assert figures["mfu"] is None  # a CPU's peak is not known
        assert figures["spread"] >= 0
    json.dumps(measured)


@pytest.mark.slow
def test_step_compares_with_dense(measured):
    dense, routed = measured["variants"]["dense"], measured["variants"]["4t4i"]
    assert dense["relative_to_dense"] == 1
    assert routed["relative_to_dense"] == pytest.approx(routed["tokens_per_second"] / dense["tokens_per_second"])


def test_step_reports_the_flops_of_dense_and_warns(capsys):
    equal, doubled = (tiny(model_ffn=ffn, model_width=64, model_hidden=512) for ffn in ("1t1i", "1t1i+1x"))
    dense = tiny(model_ffn="dense", model_width=64, model_hidden=512)
    assert step_bench._relative_flops("1t1i", equal, dense) == 1 and capsys.readouterr().err == ""
    assert step_bench._relative_flops("1t1i+1x", doubled, dense) > 1.5
    assert "warning: 1t1i+1x has 1." in capsys.readouterr().err


@pytest.mark.slow
def test_without_dense_nothing_is_relative_to_it(measured, slack_config):
    assert measured["variants"]["dense"]["relative_flops"] == 1
    alone = bench.bench_step(slack_config, ("4t4i",), repeats=1, parts=False)
    figures = alone["variants"]["4t4i"]
    assert figures["relative_to_dense"] is None
    assert figures["relative_flops"] == measured["variants"]["4t4i"]["relative_flops"]
    assert "FLOPs of dense" in bench.format_bench(alone)


@pytest.mark.slow
def test_a_studys_variants_are_measured_as_it_matches_them():
    dense, own = Variant("base", {"model.ffn": "dense"}), {"model.attention_weights": "by_modality"}
    ruled = Variant("ruled", {"model.ffn": "2t2i", "model.router": "token_choice", **own})
    base = tiny(train_batch_rows=8, train_eval_sets=())
    study = Study(base, (dense, ruled), baseline="base", tokens=1024, tolerance=0.1, budgets=(0.5,), dir="runs/none")
    figures = bench.bench_study(study, repeats=1)["variants"]
    assert list(figures) == ["base", "ruled"] and figures["base"]["relative_to_dense"] == 1
    assert figures["ruled"]["relative_flops"] == pytest.approx(1, abs=0.1) and figures["ruled"]["quota_slack"] > 0.4


def test_no_repeats_measure_nothing():
    for measure in (bench.bench_step, bench.bench_ffn):
        with pytest.raises(InputError, match="--repeats: 0; give 1 or more"):
            measure(*([tiny()] if measure is bench.bench_step else []), repeats=0)


@pytest.mark.slow
def test_parts_and_the_rest_are_the_whole_step(measured):
    for name, figures in measured["variants"].items():
        parts = figures["parts"]
        assert set(parts) == {*PARTS, "other"}
        assert sum(parts.values()) == pytest.approx(figures["step_seconds"])
        routed = ("router", "dispatch", "combine")
        assert all((parts[part] > 0) == (name != "dense") for part in routed)
        assert all(parts[part] > 0 for part in PARTS if part not in routed)


@pytest.mark.slow
def test_quota_slack_is_the_share_of_empty_slots(measured, slack_config):
    assert measured["variants"]["dense"]["quota_slack"] == 0
    # Quotas of 20 and 20 of a routing group's 32 positions, 16 tokens of each modality: 4 of 5 slots are filled.
    assert measured["variants"]["4t4i"]["quota_slack"] == pytest.approx(0.2)
    flops = cost(dataclasses.replace(slack_config, model=dataclasses.replace(slack_config.model, ffn="4t4i")))
    assert flops["flops_per_token"]["executed"] > flops["flops_per_token"]["train"]


@pytest.mark.slow
def test_the_text_shows_the_variants_and_parts(measured):
    text = bench.format_bench(measured)
    assert all(word in text for word in ("dense", "4t4i", "tokens/s", "of dense", "router", "optimizer", "unknown"))


def test_the_synthetic_batch_keeps_the_quotas_ratio():
    config = tiny()
    batch = step_bench.synthetic_batch(config)
    assert batch.token_BS.shape == (config.train.batch_rows, config.data.sequence)
    image_GT = (np.asarray(batch.token_BS) >= config.data.modalities[0].size).reshape(-1, config.group_tokens)
    assert (image_GT.mean(1) == 0.5).all()


def test_an_update_that_does_not_fit_is_measured_in_fewer_groups(monkeypatch):
    config = tiny(train_batch_rows=64)
    whole = cost(config)["bytes"]
    monkeypatch.setattr(step_bench, "_device_memory", lambda: 1e12)
    assert step_bench.rows_that_fit(config) == 64
    room = (2 * whole["parameters"] + whole["optimizer"] + whole["activations"] / 3) / 0.9
    monkeypatch.setattr(step_bench, "_device_memory", lambda: room)
    rows = step_bench.rows_that_fit(config)
    assert rows < 64 and rows % config.data.group_rows == 0
    assert step_bench.with_rows(config, rows).train.batch_rows == rows


@pytest.mark.slow
def test_ffn_is_compared_with_dense():
    result = bench.bench_ffn("2t2i+1x", width=8, hidden=16, tokens=32, repeats=2)
    assert result["time_over_dense"] == pytest.approx(result["ffn_seconds"] / result["dense_seconds"])
    assert result["relative_to_dense"] == pytest.approx(1 / result["time_over_dense"])
    assert set(result["parts"]) == {"router", "dispatch", "experts", "combine"}
    json.dumps(result)
    assert "dense" in bench.format_bench(result)
    with pytest.raises(InputError, match=r"model\.ffn"):
        bench.bench_ffn("9z", tokens=32)


@pytest.mark.slow
@pytest.mark.parametrize("ffn", ["dense", "1t1i", "2t2i+1x"])
def test_pieces_make_up_the_layer(ffn):
    """Dispatch, experts and combination, one after the other, give the layer's output."""
    case = _half_and_half(ffn, 8, 16, 32)
    x_BSD = jax.random.normal(jax.random.key(0), (1, 32, 8))
    y_GTD, _ = case.whole(x_BSD)()
    values = {name: call()[0] for name, call in case.pieces(x_BSD).items()}
    if ffn == "dense":
        np.testing.assert_allclose(values["experts"], y_GTD, rtol=1e-5)
        return
    assert ("router" in values) == (ffn != "1t1i")
    outputs, shared = values["experts"] if "+" in ffn else (values["experts"], 0)
    y_ND = jnp.zeros((32, 8))
    arguments = (x_BSD, case.tokens, case.keys, {}, weights_of(case.params))
    selections = moe.moe(*arguments, routing=case.routing, model=case.model)[1].selections
    for name, selection in selections.items():
        y_ND = y_ND.at[selection.index_EC[0]].add(outputs[name])
    np.testing.assert_allclose(y_ND[None] + shared, y_GTD, rtol=1e-4, atol=1e-5)


def test_data_counts_real_tokens():
    config = tiny()
    result = bench.bench_data(config, seconds=0.05)
    assert sum(result["tokens"].values()) == pytest.approx(result["fill"] * result["batches"] * config.batch_tokens)
    assert 0 < result["fill"] <= 1 and result["tokens_per_second"] > 0 and result["tokens_per_second_per_core"] > 0
    json.dumps(result)
    assert "tokens/s per core" in bench.format_bench(result) and "host memory" in bench.format_bench(result)
    assert result["host_bytes"] >= 0 and result["host_bytes_bound"]["total"] > 0


def test_data_says_how_to_make_a_missing_store(tmp_path):
    path = str(tmp_path / "nowhere")
    config = tiny(data_kind="store", data_stores=(StoreConfig("scenes", path),))
    with pytest.raises(InputError, match=f"moma prepare SOURCE --out {path}"):
        bench.bench_data(config)


def test_summary_is_median_and_interquartile_range():
    assert summarise([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, pytest.approx(2 / 3))
    assert summarise([2.0]) == (2.0, 0.0)


def test_calls_take_turns_after_a_warm_up():
    order = []
    seconds = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_differentiated_call_runs_both_passes():
    value, (gradient,) = differentiated(lambda x, scale: scale * jnp.sum(x**2), (jnp.arange(3.0),), 2.0)()
    assert value == 10
    np.testing.assert_allclose(gradient / gradient[1], [0, 1, 2])


def test_passes_in_a_loop_take_the_value_as_cotangent():
    value, (gradient,) = differentiated(lambda x, _: x**2, (jnp.arange(3.0),), times=3)()
    np.testing.assert_allclose(value, [0, 1, 4])
    np.testing.assert_allclose(gradient, [0, 2, 16])


@pytest.fixture(scope="module")
def generated():
    """One small `bench_generate` for all tests of it."""
    return bench.bench_generate(tiny(), ("dense", "2t2i+1x"), batch=(1, 4), prompt=8, tokens=6, repeats=2)


@pytest.mark.slow
def test_generate_compares_with_dense(generated):
    assert list(generated["rows"]) == [1, 4] and generated["bandwidth"] > 0
    for variants in generated["rows"].values():
        dense, routed = variants["dense"], variants["2t2i+1x"]
        assert dense["relative_to_dense"] == 1
        speeds = routed["decode_tokens_per_second"] / dense["decode_tokens_per_second"]
        assert routed["relative_to_dense"] == pytest.approx(speeds)
        assert dense["experts_per_token"] == 1 and 0.2 < routed["experts_per_token"] < 1.9
        assert min(figure for v in variants.values() for figure in v.values()) >= 0
    json.dumps(generated)
    text = bench.format_bench(generated)
    assert "experts/token" in text and text.count("dense") >= 2


@pytest.mark.slow
def test_generate_counts_the_bytes_of_a_step(generated):
    config, rows, position = tiny(model_ffn="dense"), 4, 8 + 6 // 2
    d, hidden, layers = config.model.width, config.model.hidden, config.model.layers
    weights = layers * (4 * d * d + 4 * d + 2 * d + 3 * d * hidden) + d + d * config.vocabulary_size
    cache = rows * position * 2 * layers * d
    assert generated["rows"][4]["dense"]["bytes_per_step"] == 4 * (weights + cache)


@pytest.mark.slow
def test_generate_measures_mixture_of_depths():
    config = tiny(model_layers=4)
    figures = bench.bench_generate(config, ("mod+dense", "mod+2t2i"), batch=(2,), prompt=8, tokens=6, repeats=1)
    dense, routed = figures["rows"][2].values()
    assert 0.5 < dense["experts_per_token"] < 1 and 0.1 < routed["experts_per_token"] < 1.4
    d, hidden = config.model.width, config.model.hidden
    layer, whole = 4 * d * d + 4 * d + 2 * d + 3 * d * hidden, 2 * (8 + 6 // 2) * 2 * d
    least = 4 * (d + d * config.vocabulary_size + 2 * (layer + whole + 2 * d))
    assert least < dense["bytes_per_step"] < least + 4 * 2 * (layer + whole)


@pytest.mark.slow
@pytest.mark.parametrize("rule, per_token", [("threshold", None), (TopTwo(), 2.0)])
def test_generate_writes_as_the_routing_rule_decides(rule, per_token):
    config = override(tiny(), {"model.router": rule})
    figures = bench.bench_generate(config, ("2t2i",), batch=(2,), prompt=8, tokens=6, repeats=1)
    assert per_token in (None, figures["rows"][2]["2t2i"]["experts_per_token"])


@pytest.mark.slow
def test_generate_refuses_a_rule_that_decides_nothing_by_itself():
    with pytest.raises(InputError, match="model.router: the model has no causal decision"):
        bench.bench_generate(override(tiny(), {"model.router": first_come}), ("2t2i",), batch=(2,), prompt=8, tokens=6)


@pytest.mark.parametrize("name", ["prompt", "tokens", "repeats", "batch"])
def test_generate_refuses_numbers_that_measure_nothing(name):
    value = (1, 0) if name == "batch" else 0
    with pytest.raises(InputError, match=f"--{name}: 0; give . or more"):
        bench.bench_generate(tiny(), ("dense",), **{name: value})


def test_generate_refuses_modalities_that_it_cannot_write():
    config = tiny()
    alone = dataclasses.replace(config.data, modalities=(dataclasses.replace(config.data.modalities[0], quota=1.0),))
    with pytest.raises(InputError, match="bench generate writes text and one modality with spans"):
        bench.bench_generate(dataclasses.replace(config, data=alone), ("dense",), batch=(1,))


def test_preparing_is_measured_beside_pillow(capsys):
    words = ("--pictures", "40", "--side", "32", "--codes-side", "4", "--repeats", "2")
    code, out, _ = moma(capsys, "bench", "prepare", *words, "--json")
    found = json.loads(out)
    assert code == 0 and found["shape"] == {"pictures": 40, "side": 32, "codes_side": 4}
    rates = [found[name]["pictures_per_processor_second"] for name in ("prepare", "pillow", "pillow_draft")]
    assert found["share_of_pillow"] == pytest.approx(rates[0] / rates[1]) and min(rates) > 0
    assert "Pillow: decode, resize" in moma(capsys, "bench", "prepare", *words)[1]
    with pytest.raises(InputError, match="--pictures: 0; give 1 or more"):
        bench.bench_prepare(pictures=0)


def test_codecs_are_measured_both_ways(capsys, tmp_path):
    write_codec(str(tmp_path), small_codec())
    code, out, _ = moma(capsys, "bench", "codec", tmp_path, "--pictures", "3", "--repeats", "2", "--json")
    found = json.loads(out)
    assert code == 0 and found["shape"]["codes_per_image"] == 64
    assert all(found[name]["pictures_per_second"] > 0 for name in ("encode", "decode"))
    blind = bench.bench_codec(small_codec(decoder=False), pictures=1, repeats=1)
    assert blind["decode"] is None and "decode" in bench.format_bench(blind)
    with pytest.raises(InputError, match="--pictures: 0; give 1 or more"):
        bench.bench_codec(small_codec(), pictures=0)
