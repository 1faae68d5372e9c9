"""The mutants of run.py can still be made; whether the tests catch them is a matter of minutes and not asked here."""

import runpy
from pathlib import Path

import pytest

RUN = runpy.run_path(str(Path(__file__).parent / "run.py"))


@pytest.mark.parametrize("mutant", RUN["MUTANTS"], ids=lambda mutant: mutant.name)
def test_the_snippet_stands_once_and_the_tests_are_there(mutant):
    assert RUN["mutated"](mutant) != (RUN["ROOT"] / "moma_jax" / mutant.file).read_text()
    assert all((RUN["ROOT"] / "tests" / name).exists() for name in mutant.tests.split())
