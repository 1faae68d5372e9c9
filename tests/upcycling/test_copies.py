"""More experts from fewer: the same function, token by token or in the mean."""

import jax
import numpy as np
import pytest
from ffn_cases import Case, mixed
from programs import batch_of, logits, program_of
from rival_rules import RIVALS
from tiers import long_but
from tiny import tiny

from moma_jax import sharding
from moma_jax.errors import InputError
from moma_jax.model.decoder import first_routing_state
from moma_jax.router import Score
from moma_jax.routers.hash import Hash
from moma_jax.routers.null import Null
from moma_jax.routers.token_choice import TokenChoice
from moma_jax.routers.top_p import TopP
from moma_jax.training.step import create_state, run_decoder
from moma_jax.upcycling.copies import SMALL, Copied, copied_groups, grown_state, perturbed


def grow(before, after, fresh=()):
    """The first state of config `before`, and that of `after` grown from it."""
    old, new = program_of(before), program_of(after)
    with sharding.use_mesh(old.mesh):
        state = create_state(old, first_routing_state(before))
        seed = state.replace(opt_state=None, routing_state=jax.tree.map(lambda x: x + 0.25, state.routing_state))
        made = grown_state(new, seed, copied_groups(before, after, fresh), 0.0, 0)
    return old, state, new, made


@pytest.mark.parametrize(
    ("before", "after", "norm", "capacity", "scale"),
    [
        ("dense", "4t4i", "swin", 1.0, 1 / 2),
        pytest.param("dense", "4t4i", "pre", 1.0, 1 / 2, marks=pytest.mark.slow),
        pytest.param("dense", "1t1i", "pre", None, 1, marks=pytest.mark.slow),
        pytest.param("dense", "8x", "pre", 1.0, 1 / 4, marks=pytest.mark.slow),
        pytest.param("2t2i", "4t4i", "swin", 0.5, 1 / 2, marks=pytest.mark.slow),
        pytest.param("2t2i", "4t4i", "pre", 0.5, 1 / 2, marks=pytest.mark.slow),
        ("2t2i", "2t4i", "pre", 0.5, (1, 1 / 2)),
        pytest.param("1t1i+2x", "2t2i+2x", "pre", 1.0, 1, marks=pytest.mark.slow),
        pytest.param("mod+1t1i", "mod+4t4i", "pre", 1.0, 1 / 2, marks=pytest.mark.slow),
    ],
)
def test_logits_from_other_seeds(before, after, norm, capacity, scale):
    # Without jitter copies of an expert take the same tokens.
    same = {"model_norm": norm, "model_capacity": capacity, "router_jitter": 0.0}
    configs = [tiny(model_ffn=ffn, **same) for ffn in (before, after)]
    scales = [own.scale for own in copied_groups(*configs).values()]
    np.testing.assert_allclose(scales, scale)
    old, state, new, made = grow(*configs)
    batch = batch_of(configs[0])
    expected = logits(old, state.params, batch)
    np.testing.assert_allclose(logits(new, made.params, batch), expected, atol=1e-5)


def test_tokens_that_choose_are_shared_out_among_copies():
    """Gates that are divided by their sum are 1 together, whatever the router: the same function, token by token."""
    seed = {"model_norm": "pre"}
    for rule in (TokenChoice(top=2, normalise=True, slack=4.0), Hash(slack=4.0)):
        configs = tiny(model_ffn="1t1i", **seed), tiny(model_ffn="4t4i", model_router=rule, **seed)
        old, state, new, made = grow(*configs)
        batch = batch_of(configs[0])
        np.testing.assert_allclose(logits(new, made.params, batch), logits(old, state.params, batch), atol=1e-4)
        if rule.parameters(1, 4):
            of_experts = np.asarray(made.params["layers"]["ffn"]["text"]["router_DE"])
            assert 0 < np.abs(of_experts).max() < 0.02


@pytest.mark.parametrize("name", [*(name for name in RIVALS if name != "remoe"), "top_p of few", "sigmoid"])
def test_a_first_router_gives_tokens_what_their_one_expert_did(name):
    """In the mean over tokens: gates add up to what the copies' down-projections are divided by."""
    others = {"null": Null(zero=4), "top_p of few": TopP(share=0.3)}
    others |= {"sigmoid": TokenChoice(gates="sigmoid", normalise=True)}
    rule, experts = (RIVALS | others)[name], 8
    columns = rule.parameters(16, experts).get("router_DE")
    shape = (4096, 1 if columns is None else columns.shape[1])
    logit_NE = SMALL * jax.random.normal(jax.random.key(0), shape)
    id_N = np.arange(4096, dtype=np.int32)
    score = Score(logit_NE, logit_NE, logit_NE, id_T=id_N, position_T=id_N)
    gate_NE = rule.decide(score, rule.state(experts), "causal")[1]
    expected = experts * rule.capacity(experts, None) * rule.first_gate(experts)
    np.testing.assert_allclose(gate_NE.sum(-1).mean(), float(expected), rtol=0.03)


