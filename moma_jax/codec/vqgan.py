"""A VQGAN ready to use: pictures to codes and back in batches of one shape, on all devices that are there."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from PIL import Image

from moma_jax.codec.interface import description_hash
from moma_jax.codec.layouts import abstract_parameters
from moma_jax.codec.network import Vqgan, VqganConfig
from moma_jax.codec.pictures import checked_codes, load_picture
from moma_jax.errors import InputError
from moma_jax.fields import read, shown

FORMAT_VERSION = 1
UNSAID = (("patch", 1),)
"""Fields that came after the first codecs were written, at the value that these have: their hashes stay."""
BATCH_PIXELS = 1 << 20
"""Pixels that a device encodes or decodes at once: four pictures of 512 x 512, in about 3 GB for Chameleon's."""
MOST_AT_ONCE = 64
"""Pictures of a batch at most: a call with fewer pays for all of it, as every batch has the same shape."""
ROWS = "rows"
"""The mesh axis that pictures are split along."""


class VqganCodec:
    """A trained VQGAN. Its methods may be called from several threads.

    Attributes:
      config: its network. params: its parameters, NumPy float32.
    """

    kind, crop = "vqgan", "centre"

    def __init__(self, config: VqganConfig, params: Mapping[str, Any]):
        self.config, self.params = config, params
        self._runs: dict[str, Any] = {}
        self._placed, self._lock = None, threading.Lock()

    @property
    def side(self) -> int:
        """Pixels of a row and of a column."""
        return self.config.side

    @property
    def codes_per_image(self) -> int:
        """Codes of one picture, row by row."""
        return self.config.places**2

    @property
    def codebook(self) -> int:
        """Number of codes."""
        return self.config.codebook

    @property
    def draws(self) -> bool:
        """Whether there is a decoder."""
        return self.config.decoder

    def read(self, image: bytes | np.ndarray) -> np.ndarray:
        """The middle square of one picture at the codec's size, uint8 (side, side, 3); raises BrokenPicture."""
        return load_picture(image, self.side, self.crop)

    def encode(self, images: Sequence[bytes | np.ndarray]) -> np.ndarray:
        """Codes of pictures, int32 (N, codes_per_image). Takes files, pixels, or what `read` gave.

        Raises:
          BrokenPicture: one of them cannot be read; `read` them one by one to know which.
        """
        if not len(images):
            return np.zeros((0, self.codes_per_image), np.int32)
        return self._in_batches("encode", np.stack([self.read(image) for image in images]))

    def decode(self, codes_NC: np.ndarray) -> list[Image.Image]:
        """Pictures of codes (N, codes_per_image).

        Raises:
          ValueError: another shape, or codes outside the codebook.
          InputError: the codec has no decoder.
        """
        if not self.draws:
            raise InputError(
                "image codec: it has no decoder, so its codes cannot be drawn; import one that has it (Chameleon's own "
                "vqgan.ckpt instead of the safetensors)"
            )
        codes_NC = checked_codes(codes_NC, self.codes_per_image, self.codebook).astype(np.int32)
        return [Image.fromarray(pixels) for pixels in self._in_batches("decode", codes_NC)] if len(codes_NC) else []

    def _in_batches(self, what: str, input_NX: np.ndarray) -> np.ndarray:
        """All rows through a compiled function, in batches of one shape; the last is filled up with its first row. One
        thread at a time: each run takes all devices, and the memory of a batch."""
        results = []
        with self._lock:
            run, size = self._compiled(what)
            for start in range(0, len(input_NX), size):
                batch_BX = input_NX[start : start + size]
                missing = size - len(batch_BX)
                whole_BX = np.concatenate([batch_BX, np.repeat(batch_BX[:1], missing, axis=0)]) if missing else batch_BX
                results.append(np.asarray(run(self._placed, whole_BX))[: len(batch_BX)])
        return np.concatenate(results)

    def _compiled(self, what: str) -> tuple[Any, int]:
        """(function of parameters on the devices and a batch, rows of a batch)."""
        mesh = Mesh(np.array(jax.local_devices()), (ROWS,), axis_types=(AxisType.Auto,))
        if self._placed is None:
            self._placed = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))
        if what not in self._runs:
            body = functools.partial(encode_pixels if what == "encode" else decode_codes, self.config)
            specs = PartitionSpec(), PartitionSpec(ROWS)
            self._runs[what] = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(ROWS)))
        return self._runs[what], mesh.size * batch_size(self.side)

    @property
    def hash(self) -> str:
        """SHA-256 of the codec, as hex."""
        return description_hash(self.to_json())

    @functools.cached_property
    def weights(self) -> bytes:
        """The parameters as safetensors."""
        flat = {name: np.ascontiguousarray(value) for name, value in flatten_dict(self.params, sep="/").items()}
        return safetensors.numpy.save(dict(sorted(flat.items())))

    def to_json(self) -> dict[str, Any]:
        """What the codec is; `from_json` reads it back beside `weights`."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "network": {k: v for k, v in dataclasses.asdict(self.config).items() if (k, v) not in UNSAID},
            "weights": hashlib.sha256(self.weights).hexdigest(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], weights: bytes) -> VqganCodec:
        """Reads `to_json`'s dictionary and `weights`; InputError where they do not belong together."""
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(f"image codec: format version {shown(version)}; this reads {FORMAT_VERSION}")
        config = read(VqganConfig, data.get("network"), "codec").check()
        if hashlib.sha256(weights).hexdigest() != data.get("weights"):
            raise InputError("image codec: its weights are not those of its description; restore or import it again")
        try:
            flat = safetensors.numpy.load(weights)
        except safetensors.SafetensorError as error:
            raise InputError(f"image codec: its weights are damaged ({str(error)[:100]}); import it again") from error
        codec = cls(config, unflatten_dict(flat, sep="/"))
        wanted = flatten_dict(abstract_parameters(config), sep="/")
        for name, own in wanted.items():
            if (shape := getattr(flat.get(name), "shape", None)) != own.shape:
                raise InputError(f"image codec: parameter {name} has shape {shape}, by its description {own.shape}")
            if flat[name].dtype != np.float32 or not np.isfinite(flat[name]).all():
                raise InputError(f"image codec: parameter {name} is not float32, or not finite; import it again")
        if strange := sorted(set(flat) - set(wanted)):
            raise InputError(f"image codec: parameter {strange[0]} is none of its network's; import it again")
        codec.__dict__["weights"] = weights  # as they came: another safetensors might write them otherwise
        return codec


