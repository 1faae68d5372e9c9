"""Every field of every config is checked, by its annotation and its facts: a new one is covered without being named."""

import dataclasses
import functools
import json
import math
import operator
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest

from moma_jax.checks import resolve
from moma_jax.config import (
    Config,
    DataConfig,
    EvalSet,
    Modality,
    ModelConfig,
    PrepareConfig,
    RunConfig,
    StoreConfig,
    TrainConfig,
)
from moma_jax.config_json import from_json, to_json
from moma_jax.errors import InputError
from moma_jax.fields import Count, Facts, differences, read, read_file, schema, setting


def whole() -> Config:
    """A config with something in every place, so that every field of every dataclass exists."""
    text, image = Modality("text", "t", 100, quota=0.5), Modality("image", "i", 20, span=16, quota=0.5)
    stores = (StoreConfig("a", "x", share={"text": 0.5}),)
    data = DataConfig("store", (text, image), stores, PrepareConfig(), sequence=64, group_rows=2)
    train = TrainConfig(steps=3, batch_rows=4, eval_sets=(EvalSet(rows=4),), eval_routings=("choice",))
    return resolve(Config(ModelConfig(layers=2, width=32, heads=4), data, train=train, run=RunConfig("runs/whole")))


def fields_of(config: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any, Facts]]:
    """(path, annotation, facts) of every field, also of the dataclasses in tuples and behind None."""
    for name, (annotation, facts) in schema(type(config)).items():
        value = getattr(config, name)
        yield (*path, name), annotation, facts
        for number, item in enumerate(value) if isinstance(value, tuple) else [(None, value)]:
            if dataclasses.is_dataclass(item):
                yield from fields_of(item, (*path, name) if number is None else (*path, name, number))


FIELDS = [pytest.param(*each, id=".".join(map(str, each[0]))) for each in fields_of(whole())]


def with_value(config: Any, path: tuple, value: Any) -> Any:
    """`config` with the value at the end of a path replaced."""
    if not path:
        return value
    if isinstance(config, tuple):
        return tuple(with_value(each, path[1:], value) if i == path[0] else each for i, each in enumerate(config))
    return dataclasses.replace(config, **{path[0]: with_value(getattr(config, path[0]), path[1:], value)})


