"""Which of a test's parameters run in the test's own tier."""

import pytest


def long_but(*few, of):
    """The parameters `of`, all but `few` in the long tier: pytest.mark.parametrize(name, long_but(a, b, of=VALUES))."""
    assert all(value in of for value in few)
    return [value if value in few else _long(value) for value in of]


def _long(value):
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.long)
