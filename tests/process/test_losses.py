"""The objective: weights against the papers' formulas, equal under every target; the bound; the hybrid and uncertain losses."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.process import gaussians, losses, weights
from ldm_jax.process.losses import diffusion_loss
from ldm_jax.process.parameterizations import PARAMETERIZATIONS, denoiser, edm, preconditioned
from ldm_jax.process.schedules import SCHEDULES, snr_shift
from ldm_jax.process.times import importance, init_importance, update_importance
from ldm_jax.process.weights import WEIGHTS, loss_weight
from tests.oracle import GAUSSIAN

MADE = {name: SCHEDULES[name]() for name in SCHEDULES}
T = jnp.array([0.05, 0.2, 0.5, 0.8, 0.95])
# name -> (snr, -d logsnr / dt) -> weight on the error of eps, from the papers
ON_EPS = {
    "eps": lambda snr, rate: 1 + 0 * snr,
    "x0": lambda snr, rate: 1 / snr,
    "min_snr": lambda snr, rate: np.minimum(snr, 5) / snr,
    "snr_truncation": lambda snr, rate: np.maximum(snr, 1) / snr,
    "p2": lambda snr, rate: 1 / (1 + snr),
    "edm": lambda snr, rate: (1 / snr + 0.25) / (0.25 / snr) / snr,
    "vlb": lambda snr, rate: rate / 2,
    "sigmoid": lambda snr, rate: rate / 2 / (1 + snr * np.exp(-2.0)),
}


def slope(schedule, t):
    """-d logsnr / dt in float64 from the papers' closed forms."""
    t = np.asarray(t, np.float64)
    return {"vp_sde": lambda: (0.1 + 19.9 * t) / -np.expm1(-(0.1 * t + 9.95 * t**2)), "rectified_flow": lambda: 2 / (t * (1 - t)),
            "edm": lambda: 14 / t, "cosine_continuous": lambda: 2 * np.pi / np.sin(np.pi * t)}[schedule]()


@pytest.mark.parametrize("schedule", ["vp_sde", "rectified_flow", "edm", "cosine_continuous"])
def test_weights_mean_the_same_for_every_target(schedule):
    made = MADE[schedule]
    a, s = (np.asarray(f(T), np.float64) for f in (made.alpha, made.sigma))
    d = 0.5
    gain = {"eps": 1 + 0 * a, "x0": a / s, "v": a / (a**2 + s**2), "flow": a / (a + s), "score": s,
            "edm": a * d / np.sqrt(s**2 + a**2 * d**2)}
    for target in PARAMETERIZATIONS:
        if made.zero_terminal_snr and PARAMETERIZATIONS[target].needs_signal:
            continue
        np.testing.assert_array_equal(loss_weight("simple", made, target, T), 1.0)
        for name, on_eps in ON_EPS.items():
            expected = on_eps((a / s) ** 2, slope(schedule, T)) * gain[target] ** 2
            np.testing.assert_allclose(loss_weight(name, made, target, T), expected, rtol=2e-4, err_msg=f"{name} {target}")
    np.testing.assert_allclose(loss_weight("edm", made, "edm", T), 1.0, rtol=1e-5)  # Karras et al.: lambda c_out^2 = 1
    np.testing.assert_allclose(loss_weight("hybrid", made, "v", T), 1 + 1e-3 * loss_weight("vlb", made, "v", T), rtol=1e-6)


