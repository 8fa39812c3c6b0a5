"""The Gaussian terms of one step against scipy in float64 and against improved DDPM's tables."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from ldm_jax.process import gaussians
from ldm_jax.process.schedules import SCHEDULES, from_betas

RNG = np.random.default_rng(0)


def test_kl_is_the_integral():
    for m1, v1, m2, v2 in [(0.3, -1.0, -0.5, 0.7), (1.0, 0.2, 1.0, 0.2), (0.0, 1.5, 2.0, -0.5)]:
        p, q = stats.norm(m1, np.exp(v1 / 2)), stats.norm(m2, np.exp(v2 / 2))
        expected = integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -20, 20)[0]
        np.testing.assert_allclose(gaussians.kl(*map(jnp.float32, (m1, v1, m2, v2))), expected, atol=1e-5)


def test_discretized_likelihood_is_the_mass_of_the_bin():
    k = RNG.integers(0, 256, 400)
    k[:20], k[20:40] = 0, 255
    x, std = k / 127.5 - 1, np.exp(RNG.uniform(-6, 1, 400))
    mean = x + 3 * std * RNG.normal(size=400)
    high = np.where(k == 255, np.inf, (x + 1 / 255 - mean) / std)
    low = np.where(k == 0, -np.inf, (x - 1 / 255 - mean) / std)
    # upper-tail bins by their mirror image, as a difference of distribution functions near 1 would cancel
    mirrored = low > -high
    low, high = np.where(mirrored, -high, low), np.where(mirrored, -low, high)
    expected = np.log(stats.norm.cdf(high) - stats.norm.cdf(low))
    args = [jnp.asarray(a, jnp.float32) for a in (x, mean, np.log(std))]
    found = jax.jit(gaussians.discretized_log_likelihood)(*args)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    gradient = jax.jit(jax.grad(lambda m, s: gaussians.discretized_log_likelihood(args[0], m, s).sum(), (0, 1)))(*args[1:])
    assert all(np.isfinite(g).all() for g in gradient)


def test_discretized_likelihood_sums_to_one_and_survives_the_tails():
    levels, log_likelihood = jnp.linspace(-1, 1, 256), jax.jit(gaussians.discretized_log_likelihood)
    for mean, std in [(0.1, 0.02), (-1.4, 0.5), (0.99, 0.001)]:
        np.testing.assert_allclose(jnp.exp(log_likelihood(levels, mean, np.log(std))).sum(), 1.0, atol=1e-4)
    far = gaussians.discretized_log_likelihood(jnp.float32(1.0), jnp.float32(-1.0), jnp.float32(np.log(0.01)))
    np.testing.assert_allclose(far, stats.norm.logsf((2 - 1 / 255) / 0.01), rtol=1e-4)  # about -2e4 nats
    eight = jax.jit(gaussians.discretized_log_likelihood, static_argnums=3)(jnp.linspace(-1, 1, 8), 0.2, -1.0, 8)
    np.testing.assert_allclose(jnp.exp(eight).sum(), 1.0, atol=1e-5)


@pytest.mark.parametrize("betas", [np.linspace(1e-4, 0.02, 1000), np.array([0.1, 0.3, 0.2, 0.4])], ids=["linear", "four"])
def test_posterior_is_improved_ddpms_table(betas):
    T = len(betas)
    abar = np.cumprod(1 - betas)
    before = np.append(1.0, abar[:-1])
    variance = betas * (1 - before) / (1 - abar)
    clipped = np.log(np.append(variance[1], variance[1:]))  # the first entry clipped to the second
    schedule = from_betas(betas)
    t, s = (jnp.asarray((np.arange(T) + i) / T, jnp.float32) for i in (1, 0))
    small, large = jax.jit(lambda t, s: gaussians.posterior_log_variances(schedule, t, s))(t, s)
    np.testing.assert_allclose(small, clipped, atol=2e-3)
    np.testing.assert_allclose(large, np.log(betas), atol=2e-3)
    for frac in (0.0, 0.25, 1.0):  # Nichol & Dhariwal 2021, eq. 15
        found = gaussians.interpolated_log_variance(schedule, t, s, jnp.full((T, 2), frac))
        np.testing.assert_allclose(found, np.repeat((frac * np.log(betas) + (1 - frac) * clipped)[:, None], 2, 1), atol=2e-3)
    x0, x_t = RNG.normal(size=(2, T, 1))
    mean = (np.sqrt(before) * betas / (1 - abar))[:, None] * x0 + (np.sqrt(1 - betas) * (1 - before) / (1 - abar))[:, None] * x_t
    np.testing.assert_allclose(gaussians.posterior_mean(schedule, jnp.float32(x0), jnp.float32(x_t), t, s), mean, atol=1e-3)


@pytest.mark.parametrize("name", ["scaled_linear", "zero_terminal", "rectified_flow", "edm", "sub_vp", "learned"])
def test_one_step_is_finite_at_the_ends(name):
    schedule = SCHEDULES[name]()
    early = jnp.maximum(1e-3, schedule.t_of_logsnr(13.0))
    t, s = jnp.array([1.0, 1.0, 0.5, early, 1.0]), jnp.array([0.999, 0.5, 0.0, 0.0, 0.0])
    x = jnp.linspace(-1, 1, 15).reshape(5, 3)

    @jax.jit
    def terms(frac):
        logvar = gaussians.interpolated_log_variance(schedule, t, s, frac)
        return gaussians.posterior_log_variances(schedule, t, s), gaussians.vlb_term(schedule, x, 0.5 * x, t, s, 0.1 * x, logvar)

    (small, large), term = terms(jnp.full_like(x, 0.3))
    gradient = jax.jit(jax.grad(lambda frac: terms(frac)[1].sum()))(jnp.full_like(x, 0.3))
    assert all(np.isfinite(a).all() for a in (small, large, term, gradient)) and np.all(small <= large + 1e-5)


def test_vlb_term_splits_at_data():
    schedule = SCHEDULES["linear"]()
    x0, x_t = jnp.round(jnp.linspace(0, 255, 6).reshape(2, 3)) / 127.5 - 1, jnp.linspace(-2, 2, 6).reshape(2, 3)
    t, s = jnp.array([0.001, 0.5]), jnp.array([0.0, 0.499])
    logvar = jnp.full((2, 3), -6.0)
    term = jax.jit(lambda: gaussians.vlb_term(schedule, x0, x_t, t, s, 0.9 * x0, logvar))()
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    beta, before = 1 - abar[499] / abar[498], abar[498]
    variance = beta * (1 - before) / (1 - abar[499])
    shift = np.sqrt(before) * beta / (1 - abar[499]) * 0.1 * np.asarray(x0[1])
    expected = 0.5 * (-6 - np.log(variance) + (variance + shift**2) * np.exp(6) - 1)
    np.testing.assert_allclose(term[1], expected, rtol=1e-3)
    # the step into data has mean 0.9 x0, as r = 0 there
    np.testing.assert_allclose(term[0], -gaussians.discretized_log_likelihood(x0[0], 0.9 * x0[0], jnp.float32(-3.0)), rtol=1e-4)
