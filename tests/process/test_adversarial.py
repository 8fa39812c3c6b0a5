"""Adversarial losses, the gradient penalty and the adaptive weight, against hand-made numbers."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.process.adversarial import ADVERSARIAL, adaptive_weight, r1

REAL = np.array([[[-2.0], [0.5]], [[3.0], [0.0]]])  # two examples of two logits
FAKE = np.array([[[-3.0], [0.25]], [[1.0], [2.0]]])

# by hand for hinge and least squares; the others' definitions through log s(a), s the sigmoid
EXPECTED = {
    "hinge": ([(3 + 0.5 + 0 + 1.25) / 2, (0 + 1 + 2 + 3) / 2], [2.75 / 2, -1.5]),
    "least_squares": ([(9 + 0.25 + 9 + 0.0625) / 4, (4 + 1 + 1 + 4) / 4], [(16 + 0.5625) / 4, (0 + 1) / 4]),
    "non_saturating": ((np.log1p(np.exp(-REAL)) + np.log1p(np.exp(FAKE))).mean((1, 2)), np.log1p(np.exp(-FAKE)).mean((1, 2))),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_values(name):
    row, (discriminator, generator) = ADVERSARIAL[name], EXPECTED[name]
    np.testing.assert_allclose(row.discriminator(jnp.asarray(REAL), jnp.asarray(FAKE)), discriminator, rtol=1e-6)
    np.testing.assert_allclose(row.generator(jnp.asarray(FAKE)), generator, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(ADVERSARIAL))
def test_who_pulls_where(name):
    """At undecided logits the discriminator raises real and lowers fake ones, the generator raises fake ones; all per example."""
    row, zero = ADVERSARIAL[name], jnp.zeros((3, 4, 5, 1))
    assert row.discriminator(zero, zero).shape == row.generator(zero).shape == (3,)
    real, fake = jax.jit(jax.grad(lambda r, f: row.discriminator(r, f)[1], (0, 1)))(zero + 0.1, zero + 0.1)
    made = jax.jit(jax.grad(lambda f: row.generator(f)[1]))(zero)
    assert np.all(real[1] < 0) and np.all(fake[1] > 0) and np.all(made[1] < 0)
    assert not np.any(real[0]) and not np.any(fake[2]) and not np.any(made[0])


@pytest.mark.parametrize("name", sorted(ADVERSARIAL))
def test_large_and_half_precision_logits(name):
    row = ADVERSARIAL[name]
    for a in (1e4, -1e4):
        logits = jnp.full((1, 2), a, jnp.bfloat16)
        for loss in (row.discriminator(logits, logits), row.generator(logits)):
            assert loss.dtype == jnp.float32 and np.all(np.isfinite(loss))


def test_r1():
    """D_p(x) = w_p . x + |x|^2 / 2 at two positions p: the gradient of their sum is w_1 + w_2 + 2 x, for each example its own."""
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(2, 3, 4, 2)), rng.normal(size=(5, 3, 4, 2))

    def logits(x):
        return jnp.einsum("bhwc,phwc->bp", x, w) + 0.5 * jnp.sum(x**2, (1, 2, 3))[:, None]

    got = jax.jit(lambda x: r1(logits, x))(jnp.asarray(x))
    np.testing.assert_allclose(got, ((w.sum(0) + 2 * x) ** 2).sum((1, 2, 3)), rtol=1e-5)


def test_adaptive_weight():
    rec = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((2,), 4.0)}
    adv = {"kernel": jnp.zeros((2, 2)), "bias": jnp.ones((2,))}
    np.testing.assert_allclose(adaptive_weight(rec, adv), np.sqrt(36 + 32) / (np.sqrt(2) + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(adaptive_weight(jnp.ones(4), jnp.zeros(4), maximum=1e6), 2e4, rtol=1e-6)
    assert adaptive_weight(jnp.ones(4), jnp.zeros(4)) == 1e4 and adaptive_weight(rec, adv, maximum=2.0) == 2.0
    assert jax.grad(lambda a: adaptive_weight(a, 2 * a))(1.5) == 0
