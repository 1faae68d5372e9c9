"""Routing rules by name: the built-in ones of moma_jax/routers, and your own, `file.py:attribute` or
`package.module:attribute`.

Foreign code runs only where a recipe, the command line or Python names it. A config.json is data: a rule that it names
and that is not built in stays a name (`Unloaded`) until it is named by whoever runs the command.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moma_jax import routers
from moma_jax.by_token import ByToken
from moma_jax.errors import InputError
from moma_jax.fields import setting, shown
from moma_jax.router import CAUSAL, CAUSAL_ROUTINGS, THRESHOLD, Function, Router, name_of

NAME = "rule"
"""Key of the rule's name beside its options, in JSON."""


@dataclass(frozen=True)
class Unloaded(Router):
    """A rule that a config.json names, whose code was not run."""

    name: str = ""
    options: Mapping[str, Any] = setting(factory=dict, opaque=True)


@functools.cache
def built_in() -> dict[str, type[Router]]:
    """The built-in rules by name."""
    modules = {info.name: f"{routers.__name__}.{info.name}" for info in pkgutil.iter_modules(routers.__path__)}
    return {name: _only_rule(importlib.import_module(module)) for name, module in modules.items()}


def _only_rule(module: Any) -> type[Router]:
    (rule,) = (
        own
        for own in vars(module).values()
        if inspect.isclass(own) and issubclass(own, Router) and own.__module__ == module.__name__
    )
    return rule


def described() -> list[dict[str, Any]]:
    """What the built-in rules say of themselves, by their files: "name", "about", "paper", "causal" (routings that can
    generate), "sees_later" (in training), "losses", "state" and "options" with their defaults."""
    return [
        {
            "name": name,
            "about": inspect.getdoc(sys.modules[rule.__module__]).partition("\n")[0],
            "paper": rule.paper,
            "causal": list(rule.causal),
            "sees_later": rule.sees_later,
            "losses": list(rule.losses),
            "state": sorted(rule().state(2)),
            "options": options_of(rule()),
        }
        for name, rule in sorted(built_in().items())
    ]


def as_table() -> str:
    """The built-in rules as a table of Markdown."""
    rows = [("`model.router`", "from", "who takes which token", "causal routings", "in training", "losses", "state")]
    rows.append(("---",) * len(rows[0]))
    for own in described():
        names = (", ".join(f"`{name}`" for name in own[key]) or "-" for key in ("causal", "losses", "state"))
        causal, losses, state = names
        sees = "sees later tokens" if own["sees_later"] else "causal"
        rows.append((f"`{own['name']}`", own["paper"], own["about"], causal, sees, losses, state))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def loaded_rule(name: str) -> Router:
    """The rule of a name with its default options; runs the code of the file or module that it names.

    Raises:
      InputError: there is none of this name, or its code fails.
    """
    if name in built_in():
        return built_in()[name]()
    if ":" not in name:
        raise InputError(
            f"model.router: {name!r} is none of {', '.join(built_in())}; name your own as FILE.py:ATTRIBUTE or "
            "PACKAGE.MODULE:ATTRIBUTE"
        )
    return as_rule(named(name, "model.router"), name)


def named(name: str, field: str) -> Any:
    """The object of a user's code called FILE.py:ATTRIBUTE or PACKAGE.MODULE:ATTRIBUTE.

    Raises:
      InputError: there is none, or its code fails; `field` is the setting that names it.
    """
    where, _, attribute = name.rpartition(":")
    try:
        module = _of_file(where) if where.endswith(".py") else importlib.import_module(where)
        return getattr(module, attribute)
    except (Exception, SystemExit) as error:
        raise InputError(f"{field}: {name}: {type(error).__name__}: {error}") from error


def as_rule(rule: Any, name: str | None = None) -> Router:
    """A Router from what names one: a Router, a class of them, a name, or a function (the short form).

    Args:
      name: how it is called in records; None: as it is defined.
    """
    match rule:
        case str():
            return loaded_rule(rule)
        case Router():
            _require_contract(type(rule))
            return rule
        case type() if issubclass(rule, Router):
            _require_contract(rule)
            if name is not None and ":" in name:
                rule.__moma_name__ = name
            return rule()
        case _ if callable(rule):
            if name is not None and hasattr(rule, "__dict__"):
                rule.__moma_name__ = name
            return Function(rule)
    raise InputError(f"model.router: {name or rule!r} is neither a Router nor a function; see moma_jax/router.py")


def _require_contract(rule: type[Router]) -> None:
    """InputError where a class could not be used or written down as a rule."""
    about = f"model.router: {rule.__qualname__}"
    if rule not in (Function, Unloaded) and rule.select is Router.select:
        raise InputError(f"{about} has no select; see moma_jax/router.py")
    if issubclass(rule, ByToken) and rule.choose is ByToken.choose:
        raise InputError(f"{about} has no choose; see moma_jax/by_token.py")
    if foreign := set(rule.causal) - set(CAUSAL_ROUTINGS):
        raise InputError(f"{about}: causal names {foreign.pop()!r}; a causal routing is {CAUSAL!r} or {THRESHOLD!r}")
    for field in dataclasses.fields(rule):
        if field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"{about}: its option {field.name} needs a default")
        if field.name == NAME:
            raise InputError(f"{about}: the option {NAME} has the name that stands for the rule's own; rename it")


