"""Pictures to codes and back. First kind of codec: a palette, as ImageGPT used (Chen et al., 2020).

A codec offers `codes_per_image`, `codebook`, `encode`, `decode`, `hash`, `to_json` and `read` (one picture, checked
and brought to the codec's size); `codec_from_json` reads back what `to_json` gave.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy.spatial import cKDTree

from moma_jax.errors import InputError

FORMAT_VERSION = 1
MAX_PIXELS = 1 << 25
"""Pixels of the largest picture that is decoded. Pillow takes 4 bytes for each, and transparency and rotation up to two
copies more: 400 MB at most, for each picture that is read at once."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is decoded; Pillow's rarer decoders (and those that start programs) stay out of reach."""
SAMPLE_PIXELS = 1 << 19
"""Pixels that a palette is fitted on, at most."""
LLOYD_STEPS = 24


class BrokenPicture(ValueError):
    """A picture that cannot be decoded, or is too large to try."""


# Reading pictures -----------------------------------------------------------------------------------------------------


def load_picture(image: bytes | np.ndarray, side: int) -> np.ndarray:
    """One picture as `side` x `side` pixels on white, uint8 of shape (side, side, 3), sRGB.

    Every cell becomes the mean of the pixels it covers (a box filter: no ringing, and a picture that has this size
    already stays as it is); the aspect ratio is not kept. Animations give their first frame.

    Args:
      image: an encoded file, or pixels of shape (height, width, 3), uint8.

    Raises:
      BrokenPicture: damaged, of an unknown format, or larger than MAX_PIXELS.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise BrokenPicture(f"pixels of shape {image.shape}, {image.dtype}; expected uint8 (height, width, 3)")
        if image.shape[:2] == (side, side):
            return image
        picture = Image.fromarray(image)
    else:
        return np.asarray(_decode_file(image, side))
    return np.asarray(_reduced(picture, side))


def _decode_file(image: bytes, side: int) -> Image.Image:
    """A picture file as side x side pixels, RGB."""
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise BrokenPicture(f"{width} x {height} pixels, more than {MAX_PIXELS}")
            # A JPEG can be decoded at an eighth of its size: many times faster, and still fine enough to average.
            picture.draft("RGB", (4 * side, 4 * side))
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return _on_white(_reduced(_filterable(picture), side))
    except BrokenPicture:
        raise
    except UnidentifiedImageError as error:  # its message holds an address in memory, and reports must be reproducible
        raise BrokenPicture(f"cannot be decoded: not a picture of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise BrokenPicture(f"cannot be decoded: {reason}") from error


def _reduced(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize((side, side), Image.Resampling.BOX)


def _filterable(picture: Image.Image) -> Image.Image:
    """The picture as grey, RGB or RGBA of 8 bits."""
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
        grey = np.asarray(picture)
        grey = grey if grey.dtype.itemsize == 2 else np.clip(grey, 0, 65535).astype(np.uint16)
        return Image.fromarray(_eight_bits(grey))
    mode = "RGBA" if picture.has_transparency_data else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)


def _eight_bits(value: np.ndarray) -> np.ndarray:
    """uint16 to uint8: value / 257, rounded (at most 0.502 off), without a wider copy."""
    return ((value - (value >> 8) + 128) >> 8).astype(np.uint8)


def _on_white(picture: Image.Image) -> Image.Image:
    """RGB on a white ground."""
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return picture.convert("RGB")


# The palette ----------------------------------------------------------------------------------------------------------


class PaletteCodec:
    """Each pixel of a side x side picture becomes the nearest of K colours in OKLab.

    Attributes:
      side: pixels of a row and of a column.
      palette_K3: the colours, uint8 sRGB.
    """

    kind = "palette"

    def __init__(self, side: int, palette_K3: np.ndarray):
        palette_K3 = np.asarray(palette_K3)
        if side < 1 or palette_K3.ndim != 2 or palette_K3.shape[1:] != (3,) or not len(palette_K3):
            raise InputError(
                f"palette: side {side}, colours of shape {palette_K3.shape}; expected (K, 3), K at least 1"
            )
        if palette_K3.min() < 0 or palette_K3.max() > 255:
            raise InputError("palette: colours are whole numbers from 0 to 255")
        self.side, self.palette_K3 = side, palette_K3.astype(np.uint8)
        self._tree = cKDTree(oklab(self.palette_K3))

    @property
    def codes_per_image(self) -> int:
        """Codes of one picture, row by row."""
        return self.side * self.side

    @property
    def codebook(self) -> int:
        """Number of codes K."""
        return len(self.palette_K3)

    def read(self, image: bytes | np.ndarray) -> np.ndarray:
        """One picture at the codec's size, uint8 (side, side, 3), fit for `encode`; raises BrokenPicture."""
        return load_picture(image, self.side)

    def encode(self, images: Sequence[bytes | np.ndarray]) -> np.ndarray:
        """Codes of pictures, int32 of shape (N, side * side). Takes files, pixels, or what `read` gave.

        Raises:
          BrokenPicture: one of them cannot be read; `read` them one by one to know which.
        """
        if not len(images):
            return np.zeros((0, self.codes_per_image), np.int32)
        pixels_P3 = np.stack([self.read(image) for image in images]).reshape(-1, 3)
        # Few of the pixels differ, so each colour is looked up once.
        colour_U, inverse_P = np.unique(_pack(pixels_P3), return_inverse=True)
        _, code_U = self._tree.query(oklab(_unpack(colour_U)))
        return code_U.astype(np.int32)[inverse_P].reshape(len(images), -1)

    def decode(self, codes_NC: np.ndarray) -> list[Image.Image]:
        """Pictures of codes of shape (N, side * side); raises ValueError for another shape or codes outside 0..K-1."""
        codes_NC = np.asarray(codes_NC)
        if codes_NC.ndim != 2 or codes_NC.shape[1] != self.codes_per_image:
            raise ValueError(f"codes of shape {codes_NC.shape}; expected (N, {self.codes_per_image})")
        if codes_NC.size and (codes_NC.min() < 0 or codes_NC.max() >= self.codebook):
            raise ValueError(f"codes outside 0..{self.codebook - 1}")
        pixels_NHW3 = self.palette_K3[codes_NC].reshape(-1, self.side, self.side, 3)
        return [Image.fromarray(pixels) for pixels in pixels_NHW3]

    @property
    def hash(self) -> str:
        """SHA-256 of the codec, as hex."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict:
        """A plain dictionary that `codec_from_json` reads back."""
        palette = self.palette_K3.tolist()
        return {"format_version": FORMAT_VERSION, "kind": self.kind, "side": self.side, "palette": palette}

    @classmethod
    def from_json(cls, data: dict) -> PaletteCodec:
        """Reads `to_json`'s dictionary; raises InputError for another format version or kind."""
        version, kind = data.get("format_version"), data.get("kind")
        if version != FORMAT_VERSION or kind != cls.kind:
            raise InputError(f"image codec: {kind!r} of format version {version}; this reads palette, {FORMAT_VERSION}")
        return cls(int(data["side"]), np.asarray(data["palette"], np.int64))


