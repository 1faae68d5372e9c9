"""What is missing is said before any work, in one line with a remedy."""

import importlib.util
import time
import uuid

import pytest

from moma_jax.errors import InputError
from moma_jax.storage import probe
from moma_jax.storage.directory import Directory
from moma_jax.storage.probe import require_usable


@pytest.fixture
def path():
    return f"memory://{uuid.uuid4().hex}/run"


def test_it_leaves_nothing_behind(path, tmp_path):
    require_usable(path, checkpoints=False)
    assert Directory(path).names("") == []
    require_usable(str(tmp_path / "new"), checkpoints=True)
    assert not (tmp_path / "new").exists()


def test_checkpoints_on_s3_are_refused():
    with pytest.raises(InputError, match="s3://bucket/run: checkpoints cannot be written to s3://.*name a local"):
        require_usable("s3://bucket/run", checkpoints=True)


def test_a_missing_extra_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else found(name))
    with pytest.raises(InputError, match=r'need gcsfs; pip install "moma_jax\[gcs\]"'):
        require_usable("gs://bucket/run", checkpoints=True)


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("NOT_FOUND: The specified bucket does not exist", "no such bucket"),
        ("HTTP response code: 403 PERMISSION_DENIED", "may not write"),
        ("UNAUTHENTICATED: Invalid credentials", "no valid credentials"),
        ("UNAVAILABLE: CURL error Could not connect", "cannot be reached"),
        ("something else", "cannot be used"),
    ],
)
def test_what_a_store_refuses_is_one_line(path, monkeypatch, words, remedy):
    def refused(*_):
        raise ValueError(f"{words} [source locations='x']\nmore")

    monkeypatch.setattr(Directory, "write", refused)
    with pytest.raises(InputError) as error:
        require_usable(path, checkpoints=False)
    assert remedy in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_a_store_that_says_nothing_is_given_up(path, monkeypatch):
    monkeypatch.setattr(Directory, "write", lambda *_: time.sleep(5))
    before = time.monotonic()
    with pytest.raises(InputError, match="gave no answer in 0 s"):
        require_usable(path, checkpoints=False, seconds=0.1)
    assert time.monotonic() - before < 4


def test_a_store_that_forgets_is_none(path, monkeypatch):
    monkeypatch.setattr(Directory, "write", lambda *_: None)
    with pytest.raises(InputError, match="is not there when it is read"):
        probe.require_usable(path, checkpoints=False)


def test_the_address_that_is_named_is_the_stores_own(monkeypatch):
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://google")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    assert Directory("gs://bucket/a").endpoint == "http://google"
    assert Directory("s3://bucket/a").endpoint == "s3://"
