"""PSNR, SSIM and use of a codebook, beside slow NumPy."""

import numpy as np
import pytest

from moma_jax.codec.quality import Quality, sheet_of, use_of


def gaussian():
    at = np.arange(11) - 5
    weights = np.exp(-0.5 * (at / 1.5) ** 2)
    return np.outer(weights, weights) / np.outer(weights, weights).sum()


def slow_ssim(a, b):
    """Wang et al., 2004, equation 13, by windows: the mean over channels and windows inside the picture."""
    window, values = gaussian()[..., None], []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = (each[y : y + 11, x : x + 11] for each in (a, b))
            mean_p, mean_q = ((window * each).sum((0, 1)) for each in (p, q))
            var_p, var_q = (window * p * p).sum((0, 1)) - mean_p**2, (window * q * q).sum((0, 1)) - mean_q**2
            both = (window * p * q).sum((0, 1)) - mean_p * mean_q
            c1, c2 = 0.01**2, 0.03**2
            values.append(
                (2 * mean_p * mean_q + c1) * (2 * both + c2) / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2))
            )
    return np.mean(values)


def test_quality_is_that_of_slow_numpy():
    random = np.random.default_rng(0)
    truth = random.integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    drawn = np.clip(truth + random.normal(0, [[[[5]]], [[[20]]], [[[60]]]], truth.shape), 0, 255).astype(np.uint8)
    codes = np.array([[0, 1], [1, 1], [3, 1]])
    judged = Quality(8)
    judged.add(truth[:2], drawn[:2], codes[:2])
    judged.add(truth[2:], drawn[2:], codes[2:])
    found = judged.figures()
    a, b = truth / 255, drawn / 255
    error_B = [np.mean((x - y) ** 2) for x, y in zip(a, b, strict=True)]
    assert found["psnr"] == pytest.approx(np.mean([10 * np.log10(1 / e) for e in error_B]), abs=1e-4)
    assert found["ssim"] == pytest.approx(np.mean([slow_ssim(x, y) for x, y in zip(a, b, strict=True)]), abs=1e-4)
    assert found["pictures"] == 3
    assert found["codebook_use"] == 3 / 8
    share = np.array([1, 4, 1]) / 6
    assert found["perplexity"] == pytest.approx(np.exp(-np.sum(share * np.log(share))))


def test_the_truth_itself_has_100_dB():
    truth = np.zeros((1, 16, 16, 3), np.uint8)
    judged = Quality(2)
    judged.add(truth, truth, np.zeros((1, 4), int))
    assert judged.figures() == {"pictures": 1, "psnr": 100, "ssim": 1, "codebook_use": 0.5, "perplexity": 1}


def test_equal_use_is_the_whole_codebook():
    assert use_of(np.full(7, 3)) == {"codebook_use": 1, "perplexity": pytest.approx(7)}


def test_a_sheet_has_every_picture_above_its_reconstruction():
    truth = [np.full((16, 16, 3), 10 * i, np.uint8) for i in range(9)]
    sheet = np.asarray(sheet_of(truth, [255 - each for each in truth]))
    assert sheet.shape == (2 * (34 + 4) + 4, 8 * 20 + 4, 3)
    assert (sheet[4:20, 44:60] == 20).all() and (sheet[22:38, 44:60] == 235).all()
    assert (sheet[42:58, 4:20] == 80).all() and (sheet[60:76, 4:20] == 175).all()
