"""Picture files to pixels, within limits: what every image tokenizer reads.

A picture has the codec's size: scaled as a whole, or its middle square alone.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 1 << 25
"""Pixels of the largest picture that is decoded. Pillow takes 4 bytes for each, and transparency and rotation up to two
copies more: 400 MB at most, for each picture that is read at once."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is decoded; Pillow's rarer decoders (and those that start programs) stay out of reach."""


class BrokenPicture(ValueError):
    """A picture that cannot be decoded, or is too large to try."""


# Reading pictures -----------------------------------------------------------------------------------------------------


def load_picture(image: bytes | np.ndarray, side: int, crop: bool = False) -> np.ndarray:
    """One picture as `side` x `side` pixels on white, uint8 of shape (side, side, 3), sRGB.

    Every cell becomes the mean of the pixels it covers (a box filter: no ringing, and a picture that has this size
    already stays as it is). Animations give their first frame.

    Args:
      image: an encoded file, or pixels of shape (height, width, 3), uint8.
      crop: the middle square is taken, as public tokenizers do; else all is, and the aspect ratio is not kept.

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
        return np.asarray(_decode_file(image, side, crop))
    return np.asarray(_reduced(picture, side, crop))


def _decode_file(image: bytes, side: int, crop: bool) -> Image.Image:
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
            return _on_white(_reduced(_filterable(picture), side, crop))
    except BrokenPicture:
        raise
    except UnidentifiedImageError as error:  # its message holds an address in memory, and reports must be reproducible
        raise BrokenPicture(f"cannot be decoded: not a picture of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise BrokenPicture(f"cannot be decoded: {reason}") from error


def _reduced(picture: Image.Image, side: int, crop: bool) -> Image.Image:
    width, height = picture.size
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    box = (left, top, left + short, top + short) if crop else None
    return picture.resize((side, side), Image.Resampling.BOX, box)


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


def png_of(picture: Image.Image) -> bytes:
    """A picture as a PNG file."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def checked_codes(codes_NC, codes: int, codebook: int) -> np.ndarray:
    """Codes of pictures as an array; raises ValueError for another shape than (N, codes), or codes outside it."""
    codes_NC = np.asarray(codes_NC)
    if codes_NC.ndim != 2 or codes_NC.shape[1] != codes:
        raise ValueError(f"codes of shape {codes_NC.shape}; expected (N, {codes})")
    if codes_NC.size and (codes_NC.min() < 0 or codes_NC.max() >= codebook):
        raise ValueError(f"codes outside 0..{codebook - 1}")
    return codes_NC
