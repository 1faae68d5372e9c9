"""Which of a test's parameters run in the fast tier."""

import pytest


def slow_but(*fast, of):
    """The parameters `of`, all slow but those in `fast`: pytest.mark.parametrize(names, slow_but(a, b, of=VALUES))."""
    assert all(value in of for value in fast)
    return [value if value in fast else _slow(value) for value in of]


def _slow(value):
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
