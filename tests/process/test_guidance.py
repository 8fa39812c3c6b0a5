"""Guidance against the exact tilted scores of a mixture whose components are its classes, and against float64 formulas."""
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.process import GUIDANCE, SCHEDULES, prior, sample
from ldm_jax.process.guidance import classifier, classifier_free, halves, within
from ldm_jax.types import UserError, normal
from tests.oracle import MIXTURE, Mixture, operation_by_operation

KEY = jax.random.key(0)
SCALES = np.array([0.0, 1.0, 2.5, 6.0], np.float32)
T = np.array([0.15, 0.4, 0.7, 0.95], np.float32)


def component(k):
    return Mixture(np.ones(1), MIXTURE.means[k:k + 1], MIXTURE.covs[k:k + 1])


def posterior(schedule, k):
    """log p(k | x_t), exact."""
    return lambda x_t, t: MIXTURE.log_posterior(schedule, x_t, t)[0][:, k]


def states():
    """One x_t for every pair of a time and a scale."""
    t, scale = (jnp.asarray(a.ravel()) for a in np.meshgrid(T, SCALES))
    return 1.5 * normal(KEY, (len(t), 2)), t, scale


def tilted(schedule, x_t, t, scale, k):
    """x0 from the score of p(x_t) p(k | x_t)^scale: (x_t + sigma^2 score) / alpha, with the score by differentiation."""
    def log_density(x):
        log_posterior, log_prob = MIXTURE.log_posterior(schedule, x, t)
        return jnp.sum(log_prob + scale * log_posterior[:, k])

    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    return (x_t + sigma**2 * jax.grad(log_density)(x_t)) / alpha


@pytest.mark.parametrize("schedule_name", ["linear", "ve", "rectified_flow"])
@pytest.mark.parametrize("k", [0, 2])
def test_guidance_is_the_tilted_score(schedule_name, k):
    schedule = SCHEDULES[schedule_name]()
    x_t, t, scale = states()
    x_t = x_t * jnp.hypot(schedule.alpha(t), schedule.sigma(t))[:, None]
    whole, part = MIXTURE.denoiser(schedule), component(k).denoiser(schedule)
    with jax.enable_x64(True):
        want = jax.jit(lambda *a: tilted(schedule, *a, k))(*(jnp.asarray(a, jnp.float64) for a in (x_t, t, scale)))
    tolerance = dict(rtol=2e-3, atol=2e-3)
    free, by_classifier = classifier_free(part, whole, scale), classifier(whole, posterior(schedule, k), scale, schedule)
    free, by_classifier, exact = jax.jit(lambda x_t, t: (free(x_t, t), by_classifier(x_t, t), part(x_t, t)))(x_t, t)
    np.testing.assert_allclose(free, want, **tolerance)
    np.testing.assert_allclose(by_classifier, want, **tolerance)
    one = np.asarray(scale) == 1.0
    np.testing.assert_allclose(exact[one], want[one], **tolerance)


