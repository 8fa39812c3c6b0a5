"""Targets: each recovers the data and the noise, converts to any other, and is finite at both ends or refused."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.process.parameterizations import (
    PARAMETERIZATIONS,
    check_parameterization,
    convert,
    denoiser,
    edm,
    preconditioned,
    preconditioning,
    split_variance,
)
from ldm_jax.process.schedules import SCHEDULES
from ldm_jax.types import UserError, split_prediction

MADE = {name: SCHEDULES[name]() for name in SCHEDULES}
X0, EPS = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
T = jnp.array([0.05, 0.3, 0.6, 0.9])
# name -> (p, q) with output = p x0 + q eps, from the papers
COEFFICIENTS = {
    "eps": lambda a, s: (0 * a, 1 + 0 * a), "x0": lambda a, s: (1 + 0 * a, 0 * a), "v": lambda a, s: (-s, a),
    "flow": lambda a, s: (-1 + 0 * a, 1 + 0 * a), "score": lambda a, s: (0 * a, -1 / s)}


def noised(schedule, t):
    a, s = (np.asarray(f(t), np.float64)[:, None] for f in (schedule.alpha, schedule.sigma))
    return a, s, jnp.asarray(a * X0 + s * EPS, jnp.float32)


def legal(name, schedule):
    return not (PARAMETERIZATIONS[name].needs_signal and schedule.zero_terminal_snr)


@pytest.mark.parametrize("schedule", ["cosine_continuous", "sub_vp", "edm", "scaled_linear"])
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_target_recovers_data_and_noise(name, schedule):
    row, (a, s, x_t) = PARAMETERIZATIONS[name], noised(MADE[schedule], T)
    a32, s32 = np.float32(a), np.float32(s)
    output = row.target(X0, EPS, a32, s32)
    if name in COEFFICIENTS:
        p, q = COEFFICIENTS[name](a, s)
        np.testing.assert_allclose(output, p * X0 + q * EPS, rtol=1e-5, atol=1e-5)
    scale = max(1.0, np.max(s / a))
    np.testing.assert_allclose(row.x0(output, x_t, a32, s32), X0, atol=2e-5 * scale)
    np.testing.assert_allclose(row.eps(output, x_t, a32, s32), EPS, atol=2e-5 * np.max(a / s))
    # an error d of the output is one of alpha slope d in eps and of sigma slope d in x0, signs aside
    slope = np.broadcast_to(row.slope(a32, s32), a.shape)
    for f, factor in ((row.eps, a), (row.x0, s)):
        jacobian = jax.jvp(lambda o: f(o, x_t, a32, s32), (jnp.asarray(output),), (jnp.ones_like(x_t),))[1]
        np.testing.assert_allclose(np.abs(jacobian), np.broadcast_to(factor * slope, x_t.shape), rtol=1e-5)


@pytest.mark.parametrize("source", PARAMETERIZATIONS)
def test_convert_any_to_any(source):
    for schedule in (MADE["vp_sde"], MADE["sub_vp"], MADE["ve"]):
        a, s, x_t = noised(schedule, T)
        for target in PARAMETERIZATIONS:
            given, wanted = (np.asarray(PARAMETERIZATIONS[n].target(X0, EPS, a, s)) for n in (source, target))
            found = convert(jnp.asarray(given, jnp.float32), x_t, T, schedule, source, target)
            size = max(np.abs(wanted).max(), 1)
            np.testing.assert_allclose(found, wanted, atol=3e-4 * size, err_msg=f"{schedule.name} {target}")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_legal_ones_are_finite_at_the_ends_and_the_others_refused(schedule):
    made, ends = MADE[schedule], jnp.array([0.0, 1e-6, 1.0, 1.0])

    @jax.jit
    def all_of_them(x_t):
        return {n: denoiser(lambda x, t: jnp.ones_like(x), made, n)(x_t, ends) for n in PARAMETERIZATIONS if legal(n, made)}

    for name, x0 in all_of_them(jnp.asarray(X0)).items():
        assert np.isfinite(x0).all(), name
        if made.sigma(jnp.float32(0.0)) == 0 and name != "x0":
            np.testing.assert_allclose(x0[0], X0[0], atol=1e-6, err_msg=name)  # at t = 0 the input is the data
    for name in PARAMETERIZATIONS:
        if not legal(name, made):
            with pytest.raises(UserError, match=r"alpha\(1\) = 0.*use 'v'"):
                denoiser(lambda x, t: x, made, name)


def test_refused():
    with pytest.raises(UserError, match="choose from"):
        check_parameterization("noise", MADE["linear"])
    with pytest.raises(UserError, match="cannot be used"):
        convert(X0, X0, T, MADE["rectified_flow"], "eps", "v")
    with pytest.raises(UserError, match="sigma_data"):
        edm(0.0)
    with pytest.raises(UserError, match="twice"):
        split_variance(jnp.zeros((2, 3)))


def test_preconditioning_is_karras_table_1():
    sigma, d = np.geomspace(0.002, 80, 9), 0.5
    c = preconditioning(jnp.ones(9), jnp.asarray(sigma, jnp.float32), d)
    np.testing.assert_allclose(c.c_skip, d**2 / (sigma**2 + d**2), rtol=1e-5)
    np.testing.assert_allclose(c.c_out, sigma * d / np.sqrt(sigma**2 + d**2), rtol=1e-5)
    np.testing.assert_allclose(c.c_in, 1 / np.sqrt(sigma**2 + d**2), rtol=1e-5)
    np.testing.assert_allclose(c.c_noise, np.log(sigma) / 4, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["edm", "vp_sde", "cosine_continuous", "rectified_flow"])
def test_preconditioned_net_sees_the_same_noise_levels_under_any_schedule(schedule):
    """The denoiser of x_t is Karras' D(x_t / alpha; sigma / alpha), whatever the scaling of the process."""
    made, d = MADE[schedule], 0.7

    def net(x, c_noise):  # any function of its two inputs
        return jnp.sin(x) + c_noise[:, None]

    a, s, x_t = noised(made, T)
    x, q = np.asarray(x_t, np.float64) / a, s / a
    F = np.sin(x / np.sqrt(q**2 + d**2)) + np.log(q) / 4
    expected = d**2 / (q**2 + d**2) * x + q * d / np.sqrt(q**2 + d**2) * F
    np.testing.assert_allclose(denoiser(preconditioned(net, made, d), made, edm(d))(x_t, T), expected, atol=1e-4)
    ends = denoiser(preconditioned(net, made, d), made, edm(d))(x_t, jnp.array([0.0, 0.0, 1.0, 1.0]))
    assert np.isfinite(ends).all()


def test_edm_target_has_unit_variance_and_is_minus_v_for_unit_data():
    x0, eps = np.random.default_rng(1).normal(size=(2, 20000))
    for d, a, s in [(0.5, 1.0, 3.0), (0.5, 1.0, 0.1), (2.0, 0.6, 0.8)]:
        np.testing.assert_allclose(np.std(edm(d).target(d * x0, eps, a, s)), 1.0, atol=0.02)
    np.testing.assert_allclose(edm(1.0).target(x0, eps, 0.6, 0.8), -PARAMETERIZATIONS["v"].target(x0, eps, 0.6, 0.8), atol=1e-6)


def test_learned_variance_splits_the_output():
    made = MADE["linear"]

    def predict(x, t):
        return jnp.concatenate([0.1 * x, jnp.full_like(x, 0.5)], -1)

    a, s, x_t = noised(made, T)
    x0, frac = split_prediction(denoiser(predict, made, "eps", learned_variance=True)(x_t, T))
    np.testing.assert_allclose(x0, (x_t - s * 0.1 * x_t) / a, rtol=1e-4)
    np.testing.assert_allclose(frac, 0.75)
