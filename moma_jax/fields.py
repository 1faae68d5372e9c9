"""The fields of a config: what is true of each, declared where the field is, and the reader that checks them all.

Both work on any dataclass whose fields are numbers, strings, truth values, Literals, tuples, dictionaries by name,
other such dataclasses, or one of these or None. What a JSON file that this package wrote must hold is said by a
TypedDict of the same (and lists), and read by `read_file`: more than it says may be in the file. No JAX.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import reprlib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from moma_jax.addresses import require_no_credentials
from moma_jax.errors import InputError

# What is true of a field ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What is true of a field besides its type. Bounds hold for every number in it, items of a tuple included."""

    above: float | None = None
    """Values are greater."""
    least: float | None = None
    """Values are greater or equal."""
    below: float | None = None
    """Values are smaller."""
    most: float | None = None
    """Values are smaller or equal."""
    unit: str = ""
    """What a value counts, in the plural."""
    example: Any = None
    """A value that would be right."""
    opaque: bool = False
    """Whether any value is taken as it is: its owner checks it."""
    may_change: bool = False
    """Whether a run may go on with another value; of a section, with anything else in it."""

    def holds(self, value: float) -> bool:
        """Whether a number is finite and within the bounds; an integer may be beyond the floats."""
        return -math.inf < value < math.inf and not (
            (self.above is not None and value <= self.above)
            or (self.least is not None and value < self.least)
            or (self.below is not None and value >= self.below)
            or (self.most is not None and value > self.most)
        )

    def refusal(self, value: float) -> str:
        """What to say of a number that `holds` does not accept."""
        bounds = {"above": self.above, "at least": self.least, "below": self.below, "at most": self.most}
        wanted = [f"{word} {bound:.12g}" for word, bound in bounds.items() if bound is not None]
        if len(wanted) == 1 and self.least is not None:
            wanted = [f"{self.least:.12g} or more"]
        if wanted == ["above 0"]:
            wanted = ["positive"]
        if len(wanted) < 2 and not -math.inf < value < math.inf:
            wanted.append("finite")
        example = "" if self.example is None else f", such as {self.example}"
        return f"must be {' and '.join(wanted)}{example}; is {shown(value)} {self.unit}".rstrip()


def setting(default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING, **facts: Any) -> Any:
    """A dataclass field with `Facts` by name; its documentation is the string under it."""
    known = Facts(**facts)
    if isinstance(default, (int, float)) and known.holds(default):
        known = dataclasses.replace(known, example=default)
    return dataclasses.field(default=default, default_factory=factory, metadata={"facts": known})


Count = Annotated[int, Facts(least=0, most=2**53)]
"""A number of things in a JSON file; floats hold it exactly."""


@functools.cache
def schema(kind: type) -> dict[str, tuple[Any, Facts]]:
    """Annotation and facts of every field of a dataclass that its constructor takes, by name."""
    hints = typing.get_type_hints(kind)
    return {f.name: (hints[f.name], f.metadata.get("facts", Facts())) for f in dataclasses.fields(kind) if f.init}


# Reading --------------------------------------------------------------------------------------------------------------


