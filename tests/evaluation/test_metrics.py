"""The measurements on pictures whose scores are known."""
import numpy as np
import pytest
from PIL import Image

from ldm_jax.evaluation import evaluate, metrics, pictures
from ldm_jax.types import UserError


def striped(labels, noise=0.0, seed=0):
    """8x8 pictures with row `label` lit."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(0, noise, (len(labels), 8, 8, 1)) if noise else np.zeros((len(labels), 8, 8, 1))
    images[np.arange(len(labels)), labels] = 1.0
    return pictures.to_uint8(images)


def test_nearest_distance_against_a_double_loop():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(size=(7, 4, 4, 3)), rng.uniform(size=(11, 4, 4, 3))
    expected = [min(np.sqrt(np.mean((x - y) ** 2)) for y in b) for x in a]
    np.testing.assert_allclose(metrics.nearest_distance(a, b, chunk=3), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics.nearest_distance(b[:2], b), 0.0, atol=1e-6)


def test_psnr():
    black, grey = np.zeros((2, 4, 4, 1)), np.full((2, 4, 4, 1), 0.1)
    np.testing.assert_allclose(metrics.psnr(grey, black), 20.0, atol=1e-4)


def test_ssim_against_the_formula_window_by_window():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(2, 13, 15, 3))
    y = 0.7 * x + 0.3 * rng.uniform(size=x.shape)
    w = np.exp(-np.add.outer(np.arange(-5, 6) ** 2, np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    w /= w.sum()
    expected = np.zeros((2, 3, 5, 3))
    for n, i, j, c in np.ndindex(expected.shape):
        a, b = (image[n, i:i + 11, j:j + 11, c] for image in (x, y))
        mu_a, mu_b = (w * a).sum(), (w * b).sum()
        luminance = (2 * mu_a * mu_b + 1e-4) / (mu_a**2 + mu_b**2 + 1e-4)
        spread = (w * (a - mu_a) ** 2).sum() + (w * (b - mu_b) ** 2).sum() + 9e-4
        expected[n, i, j, c] = luminance * (2 * (w * (a - mu_a) * (b - mu_b)).sum() + 9e-4) / spread
    np.testing.assert_allclose(metrics.ssim(x, y), expected.mean((1, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(metrics.ssim(y, x), metrics.ssim(x, y), atol=1e-12)
    np.testing.assert_allclose(metrics.ssim(x, x), 1.0, atol=1e-12)


def test_ssim_of_constant_images_is_their_luminance_term():
    black, grey = np.zeros((1, 11, 11, 1), np.uint8), np.full((1, 11, 11, 1), 51, np.uint8)  # 51 is 0.2
    np.testing.assert_allclose(metrics.ssim(black, grey), 1e-4 / (0.04 + 1e-4), rtol=1e-4)
    with pytest.raises(UserError, match="10x11"):
        metrics.ssim(black[:, 1:], grey[:, 1:])


def test_evaluation_tells_good_samples_from_wrong_and_copied_ones():
    labels = np.arange(200) % 8
    train, test = ({"image": striped(labels, 0.3, seed), "class": labels} for seed in (1, 2))
    good = evaluate.evaluate_samples(lambda ids: striped(ids, 0.3, 3) / 255.0, train, test, samples=80)
    asked, real, stand_in, distance, held_out = good.values()
    assert asked == real == stand_in == 1.0 and distance == pytest.approx(held_out, rel=0.1)
    wrong = list(evaluate.evaluate_samples(lambda ids: striped((ids + 1) % 8, 0.3, 3) / 255.0, train, test, samples=80).values())
    assert wrong[0] == 0.0 and wrong[2] == 0.0
    copies = list(evaluate.evaluate_samples(lambda ids: train["image"][ids] / 255.0, train, test, samples=80).values())
    assert copies[3] < 1e-6


def test_grid_puts_every_picture_in_its_place(tmp_path):
    rows = [np.full((3, 48, 48, 3), value) for value in (0.0, 0.5)]
    rows[1][2] = 1.0
    image = np.asarray(Image.open(pictures.save(str(tmp_path / "a" / "grid.png"), rows)))
    assert image.shape == (102, 152, 3)
    assert image[30, 30].tolist() == [0] * 3 and image[80, 30].tolist() == [128] * 3 and image[80, 130].tolist() == [255] * 3
    tiny = np.asarray(pictures.grid([np.zeros((2, 8, 8, 1))]))
    assert tiny.shape == (52, 102)  # enlarged by 6


def test_table_shows_every_number():
    text = evaluate.table({"a": 0.5, "longer": 3})
    assert text.splitlines() == ["a       0.5", "longer  3"]