@pytest.mark.parametrize(
    ("before", "rule", "said"),
    [
        ("1t1i", "remoe", "lets nothing in"),
        ("1t1i", Null(copy=1), "copies would add to the seed's function; upcycle with copy=0"),
        ("1t4i", "null", "the seed's experts for image were trained under choice; leave the rule as it is there"),
        ("2t2i", "token_choice", "grow a seed with one expert for text"),
    ],
)
def test_rules_that_cannot_begin_are_refused(before, rule, said):
    with pytest.raises(InputError, match=said):
        copied_groups(tiny(model_ffn=before), tiny(model_ffn="4t4i", model_router=rule))


@pytest.mark.parametrize(
    ("seed", "rule", "after", "said"),
    [
        (TokenChoice(), Hash(), "2t2i", "hash: the seed's experts for text were trained under token_choice"),
        (TokenChoice(), TokenChoice(top=2), "2t2i", "trained with other options"),
        (TokenChoice(), TokenChoice(), "4t4i", "copies would not share the tokens of their expert"),
    ],
)
def test_a_seed_with_several_experts_keeps_its_rule(seed, rule, after, said):
    after = {"model_ffn": after, "model_attention_weights": "by_modality"}
    with pytest.raises(InputError, match=said):
        copied_groups(tiny(model_ffn="2t2i", model_router=seed), tiny(model_router=rule, **after))


@pytest.mark.parametrize(("before", "after", "name"), [("2t2i", "2t2i", "text"), ("4x", "4t4i", "image")])
def test_controllers_go_on_where_experts_stay(before, after, name):
    rule = TokenChoice(bias_rate=0.01)
    fields = {"model_router": rule, "model_norm": "pre"}
    configs = tiny(model_ffn=before, **fields), tiny(model_ffn=after, model_attention_weights="by_modality", **fields)
    old, state, new, made = grow(*configs)
    np.testing.assert_array_equal(made.routing_state[name]["bias_E"], 0.25)
    thresholds = grow(tiny(model_ffn="1t1i"), tiny(model_ffn="4t4i"))[3].routing_state["text"]["threshold_E"]
    np.testing.assert_array_equal(thresholds, 0.0)


PAIRS = [("dense", "1t1i"), ("2t2i", "2t2i"), ("mod+1t1i", "mod+1t1i")]


@pytest.mark.parametrize(("before", "after"), long_but(PAIRS[0], of=PAIRS))
def test_modalities_begin_with_the_seeds_attention(before, after):
    seed = {"model_norm": "pre", "router_jitter": 0.0, "model_capacity": 1.0}
    configs = [tiny(model_ffn=before, **seed), tiny(model_ffn=after, model_attention_weights="by_modality", **seed)]
    old, state, new, made = grow(*configs)
    batch = batch_of(configs[0])
    np.testing.assert_allclose(logits(new, made.params, batch), logits(old, state.params, batch), atol=1e-5)


def test_attention_of_each_modality_does_not_become_one():
    with pytest.raises(InputError, match="leave it by_modality"):
        copied_groups(tiny(model_ffn="mod+1t1i", model_attention_weights="by_modality"), tiny(model_ffn="mod+2t2i"))


def test_default_capacity_keeps_the_mean_over_tokens():
    """A token that m of the four copies took has m times the seed's output; the mean of m is 1."""
    modality_GT = mixed(2, groups=8, padding=0.0)
    before, after = (Case(ffn, modality_GT) for ffn in ("1t1i", "4t4i"))
    after.x_GTD = before.x_GTD
    own = Copied("", 4, 2.0)
    assert set(copied_groups(tiny(model_ffn="1t1i"), tiny(model_ffn="4t4i")).values()) == {
        Copied(name, own.times, own.scale) for name in ("text", "image")
    }
    for name, weights in before.params.items():
        copies = {kind: np.repeat(weight, 4, axis=0) for kind, weight in weights.items()}
        after.params[name] = copies | {
            "down_EFD": own.scale * copies["down_EFD"],
            "router_DE": np.zeros_like(after.params[name]["router_DE"]),
        }
    (expected, _), (found, _) = before.run(), after.run()
    times_GT = np.zeros(modality_GT.shape)
    for selection in found[1].selections.values():
        for g in range(len(modality_GT)):
            np.add.at(times_GT[g], selection.index_EC[g][selection.filled_EC[g]], 1)
    np.testing.assert_allclose(found[0], times_GT[..., None] * expected[0], atol=1e-4)
    # An expert's share of a group's tokens is rounded up: at most 4 experts, 2 modalities, one token more each.
    assert times_GT.sum() / times_GT.size == pytest.approx(1, abs=4 * 2 / modality_GT.shape[1])
    assert 0.2 < (times_GT == 0).mean() < 0.4  # (3/4)^4 of the tokens