def read(kind: Any, value: Any, where: str = "", facts: Facts = Facts()) -> Any:
    """A value of a recipe, of the command line or of a JSON document as what its annotation says.

    Integers in the place of floats, lists in the place of tuples and NumPy scalars are converted; nothing else is.

    Args:
      kind: a dataclass, a TypedDict, or the annotation of a field.
      value: an instance or plain values; a dataclass may also come as a dictionary of its fields, or as an instance of
        a subclass, whose own fields are then checked.
      where: dotted path of the value, for messages; "" for a whole config.
      facts: of the field.

    Raises:
      InputError: the first field of a wrong type, out of range, unknown, missing, or an address with credentials, by
        its dotted path.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    value = value.item() if isinstance(value, np.generic) else value
    if dataclasses.is_dataclass(kind):
        return _read_section(kind, value, where)
    if typing.is_typeddict(kind) and isinstance(value, dict):
        return _read_object(kind, value, where)
    if origin is Annotated:
        return read(arguments[0], value, where, arguments[1])
    if origin in (typing.Union, types.UnionType):
        return _read_union(arguments, value, where, facts)
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        kinds = arguments if origin is tuple and ... not in arguments else arguments[:1] * len(value)
        if len(kinds) == len(value):
            items = (
                read(k, item, _path(where, i), facts) for i, (k, item) in enumerate(zip(kinds, value, strict=True))
            )
            return origin(items)
    if origin is dict and isinstance(value, dict) and all(type(name) is str for name in value):
        names = (read(arguments[0], name, where) for name in value)
        return {name: read(arguments[1], value[name], _path(where, name), facts) for name in names}
    if origin is Literal and any(type(value) is type(each) and value == each for each in arguments):
        return value
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if kind is Any or (type(value) is kind and (kind not in (int, float) or facts.holds(value))):
        if kind is str:
            require_no_credentials(value, where)
        return value
    raise InputError(f"{where}: {_refusal(kind, value, facts)}")


def read_file(kind: Any, content: Any, where: str) -> Any:
    """`read` of what a JSON file or a part of it holds; `where` names that, and the refusal tells to restore it."""
    try:
        return read(kind, content)
    except InputError as error:
        raise InputError(f"{where}: {str(error).lstrip(': ')}; restore the file, it is damaged") from error


def _read_object(kind: type, value: dict[str, Any], where: str) -> dict[str, Any]:
    """A dictionary that has at least the fields of a TypedDict; the others stay as they are."""
    told = {}
    for name, (annotation, needed) in _fields_of(kind).items():
        if name in value:
            told[name] = read(annotation, value[name], _path(where, name))
        elif needed:
            raise InputError(f"{_path(where, name)}: is missing")
    return value | told


@functools.cache
def _fields_of(kind: type) -> dict[str, tuple[Any, bool]]:
    """Annotation of every field of a TypedDict, and whether it must be there; from the hints, as a TypedDict's own
    answer is wrong where annotations are strings."""
    hints = typing.get_type_hints(kind, include_extras=True).items()
    optional = {name: typing.get_args(hint)[0] for name, hint in hints if typing.get_origin(hint) is typing.NotRequired}
    return {name: (optional.get(name, hint), name not in optional) for name, hint in hints}


def _read_section(kind: type, value: Any, where: str) -> Any:
    if isinstance(value, kind):
        kind, given = type(value), {name: getattr(value, name) for name in schema(type(value))}
    elif isinstance(value, dict):
        given = value
    else:
        raise InputError(f"{where or 'config'}: expected an object, {kind.__name__}; found {shown(value)}")
    known = schema(kind)
    for name in given:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(str(name), known, n=1) or known)
            raise InputError(f"{_path(where, name)}: no such field; {where or 'the config'} has {near}")
    for field in dataclasses.fields(kind):
        if field.init and field.name not in given and field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"{_path(where, field.name)}: is missing, and has no default")
    values = {}
    for name, item in given.items():
        annotation, facts = known[name]
        values[name] = item if facts.opaque else read(annotation, item, _path(where, name), facts)
    return kind(**values)


def _read_union(kinds: tuple[Any, ...], value: Any, where: str, facts: Facts) -> Any:
    """By the first alternative that the value is an instance of, or else by the first that there is."""
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    fitting = (kind for kind in kinds if isinstance(kind, type) and isinstance(value, kind))
    return read(next(fitting, kinds[0]), value, where, facts)


def _refusal(kind: Any, value: Any, facts: Facts) -> str:
    """What to say of a value that is not of a kind, or not within the bounds."""
    match typing.get_origin(kind):
        case _ if type(value) is kind:
            return facts.refusal(value)
        case typing.Literal:
            return f"{shown(value)} is not one of {', '.join(map(str, typing.get_args(kind)))}"
        case origin:
            of = typing.get_args(kind)
            names = {list: "a list", dict: "an object, values by name"}
            names[tuple] = "a list" if ... in of else f"a list of {len(of)}"
            return f"expected {names.get(origin) or getattr(kind, '__name__', kind)}, found {shown(value)}"


def _path(where: str, name: Any) -> str:
    name = name if isinstance(name, str) and name.isprintable() and len(name) <= 60 else shown(name)
    return f"{where}.{name}" if where else name


_BEGIN = reprlib.Repr()
"""Writes the begin of a value, however large and nested it is."""
_BEGIN.maxlist = _BEGIN.maxtuple = _BEGIN.maxdict = 30
_BEGIN.maxstring = _BEGIN.maxlong = _BEGIN.maxother = 200


def shown(value: Any) -> str:
    """A value in a message: one short line, whatever it is."""
    text = " ".join(_BEGIN.repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


# What may change when a run goes on -----------------------------------------------------------------------------------


def may_change(kind: type, where: str = "") -> set[str]:
    """Dotted paths of the fields, and of whole sections, with other values of which a run may go on."""
    paths = set()
    for name, (annotation, facts) in schema(kind).items():
        if facts.may_change:
            paths.add(_path(where, name))
        elif dataclasses.is_dataclass(annotation):
            paths |= may_change(annotation, _path(where, name))
    return paths


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Values of a config as plain dictionaries, by dotted name; an empty dictionary is one."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from leaves(item, _path(where, name))
    else:
        yield where, value


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Fields of two configs, or of two sections at `where`, that forbid going on from the first with the second.

    Returns:
      Lines such as `data.modalities.1.quota: old -> new`; fields that may change have none.
    """
    if before == after:
        return []
    if isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after):
        pairs = [(str(i), *values) for i, values in enumerate(zip(before, after, strict=True))]
    elif dataclasses.is_dataclass(before) and type(before) is type(after):
        fixed = [name for name, (_, facts) in schema(type(before)).items() if not facts.may_change]
        pairs = [(name, getattr(before, name), getattr(after, name)) for name in fixed]
    else:
        both = [[getattr(i, "name", i) for i in v] if isinstance(v, tuple) else v for v in (before, after)]
        return [f"{where}: {both[0]} -> {both[1]}"]
    return [line for name, *values in pairs for line in differences(*values, _path(where, name))]
