"""Generation on the real decoder, tiny and with random weights: what is written is what whole forward passes say."""

import functools

import jax
import numpy as np
import pytest
from tiers import long_but
from tiny import tiny

from moma_jax import load
from moma_jax.errors import InputError
from moma_jax.generation import Guidance, Sampling, generate_ids
from moma_jax.generation.generating import causal_routing, generator_of
from moma_jax.training.pretrain import train

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[0], [0, 9, 30, 12], [0, 4, 41, 50, 63, 40, 5, 20], [0, 17]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    config = tiny(tmp_path_factory.mktemp("run"), train_steps=2, router_auxiliary=True)
    train(config, quiet=True)
    return load(config.run.dir)


@functools.cache
def forward(decoder):
    return jax.jit(decoder.apply)


def whole_logits(loaded, routing, ids):
    """Logits after each token, (S, V), by the training decoder on a row of one document."""
    sequence = loaded.config.data.sequence
    token_BS = np.ones((2, sequence), np.int32)
    token_BS[0, : len(ids)] = ids
    segment_BS = np.zeros_like(token_BS)
    segment_BS[0, : len(ids)] = 1
    position_BS = np.broadcast_to(np.arange(sequence), token_BS.shape)
    arguments = (token_BS, segment_BS, position_BS, loaded.vocabulary.modality_V[token_BS])
    variables, given = {"params": loaded.params}, {"key": jax.random.key(0), "routing_state": loaded.routing_state}
    output = forward(loaded.under(routing))(variables, *arguments, **given)
    return np.asarray(output.hidden_BSD[0] @ loaded.params["unembedding"]["kernel_DV"])


@pytest.mark.parametrize("routing", long_but("threshold", of=["causal", "threshold"]))
def test_greedy_tokens_are_the_best_of_whole_forward_passes(loaded, routing):
    outputs = generate_ids(loaded, PROMPTS, routing=routing, text=GREEDY, image=GREEDY)
    vocabulary, codes = loaded.vocabulary, 0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = [*prompt, *output.ids]
        assert output.prompt_tokens == len(prompt) and len(ids) <= 16
        logit_SV = whole_logits(loaded, routing, ids)
        for position, token in enumerate(output.ids, len(prompt)):
            logit_V = logit_SV[position - 1]
            if vocabulary.modality_V[token] == 1:
                rivals, codes = vocabulary.modalities[1].code_ids, codes + 1
            elif token == vocabulary.modalities[1].end:
                continue
            else:  # begin marks too, where there is room; they are not counted here
                rivals = np.array([2, *range(6, 40)])
            assert logit_V[token] >= logit_V[rivals].max() - 1e-4


@pytest.mark.parametrize("routing", long_but("threshold", of=["causal", "threshold"]))
def test_guided_codes_are_the_best_of_three_forward_passes(loaded, routing):
    guidance, image = Guidance(2.0, 1.5), loaded.vocabulary.modalities[1]
    outputs = generate_ids(loaded, PROMPTS, routing=routing, mode="image", image=GREEDY, guidance=guidance)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert len(output.ids) == 6 and output.ids[0] == image.begin and output.ids[5] == image.end
        pictures = [i for i in prompt if i in (0, image.begin, image.end) or i >= 40]
        full, kept, none = (
            whole_logits(loaded, routing, [*context, *output.ids])[len(context) : len(context) + 4, image.code_ids]
            for context in (prompt, pictures, [0])
        )
        mixed = none + 1.5 * (kept - none) + 2.0 * (full - kept)
        chosen = np.take_along_axis(mixed, np.asarray(output.ids[1:5])[:, None] - 40, axis=1)[:, 0]
        assert np.all(chosen >= mixed.max(-1) - 1e-3)
    plain = generate_ids(loaded, PROMPTS, routing=routing, mode="image", image=GREEDY)
    assert any(a.ids.tolist() != b.ids.tolist() for a, b in zip(plain, outputs, strict=True)), "guidance does something"


@pytest.mark.slow
def test_both_routings_read_the_same_weights(loaded):
    for routing in ("causal", "threshold"):
        generate_ids(loaded, [[0]], routing=routing, max_tokens=2)
    first, second = (writer._model.weights for writer in generator_of(loaded)._writers.values())
    assert first is second


def test_a_row_alone_writes_the_same(loaded):
    together = generate_ids(loaded, PROMPTS, seed=3)
    for prompt, output in zip(PROMPTS, together, strict=True):
        (alone,) = generate_ids(loaded, [prompt], seed=output.seed)
        assert alone.ids.tolist() == output.ids.tolist()


@pytest.mark.slow
def test_routings_that_a_run_lacks(tmp_path):
    config = tiny(tmp_path, train_steps=1)
    train(config, quiet=True)
    model = load(config.run.dir)
    with pytest.raises(InputError, match="moma routers fit"):
        generate_ids(model, [[0]], routing="causal")
    assert causal_routing(model) == "threshold", "what it has is taken where none is named"
    own, named = (generate_ids(model, PROMPTS, seed=1, **routing) for routing in ({}, {"routing": "threshold"}))
    assert [o.ids.tolist() for o in own] == [o.ids.tolist() for o in named]
    with pytest.raises(InputError, match="'best' is none of"):
        generate_ids(load(config.run.dir), [[0]], routing="best")


def test_a_dense_model_needs_no_routing(tmp_path):
    config = tiny(tmp_path, train_steps=1, model_ffn="dense")
    train(config, quiet=True)
    model = load(config.run.dir)
    causal, threshold = (generate_ids(model, PROMPTS, routing=r, seed=1) for r in ("causal", "threshold"))
    assert [o.ids.tolist() for o in causal] == [o.ids.tolist() for o in threshold]