def test_more_generations_and_groups():
    def scales(before, after, **capacity):
        return {n: (c.source, c.times, c.scale) for n, c in copied_groups(
            tiny(model_ffn=before), tiny(model_ffn=after, **capacity)
        ).items()}  # fmt: skip

    assert scales("1t1i", "4t4i", model_capacity=1.0) == {"text": ("text", 4, 0.5), "image": ("image", 4, 0.5)}
    assert scales("dense", "8x") == {"all": ("all", 8, 2.0)}
    # c of the experts halves and they double: in the mean over tokens as much as before.
    assert scales("2t2i", "4t2i") == {"text": ("text", 2, 1.0), "image": ("image", 1, 1.0)}
    assert scales("2x", "4t2i") == {"text": ("all", 2, 1.0), "image": ("all", 1, 1.0)}


def test_fresh_experts_are_those_of_a_new_run():
    configs = tiny(model_ffn="dense"), tiny(model_ffn="2t2i")
    _, old, new, made = grow(*configs, fresh=("image",))
    with sharding.use_mesh(new.mesh):
        drawn = create_state(new, first_routing_state(configs[1])).params["layers"]["ffn"]
    grown, seed = made.params["layers"]["ffn"], old.params["layers"]["ffn"]["all"]
    for name, weight in grown["image"].items():
        np.testing.assert_allclose(weight, drawn["image"][name], atol=1e-6)  # drawn in another program
    np.testing.assert_array_equal(grown["text"]["gate_EDF"], np.repeat(seed["gate_EDF"], 2, axis=1))
    with pytest.raises(InputError, match="fresh: audio has no experts of its own in 2t2i; it has text, image"):
        copied_groups(*configs, fresh=("audio",))


def test_experts_lie_side_by_side_and_routers_go_with_them():
    _, state, _, made = grow(tiny(model_ffn="2t2i"), tiny(model_ffn="4t2i"))
    old, new = (x.params["layers"]["ffn"]["text"] for x in (state, made))
    for name, axis in (("gate_EDF", 1), ("up_EDF", 1), ("down_EFD", 1), ("router_DE", 2)):
        np.testing.assert_array_equal(new[name], np.repeat(old[name], 2, axis=axis))


@pytest.mark.slow
def test_noise_on_copied_experts():
    before, after = tiny(model_ffn="1t2i", model_hidden=64), tiny(model_ffn="4t2i", model_hidden=64)
    plain, copied = jax.device_get(grow(before, after)[3].params), copied_groups(before, after)
    noisy, again, other = (jax.device_get(perturbed(plain, copied, 0.1, number)) for number in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, noisy, again)
    ffn = [tree["layers"]["ffn"] for tree in (plain, noisy, other)]
    for name in ("gate_EDF", "up_EDF", "down_EFD"):
        clean, one, two = (x["text"][name] for x in ffn)
        relative = (one - clean).std(axis=(-2, -1)) / clean.std(axis=(-2, -1))
        np.testing.assert_allclose(relative, 0.1, rtol=0.15)
        assert len(np.unique(one[:, :, 0, 0])) == one[:, :, 0, 0].size and not np.allclose(one, two)
    assert not np.any(ffn[1]["text"]["router_DE"])
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), plain, noisy)
    assert sum(jax.tree.leaves(changed)) == 3  # all else is as it was
    assert perturbed(plain, {}, 0.0, 0) is plain


@pytest.mark.slow
def test_a_copys_gradient_is_as_moments_are_scaled():
    """Where all copies take all tokens the factors are exact: 1/k, and 1/(k scale) of the down-projection."""
    configs = [tiny(model_ffn=ffn, model_capacity=1.0, model_norm="pre") for ffn in ("1t1i", "4t4i")]
    old, state, new, made = grow(*configs)
    batch = batch_of(configs[0])

    def gradient(program, params):
        groups, routing = np.arange(4), first_routing_state(program.config)

        def total(params):
            output = run_decoder(program, params, batch, 0, groups, routing, False)
            return (output.hidden_BSD**2 * np.arange(16)).sum()

        with sharding.use_mesh(program.mesh):
            return jax.device_get(jax.jit(jax.grad(total))(params))["layers"]["ffn"]["text"]

    before, after = gradient(old, state.params), gradient(new, made.params)
    for name, factor in (("gate_EDF", 1 / 4), ("up_EDF", 1 / 4), ("down_EFD", 1 / 2)):
        expected = factor * np.repeat(before[name], 4, axis=1)
        np.testing.assert_allclose(after[name], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_experts_that_do_not_divide(tmp_path):
    for before, after, message in (
        ("2t2i", "3t2i", "3 experts for text are no multiple of the seed's 2; use 2"),
        ("4t4i", "2t4i", "use 4"),
    ):
        with pytest.raises(InputError, match=message):
            copied_groups(tiny(model_ffn=before), tiny(model_ffn=after))
    with pytest.raises(InputError, match=r"mod\+ must be the seed's"):
        copied_groups(tiny(model_ffn="1t1i"), tiny(model_ffn="mod+4t4i"))