def batch_size(side: int) -> int:
    """Pictures of a batch on one device."""
    return min(MOST_AT_ONCE, max(1, BATCH_PIXELS // side**2))


def encode_pixels(config: VqganConfig, params: Any, pixels_BHW3) -> jax.Array:
    """int32 codes (B, K) of uint8 pixels, one device's. In float32 on every platform: with less, codes would differ."""
    with jax.default_matmul_precision("highest"):
        return Vqgan(config).apply({"params": params}, to_network(config, pixels_BHW3), method="codes")


def decode_codes(config: VqganConfig, params: Any, code_BK) -> jax.Array:
    """uint8 pixels (B, N, N, 3) of codes, one device's."""
    return from_network(config, Vqgan(config).apply({"params": params}, code_BK, method="pixels"))


def to_network(config: VqganConfig, pixels_BHW3):
    """uint8 pixels as the network's float32."""
    return config.lowest + pixels_BHW3.astype(jnp.float32) * ((1 - config.lowest) / 255)


def from_network(config: VqganConfig, x_BHW3):
    """The inverse of `to_network`, within bounds."""
    share_BHW3 = (x_BHW3 - config.lowest) / (1 - config.lowest)
    return jnp.round(255 * jnp.clip(share_BHW3, 0, 1)).astype(jnp.uint8)
