"""A tiny Chameleon in Hugging Face's layout, and the run that it becomes."""

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import chameleons  # here: without the extra [convert] the tests that ask for it are skipped

    return chameleons.write(tmp_path_factory.mktemp("source") / "chameleon", shards=3)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    from moma_jax.convert import from_chameleon

    out = tmp_path_factory.mktemp("runs") / "run"
    from_chameleon(str(folder), str(out), quiet=True)
    return out
