"""Rules whose tokens choose: against slow NumPy, forward and backward; controllers, slots, drops, refusals."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rivals
from ffn_cases import MODALITIES, ROWS, Case, mixed
from tiny import tiny

from moma_jax.by_token import ByToken, highest, shares
from moma_jax.checks import resolve
from moma_jax.errors import InputError
from moma_jax.geometry import depth_rule
from moma_jax.model.moe import moe, position_order
from moma_jax.model.parameters import weights_of
from moma_jax.recipes import override
from moma_jax.router import Quota, Score, name_of
from moma_jax.routers.choice import Choice
from moma_jax.routers.hash import Hash
from moma_jax.routers.null import Null
from moma_jax.routers.random import Random
from moma_jax.routers.remoe import LIGHTEST, ReMoE
from moma_jax.routers.sinkhorn import Sinkhorn
from moma_jax.routers.token_choice import TokenChoice
from moma_jax.routers.top_p import TopP

TOLERANCE = 1e-5
FEW = 6
"""Tokens that slots are made for; there are some ten of each modality, so that experts drop some."""


@dataclasses.dataclass(frozen=True)
class Settled(Random):
    """Random experts in training as at inference, so that slow NumPy can draw the same."""

    def choose(self, score, state, key=None):
        return super().choose(score, state)


RULES = {
    "switch": TokenChoice(slack=1.0, balance=0.3, z=0.1),
    "deepseek": TokenChoice(top=2, gates="sigmoid", normalise=True, bias_rate=0.2, balance=0.0, z=0.0, slack=1.25),
    "top_p": TopP(mean=1.5, share=0.5, rate=0.2, balance=0.3, entropy=0.2, slack=1.0),
    "remoe": ReMoE(first=0.3, slack=1.5),
    "null": Null(top=2, zero=2, copy=1, balance=0.3, slack=1.5),
    "hash": Hash(top=2, seed=3, slack=1.0),
    "random": Settled(slack=1.0),
    "sinkhorn": Sinkhorn(top=2, slack=1.0),
}
ORACLE = {"switch": "token_choice", "deepseek": "token_choice"}
KINDS = {
    name: next(c for c in type(rule).__mro__ if c.__module__.startswith("moma_jax.routers"))
    for name, rule in RULES.items()
}


def state_of(rule, groups, seed=5):
    """A state whose controllers have somewhere to go: uneven loads, biases of any sign."""
    rng, found = np.random.default_rng(seed), {}
    for group in groups:
        state = rule.state(group.experts)
        state |= {"taken_E": rng.integers(5, 40, group.experts).astype(np.float32), "eligible": np.float32(40)}
        if "bias_E" in state:
            state["bias_E"] = rng.normal(0, 0.2, group.experts).astype(np.float32)
        found[group.name] = state
    return found


def prepared(name, ffn="3t4i", modalities=2):
    rule = RULES[name]
    case = Case(ffn, mixed(modalities, groups=2), modalities, router=rule)

    def with_few_slots(own):
        quota = Quota(FEW, own.quota.capacity)
        return dataclasses.replace(own, quota=quota, slots=rule.slots(quota, case.modality_GT.shape[1]))

    case.routing = case.routing._replace(groups=tuple(map(with_few_slots, case.routing.groups)))
    return case, rule, state_of(rule, case.layout.groups)


def slow(name, case, rule, states, params, x_GTD):
    """(sum of y * dy and losses, y, losses) in float64."""
    params = {g: {k: np.asarray(v, np.float64) for k, v in own.items()} for g, own in params.items()}
    tokens = {"modality": case.modality_GT, "id": case.tokens.id_GT, "position": case.tokens.position_GT}
    groups = [(g.name, g.modalities, g.experts) for g in case.layout.groups]
    slots = {own.group.name: own.slots for own in case.routing.groups}
    x_GTD = np.asarray(x_GTD, np.float64)
    y_GTD, losses = rivals.layer(ORACLE.get(name, name), rule, x_GTD, tokens, groups, params, states, slots, ROWS)
    return (y_GTD * case.dy_GTD).sum() + sum(losses.values()), y_GTD, losses


@pytest.mark.parametrize("name", RULES)
def test_output_losses_and_gradients_are_those_of_slow_numpy(name):
    case, rule, states = prepared(name)

    def total(params, x_GTD):
        arguments = (x_GTD, case.tokens, case.keys, states, weights_of(params))
        y_GTD, result = moe(*arguments, routing=case.routing, model=case.model)
        return jnp.sum(y_GTD * case.dy_GTD) + sum(result.losses.values()), (y_GTD, result)

    run = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    gradient, (y_GTD, result) = jax.device_get(run(case.params, case.x_GTD))
    _, slow_GTD, losses = slow(name, case, rule, states, case.params, case.x_GTD)
    np.testing.assert_allclose(y_GTD, slow_GTD, atol=TOLERANCE * np.abs(slow_GTD).max())
    assert set(result.losses) == set(losses) == set(rule.losses)
    for key, value in losses.items():
        np.testing.assert_allclose(result.losses[key], value, rtol=TOLERANCE)
    dropped = max(float(result.metrics[f"dropped_{own.name}"]) for own in case.layout.groups)
    assert dropped > 0, "slots that suffice would not show who is dropped"
    # Along random directions, each array by itself: central differences in float64, whose error is 1e-9 here.
    rng, leaves = np.random.default_rng(9), jax.tree.leaves_with_path((case.params, case.x_GTD))
    for number, (path, leaf) in enumerate(leaves):
        way = rng.normal(size=leaf.shape) * 1e-5

        def moved(sign, number=number, way=way):
            arrays = [np.asarray(a, np.float64) + (sign * way if n == number else 0) for n, (_, a) in enumerate(leaves)]
            params, x_GTD = jax.tree.unflatten(jax.tree.structure((case.params, case.x_GTD)), arrays)
            return slow(name, case, rule, states, params, x_GTD)[0]

        found = float((np.asarray(jax.tree.leaves(gradient)[number], np.float64) * way).sum())
        size = np.linalg.norm(jax.tree.leaves(gradient)[number]) * np.linalg.norm(way)
        np.testing.assert_allclose(found, (moved(1) - moved(-1)) / 2, atol=TOLERANCE * size, err_msg=str(path))


@pytest.mark.parametrize("name", RULES)
def test_mixed_groups_and_three_modalities(name):
    for ffn, modalities in (("5x", 2), ("2t3i4s", 3)):
        case, rule, states = prepared(name, ffn, modalities)
        (y_GTD, _), _ = case.run(state=states)
        slow_GTD = slow(name, case, rule, states, case.params, case.x_GTD)[1]
        np.testing.assert_allclose(y_GTD, slow_GTD, atol=TOLERANCE * np.abs(slow_GTD).max())


def scored(rng, tokens, columns):
    logit_TE = jnp.asarray(rng.normal(size=(tokens, columns)), jnp.float32)
    whole_T = jnp.arange(tokens, dtype=jnp.int32)
    order_T = position_order(4, tokens)
    return Score(logit_TE, logit_TE, logit_TE, order_T=order_T, id_T=whole_T % 7, position_T=whole_T)


def test_biases_even_the_load_without_a_loss():
    rule, rng = TokenChoice(bias_rate=0.01, balance=0.0), np.random.default_rng(0)
    quota, eligible_T, lean_E = Quota(512, Fraction(1, 4)), jnp.ones(512, bool), jnp.array([1.0, 0.5, 0.0, -1.0])
    state, spread = rule.state(4), []
    select = jax.jit(lambda score, state: rule.select(score, eligible_T, quota, state, jax.random.key(0)).state)
    for _ in range(200):
        score = scored(rng, 512, 4)
        state = select(score._replace(logit_TE=score.logit_TE + lean_E), state)
        spread.append(float(shares(state).max() - shares(state).min()))
    assert np.mean(spread[:5]) > 0.4 and np.mean(spread[-50:]) < 0.1


def test_sinkhorns_prices_even_a_lean():
    rng, lean_E = np.random.default_rng(0), jnp.array([2.0, 0.5, 0.0, -1.0])
    score, quota = scored(rng, 512, 4), Quota(512, Fraction(1, 4))
    score = score._replace(logit_TE=score.logit_TE + lean_E, rank_TE=score.rank_TE + lean_E)
    rule, eligible_T = Sinkhorn(), jnp.ones(512, bool)
    at_prices = shares(rule.select(score, eligible_T, quota, rule.state(4), jax.random.key(0)).state)
    without = rule.choose(score, rule.state(4))[0].mean(0)
    assert float(without.max()) > 0.5 and float(at_prices.min()) > 0.15 and float(at_prices.max()) < 0.35


def test_so_few_tokens_that_they_cannot_be_even_enter_their_highest():
    rule, score = Sinkhorn(slack=4.0), scored(np.random.default_rng(0), 64, 4)
    for count in (1, 3):
        eligible_T = jnp.arange(64) < count
        found = rule.select(score, eligible_T, Quota(64, Fraction(1, 4)), rule.state(4), None).state["taken_E"]
        expected = np.bincount(np.argmax(score.logit_TE[:count], axis=1), minlength=4)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("experts", [1, 4, 70])
def test_the_highest_are_those_of_a_stable_sort(experts):
    rank_NE = np.random.default_rng(0).integers(0, 5, (64, experts)).astype(np.float32)
    for count in {1, experts // 2, experts} - {0}:
        order_NE = np.argsort(-rank_NE, axis=1, kind="stable")[:, :count]
        expected_NE = np.zeros(rank_NE.shape, bool)
        np.put_along_axis(expected_NE, order_NE, True, axis=1)
        np.testing.assert_array_equal(jax.jit(highest, static_argnums=1)(rank_NE, count), expected_NE)


def test_metrics_say_how_loads_lie():
    """Six of eight eligible tokens choose the first of two experts, which has slots for four."""
    rule, score = TokenChoice(slack=1.0), scored(np.random.default_rng(0), 12, 2)
    first_T = np.arange(12) % 4 < 3
    score = score._replace(logit_TE=jnp.where(first_T[:, None], jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])))
    metrics = rule.select(score, jnp.arange(12) < 8, Quota(8, Fraction(1, 2)), rule.state(2), None).metrics
    found = {name: float(value) for name, value in metrics.items()}
    assert found == {"experts_chosen": 1.0, "dropped": 0.25, "empty_slots": 0.25, "busiest": 1.5}


def test_groups_without_a_modality_say_nothing_of_its_experts():
    """Two routing groups: one of text alone, one of both; every token has one expert, and none is dropped."""
    modality_GT = np.zeros((2, 24), int)
    modality_GT[1, ::2] = 1
    case = Case("2t2i", modality_GT, router=TokenChoice(slack=4.0))
    (_, result), _ = case.run(state={group.name: TokenChoice().state(2) for group in case.layout.groups})
    for group in ("text", "image"):
        assert result.metrics[f"experts_chosen_{group}"] == 1.0 and result.metrics[f"dropped_{group}"] == 0.0
        assert result.metrics[f"busiest_{group}"] >= 1.0


def test_nothing_that_enters_nowhere_is_dropped():
    rule, score = ReMoE(), scored(np.random.default_rng(0), 8, 2)
    score = score._replace(logit_TE=-jnp.ones((8, 2)))
    metrics = rule.select(score, jnp.ones(8, bool), Quota(8, Fraction(1, 2)), rule.state(2), None).metrics
    found = {name: float(value) for name, value in metrics.items()}
    assert found == {"experts_chosen": 0.0, "dropped": 0.0, "empty_slots": 1.0, "busiest": 0.0}


def test_top_p_holds_the_mean_number_of_experts():
    rule, rng = TopP(mean=2.5, rate=0.02), np.random.default_rng(0)
    quota, eligible_T = Quota(512, rule.capacity(8, None)), jnp.ones(512, bool)
    state, means = rule.state(8), []
    select = jax.jit(lambda score, state: rule.select(score, eligible_T, quota, state, jax.random.key(0)).state)
    for _ in range(200):
        state = select(scored(rng, 512, 8), state)
        means.append(float(shares(state).sum()))
    assert abs(means[0] - 2.5) > 0.5 and abs(np.mean(means[-50:]) - 2.5) < 0.05


def test_remoes_term_grows_where_too_many_enter_and_shrinks_where_too_few():
    rule = ReMoE(mean=1.0, first=1e-3, factor=1.5)
    for taken, step in ((30, 1), (10, 0), (5, -1)):
        state = rule.state(2) | {"taken_E": jnp.array([taken, taken], jnp.float32), "eligible": jnp.float32(20)}
        found = float(rule.moved(state)["log_weight"])
        assert found == pytest.approx(np.log(1e-3 * 1.5**step), abs=1e-5)
    assert float(rule.moved(rule.state(2))["log_weight"]) == pytest.approx(np.log(1e-3))  # nothing was seen yet


def test_remoes_term_comes_back_soon_after_a_long_time_of_too_few():
    rule, loads = ReMoE(), [5] * 1000 + [30] * 120
    state = rule.state(2)
    for taken in loads:
        state = rule.moved(state | {"taken_E": jnp.full(2, taken, jnp.float32), "eligible": jnp.float32(20)})
        assert float(state["log_weight"]) >= np.log(LIGHTEST) - 1e-5
    assert float(state["log_weight"]) == pytest.approx(np.log(LIGHTEST) + 120 * np.log(rule.factor), abs=1e-3)


def test_random_draws_are_new_in_training_and_even():
    rule, score = Random(top=2), scored(np.random.default_rng(0), 2048, 1)
    first_NE, again_NE, other_NE = (
        np.asarray(rule.choose(score, rule.state(4), key)[0])
        for key in (jax.random.key(1), jax.random.key(1), jax.random.key(2))
    )
    assert np.array_equal(first_NE, again_NE) and 0.3 < (first_NE != other_NE).mean() < 0.7
    inference_NE, gate_NE = map(np.asarray, rule.choose(score, rule.state(4)))
    for enters_NE in (first_NE, inference_NE):
        assert np.all(enters_NE.sum(1) == 2)
        np.testing.assert_allclose(enters_NE.mean(0), 0.5, atol=0.05)
    np.testing.assert_array_equal(gate_NE, inference_NE / 2)


def test_hash_is_even_over_ids_and_another_seed_is_another_table():
    id_T = jnp.arange(8192, dtype=jnp.int32)
    score = Score(*[jnp.zeros((8192, 1))] * 3, id_T=id_T, position_T=id_T)
    one_NE, other_NE = (np.asarray(Hash(seed=s).choose(score, Hash().state(4))[0]) for s in (0, 1))
    np.testing.assert_allclose(one_NE.mean(0), 0.25, atol=0.02)
    assert (one_NE & other_NE).sum(1).mean() == pytest.approx(0.25, abs=0.02)


def test_no_eligible_token_leaves_controllers_where_they_are():
    quota, none_T = Quota(8, Fraction(1, 2)), jnp.zeros(8, bool)
    for name, rule in RULES.items():
        columns = next(iter(rule.parameters(4, 2).values())).shape[1] if rule.parameters(4, 2) else 1
        score = scored(np.random.default_rng(0), 8, columns)
        selection, state, losses, _ = rule.select(score, none_T, quota, rule.state(2), jax.random.key(0))
        assert not selection.filled_EC.any() and all(np.isfinite(x) for x in losses.values()), name
        moved = rule.moved(state)
        for key in set(moved) - {"taken_E", "eligible"}:
            np.testing.assert_array_equal(moved[key], rule.state(2)[key], err_msg=f"{name}: {key}")


def test_depth_in_front_of_them_has_auxiliary_routers():
    """Their one causal routing is `causal`, and expert choice knows that by auxiliary routers alone."""
    config = tiny(model_ffn="mod+2t2i", model_router=TokenChoice(), train_eval_routings=("training", "causal"))
    assert depth_rule(config.model) == Choice(auxiliary=True) and depth_rule(tiny().model) == Choice()


REFUSED = {
    "capacity": (TokenChoice(), {"model_capacity": 0.5}, "model.capacity: 0.5: tokens choose under token_choice"),
    "too many": (TokenChoice(top=3), {}, "model.router: token_choice: 3 experts of a token, of 2"),
    "with null": (Null(top=9, zero=4), {}, "model.router.top: 9 experts of a token, of 6 with null ones"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_options_that_do_not_fit_are_refused(what):
    rule, fields, said = REFUSED[what]
    with pytest.raises(InputError, match=said):
        tiny(model_router=rule, **fields)


@pytest.mark.parametrize(
    ("rule", "option"),
    [
        ("token_choice", {"top": 10**400}),
        ("token_choice", {"slack": 1e308}),
        ("threshold", {"slack": 1e308}),
        ("null", {"zero": 10**20}),
        ("null", {"copy": 10**20}),
        ("remoe", {"first": 1e300}),
        ("remoe", {"mean": float("nan")}),
        ("top_p", {"share": 0.999}),
        ("sinkhorn", {"iterations": 10**9}),
    ],
)
def test_options_beyond_all_sense_are_refused_in_a_line(rule, option):
    ((name, value),) = option.items()
    with pytest.raises(InputError, match=rf"model\.router\.{name}: ") as refused:
        resolve(override(tiny(), {"model.router": rule, f"model.router.{name}": value}))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000


def test_a_mean_number_of_experts_may_be_a_whole_number():
    @dataclasses.dataclass(frozen=True)
    class Both(TokenChoice):
        def experts_of_a_token(self, experts):
            return 2

    assert Both().capacity(4, None) == Fraction(1, 2)


def test_a_rule_without_a_choice_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Nothing(ByToken):
        pass

    with pytest.raises(InputError, match="no choose"):
        tiny(model_router=Nothing())


def test_these_are_all_of_them():
    from moma_jax.rules import built_in

    by_token = {name for name, rule in built_in().items() if issubclass(rule, ByToken)}
    assert {name_of(kind()) for kind in KINDS.values()} == by_token and len(MODALITIES) == 3
