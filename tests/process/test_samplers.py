"""Sampling methods against exact denoisers: orders of convergence, laws, ends of the schedules, limits that coincide."""
import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.process import PARAMETERIZATIONS, SAMPLERS, SCHEDULES, denoiser, prior, sample
from ldm_jax.process.langevin import PREDICTORS, langevin
from ldm_jax.process.multistep import exponential_moments
from ldm_jax.process.parameterizations import check_parameterization
from ldm_jax.process.samplers import make_sampler
from ldm_jax.types import UserError, example_keys, fold_in, normal
from tests.oracle import GAUSSIAN, MIXTURE, gaussian, ode_solution, operation_by_operation, point_mass, side_by_side

KEY = jax.random.key(0)
POINT = [0.3, -0.8]
B = 18  # of every run operation by operation, so that they share what is compiled
ROWS = list(SAMPLERS)
EAGER = [name for name in ROWS if name != "ode"]  # diffrax compiles whatever it is told
# in addition to every row's defaults
VARIANTS = [("dpmpp_2m", dict(solver="heun")), ("dpmpp_2s", dict(ratio=0.7)), ("unipc", dict(variant="bh1")),
            ("unipc", dict(order=1)), ("pndm", dict(start="runge_kutta"))]


def made(name, **options):
    if name == "ode":
        pytest.importorskip("diffrax")
    return make_sampler(name, **options)


def options_of(name):
    return {k: p.default for k, p in inspect.signature(SAMPLERS[name]).parameters.items()}


def one_of_each_family():
    """The first continuous schedule of each family: in lambda = logsnr / 2 the ODE methods see no more of it than that."""
    first = {}
    for schedule in (row() for row in SCHEDULES.values()):
        if schedule.timesteps is None:
            first.setdefault(schedule.family, schedule)
    return list(first.values())


@functools.lru_cache(None)
def compiled(name):
    """A row of SCHEDULES with each of its functions one program: faster where the rest runs operation by operation."""
    schedule = SCHEDULES[name]()
    functions = {f: jax.jit(getattr(schedule, f)) for f in ("alpha", "sigma", "logsnr", "t_of_logsnr")}
    return dataclasses.replace(schedule, **functions)


@functools.lru_cache(None)
def exact(name, single=False):
    """The mixture's denoiser under that schedule, or that of data at one point."""
    return jax.jit((point_mass(POINT) if single else MIXTURE).denoiser(SCHEDULES[name]()))


# ---- orders of convergence -----------------------------------------------------------------------------------------

HIGH, LOW = -2.4, 2.4  # lambda, within the range of every schedule
STEPS = np.array([64, 128, 256])


@functools.lru_cache(None)
def solved():
    """x / alpha where the ODE starts and where it ends, float64: the same for every schedule."""
    start = np.array([[0.8, -1.1]]) * np.hypot(1, np.exp(-HIGH))
    return start, np.asarray(ode_solution(MIXTURE, jnp.asarray(start), HIGH, LOW))


def slopes(sampler, schedules, uniform_in_t=False):
    """[schedule] slope of log error against log steps, between the two largest numbers of steps, on the mixture's ODE."""
    both, n = side_by_side(schedules, len(STEPS)), np.tile(STEPS, len(schedules))
    start, end = solved()
    part = np.minimum(np.arange(STEPS[-1] + 1)[:, None] / n, 1.0)
    if uniform_in_t:
        first, last = (np.asarray(both.t_of_logsnr(jnp.full(n.shape, 2 * lam))) for lam in (HIGH, LOW))
        times = jnp.asarray(first + (last - first) * part)
    else:
        # the first steps, which are of lower order in methods with a memory, must not be the ones that are seen
        grade = max(1.0, (sampler.order or 1) / 2)
        times = both.t_of_logsnr(jnp.asarray(2 * (HIGH + (LOW - HIGH) * part**grade)))
    first, last = (both.alpha(t)[:, None] for t in (times[0], times[-1]))
    x, want, unit = (last * end, first * start, first) if sampler.upwards else (first * start, last * end, last)
    run = jax.jit(lambda x: sample(MIXTURE.denoiser(both), both, x, KEY, sampler=sampler, steps=jnp.asarray(n),
                                   capacity=int(STEPS[-1]), grid=times))
    error = np.abs(np.asarray((run(x) - want) / unit)).max(1).reshape(len(schedules), -1)
    return -np.diff(np.log2(error), axis=1)[:, -1]


