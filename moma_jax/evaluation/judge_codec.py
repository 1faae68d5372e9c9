"""`moma codec eval`: any image tokenizer, a palette too, on held-out pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from moma_jax.codec import Codec
from moma_jax.codec.folder import DESCRIPTION, open_codec
from moma_jax.codec.pictures import load_picture, png_of
from moma_jax.codec.quality import Quality, sheet_of
from moma_jax.data.store import open_store
from moma_jax.errors import InputError
from moma_jax.storage.directory import Directory, require_new_file, write_file
from moma_jax.training.codec.config import PicturesConfig
from moma_jax.training.codec.pictures import Pictures

SHOWN = 32
"""Pictures of a sheet."""


def judge(
    path: str, data: str, *, most: int | None = None, held_out: float = 0.05, side: int | None = None,
    sheet: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Figures of the codec in a folder or a store on held-out pictures (`quality.Quality`), and its side and codebook.

    Args:
      data: a source of pictures. most: how many of them; None: all. held_out: where the source has no split.
      side: at which pictures are compared; None: the codec's. sheet: a new PNG file, None: none.

    Raises:
      InputError: there is no codec, it cannot draw, there are no pictures, or the sheet cannot be written.
    """
    if sheet is not None:
        require_new_file("--sheet", sheet)
    for option, value in (("--pictures", most), ("--side", side)):
        if value is not None and value <= 0:
            raise InputError(f"{option}: {value}; give at least 1")
    if not 0 <= held_out < 1:
        raise InputError(f"--held-out: {held_out}; give a share from 0 to below 1")
    codec = _codec(path)
    if not codec.draws:
        raise InputError(f"{path}: it has no decoder, so there is nothing to compare; import a codec that has one")
    own = side or codec.side
    options = {"data.source": "--data", "data.held_out": "--held-out"}
    pictures = Pictures(PicturesConfig(source=data, held_out=held_out), options)
    judged, shown = Quality(codec.codebook), []
    for some in pictures.held_out(lambda image: load_picture(image, own, codec.crop), most):
        codes = codec.encode(list(some))
        drawn = np.stack([_enlarged(picture, own) for picture in codec.decode(codes)])
        judged.add(some, drawn, codes)
        shown += list(zip(some, drawn, strict=True))[: SHOWN - len(shown)]
    if sheet is not None:
        write_file(sheet, png_of(sheet_of(*zip(*shown, strict=True))))
    return {**judged.figures(), "side": own, "codebook": codec.codebook, "codes_per_picture": codec.codes_per_image}


def _codec(path: str) -> Codec:
    """The codec of a folder or of a store."""
    folder = Directory(path)
    if folder.read_json(DESCRIPTION) is not None:
        return open_codec(path)
    if folder.read_json("manifest.json") is not None:
        if (codec := open_store(path).image_codec()) is None:
            raise InputError(f"{path}: a store without an image codec; give the folder of one")
        return codec
    if folder.read_json("config.json") is not None:
        raise InputError(
            f"{path}: no {DESCRIPTION} here; it is written when the training is complete (if it is, remove "
            "summary.json and run the same moma codec train again)"
        )
    return open_codec(path)  # says what is missing


def _enlarged(picture: Image.Image, side: int) -> np.ndarray:
    """uint8 (side, side, 3), bicubically where it is of another size."""
    return np.asarray(picture if picture.width == side else picture.resize((side, side), Image.Resampling.BICUBIC))
