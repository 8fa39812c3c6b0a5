"""Score distillation against the closed form for Gaussian data, and the surrogate loss against the gradient it stands for."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.process.distillation import DISTILLATION_WEIGHTS, DISTILLATIONS, dds_gradient, sds_gradient, surrogate_loss, vsd_gradient
from ldm_jax.process.schedules import SCHEDULES
from ldm_jax.types import UserError, example_keys, normal
from tests.oracle import GAUSSIAN, gaussian, point_mass

W = {"sigma2": lambda a, s: s**2, "uniform": lambda a, s: 1.0 + 0 * s, "alpha_sigma2": lambda a, s: a * s**2,
     "x0": lambda a, s: s / a}
FLOW = SCHEDULES["rectified_flow"]()


def images(n, d=2, seed=5):
    return normal(jax.random.key(seed), (n, d)) + 0.3


@pytest.mark.parametrize("schedule", [FLOW, SCHEDULES["cosine"]()], ids=lambda s: s.name)
@pytest.mark.parametrize("weight", sorted(DISTILLATION_WEIGHTS))
def test_sds_is_closed_form_on_gaussian(schedule, weight):
    """eps_hat - eps averaged over eps is a sigma (a^2 C + s^2)^-1 (x - m); the mean of many draws at one t must meet it."""
    n = 20000
    x = images(1)
    many = jnp.broadcast_to(x, (n, 2))
    for t in (0.25, 0.75):
        g, metrics = sds_gradient(GAUSSIAN.denoiser(schedule), schedule, many, jax.random.key(0), weight=weight, t_min=t, t_max=t)
        t_used = float(metrics["t"][0])
        a, s = float(schedule.alpha(t_used)), float(schedule.sigma(t_used))
        cov = a**2 * GAUSSIAN.covs[0] + s**2 * np.eye(2)
        expected = W[weight](a, s) * a * s * np.linalg.solve(cov, np.asarray(x[0], float) - GAUSSIAN.means[0])
        g = np.asarray(g, float)
        assert np.all(np.abs(g.mean(0) - expected) < 4.5 * g.std(0) / np.sqrt(n))


@pytest.mark.parametrize("weight", sorted(DISTILLATION_WEIGHTS))
def test_each_draw_is_weighted_difference_of_noises(weight):
    """For a point mass at p: eps_hat - eps = (alpha / sigma) (x - p) whatever eps is, so every draw has an exact value."""
    x, p = images(64), np.array([0.2, -0.6])
    g, metrics = sds_gradient(point_mass(p).denoiser(FLOW), FLOW, x, jax.random.key(1), weight=weight)
    t = np.asarray(metrics["t"], float)[:, None]
    assert t.min() >= 0.02 and t.max() <= 0.98 and np.ptp(t) > 0.8
    np.testing.assert_allclose(g, W[weight](1 - t, t) * (1 - t) / t * (np.asarray(x) - p), rtol=2e-5, atol=1e-6)


def test_variants_reduce_to_sds():
    """VSD whose own model knows the image alone, and DDS from a source its model is sure of, are both SDS."""
    x, key, denoise = images(8), jax.random.key(2), GAUSSIAN.denoiser(FLOW)
    sds, _ = sds_gradient(denoise, FLOW, x, key)
    vsd, _ = vsd_gradient(denoise, lambda x_t, t: x, FLOW, x, key)
    source = jnp.full_like(x, 0.5)
    dds, _ = dds_gradient(denoise, point_mass([0.5, 0.5]).denoiser(FLOW), FLOW, x, source, key)
    np.testing.assert_allclose(vsd, sds, rtol=1e-6)
    np.testing.assert_allclose(dds, sds, rtol=1e-5, atol=1e-6)


def test_dds_is_the_difference_of_two_sds():
    """Each image under its own denoiser, with the same t and eps."""
    x, source, key = images(8), images(8, seed=9), jax.random.key(10)
    denoise, other = GAUSSIAN.denoiser(FLOW), gaussian([0.0, 1.0], np.eye(2)).denoiser(FLOW)
    dds, _ = dds_gradient(denoise, other, FLOW, x, source, key)
    difference = sds_gradient(denoise, FLOW, x, key)[0] - sds_gradient(other, FLOW, source, key)[0]
    np.testing.assert_allclose(dds, difference, rtol=1e-4, atol=1e-6)


def test_vsd_vanishes_where_models_agree_and_dds_where_images_do():
    x, key, denoise = images(8), jax.random.key(3), GAUSSIAN.denoiser(FLOW)
    assert np.all(np.asarray(vsd_gradient(denoise, denoise, FLOW, x, key)[0]) == 0)
    assert np.all(np.asarray(dds_gradient(denoise, denoise, FLOW, x, x, key)[0]) == 0)
    other = gaussian([0.0, 1.0], np.eye(2)).denoiser(FLOW)
    assert np.abs(dds_gradient(denoise, other, FLOW, x, x, key)[0]).min() > 1e-4


def test_descent_reaches_the_mode():
    """Following the surrogate's gradient through a generator x(theta) finds the mean of Gaussian data."""
    denoise = GAUSSIAN.denoiser(FLOW)

    def loss(theta, key):
        x = jnp.broadcast_to(theta, (512, 2)) * 2.0
        g, _ = sds_gradient(denoise, FLOW, x, key)
        return jnp.mean(surrogate_loss(x, g))

    def step(theta, key):
        return theta - 0.3 * jax.grad(loss)(theta, key), None

    theta, _ = jax.lax.scan(step, jnp.array([2.0, 2.0]), example_keys(jax.random.key(4), 200))
    np.testing.assert_allclose(2.0 * theta, GAUSSIAN.means[0], atol=0.05)


