"""Held-out evaluation under several routings, and the unigram baseline."""

import contextlib
import dataclasses
import json
import shutil

import jax
import numpy as np
import oracles
import pytest
from lettered import packed
from runs import my_choice
from tiny import tiny
from top_two import TopTwo

from moma_jax import evaluate, load, sharding
from moma_jax.batch import Packed
from moma_jax.config import EvalSet, MeshConfig
from moma_jax.config_json import to_json
from moma_jax.data.stream import open_stream
from moma_jax.errors import InputError
from moma_jax.evaluation import evaluate as evaluate_lib
from moma_jax.evaluation.evaluate import Evaluator, gap_percent, held_out, scheduled, unigram
from moma_jax.evaluation.tables import uncalibrated
from moma_jax.model.decoder import causal_decoder, first_routing_state
from moma_jax.training.pretrain import train
from moma_jax.training.step import create_state, make_program
from moma_jax.vocab import contiguous

MEASURES = ("", "_text", "_image", "_image_given_text", "_text_given_image", "_interleaved")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = tiny(tmp_path_factory.mktemp("run"), train_steps=2)
    return config, train(config, quiet=True)


def test_evaluating_a_run_again_gives_its_figures(run):
    config, summary = run
    result = evaluate(config.run.dir)
    assert timeless(result) == timeless(summary["eval"]["heldout"]) == timeless(evaluate(config))
    assert list(result) == ["choice", "threshold", "gap_percent", "unigram"]
    figures = {f"{what}{measure}" for what in ("loss", "tokens") for measure in MEASURES}
    costs = {"experts_per_token", "experts_per_token_text", "experts_per_token_image", "seconds"}
    assert set(result["unigram"]) == figures and set(result["choice"]) == figures | costs
    assert set(result["threshold"]) == figures | costs | {f"perplexity{measure}" for measure in MEASURES}
    assert len({result[name]["tokens"] for name in ("choice", "threshold", "unigram")}) == 1
    assert all(result[name]["seconds"] > 0 for name in ("choice", "threshold"))
    assert result["choice"]["experts_per_token"] == 1, "two experts, each of half"
    assert 0 < result["threshold"]["experts_per_token"] < 2
    parts = [result["threshold"][f"experts_per_token_{name}"] for name in ("text", "image")]
    assert sum(parts) == pytest.approx(result["threshold"]["experts_per_token"]) and min(parts) > 0
    json.dumps(result, allow_nan=False)


def test_thresholds_that_let_in_too_few_or_too_many_are_named():
    figures = lambda text, image: {"experts_per_token_text": text, "experts_per_token_even_image": image}  # noqa: E731
    result = {"choice": figures(0.5, 0.2), "threshold": figures(0.42, 0.02)}
    (line,) = uncalibrated(result)
    assert line.startswith("thresholds let 0.10 of the tokens enter experts even image that choice does; set them by")
    assert not uncalibrated({"choice": figures(0.5, 0.2)}) and not uncalibrated({"threshold": figures(0.5, 0.2)})
    assert len(uncalibrated(result | {"threshold": figures(0.63, 0.2)})) == 1


def timeless(result):
    """A result without what clocks say."""
    return {name: {k: v for k, v in figures.items() if k != "seconds"} for name, figures in result.items()}


def test_the_gap_is_the_share_by_which_causal_losses_lie_higher(run):
    result = evaluate(run[0].run.dir, routing=("choice", "threshold"))
    assert list(result["gap_percent"]) == ["threshold"]
    gap, choice, threshold = result["gap_percent"]["threshold"], result["choice"], result["threshold"]
    for measure in ("", "_text", "_image"):
        assert gap[f"loss{measure}"] == pytest.approx(
            100 * (threshold[f"loss{measure}"] - choice[f"loss{measure}"]) / choice[f"loss{measure}"]
        )
        assert threshold[f"perplexity{measure}"] == pytest.approx(np.exp(threshold[f"loss{measure}"]))
    assert gap["loss_interleaved"] is None and threshold["perplexity_interleaved"] is None
    assert gap_percent({"choice": {"loss": 2.0, "tokens": 3}, "causal": {"loss": 2.1, "tokens": 3}}) == {
        "causal": {"loss": pytest.approx(5.0)}
    }
    assert evaluate(run[0].run.dir, routing=("threshold",))["gap_percent"] == {}


