"""The codebook against double loops and closed forms."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import quantizer

RNG = np.random.default_rng(0)


def draws(*shape, scale=1.0):
    return (scale * RNG.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("K", [1, 7, 1024, 1025, 2500])  # one part, several, the last one full or not
def test_nearest_against_every_distance(K):
    codebook, z = draws(K, 3), draws(2, 5, 4, 3)
    distance = ((z[..., None, :].astype(np.float64) - codebook) ** 2).sum(-1)
    ids = jax.jit(quantizer.nearest)(codebook, z)
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, distance.argmin(-1))


def test_of_equal_codes_the_first_is_taken():
    codebook = np.ones((2100, 2), np.float32)
    codebook[:3] = 5.0
    np.testing.assert_array_equal(quantizer.nearest(codebook, np.ones((4, 2), np.float32)), 3)


def test_far_from_zero_the_choice_is_still_right():
    """Codes 0.1 apart at a distance of 30: rounding z or the codes to bfloat16 would mix them up."""
    codebook = 30.0 + 0.1 * np.arange(50, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    np.testing.assert_array_equal(quantizer.nearest(codebook, codebook + 0.02), np.arange(50))
    assert "Precision.HIGHEST" in str(jax.make_jaxpr(quantizer.nearest)(codebook, codebook))  # GPUs and TPUs round without it


def test_every_code_is_its_own():
    codebook = draws(300, 4)
    quantized, ids = quantizer.quantize(codebook, codebook)
    np.testing.assert_array_equal(ids, np.arange(300))
    np.testing.assert_allclose(quantized, codebook, atol=1e-6)


def test_the_straight_through_gradient():
    """d/dz f(z + sg[e - z]) = f'(e), and nothing reaches the codebook; f = sum e^3 a has f' = 3 e^2 a."""
    codebook, z, a = draws(20, 3), draws(2, 4, 3), draws(2, 4, 3)
    e = codebook[((z[..., None, :] - codebook) ** 2).sum(-1).argmin(-1)]
    of_codes, of_z = jax.grad(lambda codebook, z: jnp.sum(quantizer.quantize(codebook, z)[0] ** 3 * a), (0, 1))(codebook, z)
    np.testing.assert_allclose(quantizer.quantize(codebook, z)[0], e, atol=1e-6)
    np.testing.assert_allclose(of_z, 3 * e**2 * a, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(of_codes, 0.0)


def test_losses_and_which_side_each_moves():
    codebook, z = draws(6, 3), draws(2, 4, 5, 3)
    ids = np.asarray(quantizer.nearest(codebook, z))
    squared = ((z.astype(np.float64) - codebook[ids]) ** 2).mean((1, 2, 3))
    weight = np.array([1.0, -2.0], np.float32)
    for i, term in enumerate(quantizer.vq_losses(codebook, z, ids)):
        assert term.shape == (2,)
        np.testing.assert_allclose(term, squared, rtol=1e-5)
        total = lambda codebook, z: jnp.sum(weight * quantizer.vq_losses(codebook, z, ids)[i])
        of_codes, of_z = jax.grad(total, (0, 1))(codebook, z)
        slope = 2 * weight[:, None, None, None] * (z - codebook[ids]) / z[0].size
        by_code = np.zeros((6, 3))
        np.add.at(by_code, ids, -slope)
        np.testing.assert_allclose(of_codes, by_code if i == 0 else 0.0, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(of_z, slope if i == 1 else 0.0, rtol=1e-4, atol=1e-6)


def test_counts_and_perplexity():
    counts = quantizer.count(jnp.array([[3, 3], [0, 5]]), 6)
    np.testing.assert_array_equal(counts, [1, 0, 0, 2, 0, 1])
    assert quantizer.perplexity(counts) == pytest.approx(2**1.5, rel=1e-5)  # shares 1/4, 1/2, 1/4: 1.5 bits
    assert quantizer.perplexity(jnp.full((512,), 7)) == pytest.approx(512, rel=1e-4)
    assert quantizer.perplexity(jnp.array([0, 9, 0])) == pytest.approx(1.0)


def test_usage_is_a_moving_average_and_dead_codes_start_again():
    codebook, candidates = draws(4, 2), draws(4, 2)
    usage, counts = jnp.array([1.0, 1.0, 0.105, 0.105]), jnp.array([6, 0, 0, 2])
    step = jax.jit(lambda *args: quantizer.refresh(*args, decay=0.9, below=0.1))
    got, new = step(codebook, usage, counts, candidates)
    # 0.9 u + 0.1 * 4 * share: 0.9 + 0.3, 0.9, 0.0945 (dead), 0.0945 + 0.1
    np.testing.assert_allclose(new, [1.2, 0.9, 1.0, 0.1945], rtol=1e-5)
    np.testing.assert_array_equal(got, np.where([[False], [False], [True], [False]], candidates, codebook))


def test_usage_of_one_is_kept_by_uniform_counts():
    codebook = draws(4, 2)
    got, usage = quantizer.refresh(codebook, jnp.ones(4), jnp.full((4,), 3), -codebook, decay=0.5, below=0.99)
    np.testing.assert_allclose(usage, 1.0, rtol=1e-6)
    np.testing.assert_array_equal(got, codebook)
