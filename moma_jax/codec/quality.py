"""How good an image tokenizer is on pictures: PSNR, SSIM, use of its codebook; and truth beside reconstruction."""

from __future__ import annotations

from collections.abc import Iterable

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

LEAST_ERROR = 1e-10
"""Mean squared error, of pixels from 0 to 1, below which PSNR rises no further: 100 dB."""
COLUMNS, GAP = 8, 4
"""Pairs of a row of a sheet; white pixels between pictures."""


class Quality:
    """Adds up pictures beside their reconstructions.

    PSNR (dB) and SSIM (Wang et al., 2004, by dm-pix: Gaussian windows of 11 pixels) are means over pictures of that of
    each. `codebook_use` is the share of codes that occur at all, `perplexity` the exponential of their entropy: what
    the codebook's size would be if all of its codes were as frequent.
    """

    def __init__(self, codebook: int):
        self._psnr, self._ssim = [], []
        self._chosen_V = np.zeros(codebook, np.int64)

    def add(self, truth_BHW3: np.ndarray, drawn_BHW3: np.ndarray, code_BK: np.ndarray) -> None:
        """Adds pictures, uint8, of one size, and the codes that were drawn."""
        truth, drawn = (np.asarray(x, np.float32) / 255 for x in (truth_BHW3, drawn_BHW3))
        error_B = np.square(truth - drawn).reshape(len(truth), -1).mean(axis=1, dtype=np.float64)
        self._psnr += (-10 * np.log10(np.maximum(error_B, LEAST_ERROR))).tolist()
        self._ssim += np.asarray(_ssim(truth, drawn), np.float64).tolist()
        self._chosen_V += np.bincount(np.asarray(code_BK).ravel(), minlength=len(self._chosen_V))

    def figures(self) -> dict[str, float]:
        """The means; there is at least one picture."""
        means = {"psnr": float(np.mean(self._psnr)), "ssim": float(np.mean(self._ssim))}
        return {"pictures": len(self._psnr), **means, **use_of(self._chosen_V)}


@jax.jit
def _ssim(truth_BHW3, drawn_BHW3):
    return dm_pix.ssim(jnp.asarray(truth_BHW3), jnp.asarray(drawn_BHW3))


def use_of(chosen_V: np.ndarray) -> dict[str, float]:
    """`codebook_use` and `perplexity` of counts of codes, of which there are some."""
    share_V = chosen_V / chosen_V.sum()
    present = share_V[share_V > 0]
    return {
        "codebook_use": float(len(present) / len(share_V)),
        "perplexity": float(np.exp(-np.sum(present * np.log(present)))),
    }


def sheet_of(truth: Iterable[np.ndarray], drawn: Iterable[np.ndarray]) -> Image.Image:
    """A contact sheet: every picture, uint8 (N, N, 3), above its reconstruction."""
    pairs = [
        np.concatenate([above, np.full((GAP // 2, above.shape[1], 3), 255, np.uint8), below])
        for above, below in zip(truth, drawn, strict=True)
    ]
    height, width = (size + GAP for size in pairs[0].shape[:2])
    rows = -(-len(pairs) // COLUMNS)
    sheet = Image.new("RGB", (min(len(pairs), COLUMNS) * width + GAP, rows * height + GAP), "white")
    for i, pair in enumerate(pairs):
        sheet.paste(Image.fromarray(pair), (GAP + i % COLUMNS * width, GAP + i // COLUMNS * height))
    return sheet