@pytest.mark.slow
def test_what_cannot_see_the_future_has_a_perplexity_and_no_gap(tmp_path):
    config = tiny(tmp_path, train_steps=1, model_ffn="1t1i")
    assert list(train(config, quiet=True)["eval"]["heldout"]) == ["choice", "gap_percent", "unigram"]
    result = evaluate(str(tmp_path))
    assert list(result) == ["choice", "causal", "threshold", "gap_percent", "unigram"]
    assert result["choice"]["perplexity"] == pytest.approx(np.exp(result["choice"]["loss"]))
    for routing in ("causal", "threshold"):
        assert result["gap_percent"][routing]["loss"] == pytest.approx(0, abs=1e-3)
        assert result[routing]["experts_per_token"] == result["choice"]["experts_per_token"] == 1


@pytest.mark.slow
def test_a_run_with_a_select_function_of_its_own_has_choice_alone(tmp_path):
    state = {name: {"calls": np.zeros(2, np.float32)} for name in ("text", "image")}
    config = tiny(tmp_path / "a", train_steps=1)
    summary = train(config, select=my_choice, routing_state=state, quiet=True)
    assert list(summary["eval"]["heldout"]) == ["choice", "gap_percent", "unigram"]
    assert "perplexity" not in evaluate(config, router=my_choice)["choice"]
    with pytest.raises(InputError, match="no causal decision"):
        evaluate(config, router=my_choice, routing=("threshold",))
    with pytest.raises(InputError, match=r"train.eval_routings: threshold cannot be, .* leave it out"):
        train(tiny(tmp_path / "b", train_eval_routings=("threshold",)), select=my_choice, routing_state=state)
    assert not (tmp_path / "b" / "metrics.jsonl").exists()


def test_a_run_is_evaluated_under_the_routings_that_it_names():
    def names(state=True, **fields):
        config = tiny(**fields)
        program = make_program(config)
        return list(scheduled(program, first_routing_state(config) if state else {}))

    assert names() == ["choice", "threshold"] and names(state=False) == ["choice"]
    assert names(router_auxiliary=True) == ["choice", "causal", "threshold"]
    assert names(train_eval_routings=("threshold",)) == ["threshold"]
    assert names(model_ffn="dense") == ["choice"] == names(model_ffn="1t1i")
    assert names(model_ffn="dense", train_eval_routings=("causal", "choice")) == ["causal", "choice"]