@pytest.mark.parametrize("name, options", [(name, {}) for name in ROWS if name != "ode"] + VARIANTS)
def test_order_of_convergence(name, options):
    sampler = made(name, **options)
    if sampler.order is None:
        return  # random: see test_law
    with jax.enable_x64(True):
        found = slopes(sampler, one_of_each_family())
    tolerance = 0.15 if sampler.order < 3 or name == "lms" else 0.25
    np.testing.assert_allclose(found, sampler.order, atol=tolerance)


def test_euler_in_t_converges_for_every_schedule():
    """Its steps are in t, so that it does see each schedule."""
    with jax.enable_x64(True):
        found = slopes(make_sampler("euler"), [row() for row in SCHEDULES.values()], uniform_in_t=True)
    np.testing.assert_allclose(found, 1, atol=0.15)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_three_answers_are_exact_for_a_parabola_in_lambda(eta):
    """With a = 1 + eta and x0 = f(lambda), d(x / sigma exp(eta lambda)) = a exp(a lambda) f d lambda, whatever the steps."""
    with jax.enable_x64(True):
        schedule, a = SCHEDULES["ve"](), 1 + eta
        lam = np.array([-2.0, -1.8, -1.1, -0.6, 0.4])
        f = np.polynomial.Polynomial([0.3, -0.7, 0.2])

        def denoise(x_t, t):
            return jnp.polyval(jnp.asarray(f.coef[::-1]), 0.5 * schedule.logsnr(t))[:, None]

        _, path = sample(denoise, schedule, jnp.ones((1, 1)), KEY, sampler="dpmpp_3m", eta=eta, steps=4,
                         grid=schedule.t_of_logsnr(jnp.asarray(2 * lam)), trajectory=True)
        x = np.asarray(path["x"])[:, 0, 0]
        z = [float(normal(fold_in(example_keys(KEY, 1), i), (1, 1))[0, 0]) for i in range(4)]
    integral = np.exp(a * lam) * (f(lam) - f.deriv()(lam) / a + f.deriv(2)(lam) / a**2)
    scale = np.exp(a * lam)  # exp(eta lambda) / sigma
    for i in (2, 3):  # from the third step on
        noise = np.exp(-lam[i + 1]) * np.sqrt(1 - np.exp(-2 * eta * (lam[i + 1] - lam[i]))) * z[i]
        np.testing.assert_allclose((x[i + 1] - noise) * scale[i + 1] - x[i] * scale[i], integral[i + 1] - integral[i], rtol=1e-6)


def test_exponential_moments():
    h = np.array([1e-4, 0.03, 0.9, 1.1, 7.0, np.inf])
    u, w = np.polynomial.legendre.leggauss(60)
    u, w = (u + 1) / 2, w / 2
    with np.errstate(invalid="ignore", over="ignore"):
        want = [[np.sum(w * h_ * np.exp(-h_ * (1 - u)) * u**k) if np.isfinite(h_) else 1.0 for h_ in h] for k in range(4)]
    np.testing.assert_allclose(np.stack(exponential_moments(jnp.asarray(h, jnp.float32), 4)), want, rtol=2e-5)


# ---- laws ----------------------------------------------------------------------------------------------------------

LAW_OPTIONS = {"annealed_langevin": dict(delta=0.1, repeats=8), "edm": dict(s_churn=30.0), "ddim": dict(eta=0.6),
               "dpmpp_2s": dict(eta=1.0)}


