import dataclasses
import json

import numpy as np
import pytest

from moma_jax.config import Modality
from moma_jax.errors import InputError
from moma_jax.vocab import ModalityIds, Vocabulary, contiguous, special_tokens

MODALITIES = (Modality("text", "t", 50), Modality("image", "i", 20, span=4), Modality("audio", "a", 5, span=2))


def test_contiguous_layout():
    vocabulary = contiguous(MODALITIES)
    assert vocabulary.size == 75
    text, image, audio = vocabulary.modalities
    assert (image.begin, image.end, audio.begin, audio.end) == (4, 5, 6, 7)
    assert special_tokens(["image", "audio"])[image.begin] == "<image>"
    assert special_tokens(["image", "audio"])[audio.end] == "</audio>"
    np.testing.assert_array_equal(vocabulary.modality_V, [0] * 50 + [1] * 20 + [2] * 5)
    assert vocabulary.modality_V[image.begin] == 0, "the marks of a span belong to text"


def test_scattered_ids_keep_code_order():
    image = ModalityIds("image", "i", ((6, 8), (2, 4)), span=2, begin=0, end=1)
    vocabulary = Vocabulary((ModalityIds("text", "t", ((0, 2), (4, 6))), image))
    np.testing.assert_array_equal(image.code_ids, [6, 7, 2, 3])
    np.testing.assert_array_equal(vocabulary.modality_V, [0, 0, 1, 1, 0, 0, 1, 1])


@pytest.mark.parametrize("ranges", [((0, 2), (3, 4)), ((0, 3), (2, 4))])
def test_gaps_and_overlaps_are_refused(ranges):
    with pytest.raises(InputError, match="once each"):
        Vocabulary((ModalityIds("text", "t", ranges),))


def test_json_round_trip_and_hash():
    vocabulary = contiguous(MODALITIES)
    again = Vocabulary.from_json(vocabulary.to_json())
    assert again == vocabulary and again.hash == vocabulary.hash
    other = contiguous((MODALITIES[0], dataclasses.replace(MODALITIES[1], size=21), MODALITIES[2]))
    assert other.hash != vocabulary.hash
    with pytest.raises(InputError, match="format version 9"):
        Vocabulary.from_json({**vocabulary.to_json(), "format_version": 9})


def test_token_dtype_is_the_smallest_that_holds_the_ids():
    assert contiguous(MODALITIES).token_dtype == "uint16"
    assert contiguous((Modality("text", "t", 65536),)).token_dtype == "uint16"
    assert contiguous((Modality("text", "t", 65537),)).token_dtype == "uint32"


def test_a_damaged_layout():
    """Refused before any table of its ids is made: a range may name more than there is memory for."""
    good = contiguous((Modality("text", "t", 20, quota=1.0), Modality("image", "i", 8, span=4, quota=1.0))).to_json()
    text, image = good["modalities"]
    for change, refusal in [
        ({"modalities": []}, "special id 0 is none of its 0 ids"),
        ({"modalities": [text | {"ranges": [[0, 10**12]]}]}, "more than 16777216"),
        ({"modalities": [text | {"ranges": [[0, 20, 40]]}]}, "ranges.0: expected a list of 2"),
        ({"modalities": [text, image | {"ranges": [[21, 29]]}]}, "must cover 0..size-1 once each"),
        ({"modalities": [text, image | {"begin": 28}]}, "special id 28"),
        ({"modalities": [text, image | {"span": -1}]}, "modalities.1.span: must be 0 or more"),
        ({"pad": None}, "pad: expected int"),
        ({"format_version": [1] * 1000}, "format version"),
    ]:
        with pytest.raises(InputError, match=f"^vocabulary.*{refusal}") as caught:
            Vocabulary.from_json(json.loads(json.dumps(good | change)))
        assert len(str(caught.value)) < 200