def codec_from_json(data: dict) -> PaletteCodec:
    """The codec, of any kind, that `to_json` described; raises InputError where it is unknown."""
    match data.get("kind"):
        case "palette":
            return PaletteCodec.from_json(data)
    raise InputError(f"image codec: kind {data.get('kind')!r} is unknown; known: palette")


def fit_palette(images: Iterable[bytes | np.ndarray], side: int, colours: int, seed: int) -> PaletteCodec:
    """Fits K colours to pictures: k-means in OKLab. The same pictures and seed give the same palette.

    The first centres weigh a colour by the square root of its pixels, so that white grounds do not draw all of them.
    Where the pictures have no more than K colours, the palette has exactly these, then others spread over the cube.

    Args:
      images: training pictures only; broken ones raise BrokenPicture.
      side: side of the codec's picture, in pixels.
      colours: K.
      seed: of the sample of pixels and of the first centres.
    """
    if not 1 <= colours <= 1 << 16:
        raise InputError(f"prepare.colours: {colours}; give 1 to 65536")
    pixels = [load_picture(image, side).reshape(-1, 3) for image in images]
    if not pixels:
        raise InputError("prepare.source: no training picture to fit the palette on; check the source and its split")
    random = np.random.default_rng(seed)
    packed_P = _pack(np.concatenate(pixels))
    if len(packed_P) > SAMPLE_PIXELS:
        packed_P = random.choice(packed_P, SAMPLE_PIXELS, replace=False)
    colour_U, count_U = np.unique(packed_P, return_counts=True)
    if len(colour_U) > colours:
        centre_K3 = _k_means(oklab(_unpack(colour_U)), count_U, colours, random)
        colour_U = np.unique(_pack(from_oklab(centre_K3)))
    return PaletteCodec(side, _sorted(_padded(colour_U, colours)))