def _of_file(where: str) -> Any:
    """The module of a file, which runs once per process; it may import those that lie beside it."""
    path = str(Path(where).resolve())
    name = f"moma_rule_{Path(path).stem}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module, beside = importlib.util.module_from_spec(spec), str(Path(path).parent)
    module.__moma_file__ = where  # how its rules are called in records
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.append(beside)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(beside)
    return module


def switched(before: Router, rule: Router) -> Router:
    """The rule in the place of another, whose options of the same names it takes over."""
    if isinstance(before, Unloaded) and _named_as(before.name, rule):
        return bind(before, rule)
    own = options_of(rule)
    if isinstance(rule, Unloaded) or own != options_of(type(rule)()):
        return rule
    return dataclasses.replace(rule, **{name: value for name, value in options_of(before).items() if name in own})


def with_gumbel(router: Router) -> Router:
    """The rule with Gumbel noise, where it has that option."""
    if isinstance(router, Unloaded) and "gumbel" in router.options:
        return dataclasses.replace(router, options={**router.options, "gumbel": True})
    return dataclasses.replace(router, gumbel=True) if "gumbel" in options_of(router) else router


# Rules in config.json -------------------------------------------------------------------------------------------------

BEFORE_FADING = {"jitter", "gumbel", "decay", "auxiliary"}
"""Options of a built-in rule that was recorded whole, before there was `gumbel_until`."""


def options_of(router: Router) -> dict[str, Any]:
    """A rule's options by name."""
    if isinstance(router, Unloaded):
        return dict(router.options)
    return {f.name: getattr(router, f.name) for f in dataclasses.fields(router) if f.name != "function"}


def rule_name(router: Router) -> str:
    """How a rule is called in records, loaded or not."""
    return router.name if isinstance(router, Unloaded) else name_of(router)


def to_json(router: Router) -> dict[str, Any]:
    """{"rule": its name, its options}."""
    return {NAME: rule_name(router), **options_of(router)}


def from_json(data: Mapping[str, Any], read: Callable[[type, dict[str, Any]], Router]) -> Router:
    """The inverse of `to_json`; no foreign code is run.

    Args:
      read: reads a dictionary into a dataclass, checking it.
    """
    name, options = data.get(NAME), {key: value for key, value in data.items() if key != NAME}
    if not isinstance(name, str):
        raise InputError(
            f"model.router: {shown(data)} does not name its rule; give {{{NAME!r}: NAME, OPTION: VALUE, ...}}"
        )
    if name not in built_in():
        return Unloaded(name, options)
    rule = built_in()[name]
    return read(rule, _completed(options, rule()) if options.keys() >= BEFORE_FADING else options)


def bind(router: Router, named: Any) -> Router:
    """The rule of a run's config with its code: `router` itself where it is built in.

    Args:
      named: what the user named to be used, as `as_rule` takes it; None: nothing.

    Raises:
      InputError: the code of the run's rule was not named, or another rule was.
    """
    if named is None:
        return require_loaded(router)
    chosen = as_rule(named)
    if not isinstance(router, Unloaded):
        if rule_name(router) != rule_name(chosen):
            raise InputError(f"router: the run was trained with {rule_name(router)}, not {rule_name(chosen)}")
        return router
    if not _named_as(router.name, chosen):
        raise InputError(f"router: the run was trained with {router.name}, not {rule_name(chosen)}; name that one")
    try:
        return dataclasses.replace(chosen, **_completed(router.options, chosen))
    except TypeError as error:
        raise InputError(f"router: {router.name} no longer takes the run's options ({error})") from error


def _named_as(recorded: str, rule: Router) -> bool:
    """Whether a rule is the one of a record, wherever its file lies now; before format 2 those were names of functions
    alone."""
    (home, own), (other, name) = _home_and_name(recorded), _home_and_name(rule_name(rule))
    return own == name and home in ("", other)


def _home_and_name(name: str) -> tuple[str, str]:
    """The last part of a rule's file or module, and its name there."""
    where, _, own = name.rpartition(":")
    return Path(where).stem if where.endswith(".py") else where.rpartition(".")[2], own


def recorded_rule(router: Router, meta: Mapping[str, Any]) -> Router:
    """The routing rule of a checkpoint or summary, whose config has `router`; before rules were part of the config, a
    function's name stood beside it."""
    own, options = meta.get("select", "expert_choice"), options_of(router)
    if own == "expert_choice":
        return router
    return Unloaded(own, {name: options[name] for name in ("jitter", "gumbel")})


def _completed(options: Mapping[str, Any], rule: Router) -> dict[str, Any]:
    """Recorded options as the rule has them now: noise that was recorded without `gumbel_until` stayed to the end;
    without noise it says nothing. `decay` was that of thresholds when they were averages."""
    known = options_of(rule)
    options = {name: value for name, value in options.items() if name in known or name != "decay"}
    if "gumbel_until" in options or "gumbel_until" not in known or "gumbel" not in options:
        return dict(options)
    return {"gumbel_until": None if options["gumbel"] is True else known["gumbel_until"]} | options


def as_named(recorded: Router, rule: Router) -> Router:
    """A recorded rule under the name that `rule` has today, where it is the same."""
    if isinstance(recorded, Unloaded) and _named_as(recorded.name, rule):
        return Unloaded(rule_name(rule), _completed(recorded.options, rule))
    return recorded


def require_loaded(router: Router) -> Router:
    """The rule itself; InputError where its code was not run."""
    if isinstance(router, Unloaded):
        raise InputError(
            f"router: the config names the routing rule {router.name}, whose code is not run for that; name it, "
            f"with --router {router.name} (--model.router for a recipe, router={router.name!r} in Python)"
        )
    return router
