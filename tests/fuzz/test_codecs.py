"""Damaged folders of image tokenizers: their description, and the header and bytes of their weights."""

import hashlib
import json
import random

import numpy as np
import pytest
from mutations import COUNTS, damaged, mutants, mutated, require_refusals, written
from small_codecs import small_codec

from moma_jax.codec.folder import DESCRIPTION, WEIGHTS, hash_of, open_codec, write_codec
from moma_jax.codec.palette import PaletteCodec

CODECS = {"vqgan": small_codec, "palette": lambda: PaletteCodec(4, np.arange(48).reshape(16, 3))}


@pytest.fixture
def folder(tmp_path, request):
    write_codec(str(tmp_path), CODECS[request.param]())
    return tmp_path


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("folder", CODECS, indirect=True)
def test_descriptions(folder, count):
    def use(content):
        (folder / DESCRIPTION).write_bytes(content)
        hash_of(str(folder))
        codec = open_codec(str(folder))
        assert codec.codebook >= 1 and codec.codes_per_image >= 1 and codec.hash

    original = (folder / DESCRIPTION).read_bytes()
    use(original)
    require_refusals(use, mutants(original, count))


def with_hash(content, count):
    """Weights with a damaged header, or damaged bytes."""
    size, chance = int.from_bytes(content[:8], "little"), random.Random(0)
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    for _ in range(count):
        if chance.random() < 0.3:
            yield mutated(content, chance)
        else:
            changed = written(damaged(header, chance))
            told = len(changed) if chance.random() < 0.9 else chance.choice((0, 2**32, 2**63, 2**64 - 1))
            yield told.to_bytes(8, "little") + changed + body


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("folder", ["vqgan"], indirect=True)
@pytest.mark.parametrize("past_the_hash", [True, False])
def test_weights(folder, past_the_hash, count):
    description = json.loads((folder / DESCRIPTION).read_bytes())

    def use(content):
        (folder / WEIGHTS).write_bytes(content)
        if past_the_hash:
            own = description | {"weights": hashlib.sha256(content).hexdigest()}
            (folder / DESCRIPTION).write_text(json.dumps(own))
        open_codec(str(folder))

    original = (folder / WEIGHTS).read_bytes()
    use(original)
    require_refusals(use, with_hash(original, count))
