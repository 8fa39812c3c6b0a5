"""JPEG as a reference: bytes of the scan alone, the best quality that fits."""
import numpy as np
from PIL import Image

from ldm_jax.evaluation.jpeg import compress, within
from ldm_jax.evaluation.metrics import psnr

RNG = np.random.default_rng(0)
SMOOTH = np.asarray(Image.fromarray(RNG.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((32, 32), Image.Resampling.BICUBIC))
NOISE = RNG.integers(0, 255, (32, 32, 3), dtype=np.uint8)


def test_a_flat_picture_costs_next_to_nothing():
    """One DC coefficient in each of 4 + 1 + 1 blocks of 16x16 pixels: some bytes, where the whole file has hundreds."""
    size, again = compress(np.full((32, 32, 3), 77, np.uint8), 50)
    assert 1 <= size < 30 and np.abs(again.astype(int) - 77).max() <= 2


def test_the_best_quality_within_the_budget():
    images = np.stack([SMOOTH, NOISE])
    for budget in (100, 300, 900):
        used, again = within(images, budget)
        for image, out in zip(images, again):
            sizes = {q: compress(image, q)[0] for q in range(1, 96)}
            fits = [q for q, size in sizes.items() if size <= budget]
            if fits:
                best = compress(image, max(fits))[1]
                assert psnr(out[None], image[None])[0] >= psnr(best[None], image[None])[0] - 0.2  # sizes are not quite monotone
            else:
                np.testing.assert_array_equal(out, compress(image, 1)[1])
    assert within(images[:1], 900)[0] <= 900


def test_grey_pictures():
    size, again = compress(NOISE[..., :1], 90)
    assert again.shape == (32, 32, 1) and size > 500