def _k_means(point_P3: np.ndarray, weight_P: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Centres of weighted points: k-means++ by the weights' square roots, then Lloyd's steps."""
    centre_K3 = np.empty((count, 3))
    distance_P = np.full(len(point_P3), np.inf)
    seeding_P = score_P = np.sqrt(weight_P)
    for k in range(count):
        total_P = np.cumsum(score_P)
        chosen = min(np.searchsorted(total_P, random.random() * total_P[-1], side="right"), len(point_P3) - 1)
        centre_K3[k] = point_P3[chosen]
        distance_P = np.minimum(distance_P, np.square(point_P3 - centre_K3[k]).sum(axis=1))
        score_P = seeding_P * distance_P
    for _ in range(LLOYD_STEPS):
        distance_P, nearest_P = cKDTree(centre_K3).query(point_P3)
        mass_K = np.bincount(nearest_P, weight_P, count)
        filled_K = mass_K > 0
        for axis in range(3):
            sum_K = np.bincount(nearest_P, weight_P * point_P3[:, axis], count)
            centre_K3[filled_K, axis] = sum_K[filled_K] / mass_K[filled_K]
        # A centre that nothing is nearest to moves to one of the points that are served worst.
        worst = np.argsort(-distance_P * weight_P, kind="stable")[: np.count_nonzero(~filled_K)]
        centre_K3[~filled_K] = point_P3[worst]
    return centre_K3


def _padded(colour_U: np.ndarray, count: int) -> np.ndarray:
    """`count` different packed colours: the given ones, then points of a Halton sequence over the cube."""
    chosen, index = list(map(int, colour_U)), 1
    taken = set(chosen)
    while len(chosen) < count:
        point = np.array([[_halton(index, base) * 256 for base in (2, 3, 5)]]).astype(np.uint8)
        packed = int(_pack(point)[0])
        if packed not in taken:
            taken.add(packed)
            chosen.append(packed)
        index += 1
    return np.array(chosen, np.uint32)


def _halton(index: int, base: int) -> float:
    value, scale = 0.0, 1.0
    while index:
        scale /= base
        value += scale * (index % base)
        index //= base
    return value


def _sorted(colour_K: np.ndarray) -> np.ndarray:
    """Colours uint8 (K, 3), dark to light."""
    colour_K = np.sort(colour_K)
    palette_K3 = _unpack(colour_K)
    return palette_K3[np.argsort(oklab(palette_K3)[:, 0].round(6), kind="stable")]


def _pack(pixels_P3: np.ndarray) -> np.ndarray:
    """Colours as one number each, uint32."""
    red_P, green_P, blue_P = pixels_P3.astype(np.uint32).T
    return red_P << 16 | green_P << 8 | blue_P


def _unpack(colour_P: np.ndarray) -> np.ndarray:
    return np.stack([colour_P >> 16 & 255, colour_P >> 8 & 255, colour_P & 255], axis=-1).astype(np.uint8)


# OKLab (Ottosson, 2020): Euclidean distance is close to how different two colours look ------------------------------

_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def oklab(pixels_P3: np.ndarray) -> np.ndarray:
    """OKLab (L, a, b) of sRGB colours, float64 of the same shape."""
    share_P3 = np.asarray(pixels_P3, np.float64) / 255
    linear_P3 = np.where(share_P3 <= 0.04045, share_P3 / 12.92, ((share_P3 + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear_P3 @ _TO_LMS.T) @ _TO_LAB.T


def from_oklab(lab_P3: np.ndarray) -> np.ndarray:
    """The nearest sRGB colours, uint8."""
    lms_P3 = (lab_P3 @ np.linalg.inv(_TO_LAB).T) ** 3
    linear_P3 = np.clip(lms_P3 @ np.linalg.inv(_TO_LMS).T, 0, 1)
    share_P3 = np.where(linear_P3 <= 0.0031308, linear_P3 * 12.92, 1.055 * linear_P3 ** (1 / 2.4) - 0.055)
    return np.rint(share_P3 * 255).astype(np.uint8)