def test_classifier_where_nothing_is_left_of_the_data():
    schedule = SCHEDULES["rectified_flow"]()
    x_t, t = normal(KEY, (3, 2)), jnp.ones(3)
    whole = MIXTURE.denoiser(schedule)
    guided = classifier(whole, posterior(schedule, 0), 3.0, schedule)
    np.testing.assert_allclose(*jax.jit(lambda x_t, t: (guided(x_t, t), whole(x_t, t)))(x_t, t))


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_mean_shift(variance):
    """Against algorithm 1: a step's mean moves by scale Sigma grad, Sigma the variance of the step."""
    schedule = SCHEDULES["linear"]()
    grid = jnp.asarray([0.8, 0.6, 0.4], jnp.float32)
    x, t, s = normal(KEY, (3, 2)), 0.8, 0.6
    frac = 0.3

    def whole(x_t, t):
        x0 = MIXTURE.denoiser(schedule)(x_t, t)
        return (x0, jnp.full_like(x0, frac)) if variance == "learned" else x0

    guided = GUIDANCE["classifier_mean_shift"](whole, posterior(schedule, 1), 1.7, schedule, grid, variance)
    with operation_by_operation():
        plain_x, guided_x = (sample(jax.jit(d), schedule, x, KEY, sampler="ddpm", variance=variance, steps=1, grid=grid[:2])
                             for d in (whole, guided))
    (a_t, s_t), (a_s, s_s) = ((float(schedule.alpha(u)), float(schedule.sigma(u))) for u in (t, s))
    beta = 1 - (a_t / a_s) ** 2
    bounds = dict(small=beta * s_s**2 / s_t**2, large=beta)
    bounds["learned"] = bounds["large"]**frac * bounds["small"]**(1 - frac)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(posterior(schedule, 1)(x, jnp.full(3, t)))))(x)
    np.testing.assert_allclose(guided_x - plain_x, 1.7 * bounds[variance] * grad, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_both_forms_agree_for_small_steps(variance):
    """And so, at scale 1, with the exact conditional denoiser: the difference falls with the step."""
    schedule, x, t = SCHEDULES["rectified_flow"](), normal(KEY, (4, 2)), jnp.full(4, 0.6)
    whole, part = MIXTURE.denoiser(schedule), component(0).denoiser(schedule)
    error = []

    @jax.jit
    def off(h):
        grid = jnp.stack([0.6, 0.6 - h, 0.0])
        shifted = GUIDANCE["classifier_mean_shift"](whole, posterior(schedule, 0), 1.0, schedule, grid, variance)
        return jnp.abs(shifted(x, t) - part(x, t)).max() / jnp.abs(part(x, t) - whole(x, t)).max()

    for h in (0.04, 0.02, 0.01):
        error.append(float(off(h)))
    assert error[-1] < 0.06
    np.testing.assert_allclose(np.diff(np.log2(error)), -1, atol=0.15)


def test_mean_shift_finds_the_next_time_of_each_example():
    schedule = SCHEDULES["rectified_flow"]()
    grids = jnp.asarray([[1.0, 1.0], [0.5, 0.7], [0.2, 0.6], [0.0, 0.0]])
    x, t = normal(KEY, (2, 2)), jnp.asarray([0.5, 0.7])
    whole = MIXTURE.denoiser(schedule)

    @jax.jit
    def shift(grid, x, t):
        return GUIDANCE["classifier_mean_shift"](whole, posterior(schedule, 0), 1.0, schedule, grid, "small")(x, t) - whole(x, t)

    both = shift(grids, x, t)
    for i in range(2):
        np.testing.assert_allclose(both[i], shift(grids[:, i], x[i:i + 1], t[i:i + 1])[0], rtol=1e-5)


def test_limited_interval():
    schedule = SCHEDULES["rectified_flow"]()
    t = jnp.asarray([0.1, 0.5, 0.6, 0.9])  # sigma / alpha = 0.11, 1, 1.5, 9
    x_t = normal(KEY, (4, 2))
    c, u = component(0).denoiser(schedule), MIXTURE.denoiser(schedule)
    out = GUIDANCE["limited_interval"](c, u, 3.0, schedule, 0.5, 1.2)(x_t, t)
    full, plain = classifier_free(c, u, 3.0)(x_t, t), c(x_t, t)
    np.testing.assert_allclose(out[1], full[1], rtol=1e-6)
    np.testing.assert_allclose(out[jnp.asarray([0, 2, 3])], plain[jnp.asarray([0, 2, 3])], rtol=1e-6, atol=1e-6)
    both = GUIDANCE["rescaled"](c, u, within(schedule, lambda t: 4 * t, 0.5, 1.2), 0.0)(x_t, t)
    np.testing.assert_allclose(both[1], classifier_free(c, u, 2.0)(x_t, t)[1], rtol=1e-5)


def images():
    """(c, u) as denoisers of fixed answers [2, 3, 3, 1], in float64 too."""
    c, u = (np.random.default_rng(i).normal(size=(2, 3, 3, 1)) for i in range(2))
    fixed = [lambda x_t, t, a=a: jnp.asarray(a, jnp.float32) for a in (c, u)]
    return c, u, fixed, jnp.zeros((2, 3, 3, 1)), jnp.full(2, 0.5)


def test_rescaled():
    c, u, fixed, x, t = images()
    scale, amount = np.array([4.0, 2.0]), np.array([0.7, 1.0])
    g = u + scale[:, None, None, None] * (c - u)
    ratio = (c.reshape(2, -1).std(1) / g.reshape(2, -1).std(1))
    want = (amount * ratio + 1 - amount)[:, None, None, None] * g
    out = GUIDANCE["rescaled"](*fixed, jnp.asarray(scale), jnp.asarray(amount))(x, t)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.std(out[1]), c[1].std(), rtol=1e-5)


def test_adaptive_projected():
    c, u, fixed, x, t = images()
    out = GUIDANCE["adaptive_projected"](*fixed, 3.0, 1.0)(x, t)
    np.testing.assert_allclose(out, classifier_free(*fixed, 3.0)(x, t), rtol=1e-4, atol=1e-5)
    out = np.asarray(GUIDANCE["adaptive_projected"](*fixed, jnp.asarray([3.0, 2.0]), 0.0, 1.5)(x, t), np.float64)
    for i, s in enumerate((3.0, 2.0)):
        d = (c - u)[i].ravel()
        d *= min(1, 1.5 / np.linalg.norm(d))
        d -= d @ c[i].ravel() / (c[i].ravel() @ c[i].ravel()) * c[i].ravel()
        np.testing.assert_allclose(out[i].ravel(), c[i].ravel() + (s - 1) * d, atol=1e-5)