def test_surrogate_loss_has_the_gradient():
    """jax.grad of the surrogate, through a generator, is the returned gradient times dx / dtheta, no network Jacobian."""
    key, denoise, theta = jax.random.key(6), GAUSSIAN.denoiser(FLOW), images(4)

    def loss(theta):
        x = jnp.sin(theta)
        return jnp.sum(surrogate_loss(x, sds_gradient(denoise, FLOW, x, key)[0]))

    g, _ = sds_gradient(denoise, FLOW, jnp.sin(theta), key)
    np.testing.assert_allclose(jax.grad(loss)(theta), g * jnp.cos(theta), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(surrogate_loss(x, x**3)))(theta), theta**3, rtol=1e-6)
    np.testing.assert_allclose(surrogate_loss(jnp.sin(theta), g), 0.5 * np.sum(np.asarray(g) ** 2, -1), rtol=1e-6)


@pytest.mark.parametrize("name", sorted(DISTILLATIONS))
def test_noise_of_an_example_depends_on_its_index_alone(name):
    x, denoise = images(6), GAUSSIAN.denoiser(FLOW)
    call = {"sds": lambda x: sds_gradient(denoise, FLOW, x, jax.random.key(7)),
            "vsd": lambda x: vsd_gradient(denoise, lambda x_t, t: 0.1 * x_t, FLOW, x, jax.random.key(7)),
            "dds": lambda x: dds_gradient(denoise, denoise, FLOW, x, x + 1.0, jax.random.key(7))}[name]
    np.testing.assert_allclose(call(x)[0][:3], call(x[:3])[0], rtol=1e-6)


def test_ends_are_finite_and_unknown_weight_is_refused():
    x, denoise = images(4), GAUSSIAN.denoiser(FLOW)
    for weight in DISTILLATION_WEIGHTS:
        assert np.all(np.isfinite(sds_gradient(denoise, FLOW, x, jax.random.key(8), weight=weight, t_min=1.0, t_max=1.0)[0]))
    with pytest.raises(UserError, match="sigma2"):
        sds_gradient(denoise, FLOW, x, jax.random.key(8), weight="none")