def test_bound_of_a_discrete_process_is_ho_et_als():
    betas = np.linspace(1e-4, 0.02, 1000)
    k = np.array([0, 1, 10, 500, 999])
    expected = 1000 * betas**2 / (2 * betas * (1 - betas) * (1 - np.cumprod(1 - betas)))
    found = loss_weight("vlb", MADE["linear"], "eps", jnp.asarray((k + 1) / 1000, jnp.float32))
    np.testing.assert_allclose(found, expected[k], rtol=2e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_weight_is_finite_at_the_ends(schedule):
    made = MADE[schedule]
    early = jnp.maximum(made.t_of_logsnr(13.0), 1e-3)
    t = made.on_grid(jnp.stack([early, jnp.float32(1.0)]))

    @jax.jit
    def all_of_them():
        at = {target: weights.level(made, row, t) for target, row in PARAMETERIZATIONS.items()
              if not (row.needs_signal and made.zero_terminal_snr)}
        return {(name, target): WEIGHTS[name](at[target]) for name in WEIGHTS for target in at}

    for name, value in all_of_them().items():
        assert np.isfinite(value).all() and np.all(value >= 0), name


@pytest.mark.parametrize("target", PARAMETERIZATIONS)
def test_loss_of_the_exact_denoiser_is_the_same_for_every_target(target):
    """One key draws the same times and noise, so the weighted loss may not depend on what the network predicts."""
    schedule, x0 = MADE["vp_sde"], GAUSSIAN.draw(jax.random.key(0), 64).astype(jnp.float32)
    best, row = GAUSSIAN.denoiser(schedule), PARAMETERIZATIONS[target]

    def predict(x_t, t):
        a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        x0_hat = best(x_t, t).astype(jnp.float32)
        return row.target(x0_hat, (x_t - a * x0_hat) / s, a, s)

    @jax.jit
    def both(key):
        return (diffusion_loss(predict, schedule, target, x0, key, weight="x0"),
                diffusion_loss(lambda x_t, t: best(x_t, t).astype(jnp.float32), schedule, "x0", x0, key)[0])

    (loss, metrics), reference = both(jax.random.key(1))
    t = metrics["t"]
    np.testing.assert_allclose(loss, reference, rtol=2e-2, atol=1e-4)
    assert loss.shape == metrics["mse"].shape == t.shape == (64,)


def test_exact_denoiser_has_the_posterior_variance_as_loss():
    """E |x0 - E[x0 | x_t]|^2 / D of a Gaussian is tr((C^-1 + SNR I)^-1) / D."""
    schedule, n = MADE["rectified_flow"], 4000
    x0 = GAUSSIAN.draw(jax.random.key(0), n).astype(jnp.float32)
    best = GAUSSIAN.denoiser(schedule)
    loss, _ = jax.jit(lambda key: diffusion_loss(lambda x_t, t: best(x_t, t).astype(jnp.float32), schedule, "x0", x0, key,
                                                 times=lambda key, n, schedule: jnp.full(n, 0.4)))(jax.random.key(1))
    lam = np.linalg.eigvalsh(GAUSSIAN.covs[0])
    np.testing.assert_allclose(loss.mean(), np.mean(1 / (1 / lam + (0.6 / 0.4) ** 2)), atol=4 * loss.std() / np.sqrt(n))


def test_edm_loss_is_karras_et_als():
    """lambda(sigma) |D(x; sigma) - x0|^2 with a raw network, by table 1 in float64."""
    schedule, d = MADE["edm"], 0.5
    x0 = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)

    def net(x, c_noise):
        return jnp.cos(x) + c_noise[:, None]

    seen = {}

    def predict(x_t, t):
        seen.update(x=x_t, t=t)
        return preconditioned(net, schedule, d)(x_t, t)

    loss, _ = diffusion_loss(predict, schedule, edm(d), jnp.asarray(x0), jax.random.key(0), times="lognormal")
    x, q = np.asarray(seen["x"], np.float64), 80 * np.asarray(seen["t"], np.float64)[:, None] ** 7
    D = d**2 / (q**2 + d**2) * x + q * d / np.sqrt(q**2 + d**2) * (np.cos(x / np.sqrt(q**2 + d**2)) + np.log(q) / 4)
    np.testing.assert_allclose(loss, np.mean((q**2 + d**2) / (q * d) ** 2 * (D - x0) ** 2, 1), rtol=5e-3)


def test_one_key_per_example_and_options():
    schedule, x0 = MADE["linear"], jnp.linspace(-1, 1, 12).reshape(4, 3)
    weight = functools.partial(weights.min_snr, gamma=1.0)
    whole, part = (diffusion_loss(lambda x, t: 0.5 * x, schedule, "eps", x, jax.random.key(0), weight=weight)[0]
                   for x in (x0, x0[:2]))
    np.testing.assert_allclose(part, whole[:2], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["zero_terminal", "cosine_continuous"])
