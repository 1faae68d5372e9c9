"""The VQGAN as a codec: batches, devices, its folder, and what is refused."""

import dataclasses
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from processes import output, spawn
from small_codecs import small_codec

from moma_jax.codec import codec_of, vqgan
from moma_jax.codec.folder import open_codec, write_codec
from moma_jax.codec.network import Vqgan, nearest
from moma_jax.codec.pictures import BrokenPicture
from moma_jax.codec.vqgan import VqganCodec
from moma_jax.errors import InputError


@pytest.fixture(scope="module")
def own():
    return small_codec()


def pictures(count, seed=0, side=16):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def test_codes_do_not_depend_on_the_batch(own, monkeypatch):
    images = pictures(7)
    together = own.encode(list(images))
    assert together.shape == (7, 64) and together.dtype == np.int32 and len(np.unique(together)) > 4
    monkeypatch.setattr(vqgan, "BATCH_PIXELS", 3 * 16**2)
    np.testing.assert_array_equal(small_codec().encode(list(images)), together)
    for image, code_K in zip(images, together, strict=True):
        np.testing.assert_array_equal(own.encode([image])[0], code_K)


def test_threads_get_the_codes_of_their_pictures(own):
    images = pictures(12)
    expected = own.encode(list(images))
    fresh = VqganCodec(own.config, own.params)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: fresh.encode([image])[0], images))
    np.testing.assert_array_equal(found, expected)


def test_files_and_pixels_have_the_same_codes(own):
    (image,) = pictures(1)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    np.testing.assert_array_equal(own.encode([buffer.getvalue()]), own.encode([image]))
    assert own.read(pictures(1, side=40)[0, :, :24]).shape == (16, 16, 3)
    with pytest.raises(BrokenPicture):
        own.encode([image, b"none"])
    assert own.encode([]).shape == (0, 64) and own.decode(np.zeros((0, 64), int)) == []


def test_codes_are_drawn(own):
    codes = own.encode(list(pictures(3)))
    drawn = own.decode(codes)
    assert [picture.size for picture in drawn] == [(16, 16)] * 3
    expected = Vqgan(own.config).apply({"params": own.params}, codes, method="pixels")
    np.testing.assert_allclose(np.stack(drawn), np.clip(np.asarray(expected) + 1, 0, 2) * 127.5, atol=0.51)
    for wrong in (codes[:, 1:], codes + 32):
        with pytest.raises(ValueError, match="codes"):
            own.decode(wrong)


def test_without_a_decoder_nothing_is_drawn():
    blind = small_codec(decoder=False)
    assert "decoder" not in blind.params and not blind.draws
    with pytest.raises(InputError, match="no decoder"):
        blind.decode(np.zeros((1, 64), int))


def test_the_nearest_row_is_the_loops():
    random = np.random.default_rng(0)
    z_BKC, row_VC = random.normal(size=(2, 5, 3)).astype(np.float32), random.normal(size=(7, 3)).astype(np.float32)
    row_VC[4] = row_VC[2]  # the first of two that are equal
    z_BKC[0, 0] = row_VC[4]
    expected = [[int(np.argmin([np.sum((z - row) ** 2) for row in row_VC])) for z in z_KC] for z_KC in z_BKC]
    assert np.asarray(nearest(z_BKC, row_VC)).tolist() == expected and expected[0][0] == 2


def test_lengths_can_be_divided_out(own):
    images = list(pictures(2))
    scaled = own.params | {"codebook_VC": own.params["codebook_VC"] * np.linspace(1, 9, 32)[:, None].astype(np.float32)}
    both = dataclasses.replace(own.config, unit_length="both")
    one, other = (VqganCodec(both, params).encode(images) for params in (own.params, scaled))
    np.testing.assert_array_equal(one, other)
    assert (VqganCodec(own.config, scaled).encode(images) != own.encode(images)).any()


def test_a_folder_keeps_it(own, tmp_path):
    write_codec(str(tmp_path / "codec"), own)
    read = open_codec(str(tmp_path / "codec"))
    assert read.hash == own.hash and read.config == own.config
    np.testing.assert_array_equal(read.encode(list(pictures(2))), own.encode(list(pictures(2))))
    assert small_codec(side=32).hash != own.hash
    with pytest.raises(InputError, match=r"no codec.json here; give a folder that moma codec"):
        open_codec(str(tmp_path))


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda folder: (folder / "codec.safetensors").unlink(), "weights are missing"),
        (lambda folder: (folder / "codec.safetensors").write_bytes(b"else"), "not those of its description"),
        (lambda folder: change(folder, side=24.5), "codec.side: expected int, found 24.5"),
        (lambda folder: change(folder, side=15), "15 pixels cannot be halved 1 times; use a multiple of 2"),
        (lambda folder: change(folder, blocks=10**12), "codec.blocks: must be at least 0 and at most 64"),
        (lambda folder: change(folder, multipliers=[1] * 65), "codec.multipliers: 65 levels; .* 64 at most"),
        (lambda folder: change(folder, widht=3), "codec.widht: no such field"),
        (
            lambda folder: change(folder, codebook=64),
            "parameter codebook_VC has shape .32, 4., by its description .64, 4.",
        ),
        (lambda folder: change(folder, attention_levels=[2]), "there is no level 2; they are 0 to 1"),
        (lambda folder: (folder / "codec.json").write_text('{"kind": "tiles"}'), "kind 'tiles' is unknown"),
    ],
)
def test_a_damaged_folder_is_one_line(own, tmp_path, breakage, message):
    write_codec(str(tmp_path), own)
    breakage(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        open_codec(str(tmp_path))
    assert "\n" not in str(error.value)


def change(folder, **fields):
    data = json.loads((folder / "codec.json").read_text())
    data["network"] |= fields
    (folder / "codec.json").write_text(json.dumps(data))


@pytest.mark.slow
def test_eight_devices_give_the_same_codes(own, tmp_path):
    write_codec(str(tmp_path), own)
    np.save(tmp_path / "pictures.npy", pictures(21))
    code = (
        "import numpy as np\nfrom moma_jax.codec.folder import open_codec\nfrom moma_jax.codec import vqgan\n"
        "vqgan.BATCH_PIXELS = 512\n"
        f"codes = open_codec({str(tmp_path)!r}).encode(list(np.load({str(tmp_path / 'pictures.npy')!r})))\n"
        f"np.save({str(tmp_path / 'codes.npy')!r}, codes)"
    )
    output(spawn("-c", code, devices=8))
    np.testing.assert_array_equal(np.load(tmp_path / "codes.npy"), own.encode(list(pictures(21))))


def test_the_description_says_everything(own):
    again = codec_of(json.loads(json.dumps(own.to_json())), lambda: own.weights)
    assert again.config == own.config and again.hash == own.hash
