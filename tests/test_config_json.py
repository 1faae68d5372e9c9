"""Configs of earlier formats, and rules that are not built in, read from config.json."""

import json
from dataclasses import dataclass

import pytest
from tiny import tiny

from moma_jax.config import with_router
from moma_jax.config_json import from_json, to_json
from moma_jax.errors import InputError
from moma_jax.router import Function, Router
from moma_jax.routers.choice import Choice
from moma_jax.routers.threshold import Threshold
from moma_jax.rules import Unloaded, bind, require_loaded

FORMAT_1 = {
    "jitter": 0.0,
    "gumbel": True,
    "threshold_decay": 0.9,
    "auxiliary": True,
    "routing_warmup": 7,
    "routing_slack": 1.5,
}
OPTIONS = {"jitter": 0.0, "gumbel": True, "gumbel_until": None, "auxiliary": True}


@dataclass(frozen=True)
class Mine(Router):
    """A rule of the user's."""

    reach: int = 3

    def select(self, score, eligible_T, quota, state, key):
        raise NotImplementedError


def written(config):
    return json.loads(json.dumps(to_json(config)))


def in_format_1(**model):
    """config.json as it was when the routing rule's options were fields of the model."""
    data = written(tiny())
    data["format_version"] = 1
    del data["model"]["router"]
    data["model"] |= model
    return data


@pytest.mark.parametrize(
    ("routing", "router"),
    [("choice", Choice(**OPTIONS)), ("threshold", Threshold(**OPTIONS, warmup=7, slack=1.5))],
)
def test_format_1_is_read_as_todays(routing, router):
    read = from_json(in_format_1(routing=routing, **FORMAT_1))
    assert read == with_router(tiny(), router)
    assert written(read)["format_version"] == 2 and from_json(written(read)) == read


def test_the_decay_of_averages_is_read_and_says_nothing():
    """Thresholds were averages of cut-offs once, with an option of their own."""
    data = written(with_router(tiny(), Choice(gumbel_until=None)))
    data["model"]["router"] |= {"decay": 0.9}
    assert from_json(data) == with_router(tiny(), Choice(gumbel_until=None))
    data["model"]["router"] = {"rule": "choice", "decay": 0.9}
    with pytest.raises(InputError, match="model.router.decay: no such field"):
        from_json(data)


def test_format_1_without_routing_fields_is_the_default():
    assert from_json(in_format_1()) == tiny()


def test_format_1_of_an_unknown_field_is_refused():
    with pytest.raises(InputError, match=r"^model.widht: no such field"):
        from_json(in_format_1(**FORMAT_1, widht=3))


@dataclass(frozen=True)
class Noisy(Mine):
    """One with the options of a built-in rule, but not those that came later."""

    jitter: float = 0.0
    gumbel: bool = False
    decay: float = 0.9
    auxiliary: bool = False


def ranked(score, eligible_T, quota, state, key):
    raise NotImplementedError


def test_noise_of_the_users_rules_stays_as_it_was_recorded():
    noisy = Noisy(gumbel=True)
    assert bind(from_json(written(with_router(tiny(), noisy))).model.router, Noisy) == noisy
    data = written(with_router(tiny(), Function(ranked, gumbel=True)))
    assert bind(from_json(data).model.router, ranked).gumbel_until == 0.5
    del data["model"]["router"]["gumbel_until"]
    assert bind(from_json(data).model.router, ranked).gumbel_until is None


def test_a_rule_of_the_users_stays_a_name_until_it_is_named():
    read = from_json(written(with_router(tiny(), Mine(reach=5)))).model.router
    assert isinstance(read, Unloaded) and read.options == {"reach": 5}
    with pytest.raises(InputError, match="Mine, whose code is not run"):
        require_loaded(read)
    assert bind(read, Mine) == Mine(reach=5)
