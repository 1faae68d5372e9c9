"""A palette, as ImageGPT used (Chen et al., 2020): each pixel of a small picture is a code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

from moma_jax.codec.interface import description_hash
from moma_jax.codec.pictures import checked_codes, load_picture
from moma_jax.errors import InputError
from moma_jax.fields import shown

FORMAT_VERSION = 1
SAMPLE_PIXELS = 1 << 19
"""Pixels that a palette is fitted on, at most."""
LLOYD_STEPS = 24
LOOKED_UP = 4096
"""Colours whose code is looked up at once: their arrays stay small enough to be reused."""
MOST_SIDE = 4096


class PaletteCodec:
    """Each pixel of a side x side picture becomes the nearest of K colours in OKLab.

    Attributes:
      side: pixels of a row and of a column.
      palette_K3: the colours, uint8 sRGB.
    """

    kind, crop = "palette", "whole"

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
        self._known_C = np.zeros(1 << 24, np.uint32)  # code + 1 of every colour that was met; memory as it is touched

    draws, weights = True, None

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
        return load_picture(image, self.side, self.crop)

    def encode(self, images: Sequence[bytes | np.ndarray]) -> np.ndarray:
        """Codes of pictures, int32 of shape (N, side * side). Takes files, pixels, or what `read` gave.

        Raises:
          BrokenPicture: one of them cannot be read; `read` them one by one to know which.
        """
        if not len(images):
            return np.zeros((0, self.codes_per_image), np.int32)
        pixels_P3 = np.stack([self.read(image) for image in images]).reshape(-1, 3)
        colour_P = _pack(pixels_P3)
        # Each colour is looked up once; several threads may do so at once, and write the same.
        colour_U = np.unique(colour_P[self._known_C[colour_P] == 0])
        for start in range(0, len(colour_U), LOOKED_UP):
            some_U = colour_U[start : start + LOOKED_UP]
            self._known_C[some_U] = self._tree.query(oklab(_unpack(some_U)))[1] + 1
        return (self._known_C[colour_P] - 1).astype(np.int32).reshape(len(images), -1)

    def decode(self, codes_NC: np.ndarray) -> list[Image.Image]:
        """Pictures of codes of shape (N, side * side); raises ValueError for another shape or codes outside 0..K-1."""
        codes_NC = checked_codes(codes_NC, self.codes_per_image, self.codebook)
        pixels_NHW3 = self.palette_K3[codes_NC].reshape(-1, self.side, self.side, 3)
        return [Image.fromarray(pixels) for pixels in pixels_NHW3]

    @property
    def hash(self) -> str:
        """SHA-256 of the codec, as hex."""
        return description_hash(self.to_json())

    def to_json(self) -> dict:
        """A plain dictionary that `from_json` reads back."""
        palette = self.palette_K3.tolist()
        return {"format_version": FORMAT_VERSION, "kind": self.kind, "side": self.side, "palette": palette}

    @classmethod
    def from_json(cls, data: dict) -> PaletteCodec:
        """Reads `to_json`'s dictionary; raises InputError for another format version or kind."""
        version, kind = data.get("format_version"), data.get("kind")
        if version != FORMAT_VERSION or kind != cls.kind:
            raise InputError(
                f"image codec: {shown(kind)} of format version {shown(version)}; this reads palette, {FORMAT_VERSION}"
            )
        side, palette = data.get("side"), data.get("palette")
        try:
            palette_K3 = np.asarray(palette)
        except ValueError as error:  # rows of several lengths
            raise InputError("image codec: its palette is damaged; restore it") from error
        if type(side) is not int or not 1 <= side <= MOST_SIDE or palette_K3.dtype.kind not in "iu":
            raise InputError(f"image codec: side {shown(side)}, or its palette, is damaged; restore it")
        return cls(side, palette_K3)


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


_SHARE_256 = np.arange(256) / 255
_LINEAR_256 = np.where(_SHARE_256 <= 0.04045, _SHARE_256 / 12.92, ((_SHARE_256 + 0.055) / 1.055) ** 2.4)
"""Light of each value of a channel."""


def oklab(pixels_P3: np.ndarray) -> np.ndarray:
    """OKLab (L, a, b) of sRGB colours, float64 of the same shape."""
    linear_P3 = _LINEAR_256[np.asarray(pixels_P3)]
    return np.cbrt(linear_P3 @ _TO_LMS.T) @ _TO_LAB.T


def from_oklab(lab_P3: np.ndarray) -> np.ndarray:
    """The nearest sRGB colours, uint8."""
    lms_P3 = (lab_P3 @ np.linalg.inv(_TO_LAB).T) ** 3
    linear_P3 = np.clip(lms_P3 @ np.linalg.inv(_TO_LMS).T, 0, 1)
    share_P3 = np.where(linear_P3 <= 0.0031308, linear_P3 * 12.92, 1.055 * linear_P3 ** (1 / 2.4) - 0.055)
    return np.rint(share_P3 * 255).astype(np.uint8)