def test_thresholds():
    x = np.random.default_rng(0).normal(size=(3, 4, 4, 2)) * np.array([0.2, 1.0, 3.0])[:, None, None, None]
    fixed = lambda x_t, t: jnp.asarray(x, jnp.float32)  # noqa: E731
    np.testing.assert_allclose(GUIDANCE["static_clip"](fixed)(x, None), np.clip(x, -1, 1), rtol=1e-6)
    m = np.maximum(np.quantile(np.abs(x).reshape(3, -1), 0.9, axis=1), 1.0)[:, None, None, None]
    np.testing.assert_allclose(GUIDANCE["dynamic_threshold"](fixed, 0.9)(x, None), np.clip(x, -m, m) / m, rtol=1e-5)
    capped = np.minimum(m, 1.5)
    out = GUIDANCE["dynamic_threshold"](fixed, 0.9, maximum=1.5)(x, None)
    np.testing.assert_allclose(out, np.clip(x, -capped, capped) / capped, rtol=1e-5)


def build(name, denoise, schedule):
    """A row of GUIDANCE on `denoise`, with something for each of the arguments that have no default."""
    given = dict(other=lambda x_t, t: 0.1 * x_t, scale=jnp.asarray([1.5, 3.0]), schedule=schedule,
                 times=jnp.asarray([1.0, 0.5, 0.0]), log_prob=lambda x_t, t: jnp.sum(jnp.cos(x_t), axis=(1, 2, 3)))
    names = list(inspect.signature(GUIDANCE[name]).parameters)
    return GUIDANCE[name](denoise, **{k: given[k] for k in names[1:] if k in given})


@pytest.mark.parametrize("name", list(GUIDANCE))
def test_learned_variance_passes_and_rows_compose(name):
    schedule = SCHEDULES["linear"]()
    x, t = normal(KEY, (2, 4, 4, 3)), jnp.asarray([0.5, 1.0])

    def learned(x_t, t):
        return jnp.sin(x_t), jnp.full_like(x_t, 0.25)

    x0, frac = build(name, learned, schedule)(x, t)
    plain = build(name, lambda x_t, t: jnp.sin(x_t), schedule)(x, t)
    np.testing.assert_allclose(x0, plain, rtol=1e-6)
    np.testing.assert_array_equal(frac, 0.25)
    assert x0.shape == x.shape and np.isfinite(x0).all()
    for other in GUIDANCE:
        x0, frac = build(other, build(name, learned, schedule), schedule)(x, t)
        assert x0.shape == x.shape and frac.shape == x.shape


@pytest.mark.parametrize("name", [name for name in GUIDANCE if "other" in inspect.signature(GUIDANCE[name]).parameters])
def test_halves_are_evaluated_once(name):
    calls, schedule = [], SCHEDULES["linear"]()

    def both(x_t, t):
        calls.append(1)
        return jnp.sin(x_t), (0.1 * x_t, jnp.ones_like(x_t))

    first, second = halves(both)
    given = dict(scale=2.0, schedule=schedule)
    row = GUIDANCE[name]
    x, t = normal(KEY, (2, 3)), jnp.full(2, 0.5)
    out = row(first, second, **{k: v for k, v in given.items() if k in inspect.signature(row).parameters})(x, t)
    assert len(calls) == 1 and not isinstance(out, tuple)


@pytest.mark.parametrize("form", ["classifier", "classifier_mean_shift"])
def test_sampling_with_a_classifier_draws_from_the_class(form):
    """Ancestral sampling of the whole mixture under the exact classifier at scale 1 gives that component's moments."""
    schedule, k, n, steps = SCHEDULES["vp_sde"](), 1, 2000, 80
    times = jnp.concatenate([jnp.ones(1), schedule.t_of_logsnr(jnp.linspace(-8.0, 8.0, steps)[1:]), jnp.zeros(1)])
    whole = MIXTURE.denoiser(schedule)
    arguments = (posterior(schedule, k), 1.0, schedule) + ((times, "large") if form == "classifier_mean_shift" else ())
    out = jax.jit(lambda x: sample(GUIDANCE[form](whole, *arguments), schedule, x, KEY, sampler="ddpm", steps=steps, grid=times))(
        prior(schedule, jax.random.key(1), (n, 2)))
    std = np.sqrt(np.diag(MIXTURE.covs[k]))
    np.testing.assert_allclose(out.mean(0), MIXTURE.means[k], atol=4.5 * std.max() / n**0.5 + 0.02)
    off = (np.cov(np.asarray(out).T) - MIXTURE.covs[k]) / np.outer(std, std)
    assert np.abs(off).max() < 4.5 * (2 / n) ** 0.5 + 3 / steps


def test_errors():
    schedule = SCHEDULES["linear"]()
    with pytest.raises(UserError, match="large"):
        GUIDANCE["classifier_mean_shift"](None, None, 1.0, schedule, [1.0, 0.0], "tiny")
    guided = GUIDANCE["classifier_mean_shift"](lambda x, t: x, lambda x, t: x[:, 0], 1.0, schedule, [1.0, 0.0], "learned")
    with pytest.raises(UserError, match="learns one"):
        guided(jnp.ones((1, 2)), jnp.ones(1))
