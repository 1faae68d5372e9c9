"""Naming a routing rule of one's own: what is refused in one line, and how a rule is called and found again."""

import dataclasses
import functools
import json

import pytest

from moma_jax.config import Config
from moma_jax.errors import InputError
from moma_jax.recipes import override
from moma_jax.router import Function, name_of
from moma_jax.routers.choice import Choice
from moma_jax.routers.threshold import Threshold
from moma_jax.routers.token_choice import TokenChoice
from moma_jax.rules import Unloaded, as_named, as_rule, bind, recorded_rule, switched, to_json, with_gumbel

SOURCE = """
from dataclasses import dataclass
from moma_jax.router import Router
from moma_jax.routers.choice import Choice
import beside_rule
@dataclass(frozen=True)
class Mine(Choice):
    reach: int = 2
@dataclass(frozen=True)
class Other(Mine):
    pass
mine, other = Mine(reach=3), Other()
@dataclass(frozen=True)
class NoDefault(Router):
    reach: int
    select = Choice.select
@dataclass(frozen=True)
class NoSelect(Router):
    pass
@dataclass(frozen=True)
class Greedy(Choice):
    causal = ("greedy",)
@dataclass(frozen=True)
class Rule(Choice):
    rule: str = ""
def function(score, eligible_T, quota, state, key): ...
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "beside_rule.py").write_text("")
    (tmp_path / "my rule.py").write_text(SOURCE)
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    return tmp_path / "my rule.py"


BROKEN = {
    "NoDefault": "needs a default",
    "NoSelect": "no select",
    "Rule": "rename it",
    "Greedy": "'greedy'; a causal routing is 'causal' or 'threshold'",
    "nothing": "nothing",
}


@pytest.mark.parametrize("name, said", BROKEN.items())
def test_a_class_that_breaks_the_contract_is_refused(file, name, said):
    with pytest.raises(InputError, match=said):
        as_rule(f"{file}:{name}")


def test_a_file_that_exits_is_refused(file):
    with pytest.raises(InputError, match="SystemExit"):
        as_rule(f"{file.with_name('leaves.py')}:Rule")


def test_an_instance_is_called_by_its_class_and_a_subclass_by_itself(file):
    assert name_of(as_rule(f"{file}:Mine")) == name_of(as_rule(f"{file}:mine")) == f"{file}:Mine"
    assert name_of(as_rule(f"{file}:other")) == f"{file}:Other"
    assert as_rule(f"{file}:mine").reach == 3


def test_a_function_without_a_name_of_its_own_can_be_a_rule():
    assert name_of(as_rule(functools.partial(print))).endswith(":partial")


def test_a_rule_is_found_again_where_its_file_lies_now(file):
    recorded, rule = Unloaded("elsewhere/my rule.py:Mine", {"reach": 7}), as_rule(f"{file}:Mine")
    assert bind(recorded, f"{file}:Mine").reach == 7
    assert to_json(as_named(recorded, rule)) == {"rule": f"{file}:Mine", "reach": 7}
    with pytest.raises(InputError, match="was trained with"):
        bind(recorded, f"{file}:Other")


def test_a_function_of_format_1_goes_on_with_its_options(file):
    before = recorded_rule(Choice(gumbel=True, jitter=0.5), {"select": "function"})
    rule = switched(Choice(gumbel=True, jitter=0.5), as_rule(f"{file}:function"))
    assert isinstance(rule, Function) and (rule.gumbel, rule.jitter) == (True, 0.5)
    assert to_json(as_named(before, rule)) == to_json(rule) | {"gumbel_until": None}, "its noise stayed to the end"
    before, rule = dataclasses.replace(before, options={"jitter": 0.5, "gumbel": False}), Function(rule.function, 0.5)
    assert to_json(as_named(before, rule)) == to_json(rule)


def test_gumbel_noise_of_a_rule_whose_code_was_not_run():
    assert with_gumbel(Unloaded("a.py:A", {"gumbel": False})).options == {"gumbel": True}
    assert with_gumbel(Unloaded("a.py:A", {})).options == {}


def test_a_rule_given_whole_keeps_its_own_options_and_json_names_it():
    config = override(Config(), {"model.router": Choice(gumbel=True)})
    assert override(config, {"model.router": Threshold()}).model.router == Threshold()
    assert override(config, {"model.router": "threshold"}).model.router == Threshold(gumbel=True)
    given = json.dumps({"rule": "threshold", "warmup": 5})
    assert override(config, ["--model.router", given]).model.router == Threshold(gumbel=True, warmup=5)


def test_a_rule_is_chosen_before_its_options_wherever_it_stands():
    config = override(Config(), {"model.router.top": 2, "model.router": "token_choice"})
    assert config.model.router == TokenChoice(top=2)


def test_json_that_is_nested_too_deeply_is_refused():
    with pytest.raises(InputError, match="not JSON"):
        override(Config(), ["--data.stores", "[" * 100_000])