@pytest.mark.parametrize("name", [n for n in ROWS if n in LAW_OPTIONS or n == "ode" or make_sampler(n).order is None])
def test_law(name):
    """Mean and covariance of the mixture, at two numbers of steps, from noise at t = 1 to t = 0 on a flow and on a VP process.

    For the random methods; that the others have the law follows from their convergence to the ODE.
    """
    each, counts = 2000, [48, 96]
    sampler = made(name, **LAW_OPTIONS.get(name, {}))
    counts = [1, 2] if name == "ode" else counts
    schedules = [SCHEDULES["rectified_flow"](), SCHEDULES["vp_sde"]()]
    both = side_by_side(schedules, len(counts) * each)
    n = np.tile(np.repeat(counts, each), len(schedules))
    part = np.arange(counts[-1] + 1)[:, None] / n
    lam = -4.0 + 8.0 * part  # even in lambda, then from lambda = 4 to the data
    times = jnp.where(part >= 1, 0.0, jnp.where(part <= 0, 1.0, both.t_of_logsnr(jnp.asarray(2 * lam, jnp.float32))))
    x = both.sigma(jnp.ones(len(n)))[:, None] * normal(KEY, (len(n), 2))
    out = jax.jit(lambda x: sample(MIXTURE.denoiser(both), both, x, jax.random.key(1), sampler=sampler, steps=jnp.asarray(n),
                                   capacity=counts[-1], grid=times))(x)
    out = np.asarray(out, np.float64).reshape(len(schedules), len(counts), each, 2)
    std = np.sqrt(np.diag(MIXTURE.cov()))
    for i, schedule in enumerate(schedules):
        for j, count in enumerate(counts):
            bias = 0.0 if name == "ode" else 3.0 / count  # what a first-order method is allowed, relative
            mean, cov = out[i, j].mean(0), np.cov(out[i, j].T)
            assert np.all(np.abs(mean - MIXTURE.mean()) < 4.5 * std / each**0.5 + bias * std), (schedule.name, count, mean)
            off = np.abs(cov - MIXTURE.cov()) / np.outer(std, std)
            assert np.all(off < 4.5 * (2 / each) ** 0.5 + bias), (schedule.name, count, cov)


@pytest.mark.parametrize("delta", [0.02, 0.5])
def test_langevin_stationary_law(delta):
    """On N(m, v) at a fixed time the chain is linear: its stationary variance is v / (1 - delta sigma^2 / (2 v)), near v."""
    schedule, t, n = SCHEDULES["rectified_flow"](), 0.4, 10000
    data = gaussian([0.5, -1.0], [[0.6, 0.0], [0.0, 0.05]])
    alpha, sigma2 = 0.6, 0.16
    v = alpha**2 * np.array([0.6, 0.05]) + sigma2
    x = jax.jit(lambda x: langevin(data.denoiser(schedule), schedule, x, jnp.full(n, t), example_keys(KEY, n), delta,
                                   int(12 / delta)))(jnp.zeros((n, 2)))
    stationary = v / (1 - delta * sigma2 / (2 * v))
    np.testing.assert_allclose(x.mean(0), alpha * data.mean(), atol=4.5 * (stationary.max() / n) ** 0.5)
    np.testing.assert_allclose(x.var(0), stationary, rtol=4.5 * (2 / n) ** 0.5)


def test_corrector_step_size():
    """Where the network sees no noise in x, the corrector only adds some: sqrt(2 delta) sigma = 2 snr sigma, a time `repeats`."""
    schedule, n, snr = SCHEDULES["rectified_flow"](), 20000, 0.2
    x, times = jnp.zeros((n, 1)), jnp.asarray([0.6, 0.5])
    out = sample(lambda x_t, t: x_t / (1 - t[:, None]), schedule, x, KEY, sampler="predictor_corrector", predictor="ddim", snr=snr,
                 repeats=2, steps=1, grid=times)
    assert abs(float(jnp.std(out)) / (2**0.5 * 2 * snr * 0.5) - 1) < 4.5 / (2 * n) ** 0.5


