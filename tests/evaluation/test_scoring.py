"""Scores of documents under causal routings, against plain sums over one row by itself."""

import dataclasses

import jax
import numpy as np
import pytest
from tiers import long_but
from tiny import tiny

from moma_jax import load, train
from moma_jax.errors import InputError
from moma_jax.evaluation import scoring
from moma_jax.evaluation.scoring import Scorer
from moma_jax.model.decoder import causal_decoder

ROUTINGS = ("causal", "threshold")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model with experts, auxiliary routers and thresholds, of strong opinions, so that a wrong position shows."""
    config = tiny(tmp_path_factory.mktemp("run"), router_auxiliary=True, train_steps=2)
    train(config, quiet=True)
    model = load(config.run.dir)
    kernel_DV = model.params["unembedding"]["kernel_DV"] * 3
    return dataclasses.replace(model, params={**model.params, "unembedding": {"kernel_DV": kernel_DV}})


def documents(lengths, vocabulary):
    """Random ids of text, of pictures, and of both: whatever mixture, every token finds its experts."""
    random = np.random.default_rng(0)
    image = vocabulary.modalities[1].code_ids
    spans = [np.arange(4, 40), image, np.arange(vocabulary.size)]
    return [random.choice(spans[n % 3], length).astype(np.int32) for n, length in enumerate(lengths)]


def plain(loaded, routing, row):
    """(nats, greedy) of one document: a row and a group by itself, nothing padded, float64 logits."""
    data = dataclasses.replace(loaded.config.data, group_rows=1)
    decoder = causal_decoder(dataclasses.replace(loaded.config, data=data), routing)
    token_BS = row[None, :-1]
    output = decoder.apply(
        {"params": loaded.params},
        token_BS,
        np.ones_like(token_BS),
        np.arange(token_BS.shape[1])[None],
        loaded.vocabulary.modality_V[token_BS],
        key=jax.random.key(1),
        routing_state=loaded.routing_state,
    )
    logit_SV = np.asarray(output.hidden_BSD[0], np.float64) @ np.asarray(loaded.params["unembedding"]["kernel_DV"])
    log_SV = logit_SV - np.log(np.exp(logit_SV).sum(-1, keepdims=True))
    return -log_SV[np.arange(len(row) - 1), row[1:]], log_SV.argmax(-1) == row[1:]


@pytest.mark.parametrize("routing", long_but("threshold", of=ROUTINGS))
def test_scores_are_those_of_a_document_by_itself(loaded, routing, monkeypatch):
    monkeypatch.setattr(scoring, "BUCKET", 8)
    rows = documents([17, 3, 9, 12], loaded.vocabulary)
    scores = Scorer(loaded, routing, batch_rows=3)(rows)
    for row, scored in zip(rows, scores, strict=True):
        nats_N, greedy_N = plain(loaded, routing, row)
        np.testing.assert_allclose(scored.nats_N, nats_N, rtol=1e-4, atol=1e-4)
        assert scored.nats_N.dtype == np.float32 and np.array_equal(scored.greedy_N, greedy_N)


@pytest.mark.parametrize("routing", long_but("threshold", of=ROUTINGS))
def test_the_likeliest_token_is_greedy(loaded, routing):
    row = documents([6], loaded.vocabulary)[0]
    scorer = Scorer(loaded, routing)
    everything = [np.append(row, token).astype(np.int32) for token in range(loaded.vocabulary.size)]
    scores = scorer(everything)
    nats_V = np.array([scored.nats_N[-1] for scored in scores])
    np.testing.assert_allclose(np.exp(-nats_V).sum(), 1, rtol=1e-5)
    assert [n for n, scored in enumerate(scores) if scored.greedy_N[-1]] == [nats_V.argmin()]


def test_a_document_of_one_id_has_no_scores(loaded):
    [scored] = Scorer(loaded, "causal")([np.array([0])])
    assert scored.nats_N.shape == scored.greedy_N.shape == (0,)
    assert Scorer(loaded, "causal")([]) == []


def test_the_chunk_of_logits_changes_nothing(loaded):
    rows = documents([17, 11], loaded.vocabulary)
    train_config = dataclasses.replace(loaded.config.train, loss_chunk=3)
    small = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, train=train_config))
    for a, b in zip(Scorer(loaded, "causal")(rows), Scorer(small, "causal")(rows), strict=True):
        np.testing.assert_allclose(a.nats_N, b.nats_N, rtol=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [([], "no list of at least one id"), ([0] * 18, "has 18 ids; .* of 16 allows 17"), ([64], "not below .* 64")],
)
def test_documents_that_cannot_be_scored(loaded, row, message):
    with pytest.raises(InputError, match=message):
        Scorer(loaded, "causal")([np.array(row)])


def test_what_gives_no_likelihoods_is_refused(loaded, tmp_path):
    for routing, message in [("choice", "sees the future"), ("chance", "'chance' is none of")]:
        with pytest.raises(InputError, match=message):
            Scorer(loaded, routing)
    with pytest.raises(InputError, match="batch_size: 0"):
        Scorer(loaded, "causal", batch_rows=0)
    train(tiny(tmp_path, train_steps=1), quiet=True)
    with pytest.raises(InputError, match="routers fit"):
        Scorer(load(str(tmp_path)), "causal")