def wrong_values(annotation: Any, facts: Facts) -> Iterator[Any]:
    """Values that a field does not accept: other types, other names, numbers beyond its bounds."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    yield object()
    if inner != (str, str):  # names of the compiler's options, which it knows itself
        yield {"nobody": "knows this"}
    if type(None) not in inner:
        yield None
    if origin is tuple:
        yield from ("text", 3, *([wrong] for wrong in wrong_values(inner[0], facts)))
    elif origin is dict:
        yield from ("text", 3, [], {3: 0.5}, *({"text": wrong} for wrong in wrong_values(inner[1], facts)))
    elif origin is types.UnionType:
        others = (kind for kind in inner if kind is not type(None))
        yield from (wrong for kind in others for wrong in wrong_values(kind, facts) if wrong is not None)
    elif origin is typing.Literal:
        yield from ("", inner[0] + " ", 0, True, [inner[0]])
    elif annotation is bool:
        yield from (0, 1.0, "true")
    elif annotation is str:
        yield from (0, True, b"text", ["text"])
    elif annotation in (int, float):
        yield from ("2", True, [2], *([2.0] if annotation is int else [math.nan, math.inf, 10**400]))
        yield from (annotation(bound) for bound in (facts.above, facts.below) if bound is not None)
        small = {int: 1, float: 1e-6}[annotation]
        yield from (annotation(facts.least) - small for _ in "1" if facts.least is not None)
        yield from (annotation(facts.most) + small for _ in "1" if facts.most is not None)
        yield annotation(-(10**9))  # whatever is counted or measured here has a lower bound
    else:
        assert dataclasses.is_dataclass(annotation), annotation
        yield from ("text", 3, [])


@pytest.mark.parametrize(("path", "annotation", "facts"), FIELDS)
def test_every_field_refuses_what_it_does_not_mean_and_says_where(path, annotation, facts):
    """In a recipe and in a config.json alike."""
    start = "^" + re.escape(".".join(map(str, path))) + r"[:.]"
    for value in wrong_values(annotation, facts):
        with pytest.raises(InputError, match=start) as caught:
            resolve(with_value(whole(), path, value))
        assert "\n" not in str(caught.value)
        data = to_json(whole())
        place = functools.reduce(operator.getitem, path[:-1], data)
        place[path[-1]] = value
        if path[0] != "mesh" or type(value) is not int:  # -1 or positive: no range, seen when the config is resolved
            with pytest.raises(InputError, match=start):
                from_json(data)


@pytest.mark.parametrize(("path", "annotation", "facts"), FIELDS)
def test_json_has_no_other_fields_than_the_config(path, annotation, facts):
    data = json.loads(json.dumps(to_json(whole())))
    place = functools.reduce(operator.getitem, path[:-1], data)
    place[f"{path[-1]}_"] = place.pop(path[-1])
    start = re.escape(".".join(map(str, path)))
    with pytest.raises(InputError, match=rf"^{start}_: no such field; .* has {path[-1]}"):
        from_json(data)


@pytest.mark.parametrize(("path", "annotation", "facts"), FIELDS)
def test_every_bound_that_is_included_is_accepted(path, annotation, facts):
    for bound in (facts.least, facts.most):
        if bound is not None and typing.get_origin(annotation) is not dict:
            from_json(to_json(with_value(whole(), path, bound)))


def test_a_whole_config_survives_json():
    config = whole()
    assert from_json(json.loads(json.dumps(to_json(config), allow_nan=False))) == config


def changed(path: str, value: Any) -> Config:
    """The whole config with another value at a dotted path, checked."""
    return resolve(with_value(whole(), tuple(path.split(".")), value))


def test_an_int_stands_for_a_float_and_a_list_for_a_tuple():
    rate = changed("optimizer.peak_lr", 1).optimizer.peak_lr
    assert rate == 1 and type(rate) is float
    assert changed("train.eval_sets", [EvalSet(rows=4, stores=[])]).train.eval_sets == (EvalSet(rows=4),)


def test_numpy_scalars_become_python_numbers_exactly():
    layers = changed("model.layers", np.int64(4)).model.layers
    assert layers == 4 and type(layers) is int
    dropout = changed("model.dropout", np.float32(0.1)).model.dropout
    assert dropout == float(np.float32(0.1)) and type(dropout) is float
    assert changed("run.tensorboard", np.False_).run.tensorboard is False
    with pytest.raises(InputError, match=r"^model.layers: expected int, found 4.0$"):
        changed("model.layers", np.float64(4))
    with pytest.raises(InputError, match=r"^model.dropout: expected float, found array\(\[0.1, 0.2\]\)$"):
        changed("model.dropout", np.array([0.1, 0.2]))


@dataclasses.dataclass(frozen=True)
class Rule:
    """A kind of which a config may have any."""


@dataclasses.dataclass(frozen=True)
class Noisy(Rule):
    noise: float = setting(0.5, least=0, unit="nats")
    by: Literal["row", "group"] = "row"


@dataclasses.dataclass(frozen=True)
class Ruled:
    rule: Rule | str = Rule()
    other: Rule = Rule()


def test_a_subclass_is_checked_by_its_own_fields():
    assert read(Ruled, Ruled(rule="noisy", other=Noisy(1))) == Ruled("noisy", Noisy(1.0))
    with pytest.raises(InputError, match="^rule.noise: must be 0 or more, such as 0.5; is -1.0 nats$"):
        read(Ruled, Ruled(rule=Noisy(-1)))
    with pytest.raises(InputError, match="^other.by: 'page' is not one of row, group$"):
        read(Ruled, Ruled(other=Noisy(by="page")))
    with pytest.raises(InputError, match="^other: expected an object, Rule; found 'noisy'$"):
        read(Ruled, Ruled(other="noisy"))
    with pytest.raises(InputError, match="^rule: expected an object, Rule; found 3$"):
        read(Ruled, Ruled(rule=3))
    assert differences(Ruled(other=Noisy()), Ruled()) == ["other: Noisy(noise=0.5, by='row') -> Rule()"]


# Files of JSON --------------------------------------------------------------------------------------------------------


class Piece(typing.TypedDict):
    name: str
    count: Count
    pair: typing.NotRequired[tuple[int, float]]
    kinds: typing.NotRequired[dict[Literal["a", "b"], list[Count]]]


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"name": 1}, "name: expected str, found 1"),
        ({"count": -1}, "count: must be at least 0 and at most 9.*; is -1"),
        ({"count": 10**400}, "count: must be at least 0 and at most 9.*; is 1000000"),
        ({"count": True}, "count: expected int, found True"),
        ({"pair": [1]}, r"pair: expected a list of 2, found \[1\]"),
        ({"pair": [1, math.nan]}, "pair.1: must be finite; is nan"),
        ({"kinds": {"c": []}}, "'c' is not one of a, b"),
        ({"kinds": {"a": [0, None]}}, "kinds.a.1: expected int, found None"),
        ({"kinds": []}, r"kinds: expected an object, values by name, found \[\]"),
    ],
)
def test_what_a_file_holds_is_refused_in_one_line(change, refusal):
    content = {"name": "x", "count": 3} | change
    with pytest.raises(InputError, match=f"^a.json: .*{refusal}.*; restore the file, it is damaged$") as caught:
        read_file(Piece, content, "a.json")
    assert len(str(caught.value)) < 250


def test_what_a_file_holds_is_kept():
    content = {"name": "x", "count": 2**53, "pair": [1, 2], "kinds": {"b": [1]}, "more": {"of": ["it"]}}
    assert read_file(Piece, content, "a.json") == content | {"pair": (1, 2.0)}
    with pytest.raises(InputError, match=r"a.json: count: is missing"):
        read_file(Piece, {"name": "x"}, "a.json")
    with pytest.raises(InputError, match=r"a.json: expected Piece, found \[\]"):
        read_file(Piece, [], "a.json")


def test_a_nest_of_any_depth_and_names_of_any_length_make_one_short_line():
    deep = functools.reduce(lambda inner, _: [inner], range(900), [])
    for content in ({"name": deep}, {"name": "x", "kinds": {"\n" * 10_000: 0}}, {"name": {"x" * 10_000: deep}}):
        with pytest.raises(InputError) as caught:
            read_file(Piece, {"count": 1} | content, "a.json")
        assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such field") as caught:
        from_json({"format_version": 2, "\ud800" * 10_000: 0})
    assert len(str(caught.value)) < 250