def test_corrector_of_drawn_norms_before_the_step():
    """Each example moves along its own score by snr times as much as its noise weighs; then the predictor steps from there."""
    schedule, snr, shape, t = SCHEDULES["ve"](0.1, 2.0), 0.3, (3, 2, 4), np.full(3, 0.6, np.float32)
    rng = np.random.default_rng(0)
    x, eps = (rng.normal(size=shape).astype(np.float32) * np.array([1, 2, 5], np.float32)[:, None, None] for _ in range(2))
    keys, sigma = example_keys(KEY, 3), 0.1 * 20**0.6
    z = np.asarray(normal(fold_in(keys, 0), shape), np.float64)
    denoise = lambda x_t, t: x_t - schedule.sigma(t)[:, None, None] * eps
    norm = lambda a: np.sqrt(np.sum(a.astype(np.float64)**2, (1, 2), keepdims=True))
    drift, noise = -2 * (snr * norm(z) / norm(eps))**2 * eps * sigma, 2 * snr * norm(z) / norm(eps) * z * sigma
    np.testing.assert_allclose(norm(drift) / norm(noise), snr)  # Song et al. 2021: what their r is
    got = langevin(denoise, schedule, x, t, keys, 2 * snr**2, 1, True)
    np.testing.assert_allclose(got, x + drift + noise, rtol=1e-4, atol=1e-4)

    one = fold_in(keys, 0)
    want = langevin(denoise, schedule, x, t, fold_in(one, 1), 2 * snr**2, 2, True)
    want, _ = PREDICTORS["ddpm_large"]().step(denoise, schedule, want, t, 0 * t + 0.2, fold_in(one, 0), ())
    got = sample(denoise, schedule, x, keys, sampler="predictor_corrector", predictor="ddpm_large", snr=snr, repeats=2, first="corrector",
                 norms="drawn", steps=1, grid=jnp.asarray([0.6, 0.2]))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_ddpm_variances():
    """One step from many copies of one x: the spread is that of the variance asked for, frac interpolating its logarithm."""
    schedule, n = SCHEDULES["cosine"](), 20000
    t, s = np.float32(0.6), np.float32(0.5)
    a_t, s_t, a_s, s_s = (float(f(u)) for u in (t, s) for f in (schedule.alpha, schedule.sigma))
    beta = 1 - (a_t / a_s) ** 2
    small, large = s_s**2 / s_t**2 * beta, beta  # Ho et al. 2020, section 3.2
    x, times = jnp.full((n, 1), 0.3), jnp.asarray([t, s])

    def spread(denoise, variance):
        return float(np.var(sample(denoise, schedule, x, KEY, sampler="ddpm", variance=variance, steps=1, grid=times)))

    def plain(x_t, t):
        return 0.2 * x_t

    def learned(x_t, t):
        return 0.2 * x_t, jnp.full_like(x_t, 0.25)

    for got, want in [(spread(plain, "small"), small), (spread(plain, "large"), large),
                      (spread(learned, "learned"), large**0.25 * small**0.75), (spread(learned, "small"), small)]:
        assert abs(got / want - 1) < 4.5 * (2 / n) ** 0.5
    with pytest.raises(UserError, match="learns one"):
        spread(plain, "learned")


# ---- limits in which methods coincide ------------------------------------------------------------------------------

def end_of(name, schedule_name="linear", steps=7, grid="uniform", single=False, **options):
    schedule = compiled(schedule_name)
    with operation_by_operation():
        return np.asarray(sample(exact(schedule_name, single), schedule, prior(schedule, jax.random.key(3), (B, 2)), KEY,
                                 sampler=made(name, **options), steps=steps, grid=grid))


@pytest.mark.parametrize("one, other, schedule", [
    (("ddim", {}), ("euler", {}), "rectified_flow"),
    (("heun", {}), ("edm", {}), "ve"),
    (("ddim", dict(eta=1.0)), ("ddpm", {}), "linear"),
    (("ddim", dict(eta=1.0)), ("ddpm", {}), "rectified_flow"),
    (("ddim", dict(eta=0.3)), ("euler_ancestral", dict(eta=0.3)), "linear"),
    (("ddim", {}), ("lms", dict(order=1)), "cosine"),
    (("euler", {}), ("euler_maruyama", dict(eta=0.0)), "linear"),
    (("dpmpp_2m", dict(eta=1.0)), ("dpmpp_2m_sde", {}), "linear"),
    (("ddim", {}), ("predictor_corrector", dict(predictor="ddim", repeats=0)), "linear"),
    (("ddim", {}), ("predictor_corrector", dict(predictor="ddim", repeats=0, first="corrector", norms="drawn")), "linear"),
    (("dpmpp_2m", dict(solver="heun")), ("dpmpp_2m", {}), "point"),
])
def test_coincide(one, other, schedule):
    single = schedule == "point"
    a, b = (end_of(name, "linear" if single else schedule, single=single, **options) for name, options in (one, other))
    np.testing.assert_allclose(a, b, atol=2e-6 * max(1.0, np.abs(a).max()))


