"""Held-out evaluation and the unigram baseline."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from tiny import tiny

from moma_jax import evaluate, load
from moma_jax.config import EvalSet, MeshConfig
from moma_jax.config_json import to_json
from moma_jax.data.stream import open_stream
from moma_jax.errors import InputError
from moma_jax.training import objective
from moma_jax.training.evaluate import _result, held_out, unigram
from moma_jax.training.loop import train
from moma_jax.vocab import contiguous


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = tiny(tmp_path_factory.mktemp("run"), train_steps=2)
    return config, train(config, quiet=True)


def test_evaluating_a_run_again_gives_its_figures(run):
    config, summary = run
    result = evaluate(config.run.dir)
    assert result == summary["eval"]["heldout"] == evaluate(config)
    assert set(result) == {"choice", "unigram"}
    for losses in result.values():
        assert set(losses) == {"loss", "loss_text", "loss_image", "tokens"}
    assert result["choice"]["tokens"] == result["unigram"]["tokens"] > 0
    json.dumps(result, allow_nan=False)


def test_a_loaded_model_is_ready_to_use(run):
    loaded = load(run[0].run.dir)
    assert loaded.step == 2 and loaded.vocabulary == contiguous(loaded.config.data.modalities)
    batch = next(iter(open_stream(loaded.config))).batch
    import jax

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
        ({"routing": ("threshold",)}, "threshold.*use choice"),
        ({"eval_set": "other"}, "other.*heldout"),
        ({"step": 1}, "no checkpoint of step 1; it has: 2"),
        ({"select": lambda *a: None}, "trained with the select function expert_choice"),
    ],
)
def test_wrong_questions_are_input_errors(run, arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate(run[0].run.dir, **arguments)


def test_a_run_of_other_devices_can_be_evaluated(run, tmp_path):
    path = shutil.copytree(run[0].run.dir, tmp_path / "copy")
    config = dataclasses.replace(run[0], mesh=MeshConfig(data=64))
    (path / "config.json").write_text(json.dumps(to_json(config)))
    assert evaluate(str(path)) == run[1]["eval"]["heldout"]


def test_a_modality_without_targets_has_no_loss(run):
    result = _result(objective.Sums(np.array([4.0, 0.0]), np.array([2.0, 0.0]), 0.0), run[0])
    assert result == {"loss": 2.0, "loss_text": 2.0, "loss_image": None, "tokens": 2}


def test_no_run_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        evaluate(str(tmp_path))


def test_held_out_rows_are_weighed_once_whatever_the_batches():
    eval_set = EvalSet(rows=6, seed=3)
    one = list(held_out(tiny(train_batch_rows=2), eval_set))
    wide = list(held_out(tiny(train_batch_rows=8), eval_set, devices=4))
    assert len(one) == 3 and len(wide) == 1 and len(wide[0].token_BS) == 8
    assert not wide[0].weight_BS[6:].any() and wide[0].weight_BS[:6].any()


def test_unigram_losses_are_those_of_smoothed_frequencies():
    config = tiny(train_steps=3)
    vocabulary = contiguous(config.data.modalities)
    eval_set = dataclasses.replace(config.train.eval_sets[0], rows=8)
    result = unigram(config, vocabulary.modality_V, eval_set)
    seen = [p.batch for _, p in zip(range(3), open_stream(config), strict=False)]
    counts = dict.fromkeys(range(vocabulary.size), 1)
    for batch in seen:
        for target, weight in zip(batch.target_BS.flat, batch.weight_BS.flat, strict=True):
            counts[int(target)] += weight > 0
    nats = {0: [], 1: []}
    for batch in held_out(config, eval_set):
        for target, weight in zip(batch.target_BS.flat, batch.weight_BS.flat, strict=True):
            if weight:
                nats[int(vocabulary.modality_V[target])].append(-np.log(counts[int(target)] / sum(counts.values())))
    np.testing.assert_allclose(result["loss_text"], np.mean(nats[0]))
    np.testing.assert_allclose(result["loss_image"], np.mean(nats[1]))
    np.testing.assert_allclose(result["loss"], np.mean(nats[0] + nats[1]))
    assert result["tokens"] == len(nats[0]) + len(nats[1])
