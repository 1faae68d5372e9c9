"""Of two processes that begin in one directory, on a disk or in a bucket, one writes and the other is told who does."""

import contextlib

import pytest
from buckets import google
from processes import spawn

pytestmark = pytest.mark.slow
RACES = 50


def say(process, words=""):
    process.stdin.write(f"{words}\n")
    process.stdin.flush()


def hear(process):
    return process.stdout.readline().strip()


@contextlib.contextmanager
def racers(environment):
    """Two processes of helpers/races.py, once they listen."""
    both = [spawn("-m", "races", **environment) for _ in range(2)]
    try:
        assert [int(hear(each)) for each in both] == [each.pid for each in both]
        yield both
    finally:
        for each in both:
            each.kill()
            each.wait()


def require_one_writer(both, place):
    for number in range(RACES):
        for each in both:
            say(each, f"{place}/{number}")
        told = [hear(each) for each in both]
        assert told.count("won") == 1, told
        winner, loser = both[told.index("won")], told[1 - told.index("won")]
        assert f"process {winner.pid} of " in loser and "is writing here; stop it, or use another directory" in loser
        for each in both:
            say(each)
        assert hear(winner) == "wrote"


def require_taken_over(both, place):
    first, second = both
    say(first, place)
    assert hear(first) == "won"
    first.kill()
    say(second, place)
    assert hear(second) == "won"


def test_on_a_disk(tmp_path):
    with racers({}) as both:
        require_one_writer(both, tmp_path)
        require_taken_over(both, tmp_path / "over")


def test_in_a_bucket():
    with google() as environment, racers(environment) as both:
        require_one_writer(both, "gs://bucket")
        require_taken_over(both, "gs://bucket/over")
