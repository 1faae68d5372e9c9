"""Image tokenizers: pictures to codes and back.

    read      a file or pixels -> one picture of the codec's size, checked
    encode    pictures -> codes (N, K)          decode    codes -> pictures, where it `draws`
    side, codes_per_image, codebook, hash       what ids of a store depend on
    to_json, weights                            what it is; a folder and a store hold both

Two kinds: a palette (codec/palette.py), and a VQGAN (codec/vqgan.py over codec/network.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moma_jax.codec.interface import Codec
from moma_jax.codec.palette import PaletteCodec
from moma_jax.errors import InputError
from moma_jax.fields import shown

__all__ = ["Codec", "codec_of"]


def codec_of(data: Mapping[str, Any], weights: Callable[[], bytes | None]) -> Codec:
    """The codec, of any kind, that `to_json` described.

    Args:
      weights: reads the weights that lie beside the description, for a kind that has some.

    Raises:
      InputError: the kind is unknown, or the weights are missing or others.
    """
    match data.get("kind"):
        case "palette":
            return PaletteCodec.from_json(data)
        case "vqgan":
            from moma_jax.codec.vqgan import VqganCodec  # a palette needs no JAX

            if (content := weights()) is None:
                raise InputError("image codec: its weights are missing; restore them, or import it again")
            return VqganCodec.from_json(data, content)
    raise InputError(f"image codec: kind {shown(data.get('kind'))} is unknown; known: palette, vqgan")
