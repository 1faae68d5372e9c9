"""Picture files to pixels, within limits: what every image tokenizer reads.

A picture has the codec's size: scaled as a whole, or a square of it alone.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

MAX_PIXELS = 1 << 25
"""Pixels of the largest picture that is decoded. Pillow takes 4 bytes for each, and transparency and rotation up to two
copies more: 400 MB at most, for each picture that is read at once."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is decoded; Pillow's rarer decoders (and those that start programs) stay out of reach."""


WHITE = (255, 255, 255)
ORIENTATION = 0x0112
"""The tag that says how a camera was held."""


class BrokenPicture(ValueError):
    """A picture that cannot be decoded, or is too large to try."""


# Reading pictures -----------------------------------------------------------------------------------------------------


def load_picture(
    image: bytes | np.ndarray, side: int, crop: str = "whole", ground: tuple[int, int, int] = WHITE, seed: int = 0
) -> np.ndarray:
    """One picture as `side` x `side` pixels, uint8 of shape (side, side, 3), sRGB.

    Every cell becomes the mean of the pixels it covers (a box filter: no ringing, and a picture that has this size
    already stays as it is). Animations give their first frame.

    Args:
      image: an encoded file, or pixels of shape (height, width, 3), uint8.
      crop: "whole" keeps all of it, and not its aspect ratio; "centre" takes the middle square, as public tokenizers
        do; "random" a square anywhere along the longer side, which `seed` and the picture's bytes decide.
      ground: colour under transparent pixels.

    Raises:
      BrokenPicture: damaged, of an unknown format, or larger than MAX_PIXELS.
    """
    return read_picture(image, side, crop, ground, seed).pixels_HW3


class Read(NamedTuple):
    """A picture as it was read.

    Attributes:
      pixels_HW3: uint8 (side, side, 3).
      width, height: of the file, turned as it says.
      key: 64 bits that are equal for equal pixels at this size, wherever they are cropped.
    """

    pixels_HW3: np.ndarray
    width: int
    height: int
    key: int


def read_picture(
    image: bytes | np.ndarray, side: int, crop: str = "whole", ground: tuple[int, int, int] = WHITE, seed: int = 0
) -> Read:
    """See `load_picture`, whose arguments and errors these are."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise BrokenPicture(f"pixels of shape {image.shape}, {image.dtype}; expected uint8 (height, width, 3)")
        (height, width), content = image.shape[:2], image
        reduce = functools.partial(_reduced_pixels, image, side)
        return _read(reduce, crop, width, height, content, seed)
    return _read_file(image, side, crop, ground, seed)


def _read(reduce: Callable[[Any], np.ndarray], crop: str, width: int, height: int, content, seed: int) -> Read:
    """Args: reduce: gives the pixels of a box of the picture, None of all of it. content: what was read."""
    square = reduce(_box(crop, width, height, content, seed))
    same = reduce(_box("centre", width, height, content, seed)) if crop == "random" else square
    return Read(square, width, height, int.from_bytes(hashlib.sha256(same.tobytes()).digest()[:8]))


def _box(crop: str, width: int, height: int, content, seed: int) -> tuple[float, float, float, float] | None:
    """Left, top, right and bottom of what is kept; None: everything."""
    if crop == "whole":
        return None
    short, share = min(width, height), 0.5
    if crop == "random":
        digest = hashlib.sha256(seed.to_bytes(8) + (content if isinstance(content, bytes) else content.tobytes()))
        share = int.from_bytes(digest.digest()[:8]) / 2**64
    left, top = (width - short) * share, (height - short) * share
    return left, top, left + short, top + short


def _reduced_pixels(image: np.ndarray, side: int, box) -> np.ndarray:
    if image.shape[:2] == (side, side):
        return image
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX, box))


def _read_file(image: bytes, side: int, crop: str, ground: tuple[int, int, int], seed: int) -> Read:
    """A picture file as side x side pixels, RGB."""
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise BrokenPicture(f"{width} x {height} pixels, more than {MAX_PIXELS}")
            # A JPEG can be decoded at an eighth of its size: many times faster, and still fine enough to average.
            picture.draft("RGB", (4 * side, 4 * side))
            picture.load()
            turned = picture.getexif().get(ORIENTATION, 1) if picture.format != "JPEG" or "exif" in picture.info else 1
            if turned != 1:
                ImageOps.exif_transpose(picture, in_place=True)
                width, height = (height, width) if turned > 4 else (width, height)
            flat = _in_srgb(_filterable(picture), picture.info.get("icc_profile"))

            def reduce(box):
                scaled = None if box is None else _scaled(box, flat.width / width, flat.height / height)
                return np.asarray(_on(ground, flat.resize((side, side), Image.Resampling.BOX, scaled)))

            return _read(reduce, crop, width, height, image, seed)
    except BrokenPicture:
        raise
    except UnidentifiedImageError as error:  # its message holds an address in memory, and reports must be reproducible
        raise BrokenPicture(f"cannot be decoded: not a picture of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise BrokenPicture(f"cannot be decoded: {reason}") from error


def _scaled(box: tuple[float, float, float, float], across: float, down: float) -> tuple[float, float, float, float]:
    """A box of the file in what was decoded of it, which may be smaller; never beyond its edge by rounding."""
    left, top, right, bottom = box
    return left * across, top * down, right * across, bottom * down


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """The picture's colours as sRGB, where its file names another space of red, green and blue."""
    change = None if not profile or picture.mode == "L" else _to_srgb(profile, picture.mode)
    return picture if change is None else ImageCms.applyTransform(picture, change)


@functools.lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str):
    """What makes colours of a profile sRGB; None where they are, or the profile is none of RGB."""
    try:
        found = ImageCms.getOpenProfile(io.BytesIO(profile))
        if found.profile.xcolor_space != "RGB " or "srgb" in (found.profile.profile_description or "").lower():
            return None
        return ImageCms.buildTransform(found, ImageCms.createProfile("sRGB"), mode, mode)
    except (ImageCms.PyCMSError, OSError):
        return None  # a damaged profile says nothing


def colour_of(text: str) -> tuple[int, int, int]:
    """Red, green and blue of #rrggbb; raises ValueError."""
    if not re.fullmatch("#[0-9a-fA-F]{6}", text):
        raise ValueError(f"{text!r} is not #rrggbb")
    return tuple(bytes.fromhex(text[1:]))


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


def _on(ground: tuple[int, int, int], picture: Image.Image) -> Image.Image:
    """RGB on a ground."""
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (*ground, 255)), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def png_of(picture: Image.Image) -> bytes:
    """A picture as a PNG file."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def data_uri(picture: Image.Image) -> str:
    """A picture as an address that holds it whole, for HTML."""
    return f"data:image/png;base64,{base64.b64encode(png_of(picture)).decode()}"


def checked_codes(codes_NC, codes: int, codebook: int) -> np.ndarray:
    """Codes of pictures as an array; raises ValueError for another shape than (N, codes), or codes outside it."""
    codes_NC = np.asarray(codes_NC)
    if codes_NC.ndim != 2 or codes_NC.shape[1] != codes:
        raise ValueError(f"codes of shape {codes_NC.shape}; expected (N, {codes})")
    if codes_NC.size and (codes_NC.min() < 0 or codes_NC.max() >= codebook):
        raise ValueError(f"codes outside 0..{codebook - 1}")
    return codes_NC