def test_a_loaded_model_is_ready_to_use(run):
    loaded = load(run[0].run.dir)
    assert loaded.step == 2 and loaded.vocabulary == contiguous(loaded.config.data.modalities)
    batch = next(iter(open_stream(loaded.config))).batch
    output = loaded.decoder.apply(
        {"params": loaded.params},
        batch.token_BS,
        batch.segment_BS,
        batch.position_BS,
        loaded.vocabulary.modality_V[batch.token_BS],
        key=jax.random.key(0),
    )
    assert output.hidden_BSD.shape == (8, 16, 16) and np.isfinite(output.hidden_BSD).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"routing": ("choice", "causal")}, "routing: .* has no auxiliary routers; fit them with: moma routers fit"),
        ({"routing": ("future",)}, "routing: 'future' is none of choice, causal, threshold"),
        ({"eval_set": "other"}, "other.*heldout"),
        ({"step": 1}, "no checkpoint of step 1; it has: 2"),
        ({"router": lambda *a: None}, "trained with choice, not "),
    ],
)
def test_wrong_questions_are_input_errors(run, arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate(run[0].run.dir, **arguments)


def test_a_run_of_other_devices_can_be_evaluated(run, tmp_path):
    path = shutil.copytree(run[0].run.dir, tmp_path / "copy")
    config = dataclasses.replace(run[0], mesh=MeshConfig(data=64))
    (path / "config.json").write_text(json.dumps(to_json(config)))
    assert timeless(evaluate(str(path))) == timeless(run[1]["eval"]["heldout"])


def test_no_run_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        evaluate(str(tmp_path))


def test_held_out_rows_are_weighed_once_whatever_the_batches():
    eval_set = EvalSet(rows=6, seed=3)
    one = [packed.batch for packed in held_out(tiny(train_batch_rows=2), eval_set)]
    wide = [packed.batch for packed in held_out(tiny(train_batch_rows=8), eval_set, devices=4)]
    assert len(one) == 3 and len(wide) == 1 and len(wide[0].token_BS) == 8
    assert not wide[0].weight_BS[6:].any() and wide[0].weight_BS[:6].any()


def test_what_a_rule_records_is_a_mean_over_the_routing_groups_that_have_tokens():
    figures = []
    for rows in (2, 4, 8):  # six rows are three batches of one group, two of two, one of three groups and padding
        rule = {"model_ffn": "4t4i", "model_router": TopTwo(top=1, slack=1.0)}
        config = tiny(train_batch_rows=rows, train_eval_sets=(EvalSet(rows=6, seed=3),), **rule)
        program, state = make_program(config), first_routing_state(config)
        with sharding.use_mesh(program.mesh):
            evaluator = Evaluator(program, contiguous(config.data.modalities), scheduled(program, state))
            evaluated = evaluator(create_state(program, state).params, state, config.train.eval_sets[0])
        figures.append({name: value for name, value in evaluated["training"].items() if name.startswith("routing_")})
    assert set(figures[0]) == {"routing_token_drop_text", "routing_token_drop_image"}
    assert all(0 < value < 1 for value in figures[0].values()), figures
    for other in figures[1:]:
        assert other == pytest.approx(figures[0], rel=1e-5)


def test_unigram_losses_are_those_of_smoothed_frequencies():
    config = tiny(train_steps=3)
    vocabulary = contiguous(config.data.modalities)
    eval_set = dataclasses.replace(config.train.eval_sets[0], rows=8)
    result = unigram(config, vocabulary, eval_set)
    seen = [p.batch for _, p in zip(range(3), open_stream(config), strict=False)]
    counts = dict.fromkeys(range(vocabulary.size), 1)
    for batch in seen:
        for target, weight in zip(batch.target_BS.flat, batch.weight_BS.flat, strict=True):
            counts[int(target)] += weight > 0
    nats = {0: [], 1: []}
    for batch in (each.batch for each in held_out(config, eval_set)):
        for target, weight in zip(batch.target_BS.flat, batch.weight_BS.flat, strict=True):
            if weight:
                nats[int(vocabulary.modality_V[target])].append(-np.log(counts[int(target)] / sum(counts.values())))
    np.testing.assert_allclose(result["loss_text"], np.mean(nats[0]))
    np.testing.assert_allclose(result["loss_image"], np.mean(nats[1]))
    np.testing.assert_allclose(result["loss"], np.mean(nats[0] + nats[1]))
    assert result["tokens"] == len(nats[0]) + len(nats[1])


# Causal evaluation is exact -------------------------------------------------------------------------------------------

DOCUMENTS = [
    # Text alone, codes alone (both far beyond the quotas of half a routing group), pairs, stories, pieces.
    [["<tttttttttttttt>"], ["<ttttttt>", "ttttttt|t"]],
    [["cccccccccccccccc"], ["cccccccccccc|c"]],
    [["<tt[cccc]>", "<tttt>"], ["<[cccc]tt>", "t[cccc|c"]],
    [["<t[cccc]t[cccc]>"], ["<tt[cccc]|t"]],
]
CONFIG = tiny(model_ffn="2t2i+1x", router_auxiliary=True, train_batch_rows=8)
VOCABULARY = contiguous(CONFIG.data.modalities)


def batch_of(rows):
    """A batch of documents, codes and words drawn at random."""
    batch = packed(rows, VOCABULARY, CONFIG.data.sequence)
    rng = np.random.default_rng(7)
    token_BS, target_BS = np.array(batch.token_BS), np.array(batch.target_BS)
    for letter, low, high in ((20, 10, 40), (40, 40, 64)):
        # Equal tokens stay equal wherever they stand, so that documents do not depend on their rows.
        draw = rng.permutation(np.arange(low, high))[:16]
        for drawn, where in ((token_BS, batch.position_BS), (target_BS, batch.position_BS + 1)):
            drawn[...] = np.where(drawn == letter, draw[where % 16], drawn)
    return batch._replace(token_BS=token_BS, target_BS=target_BS)


def random_model():
    """Parameters and thresholds, away from their first values."""
    program, state = make_program(CONFIG), first_routing_state(CONFIG)
    with sharding.use_mesh(program.mesh):
        params = jax.device_get(create_state(program, state).params)
    rng = np.random.default_rng(3)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: rng.normal(0, 0.4, x.shape).astype(np.float32) if "out_AE" in str(path) else x, params
    )
    for group in state.values():
        group["threshold_E"] = rng.normal(0, 0.5, group["threshold_E"].shape).astype(np.float32)
    return program, params, state


def rms(x_SD, scale_D):
    return x_SD / np.sqrt(np.square(x_SD).mean(-1, keepdims=True) + CONFIG.model.norm_epsilon) * scale_D


def swiglu(x_SD, weights, e):
    gate_SF, up_SF = x_SD @ weights["gate_EDF"][e], x_SD @ weights["up_EDF"][e]
    return (gate_SF * oracles.sigmoid(gate_SF) * up_SF) @ weights["down_EFD"][e]