def test_hybrid_loss_teaches_only_the_variance_through_the_bound(schedule):
    made, target = MADE[schedule], "v"
    x0 = jnp.round(jax.random.uniform(jax.random.key(5), (16, 3)) * 255) / 127.5 - 1

    def loss(p, scale):
        predict = lambda x, t: jnp.concatenate([p[0] * x, p[1] * jnp.ones_like(x)], -1)
        value, metrics = diffusion_loss(predict, made, target, x0, jax.random.key(1), learned_variance=True, vlb_scale=scale)
        return value.sum(), metrics

    p = jnp.array([0.3, -0.2])
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    with_bound, metrics = gradient(p, 1e-3)
    without, _ = gradient(p, 0.0)
    np.testing.assert_allclose(with_bound[0], without[0], rtol=1e-5)
    assert without[1] == 0 and with_bound[1] != 0 and np.isfinite(with_bound).all()
    # the bound's term itself, from its parts
    t = metrics["t"]
    T_ = made.timesteps or 1000
    s = jnp.maximum(jnp.round(t * T_) - 1, 0) / T_ if made.timesteps else jnp.maximum(t - 1 / T_, 0)

    @jax.jit
    def bound():
        seen = {}
        diffusion_loss(lambda x, t: seen.update(x=x) or p[0] * x, made, target, x0, jax.random.key(1))
        best = denoiser(lambda x, t: p[0] * x, made, target)(seen["x"], t)
        logvar = gaussians.interpolated_log_variance(made, t, s, jnp.full_like(x0, 0.4))
        return gaussians.vlb_term(made, x0, seen["x"], t, s, best, logvar).mean(1) / np.log(2) * T_

    terms = bound()
    np.testing.assert_allclose(metrics["vlb"], terms, rtol=1e-3, atol=1e-3)  # float32 rounding, times T
    np.testing.assert_allclose(jax.jit(loss)(p, 0.1)[0], metrics["mse"].sum() + 0.1 * terms.sum(), rtol=1e-4)


def test_importance_sampling_keeps_the_mean_and_lowers_the_variance():
    schedule, x0, n = MADE["rectified_flow"], jnp.zeros((4000, 1)), 4000

    def run(times, key):
        return jax.jit(lambda x0, key: diffusion_loss(lambda x, t: jnp.zeros_like(x), schedule, "flow", x0, key, times=times,
                                                      weight=lambda at: jnp.exp(-at.logsnr / 4)))(x0, key)

    plain, metrics = run("uniform", jax.random.key(0))
    state = update_importance(init_importance(20, 50), metrics["t"], metrics["loss"])
    sampled, _ = run(importance(state), jax.random.key(1))
    np.testing.assert_allclose(sampled.mean(), plain.mean(), atol=4 * np.hypot(plain.std(), sampled.std()) / np.sqrt(n))
    assert sampled.std() < 0.9 * plain.std()


def test_learned_uncertainty():
    schedule, x0, key = MADE["vp_sde"], jnp.ones((8, 2)), jax.random.key(0)
    predict = lambda x, t: 0.1 * x
    plain, metrics = diffusion_loss(predict, schedule, "eps", x0, key)
    u = lambda logsnr: 0.3 + 0.1 * logsnr
    value, _ = diffusion_loss(predict, schedule, "eps", x0, key, log_uncertainty=u)
    at = u(schedule.logsnr(metrics["t"]))
    np.testing.assert_allclose(value, plain * np.exp(-at) + at, rtol=1e-5)
    params = losses.init_uncertainty(32)
    np.testing.assert_array_equal(losses.uncertainty(params, jnp.array([-jnp.inf, 0.0, jnp.inf])), 0.0)
    # at its best u is the log of the expected loss: gradient descent finds it at one noise level
    logsnr, error = jnp.zeros(1), 7.0

    def expected(params):
        u = losses.uncertainty(params, logsnr)
        return jnp.sum(error * jnp.exp(-u) + u)

    step = jax.jit(lambda params: params - jax.grad(expected)(params))
    for _ in range(200):
        params = step(params)
    np.testing.assert_allclose(losses.uncertainty(params, logsnr), np.log(error), atol=1e-3)


def test_sigmoid_weight_is_one_function_of_logsnr_under_any_schedule():
    """Integrals over t of the weight on eps depend on the ends alone (Kingma & Gao 2023)."""
    def integral(schedule, low=-4.0, high=6.0):
        t = jnp.linspace(*schedule.t_of_logsnr(jnp.array([high, low])), 4001)
        return np.trapezoid(np.asarray(loss_weight("sigmoid", schedule, "eps", t), np.float64), np.asarray(t, np.float64))
    expected = 0.5 * (np.logaddexp(0, 2 + 4.0) - np.logaddexp(0, 2 - 6.0))
    for schedule in (MADE["vp_sde"], MADE["ve"], MADE["sigmoid"], snr_shift("vp_sde", 2.0)):
        np.testing.assert_allclose(integral(schedule), expected, rtol=2e-3, err_msg=schedule.name)
