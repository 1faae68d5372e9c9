"""Palette codec: what is decoded, what is refused, and how close pictures stay."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from moma_jax.codec import codec_of, pictures
from moma_jax.codec.palette import PaletteCodec, fit_palette, from_oklab, oklab
from moma_jax.codec.pictures import BrokenPicture, load_picture
from moma_jax.data import scenes
from moma_jax.errors import InputError


def encoded(pixels, kind="PNG", mode=None, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels), mode).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed, shape=(16, 16, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_a_picture_of_the_right_size_keeps_its_pixels(kind):
    pixels = noise(0)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(load_picture(encoded(pixels, kind, **options), 16), pixels)
    assert np.array_equal(load_picture(pixels, 16), pixels)


def test_larger_pictures_are_averaged_and_need_not_be_square():
    pixels = noise(1, (8, 4, 3))
    mean = pixels.reshape(4, 2, 4, 3).mean(axis=1)
    assert np.abs(load_picture(pixels, 4) - mean).max() <= 1
    assert load_picture(noise(2, (3, 7, 3)), 16).shape == (16, 16, 3)


def test_the_middle_square_can_be_taken():
    pixels = noise(3, (4, 8, 3))
    assert np.array_equal(load_picture(encoded(pixels), 4, crop="centre"), pixels[:, 2:6])


def test_what_is_transparent_becomes_white():
    clear = np.zeros((4, 4, 4), np.uint8)
    assert (load_picture(encoded(clear), 2) == 255).all()
    half = np.full((4, 4, 4), (0, 0, 0, 128), np.uint8)
    assert np.abs(load_picture(encoded(half), 2).astype(int) - 127).max() <= 1


def test_sixteen_bits_of_grey_are_not_clipped():
    grey = np.full((4, 4), 32896, np.uint16)
    assert (load_picture(encoded(grey), 4) == 128).all()


def test_sixteen_bits_become_eight_by_rounding():
    value = np.arange(1 << 16, dtype=np.uint16)
    assert np.abs(pictures._eight_bits(value) - value / 257).max() < 0.51


def test_what_a_camera_turned_is_turned_back_before_it_is_reduced():
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    turned = load_picture(encoded(pixels, exif=exif.tobytes()), 4)
    assert (turned[:2] == 255).all() and (turned[2:] == 0).all()


def test_broken_pictures_are_named_as_such(monkeypatch):
    whole = encoded(noise(3, (64, 64, 3)))
    reasons = []
    for content in (b"no picture", b"no picture either"):
        with pytest.raises(BrokenPicture) as caught:
            load_picture(content, 16)
        reasons.append(str(caught.value))
    assert len(set(reasons)) == 1 and "0x" not in reasons[0], "reports are the same every time"
    for content in (b"", b"no picture", whole[: len(whole) // 2], encoded(noise(3), "JPEG")[:200], b"%!PS-Adobe-3.0"):
        with pytest.raises(BrokenPicture, match="cannot be decoded"):
            load_picture(content, 16)
    for pixels in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(BrokenPicture, match="expected uint8"):
            load_picture(pixels, 16)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(BrokenPicture, match="64 x 64 pixels"):
        load_picture(whole, 16)


def test_oklab_has_its_published_values_and_an_inverse():
    assert np.allclose(oklab([[255, 255, 255]]), [[1, 0, 0]], atol=1e-3)
    assert np.allclose(oklab([[255, 0, 0]]), [[0.6280, 0.2249, 0.1258]], atol=1e-3)
    colours = noise(4, (500, 3))
    assert np.array_equal(from_oklab(oklab(colours)), colours)


def test_few_colours_come_back_exactly():
    pictures = [scenes.render(scenes.scene(seed), 16) for seed in range(40)]
    codec = fit_palette(pictures, 16, 24, seed=0)
    codes = codec.encode(pictures)
    assert (codes.shape, codes.dtype) == ((40, 256), np.int32)
    assert all(np.array_equal(a, b) for a, b in zip(map(np.asarray, codec.decode(codes)), pictures, strict=True))
    assert len(np.unique(codec.palette_K3, axis=0)) == codec.codebook == 24


def test_every_pixel_gets_the_nearest_colour():
    codec = fit_palette([noise(5)], 16, 20, seed=1)
    picture = noise(6)
    lab_K3 = oklab(codec.palette_K3)
    for pixel, code in zip(picture.reshape(-1, 3)[:50], codec.encode([picture])[0], strict=False):
        assert code == np.argmin(np.square(oklab(pixel) - lab_K3).sum(axis=1))
    single = [codec.encode([p])[0] for p in (picture, encoded(picture))]
    assert np.array_equal(single, codec.encode([picture, encoded(picture)]))


def test_fit_is_deterministic_keeps_white_and_beats_a_random_palette():
    smooth = [np.asarray(Image.fromarray(noise(s, (3, 3, 3))).resize((16, 16))) for s in range(20)]
    smooth += [np.full((16, 16, 3), 255, np.uint8)] * 20
    codec = fit_palette(smooth, 16, 64, seed=0)
    assert codec.hash == fit_palette(iter(smooth), 16, 64, seed=0).hash
    assert codec.hash != fit_palette(smooth, 16, 64, seed=1).hash
    assert [255, 255, 255] in codec.palette_K3.tolist()
    lattice = np.array(list(itertools.product((32, 96, 160, 224), repeat=3)))

    def error(c):
        decoded = np.stack([np.asarray(p) for p in c.decode(c.encode(smooth))])
        return np.mean((decoded.astype(float) - np.stack(smooth)) ** 2)

    assert error(codec) < 0.5 * error(PaletteCodec(16, lattice))


def test_json_round_trip_and_refusals():
    codec = fit_palette([noise(7)], 16, 8, seed=0)
    assert codec_of(codec.to_json(), lambda: None).hash == codec.hash
    assert (codec.codebook, codec.codes_per_image) == (8, 256)
    assert codec.encode([]).shape == (0, 256)
    for data in ({}, {"kind": "vector"}, {**codec.to_json(), "format_version": 9}):
        with pytest.raises(InputError, match="image codec"):
            codec_of(data, lambda: None)
    with pytest.raises(InputError, match="whole numbers from 0 to 255"):
        codec_of({**codec.to_json(), "palette": [[0, 0, 256]]}, lambda: None)
    with pytest.raises(ValueError, match="outside"):
        codec.decode(np.full((1, 256), 8))
    with pytest.raises(ValueError, match="shape"):
        codec.decode(np.zeros((1, 255), int))
    with pytest.raises(InputError, match="no training picture"):
        fit_palette([], 16, 8, seed=0)
    with pytest.raises(InputError, match="colours"):
        fit_palette([noise(7)], 16, 0, seed=0)


@pytest.mark.parametrize("changes", [{"side": None}, {"side": "x"}, {"side": 4.5}, {"side": 10**7}, {"palette": "abc"},
                                     {"palette": [[1, 2, 3], [4]]}, {"palette": [[0.5, 1, 2]]}])  # fmt: skip
def test_a_damaged_description_is_one_line(changes):
    description = {"format_version": 1, "kind": "palette", "side": 4, "palette": [[0, 0, 0]], **changes}
    with pytest.raises(InputError, match="palette"):
        PaletteCodec.from_json(description)
