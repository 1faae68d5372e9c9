"""Under causal routing no later token changes an earlier logit, exactly; under expert choice one does."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rival_rules import RIVALS
from tiers import long_but
from tiny import MODALITIES, tiny

from moma_jax import load, sharding, train
from moma_jax.by_token import ByToken
from moma_jax.config import Modality
from moma_jax.data.stream import open_stream
from moma_jax.model.decoder import causal_decoder, first_routing_state
from moma_jax.routers.choice import Choice
from moma_jax.routers.threshold import Threshold
from moma_jax.training.step import create_state, make_program
from moma_jax.vocab import contiguous

AUDIO = Modality("audio", "a", size=8, span=2, quota=0.25)
THREE = (MODALITIES[0], dataclasses.replace(MODALITIES[1], quota=0.25), AUDIO)
MODELS = {
    "2t2i": MODALITIES,
    "4x": MODALITIES,
    "2t2i+1x": MODALITIES,
    "2t2i2a": THREE,
    "mod+2t2i": MODALITIES,
    "mod+dense": MODALITIES,
}
CHANGES = 24


def logits_of(decoder, params, routing_state, batch, modality_V):
    """A compiled function token_BS -> (logits_BSV, the routing state after it)."""
    modality_V = jnp.asarray(modality_V, jnp.int32)

    @jax.jit
    def run(token_BS):
        places = (batch.segment_BS, batch.position_BS, modality_V[token_BS])
        variables = {"params": params}
        output = decoder.apply(variables, token_BS, *places, key=jax.random.key(0), routing_state=routing_state)
        return output.hidden_BSD @ params["unembedding"]["kernel_DV"], output.routing_state

    return run


def broken(run, batch, vocabulary):
    """How many of some changes of one token each change an earlier logit of any row.

    That none changes anything at all would prove nothing, so it is looked at here.
    """
    rng = np.random.default_rng(0)
    before_BSV, found, felt = np.asarray(run(batch.token_BS)[0]), 0, 0
    for _ in range(CHANGES):
        row, at = rng.integers(batch.token_BS.shape[0]), rng.integers(1, batch.token_BS.shape[1])
        token_BS = np.array(batch.token_BS)
        token_BS[row, at] = (token_BS[row, at] + rng.integers(1, vocabulary.size)) % vocabulary.size
        after_BSV = np.asarray(run(token_BS)[0])
        found += not np.array_equal(after_BSV[:, :at], before_BSV[:, :at])
        felt += not np.array_equal(after_BSV[row, at], before_BSV[row, at])
    assert felt > CHANGES / 2
    return found


@cache
def random_model(ffn):
    """Program, vocabulary, parameters whose auxiliary routers say something, a batch, thresholds of one update."""
    config = tiny(model_ffn=ffn, model_router=Choice(auxiliary=True), data_modalities=MODELS[ffn])
    vocabulary = contiguous(config.data.modalities)
    program, first = make_program(config), first_routing_state(config)
    params = create_state(program, first).params
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 0.5 * jax.random.normal(jax.random.key(2), x.shape) if "out_AE" in str(path) else x, params
    )
    batch = next(iter(open_stream(config))).batch
    assert batch.segment_BS.max() > 1, "documents are packed"
    assert all(vocabulary.modality_V[row].any() for row in batch.token_BS), "every row has an image"
    return program, vocabulary, params, batch, logits_of(program.decoder, params, first, batch, vocabulary.modality_V)


def changed(ffn, decoder_of, shift=0.0):
    """(`broken`, the state of the routing afterwards) of a random model under the decoder decoder_of(program)."""
    program, vocabulary, params, batch, choice = random_model(ffn)
    state = choice(batch.token_BS)[1]
    state = {name: group | {"threshold_E": group["threshold_E"] + shift} for name, group in state.items()}
    run = logits_of(decoder_of(program), params, state, batch, vocabulary.modality_V)
    return broken(run, batch, vocabulary), run(batch.token_BS)[1]


@pytest.mark.parametrize("ffn", long_but("2t2i+1x", "mod+2t2i", of=list(MODELS)))
@pytest.mark.parametrize("routing", ["causal", "threshold"])
def test_no_later_token_changes_an_earlier_logit(ffn, routing):
    assert changed(ffn, lambda program: causal_decoder(program.config, routing))[0] == 0


@pytest.mark.parametrize("ffn", long_but("2t2i+1x", of=list(MODELS)))
@pytest.mark.parametrize(("slack", "drops"), [(1.0, True), (4.0, False)])
def test_nor_where_slots_run_out(ffn, slack, drops):
    def threshold_training(program):
        rule = Threshold(warmup=1, slack=slack, auxiliary=True)  # an update has been: the warm-up is over
        return program.decoder.clone(model=dataclasses.replace(program.config.model, router=rule))

    found, state = changed(ffn, threshold_training, shift=-1.0 if drops else 0.0)
    dropped = max(float(np.max(group["dropped_E"])) for group in state.values())
    assert found == 0 and (dropped > 0) == drops


@pytest.mark.parametrize("ffn", long_but("2t2i+1x", of=list(MODELS)))
def test_expert_choice_fails_the_same_test(ffn):
    assert changed(ffn, lambda program: program.decoder)[0] > 0


@pytest.mark.parametrize("name", [*RIVALS, "choice", "threshold"])
def test_rules_look_ahead_in_training_where_they_say_so_and_never_at_inference(name):
    rule = {**RIVALS, "choice": Choice(), "threshold": Threshold()}[name]
    if isinstance(rule, ByToken):
        rule = dataclasses.replace(rule, slack=1.0)  # tokens are dropped, and must be by position
    config = tiny(model_ffn="4t4i", model_router=rule)
    program, first, vocabulary = make_program(config), first_routing_state(config), contiguous(config.data.modalities)
    params, batch = create_state(program, first).params, next(iter(open_stream(config))).batch
    run = logits_of(program.decoder, params, first, batch, vocabulary.modality_V)
    assert (broken(run, batch, vocabulary) > 0) == rule.sees_later
    state = run(batch.token_BS)[1]
    causal = causal_decoder(config, rule.causal[-1])
    assert broken(logits_of(causal, params, state, batch, vocabulary.modality_V), batch, vocabulary) == 0


RULES = {"choice": Choice(auxiliary=True), "threshold": Threshold(warmup=5, slack=1.0, auxiliary=True)}


@pytest.fixture(scope="module", params=RULES)
def trained(request, tmp_path_factory):
    """A model trained for some dozens of updates by expert choice, or by thresholds after a few of it."""
    fields = {"train_steps": 40, "train_eval_every": 40, "train_log_every": 20}
    config = tiny(tmp_path_factory.mktemp("run"), model_router=RULES[request.param], **fields)
    train(config, quiet=True)
    return load(config.run.dir)


@pytest.mark.slow
def test_of_a_trained_model_too(trained):
    batch = next(iter(open_stream(trained.config, split="validation", rows=8, epochs=1))).batch
    found = {}
    with sharding.use_mesh(trained.program.mesh):
        for routing in trained.routings:
            decoder, modality_V = trained.under(routing), trained.vocabulary.modality_V
            run = logits_of(decoder, trained.params, trained.routing_state, batch, modality_V)
            found[routing] = broken(run, batch, trained.vocabulary)
        run = logits_of(trained.decoder, trained.params, trained.routing_state, batch, modality_V)
        found["training"] = broken(run, batch, trained.vocabulary)
    assert found["causal"] == found["threshold"] == 0
    assert (found["training"] == 0) == (isinstance(trained.config.model.router, Threshold))
    assert found["choice"] > 0, "expert choice looks ahead, whatever the model was trained by"
