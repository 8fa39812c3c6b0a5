"""Every schedule against float64 numpy from the papers' formulas, and the identities that all of them owe."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.process.learned_schedule import gamma, init_learned, learned
from ldm_jax.process.noising import FAMILIES
from ldm_jax.process.schedules import SCHEDULES, from_betas, snr_shift, time_shift, zero_terminal
from ldm_jax.types import UserError

T = np.concatenate([[1e-4, 1e-3, 0.004], np.linspace(0.01, 1.0, 200)]).astype(np.float32)


def table(betas):
    """(alpha, sigma) of a beta table, with log abar linear between the grid points."""
    log_abar = np.concatenate([[0.0], np.log(np.cumprod(1 - np.asarray(betas, np.float64)))])

    def scales(t):
        a = np.interp(t, np.arange(len(log_abar)) / len(betas), log_abar)
        return np.exp(a / 2), np.sqrt(1 - np.exp(a))
    return scales


def vp(abar):
    return np.sqrt(abar), np.sqrt(1 - abar)


def cosine_betas(n=1000, s=0.008):
    f = [math.cos((i / n + s) / (1 + s) * math.pi / 2) ** 2 for i in range(n + 1)]
    return [min(1 - f[i + 1] / f[i], 0.999) for i in range(n)]


def chen_sigmoid(t, start=-3.0, end=3.0, tau=1.0):
    S = lambda u: 1 / (1 + np.exp(-u / tau))
    return vp(np.clip((S(end) - S(t * (end - start) + start)) / (S(end) - S(start)), 1e-9, 1.0))


def hang_laplace(t, mu=0.0, b=0.5, end=-6.0):
    u = t * (1 - 0.5 * np.exp((end - mu) / b))
    return vp(1 / (1 + np.exp(-(mu - b * np.sign(0.5 - u) * np.log(1 - 2 * np.abs(u - 0.5))))))


def song(t, low=0.1, high=20.0):
    return np.exp(-0.25 * t**2 * (high - low) - 0.5 * t * low)


def vdm(t, low=-13.3, high=5.0):
    p = {k: np.asarray(v, np.float64) for k, v in init_learned(jax.random.key(0)).items()}

    def g(t):
        h = np.abs(p["l1"]) * t + p["b1"]
        return h + np.mean(np.abs(p["w3"]) / (1 + np.exp(-(h[..., None] * np.abs(p["w2"]) + p["b2"]))), -1)
    ends = g(np.array([0.0, 1.0]))
    return vp(1 / (1 + np.exp(low + (high - low) * (g(t) - ends[0]) / (ends[1] - ends[0]))))


LINEAR = np.linspace(1e-4, 0.02, 1000)
SCALED = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
cosine_scales = lambda t: (np.cos(np.pi * t / 2), np.sin(np.pi * t / 2))
REFERENCE = {
    "linear": table(LINEAR),
    "scaled_linear": table(SCALED),
    "cosine": table(cosine_betas()),
    "vp_sde": lambda t: vp(song(t) ** 2),
    "sub_vp": lambda t: (song(t), 1 - song(t) ** 2),
    "ve": lambda t: (np.ones_like(t), 0.01 * 5000.0**t),
    "edm": lambda t: (np.ones_like(t), (t * 80 ** (1 / 7)) ** 7),
    "cosine_continuous": cosine_scales,
    "sigmoid": chen_sigmoid,
    "laplace": hang_laplace,
    "rectified_flow": lambda t: (1 - t, t),
    "learned": vdm,
    "snr_shift": lambda t: vp(1 / (1 + 4 * np.tan(np.pi * t / 2) ** 2)),
    "time_shift": lambda t: (1 - 3 * t / (1 + 2 * t), 3 * t / (1 + 2 * t)),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_scales_are_the_papers(name):
    alpha, sigma = REFERENCE[name](T.astype(np.float64))
    schedule = SCHEDULES[name]()
    mixed = 1e-5 if name == "sigmoid" else 2e-7  # its floor is mixed in
    np.testing.assert_allclose(schedule.alpha(T), alpha, rtol=3e-5, atol=mixed)
    np.testing.assert_allclose(schedule.sigma(T), sigma, rtol=2e-4 if name in ("linear", "scaled_linear", "cosine") else 3e-5)
    np.testing.assert_allclose(schedule.logsnr(T)[:-1], 2 * np.log(alpha[:-1] / sigma[:-1]), rtol=2e-5, atol=5e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ends_inverse_and_slopes(name):
    schedule = SCHEDULES[name]()
    ends = jnp.array([0.0, 1.0])
    for f in (schedule.alpha, schedule.sigma):
        assert np.isfinite(f(ends)).all()
    if name != "learned":
        assert schedule.alpha(ends)[0] == 1 and schedule.sigma(ends)[0] == 0 and schedule.logsnr(ends)[0] == np.inf
        assert schedule.t_of_logsnr(jnp.inf) == 0
    assert schedule.t_of_logsnr(-jnp.inf) == 1
    assert schedule.zero_terminal_snr == (schedule.alpha(ends)[1] == 0) == (schedule.logsnr(ends)[1] == -np.inf)

    @jax.jit
    def everything(t):
        one = jnp.ones_like(t)
        (alpha, da), (sigma, ds), (l, dl) = (jax.jvp(f, (t,), (one,)) for f in (schedule.alpha, schedule.sigma, schedule.logsnr))
        return alpha, da, sigma, ds, l, dl, schedule.t_of_logsnr(l)

    alpha, da, sigma, ds, l, dl, back = map(np.asarray, everything(T))
    np.testing.assert_allclose(back, T, atol=3e-6, rtol=1e-4)
    assert np.all(np.diff(l) < 0) and np.all(da <= 0) and np.isfinite(da).all() and np.isfinite(ds).all()
    inside = slice(0, -1)
    np.testing.assert_allclose(l[inside], 2 * np.log(alpha[inside].astype(np.float64) / sigma[inside]), atol=2e-3)
    np.testing.assert_allclose(dl[inside], 2 * (da[inside] / alpha[inside] - ds[inside] / sigma[inside]), rtol=2e-3)
    np.testing.assert_allclose(FAMILIES[schedule.family](alpha, sigma), 1.0, atol=1e-6)
    np.testing.assert_array_equal(schedule.alpha(T.reshape(7, 29)).shape, (7, 29))
    if schedule.timesteps:
        grid = (np.arange(schedule.timesteps) + 1) / np.float32(schedule.timesteps)
        for before in (0.0, 0.4):
            np.testing.assert_allclose(schedule.on_grid((grid - before / schedule.timesteps).astype(np.float32)), grid, atol=2e-7)


def lin(abar):
    """Lin et al. 2024, algorithm 1, on a table of abar."""
    root = np.sqrt(abar)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@pytest.mark.parametrize("made, abar", [
    (lambda: SCHEDULES["linear"](), np.cumprod(1 - LINEAR)),
    (lambda: SCHEDULES["linear"](timesteps=7, beta_start=0.1, beta_end=0.5), np.cumprod(1 - np.linspace(0.1, 0.5, 7))),
    (lambda: SCHEDULES["scaled_linear"](), np.cumprod(1 - SCALED)),
    (lambda: SCHEDULES["cosine"](), np.cumprod(1 - np.array(cosine_betas()))),
    (lambda: SCHEDULES["cosine"](timesteps=4000), np.cumprod(1 - np.array(cosine_betas(4000)))),
    (lambda: from_betas([0.1, 0.7, 0.2]), np.array([0.9, 0.27, 0.216])),
    (lambda: zero_terminal("linear"), lin(np.cumprod(1 - LINEAR))),
    (lambda: zero_terminal("scaled_linear"), lin(np.cumprod(1 - SCALED))),
])
def test_tables_of_abar(made, abar):
    schedule = made()
    t_k = ((np.arange(len(abar)) + 1) / len(abar)).astype(np.float32)
    np.testing.assert_allclose(np.asarray(schedule.alpha(t_k), np.float64) ** 2, abar, atol=1e-6)
    assert schedule.timesteps == len(abar)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if SCHEDULES[name]().family != "ve"])
def test_zero_terminal_of_any(name):
    base, schedule = SCHEDULES[name](), zero_terminal(name)

    @jax.jit
    def everything(t):
        alpha, slope = jax.jvp(schedule.alpha, (t,), (jnp.ones_like(t),))
        return alpha, slope, schedule.logsnr(t), schedule.t_of_logsnr(schedule.logsnr(t))

    alpha, slope, logsnr, back = everything(T)
    assert schedule.alpha(jnp.float32(1.0)) == 0 and alpha[-1] == 0 and logsnr[-1] == -np.inf and np.all(alpha[:-1] > 0)
    assert schedule.zero_terminal_snr and np.isfinite(slope).all() and slope[-1] < 0
    np.testing.assert_allclose(back, T, atol=1e-5, rtol=1e-3)
    if base.zero_terminal_snr:  # nothing left to do
        np.testing.assert_allclose(alpha, base.alpha(T), atol=1e-6)


def test_zero_terminal_of_a_continuous_process():
    t = T.astype(np.float64)
    alpha = (song(t) - song(1.0)) / (1 - song(1.0))
    schedule = zero_terminal("vp_sde")
    np.testing.assert_allclose(schedule.alpha(T), alpha, atol=3e-7)
    np.testing.assert_allclose(schedule.sigma(T), np.sqrt(1 - alpha**2), rtol=2e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_snr_shift_moves_logsnr_alone(name):
    base, shift = SCHEDULES[name](), 2.5
    schedule = snr_shift(name, shift)
    inside = T[:-1]

    @jax.jit
    def everything(t):
        both = [(s.alpha(t), s.sigma(t), s.logsnr(t)) for s in (base, schedule)]
        return *both, FAMILIES[base.family](*both[1][:2]), schedule.t_of_logsnr(both[1][2])

    (alpha, sigma, logsnr), (alpha_shifted, sigma_shifted, logsnr_shifted), norm, back = everything(inside)
    np.testing.assert_allclose(np.float64(sigma_shifted) / alpha_shifted, shift * np.float64(sigma) / alpha, rtol=1e-5)
    np.testing.assert_allclose(logsnr_shifted, logsnr - 2 * np.log(shift), atol=1e-5)
    np.testing.assert_allclose(norm, 1.0, atol=1e-6)
    np.testing.assert_allclose(back, inside, atol=3e-6, rtol=1e-3)
    assert schedule.timesteps == base.timesteps and schedule.zero_terminal_snr == base.zero_terminal_snr


def test_shifts_compose():
    flow = SCHEDULES["rectified_flow"]()
    for pair in [(snr_shift(flow, 3.0), time_shift(flow, 3.0)),  # the same thing on straight paths
                 (time_shift(time_shift(flow, 2.0), 1.5), time_shift(flow, 3.0)),
                 (snr_shift(snr_shift("cosine", 2.0), 1.5), snr_shift("cosine", 3.0)),
                 (snr_shift("linear", 1.0), SCHEDULES["linear"]()),
                 (time_shift("cosine", timesteps=10, shift=1.0), SCHEDULES["cosine"](timesteps=10))]:
        for f in ("alpha", "sigma"):
            np.testing.assert_allclose(getattr(pair[0], f)(T), getattr(pair[1], f)(T), atol=1e-6)
    # a picture of 256 pixels a side has at t the noise-to-signal ratio that one of 64 has, times 4
    np.testing.assert_allclose(snr_shift("cosine_continuous", 256 / 64).logsnr(0.5), 2 * np.log(64 / 256), atol=1e-6)


def test_shift_is_traced():
    count = []

    @jax.jit
    def alpha(shift, t):
        count.append(1)
        return snr_shift("rectified_flow", shift).alpha(t) + time_shift("rectified_flow", shift).alpha(t)

    for shift in (1.0, 3.0):
        np.testing.assert_allclose(alpha(shift, T), 2 * (1 - shift * T / (1 + (shift - 1) * T)), atol=1e-6)
    assert len(count) == 1


def test_learned_is_monotone_for_any_parameters():
    params = init_learned(jax.random.key(1), features=16, gamma_min=-8.0, gamma_max=3.0)
    params = jax.tree.map(lambda p: p + 3 * jax.random.normal(jax.random.key(p.size), p.shape), params) | {
        "gamma_min": jnp.float32(-8.0), "gamma_max": jnp.float32(3.0)}
    values = np.asarray(gamma(params, T))
    assert np.all(np.diff(values) > 0)
    np.testing.assert_allclose(gamma(params, jnp.array([0.0, 1.0])), [-8.0, 3.0], atol=1e-5)

    def loss(params):  # a schedule of traced parameters, as inside a training step
        schedule = learned(params)
        assert not schedule.zero_terminal_snr
        return jnp.sum(schedule.sigma(T) ** 2), schedule.t_of_logsnr(schedule.logsnr(T))

    gradient, back = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(back, T, atol=1e-5)
    assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("make, says", [
    (lambda: from_betas([[0.1]]), "1-D"), (lambda: from_betas([]), "1-D"), (lambda: from_betas([0.1, 1.0]), r"\(0, 1\)"),
    (lambda: SCHEDULES["linear"](timesteps=0), "timesteps"), (lambda: SCHEDULES["linear"](timesteps=10.5), "timesteps"),
    (lambda: SCHEDULES["linear"](beta_end=1.5), "betas"), (lambda: SCHEDULES["scaled_linear"](beta_start=-1.0), "beta_start"),
    (lambda: SCHEDULES["cosine"](s=-0.1), "offset"), (lambda: SCHEDULES["cosine_continuous"](s=-0.1), "offset"),
    (lambda: SCHEDULES["vp_sde"](beta_min=0.0), "beta_min"), (lambda: SCHEDULES["sub_vp"](beta_max=0.01), "beta_max"),
    (lambda: SCHEDULES["ve"](sigma_min=1.0, sigma_max=0.5), "sigma_min"), (lambda: SCHEDULES["edm"](rho=-1.0), "rho"),
    (lambda: SCHEDULES["sigmoid"](tau=0.0), "tau"), (lambda: SCHEDULES["sigmoid"](start=4.0), "start"),
    (lambda: SCHEDULES["laplace"](b=0.0), "b > 0"), (lambda: SCHEDULES["laplace"](logsnr_min=1.0), "logsnr_min"),
    (lambda: SCHEDULES["snr_shift"](shift=0.0), "shift"), (lambda: SCHEDULES["time_shift"](shift=-1.0), "shift"),
    (lambda: SCHEDULES["snr_shift"](base="consine"), "choose from"), (lambda: zero_terminal("edm"), "alpha = 1"),
    (lambda: init_learned(jax.random.key(0), gamma_min=2.0, gamma_max=1.0), "gamma_min"),
])
def test_refused(make, says):
    with pytest.raises(UserError, match=says):
        make()