def naive_ffn(x_SD, modality_S, ffn, state, layer, routing):
    """(y_SD, experts entered): every expert on every token, times its gate where the token enters."""
    y_SD, entered = swiglu(x_SD, ffn["shared"], 0), 0
    for m, name in enumerate(("text", "image")):
        logit_SE = x_SD @ ffn[name]["router_DE"]
        predictor = ffn[f"{name}_auxiliary"]
        inner_SA = x_SD @ predictor["in_DA"]
        predicted_SE = (inner_SA * oracles.sigmoid(inner_SA)) @ predictor["out_AE"]
        threshold_E = state[name]["threshold_E"][layer]
        enters_SE = predicted_SE > 0 if routing == "causal" else logit_SE >= threshold_E
        enters_SE = enters_SE & (modality_S == m)[:, None]
        entered += enters_SE.sum()
        for e in range(2):
            y_SD = y_SD + (enters_SE * oracles.sigmoid(logit_SE))[:, e : e + 1] * swiglu(x_SD, ffn[name], e)
    return y_SD, entered


def naive(params, state, batch, routing):
    """(nats_BS, experts per token) of a batch, row by row, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    nats_BS, entered, modality_V = np.zeros(batch.token_BS.shape), 0, VOCABULARY.modality_V
    for b, row in enumerate(zip(*batch, strict=True)):
        token_S, target_S, segment_S, position_S, *_ = row
        modality_S = np.where(segment_S > 0, modality_V[token_S], -1)
        x_SD = params["embedding"]["kernel_VD"][token_S]
        for layer in range(CONFIG.model.layers):
            own = jax.tree.map(lambda x, layer=layer: x[layer], params["layers"])
            y_SD = oracles.attention(x_SD, segment_S, position_S, own["attention"])
            x_SD = x_SD + rms(y_SD, own["attention_norm"]["scale_D"])
            y_SD, more = naive_ffn(x_SD, modality_S, own["ffn"], state, layer, routing)
            x_SD, entered = x_SD + rms(y_SD, own["ffn_norm"]["scale_D"]), entered + more
        logit_SV = rms(x_SD, params["final_norm"]["scale_D"]) @ params["unembedding"]["kernel_DV"]
        nats_BS[b] = np.log(np.exp(logit_SV).sum(-1)) - logit_SV[np.arange(len(token_S)), target_S]
    return nats_BS, entered / ((batch.segment_BS > 0).sum() * CONFIG.model.layers)


def by_document(batch, nats_BS):
    """The losses, from a walk over documents and their targets."""
    found = {measure: [] for measure in MEASURES}
    for b, segment_S in enumerate(batch.segment_BS):
        for number in range(1, segment_S.max() + 1):
            at = np.flatnonzero(segment_S == number)
            words = "".join("tc"[int(token >= 40)] if token > 5 else "<.>.[]"[token] for token in batch.token_BS[b, at])
            for s in at:
                if batch.weight_BS[b, s] == 0:
                    continue
                image, spans = batch.target_BS[b, s] >= 40, words.count("[")
                pair = spans == 1 and words[0] == "<" and words[-1] == ">"
                names = ["", "_image" if image else "_text"]
                if pair and words[1] != "[" and words.endswith("]>") and image:
                    names.append("_image_given_text")
                if pair and words[1] == "[" and words[-2] == "t" and s - at[0] >= words.index("]"):
                    names.append("_text_given_image")
                if words[0] == "<" and spans >= 2:
                    names.append("_interleaved")
                for name in names:
                    found[name].append(nats_BS[b, s])
    return found


@pytest.fixture(scope="module")
def model():
    program, params, state = random_model()
    decoders = {name: causal_decoder(CONFIG, name) for name in ("causal", "threshold")}
    return program, params, state, Evaluator(program, VOCABULARY, decoders)


@contextlib.contextmanager
def rows_held_out(monkeypatch, batches):
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_lib, "held_out", lambda *_: (Packed(batch, {}) for batch in batches))
        yield


def test_causal_losses_are_those_of_dense_masks_whatever_the_documents(model, monkeypatch):
    program, params, state, evaluator = model
    packed_rows = batch_of([row for group in DOCUMENTS for row in group])
    alone = [[words] for group in DOCUMENTS for row in group for words in row]
    alone += [[] for _ in range(-len(alone) % 8)]
    for batches in ([packed_rows], [batch_of(alone[i : i + 8]) for i in range(0, len(alone), 8)]):
        with rows_held_out(monkeypatch, batches), sharding.use_mesh(program.mesh):
            results = evaluator(params, state, EvalSet())
        for routing in ("causal", "threshold"):
            nats_BS, entered = naive(params, state, packed_rows, routing)
            for measure, nats in by_document(packed_rows, nats_BS).items():
                assert results[routing][f"tokens{measure}"] == len(nats) > 0
                assert results[routing][f"loss{measure}"] == pytest.approx(np.mean(nats), rel=1e-5)
            assert results[routing]["experts_per_token"] == pytest.approx(entered) and 0.3 < entered < 1.7
    assert results["causal"]["loss"] != pytest.approx(results["threshold"]["loss"], rel=1e-4)