@pytest.mark.parametrize("name", ["dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "unipc", "lms", "pndm"])
@pytest.mark.parametrize("schedule", ["linear", "rectified_flow"])
def test_first_step_and_the_step_into_data_are_ddim(name, schedule):
    """One step from t = 1 to t = 0, and for those with a memory the first step of more."""
    np.testing.assert_allclose(end_of(name, schedule, steps=1), end_of("ddim", schedule, steps=1), atol=1e-6)
    if name in ("dpmpp_2m", "dpmpp_3m", "unipc", "lms"):
        grid = jnp.asarray([1.0, 0.4])
        first, want = (end_of(method, schedule, steps=1, grid=grid) for method in (name, "ddim"))
        np.testing.assert_allclose(first, want, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "ve", "rectified_flow"])
@pytest.mark.parametrize("name", [name for name in EAGER if name not in ("euler", "euler_maruyama", "ddim_inversion")])
def test_point_mass_is_exact_in_one_step(name, schedule):
    np.testing.assert_allclose(end_of(name, schedule, steps=1, single=True), np.tile([POINT], (B, 1)), atol=1e-6)


def test_ode_agrees_with_the_reference_solution():
    schedule = SCHEDULES["linear"]()
    start = np.array([[0.8, -1.1]]) * np.hypot(1, np.exp(-HIGH))
    times = schedule.t_of_logsnr(jnp.asarray([2 * HIGH, 2 * LOW], jnp.float32))
    first, last = float(schedule.alpha(times[0])), float(schedule.alpha(times[1]))
    end = np.asarray(ode_solution(MIXTURE, jnp.asarray(start, jnp.float32), HIGH, LOW))
    denoise = MIXTURE.denoiser(schedule)
    for solver in ("dopri5", "tsit5"):
        out = sample(denoise, schedule, jnp.asarray(first * start, jnp.float32), KEY, sampler=made("ode", solver=solver), steps=1,
                     grid=times)
        np.testing.assert_allclose(out, last * end, atol=1e-4)


def test_ode_needs_diffrax(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(UserError, match="pip install diffrax"):
        make_sampler("ode")


# ---- the ends of every schedule, and every target ------------------------------------------------------------------

@pytest.mark.parametrize("schedule_name", list(SCHEDULES))
def test_every_legal_combination_is_finite_at_the_ends(schedule_name):
    """Every sampler x target in float32 on 1 -> 0, 1 -> 0.5 -> 0, 1 -> 0.999 -> 0.001 -> 0, for the exact net of N(0, 1/4)."""
    schedule = compiled(schedule_name)
    legal = []
    for target in PARAMETERIZATIONS:
        try:
            check_parameterization(target, schedule)
            legal.append(target)
        except UserError:
            pass
    assert "x0" in legal and "v" in legal
    legal += ["x0"] * (len(PARAMETERIZATIONS) - len(legal))
    paths = np.array([[1.0, 0, 0, 0], [1.0, 0.5, 0, 0], [1.0, 0.999, 0.001, 0]], np.float32)
    size, steps = len(legal) * len(paths), np.tile([1, 2, 3], len(legal))

    def network(target):
        def predict(x_t, t):
            a, s = (f(t)[:, None] for f in (schedule.alpha, schedule.sigma))
            return PARAMETERIZATIONS[target].target(a / 4 / (a**2 / 4 + s**2) * x_t, s / (a**2 / 4 + s**2) * x_t, a, s)
        return denoiser(predict, schedule, target)

    denoisers = [network(target) for target in legal]

    @jax.jit
    def denoise(x_t, t):  # example i has target i // len(paths)
        answers = [d(x_t[i * 3:i * 3 + 3], t[i * 3:i * 3 + 3]) for i, d in enumerate(denoisers)]
        return jnp.concatenate(answers)

    grid = jnp.asarray(np.tile(paths, (len(legal), 1)).T)
    with operation_by_operation():
        for name in EAGER:
            options = dict(repeats=2) if name == "annealed_langevin" else dict(s_churn=1.0) if name == "edm" else {}
            x = prior(schedule, KEY, (size, 2))
            out = sample(denoise, schedule, x, KEY, sampler=name, steps=jnp.asarray(steps), capacity=3, grid=grid, **options)
            finite = np.isfinite(np.asarray(out)).all(1).reshape(len(legal), len(paths))
            assert finite.all(), (name, [legal[i] for i in np.flatnonzero(~finite.all(1))], np.flatnonzero(~finite.all(0)))
            assert out.dtype == jnp.float32


# ---- what `sample` promises ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", EAGER)
def test_an_example_depends_on_its_own_key_only(name):
    """In another order, each example with its key, the same examples come out in that order."""
    schedule, sampler, denoise = compiled("rectified_flow"), made(name), exact("rectified_flow")
    x, keys = prior(schedule, KEY, (B, 2)), example_keys(jax.random.key(1), B)
    order = np.random.default_rng(0).permutation(B)
    with operation_by_operation():
        one, other = (sample(denoise, schedule, x[i], keys[i], sampler=sampler, steps=3) for i in (np.arange(B), order))
        again = sample(denoise, schedule, x, jax.random.key(2), sampler=sampler, steps=3)
    np.testing.assert_allclose(other, one[order], atol=1e-6)
    assert np.allclose(again, one, atol=1e-5) == (sampler.order is not None)


def test_four_or_eight_examples():
    schedule = SCHEDULES["linear"]()
    four, eight = (sample(MIXTURE.denoiser(schedule), schedule, prior(schedule, KEY, (n, 2)), jax.random.key(1), sampler="ddpm",
                          steps=3) for n in (4, 8))
    np.testing.assert_allclose(four, eight[:4], atol=1e-6)


@pytest.mark.parametrize("name, option", [(name, k) for name in EAGER for k, v in options_of(name).items()
                                          if isinstance(v, float) or k == "order"])
def test_options_may_differ_within_a_batch(name, option):
    """An array of settings [B] gives each example what it gets with its own setting alone."""
    schedule, x = compiled("linear"), prior(SCHEDULES["linear"](), KEY, (B, 2))
    a, b = (1, 2) if option == "order" else (0.05, 0.3) if option in ("bound", "delta") else (0.4, 0.9)
    rest = dict(s_churn=2.0) if name == "edm" and option != "s_churn" else {}

    def run(value):
        with operation_by_operation():
            return sample(lambda x_t, t: 0.3 * jnp.sin(x_t), schedule, x, jax.random.key(1), sampler=name, steps=3,
                          **{option: value, **rest})

    mixed, first, second = run(jnp.asarray([a, b] * (B // 2))), run(jnp.asarray([a] * B)), run(b)
    np.testing.assert_allclose(mixed[0], first[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1], second[1], atol=1e-5)
    assert not np.allclose(first, second, atol=1e-4) or option in ("s_tmin", "s_tmax", "s_noise")


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m", "unipc", "pndm", "ddim_inversion"])
def test_steps_may_differ_within_a_batch(name):
    schedule = compiled("linear")
    denoise, x = exact("linear"), 0.5 * normal(KEY, (B, 2))
    with operation_by_operation():
        mixed = sample(denoise, schedule, x, jax.random.key(1), sampler=name, steps=jnp.asarray([2, 5, 3] * (B // 3)))
        alone = [sample(denoise, schedule, x, jax.random.key(1), sampler=name, steps=n) for n in (2, 5, 3)]
    np.testing.assert_allclose(mixed[:3], np.stack([alone[i][i] for i in range(3)]), atol=1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_numbers_may_be_traced(name):
    """Steps and every numeric option are inputs of the compiled program: tracing it fails if one is asked for its value."""
    made(name)
    schedule = SCHEDULES["rectified_flow"]()
    numbers = {k: jnp.float32(v) for k, v in options_of(name).items()
               if isinstance(v, (int, float)) and not isinstance(v, bool) and k != "max_steps"}

    def run(x, steps, numbers):
        return sample(MIXTURE.denoiser(schedule), schedule, x, KEY, sampler=name, steps=steps, capacity=4, **numbers)

    out = jax.eval_shape(run, jnp.zeros((3, 2)), jnp.int32(2), numbers)
    assert out.shape == (3, 2) and out.dtype == jnp.float32


def test_one_compilation_and_only_the_steps_asked_for():
    """Steps, eta and the grid's numbers change without compiling again; of the capacity only `steps` calls are made."""
    schedule, calls = SCHEDULES["linear"](), []

    def denoise(x_t, t):
        jax.debug.callback(lambda: calls.append(1))
        return 0.2 * x_t

    @jax.jit
    def run(x, steps, eta):
        return sample(denoise, schedule, x, KEY, sampler="ddim", eta=eta, steps=steps, capacity=20)

    x = prior(schedule, KEY, (2, 2))
    for steps, eta in [(3, 0.0), (20, 0.5), (1, 1.0)]:
        before = len(calls)
        padded = run(x, steps, eta)
        jax.effects_barrier()
        assert len(calls) - before == steps
        exact = sample(lambda x_t, t: 0.2 * x_t, schedule, x, KEY, sampler="ddim", eta=eta, steps=steps)
        np.testing.assert_allclose(padded, exact, atol=1e-5)
    assert run._cache_size() == 1


def test_trajectory_and_upwards():
    schedule = SCHEDULES["linear"]()
    denoise, x = MIXTURE.denoiser(schedule), prior(schedule, KEY, (2, 2))
    end, path = sample(denoise, schedule, x, KEY, steps=4, trajectory=True)
    np.testing.assert_array_equal(path["x"][0], x)
    np.testing.assert_array_equal(path["x"][-1], end)
    np.testing.assert_allclose(path["t"], [1, 0.75, 0.5, 0.25, 0], atol=1e-6)
    _, path = sample(denoise, schedule, x, KEY, sampler="ddim_inversion", steps=2, capacity=4, trajectory=True)
    np.testing.assert_allclose(path["t"], [0, 0.5, 1, 1, 1], atol=1e-6)


@pytest.mark.parametrize("wrong, says", [
    (dict(sampler="dimm"), "ddim"), (dict(sampler="heun", eta=1.0), "no option eta"), (dict(sampler="unipc", order=4), "1, 2, 3"),
    (dict(sampler="ddpm", variance="tiny"), "learned"), (dict(steps=0), "at least 1"), (dict(steps=5, capacity=3), "capacity"),
    (dict(sampler="dpmpp_2m", solver="rk"), "midpoint"), (dict(sampler=make_sampler("ddim"), eta=1.0), "made already"),
    (dict(steps=2, grid=jnp.asarray([1.0, 0.0])), "takes 3"), (dict(sampler="predictor_corrector", predictor="x"), "ddpm"),
    (dict(sampler="predictor_corrector", first="both"), "predictor, corrector"),
    (dict(sampler="predictor_corrector", norms="mean"), "expected, drawn"),
])
def test_errors(wrong, says):
    schedule = SCHEDULES["linear"]()
    with pytest.raises(UserError, match=says):
        sample(MIXTURE.denoiser(schedule), schedule, jnp.zeros((1, 2)), KEY, **wrong)


def test_capacity_is_required_for_traced_steps():
    schedule = SCHEDULES["linear"]()
    with pytest.raises(UserError, match="give capacity"):
        jax.eval_shape(lambda n: sample(MIXTURE.denoiser(schedule), schedule, jnp.zeros((1, 2)), KEY, steps=n), jnp.int32(3))


def test_gradient_through_a_multistep_sampler_is_finite():
    """Methods with branches at the ends must not leak a masked infinity into the gradient."""
    schedule = SCHEDULES["rectified_flow"]()
    denoise = GAUSSIAN.denoiser(schedule)
    for name in ("dpmpp_2m", "unipc"):
        g = jax.grad(lambda x: jnp.sum(sample(denoise, schedule, x, KEY, sampler=name, steps=3) ** 2))(jnp.ones((2, 2)))
        assert np.isfinite(np.asarray(g)).all() and np.abs(g).max() > 0
