"""Few-step objectives at their known minimisers. For Gaussian data N(m, C) the probability flow is linear: with the eigenvalues c
of C and std_t = sqrt(alpha_t^2 c + sigma_t^2), x_s = alpha_s m + (std_s / std_t) (x_t - alpha_t m) along each eigenvector."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.process.consistency import (
    CONSISTENCY_WEIGHTS,
    DISTANCES,
    INTERVALS,
    consistency_function,
    consistency_loss,
    consistency_sampler,
    doubling_curriculum,
)
from ldm_jax.process.few_step import (
    FEW_STEP,
    average_velocity,
    mean_flow_loss,
    path,
    progressive_loss,
    progressive_target,
    reflow_loss,
    reflow_pairs,
    shortcut_loss,
)
from ldm_jax.process.parameterizations import PARAMETERIZATIONS
from ldm_jax.process.samplers import SAMPLERS, Sampler, prior, sample
from ldm_jax.process.schedules import SCHEDULES
from ldm_jax.types import UserError, expand
from tests.oracle import GAUSSIAN, MIXTURE

FLOW = SCHEDULES["rectified_flow"]()
VP = SCHEDULES["vp_sde"]()
EDM = SCHEDULES["edm"](sigma_max=20.0)
EIGENVALUES, BASIS = np.linalg.eigh(GAUSSIAN.covs[0])
MEAN = GAUSSIAN.means[0]
N = 256
KEY = jax.random.key(11)


def data(n=N):
    return jnp.asarray(np.random.default_rng(0).multivariate_normal(MEAN, GAUSSIAN.covs[0], n), jnp.float32)


def noise(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def std(schedule, t):
    return jnp.sqrt(schedule.alpha(t)[:, None] ** 2 * EIGENVALUES[None] + schedule.sigma(t)[:, None] ** 2)


def flow_map(schedule, x, t, s):
    """The exact probability flow from t to s, [B]."""
    a_t, a_s = expand(schedule.alpha(t), x), expand(schedule.alpha(s), x)
    return a_s * MEAN[None] + (std(schedule, s) / std(schedule, t) * ((x - a_t * MEAN[None]) @ BASIS)) @ BASIS.T


def average(x, t, r):
    """u(x_t, t, r) on rectified flow, the difference of the two std divided by t - r by hand so that r = t is exact."""
    slope = (expand(t + r, x) - EIGENVALUES[None] * expand(2 - t - r, x)) / (std(FLOW, t) * (std(FLOW, t) + std(FLOW, r)))
    return (slope * ((x - expand(1 - t, x) * MEAN[None]) @ BASIS)) @ BASIS.T - MEAN[None]


def bump(x, t):
    """A change to an exact solution that it cannot absorb."""
    return jnp.sin(x) * expand(1 + t, x)


def tangent(f, theta):
    """d f / d theta, each example's."""
    return jax.jit(lambda theta: jax.jvp(f, (theta,), (jnp.float32(1.0),))[1])(jnp.float32(theta))


def slopes(loss):
    """Mean loss and d mean loss / d theta at theta = 0 and theta = 0.1, where theta scales an added bump."""
    f = jax.jit(jax.value_and_grad(lambda theta: jnp.mean(loss(theta)[0])))
    return [tuple(map(float, f(jnp.float32(theta)))) for theta in (0.0, 0.1)]


@pytest.mark.parametrize("schedule", [FLOW, VP, EDM], ids=lambda s: s.name)
def test_flow_map_solves_the_ode_of_the_oracle(schedule):
    """The closed form this file relies on: it starts at x, and its velocity is that of the oracle's x0 and eps."""
    @jax.jit
    def check(x, t, s):
        y, slope = jax.jvp(lambda s: flow_map(schedule, x, t, s), (s,), (jnp.ones_like(s),))
        x0 = GAUSSIAN.denoiser(schedule)(y, s)
        again, velocity = path(schedule, x0, (y - schedule.alpha(s)[:, None] * x0) / schedule.sigma(s)[:, None], s)
        return flow_map(schedule, x, t, t) - x, again - y, (slope - velocity) / (1 + jnp.abs(velocity))

    for difference in check(noise(16, 2), jnp.full(16, 0.8), jnp.linspace(0.2, 1.0, 16)):
        np.testing.assert_allclose(difference, 0, atol=2e-5)


def test_average_is_that_of_the_flow_map():
    x, t, r = noise(16, 2), jnp.full(16, 0.8), jnp.full(16, 0.3)
    u, v, end = jax.jit(lambda x: (average(x, t, r), average(x, t, t), flow_map(FLOW, x, t, r)))(x)
    x0 = jax.jit(GAUSSIAN.denoiser(FLOW))(x, t)
    np.testing.assert_allclose(u, (x - end) / 0.5, atol=1e-5)
    np.testing.assert_allclose(v, (x - x0) / 0.8, atol=1e-5)


def test_path_velocity_is_the_derivative():
    x0, eps, t, h = data(8), noise(8, 2), jnp.linspace(0.1, 0.9, 8), 1e-3
    run = jax.jit(lambda t: path(VP, x0, eps, t))
    np.testing.assert_allclose(run(t)[1], (run(t + h)[0] - run(t - h)[0]) / (2 * h), rtol=2e-3, atol=1e-3)


# Reflow

def test_reflow_pairs_follow_the_flow():
    x0, eps = reflow_pairs(GAUSSIAN.denoiser(VP), VP, KEY, (64, 2), sampler="heun", steps=100, grid="logsnr_uniform")
    np.testing.assert_allclose(eps.std(), 1.0, atol=0.15)
    np.testing.assert_allclose(x0, flow_map(VP, eps * VP.sigma(1.0), jnp.ones(64), jnp.zeros(64)), atol=2e-3)


def test_reflow_minimiser_is_straight():
    """x0 = m + A eps, A = C^(1/2): no paths cross; their velocity (I - A) ((1 - t) A + t)^-1 (x - (1 - t) m) - m has no loss."""
    eps, a = noise(N, 2), np.sqrt(EIGENVALUES)[None]
    x0 = flow_map(FLOW, eps, jnp.ones(N), jnp.zeros(N))

    def velocity(x, t):
        at = expand(t, x)
        return ((1 - a) / ((1 - at) * a + at) * ((x - (1 - at) * MEAN[None]) @ BASIS)) @ BASIS.T - MEAN[None]

    (value, slope), (worse, steeper) = slopes(
        lambda theta: reflow_loss(lambda x, t: velocity(x, t) + theta * bump(x, t), FLOW, x0, eps, KEY))
    assert value < 1e-10 and abs(slope) < 1e-5
    assert worse > 1e-3 and steeper > 1e-2
    independent, _ = reflow_loss(velocity, FLOW, data(), eps, KEY)
    assert independent.mean() > 0.1


# Progressive distillation

@pytest.mark.parametrize("name", ["linear", "rectified_flow", "edm"])
def test_progressive_target_is_two_steps_of_ddim(name):
    """One DDIM step with the target lands where the teacher's two do, from every t = i / 4 to (i - 1) / 4."""
    schedule = SCHEDULES[name]()
    teacher, ddim = MIXTURE.denoiser(schedule), SAMPLERS["ddim"]().step

    @jax.jit
    def ends(z, t, s):
        x, m = z * jnp.hypot(schedule.alpha(t), schedule.sigma(t))[:, None], 0.5 * (t + s)
        target = progressive_target(teacher, schedule, x, t, s)
        middle, _ = ddim(teacher, schedule, x, t, m, KEY, ())
        return ddim(lambda x_t, t: target, schedule, x, t, s, KEY, ())[0], ddim(teacher, schedule, middle, m, s, KEY, ())[0]

    t = jnp.tile(jnp.array([1.0, 0.75, 0.5, 0.25]), 8)
    one, two = ends(noise(32, 2), t, t - 0.25)
    np.testing.assert_allclose(one, two, rtol=2e-4, atol=2e-4)


def paper_target(schedule, x, t, s):
    """Salimans & Ho 2022, algorithm 2 as printed, with the Gaussian's denoiser along its eigenvectors, float64."""
    a = {u: np.float64(schedule.alpha(jnp.float32(u))) for u in (t, (t + s) / 2, s)}
    b = {u: np.float64(schedule.sigma(jnp.float32(u))) for u in a}

    def hat(z, u):
        return MEAN + (a[u] * EIGENVALUES / (a[u] ** 2 * EIGENVALUES + b[u] ** 2) * ((z - a[u] * MEAN) @ BASIS)) @ BASIS.T

    m = (t + s) / 2
    z_m = a[m] * hat(x, t) + b[m] / b[t] * (x - a[t] * hat(x, t))
    z_s = a[s] * hat(z_m, m) + b[s] / b[m] * (z_m - a[m] * hat(z_m, m))
    return (z_s - b[s] / b[t] * x) / (a[s] - b[s] / b[t] * a[t])


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=lambda s: s.name)
def test_progressive_loss_has_its_minimiser(schedule):
    """A student that is the paper's target at each of its times has no loss; anything else has."""
    steps, teacher = 4, GAUSSIAN.denoiser(schedule)
    x, target = noise(16, 2), jax.jit(functools.partial(progressive_target, teacher, schedule))
    for i in (1, 2, 4):
        found = target(x, jnp.full(16, i / steps), jnp.full(16, (i - 1) / steps))
        np.testing.assert_allclose(found, paper_target(schedule, np.asarray(x, float), i / steps, (i - 1) / steps), atol=2e-5)

    def student(theta):
        return lambda x_t, t: progressive_target(teacher, schedule, x_t, t, t - 1 / steps) + theta * bump(x_t, t)

    (value, slope), (worse, steeper) = slopes(
        lambda theta: progressive_loss(student(theta), teacher, schedule, data(), KEY, steps=steps))
    assert value < 1e-9 and abs(slope) < 1e-4
    assert worse > 1e-3 and steeper > 1e-2


def test_progressive_times_are_the_student_s():
    """t on 1/N .. N/N, each about equally often, N traced without a second compilation."""
    teacher, calls = GAUSSIAN.denoiser(FLOW), []

    @jax.jit
    def times(steps):
        calls.append(1)
        return progressive_loss(teacher, teacher, FLOW, jnp.zeros((4000, 2)), KEY, steps=steps)[1]["t"]

    for steps in (8, 4, 1):
        values, counts = np.unique(np.asarray(times(steps)), return_counts=True)
        np.testing.assert_allclose(values, np.arange(1, steps + 1) / steps, rtol=1e-6)
        assert np.all(np.abs(counts - 4000 / steps) < 5 * np.sqrt(4000 / steps))
    assert len(calls) == 1


# Consistency

def exact_consistency(schedule, t_min):
    def f(x_t, t):
        s = jnp.full_like(t, t_min)
        return flow_map(schedule, x_t, t, s) / expand(schedule.alpha(s), x_t)
    return f


@pytest.mark.parametrize("schedule", [FLOW, EDM], ids=lambda s: s.name)
def test_consistency_function_is_the_paper_s(schedule):
    """The boundary condition, and c_skip, c_out of Song et al. 2023 in units of x_t / alpha, float64."""
    t_min, d = 0.3 if schedule is EDM else 0.05, 0.7
    x, t = noise(16, 2), jnp.linspace(t_min, 0.95, 16)
    f = jax.jit(consistency_function(lambda x_t, t: jnp.cos(x_t), schedule, t_min=t_min, sigma_data=d))
    a, s = (np.asarray(g(t), float)[:, None] for g in (schedule.alpha, schedule.sigma))
    tau, low, z = s / a, s[0] / a[0], np.asarray(x, float)
    expected = d**2 / ((tau - low) ** 2 + d**2) * z / a + d * (tau - low) / np.sqrt(tau**2 + d**2) * np.cos(z)
    np.testing.assert_allclose(f(x, t), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(f(x, t)[0], x[0] / a[0], rtol=1e-6)
    assert np.all(np.isfinite(f(x, jnp.ones(16)))) and np.all(np.isfinite(f(x, jnp.zeros(16))))


def test_consistency_function_without_cutoff_is_edm():
    x, t = noise(16, 2), jnp.linspace(0.05, 1.0, 16)
    f = consistency_function(lambda x_t, t: jnp.cos(x_t), FLOW, t_min=0.0)
    alpha, sigma = expand(FLOW.alpha(t), x), expand(FLOW.sigma(t), x)
    np.testing.assert_allclose(f(x, t), PARAMETERIZATIONS["edm"].x0(jnp.cos(x), x, alpha, sigma), rtol=1e-5, atol=1e-6)


def exact_step():
    return Sampler(lambda denoise, schedule, x, t, s, key, carry: (flow_map(schedule, x, t, s), carry))


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=lambda s: s.name)
def test_consistency_distillation_minimiser(schedule):
    """With an exact teacher's step the exact consistency function has no loss, in any distance and weight; with a bump it has."""
    times, f, teacher = jnp.linspace(1.0, 0.05, 9), exact_consistency(schedule, 0.05), GAUSSIAN.denoiser(schedule)

    @jax.jit
    def losses(theta):
        def g(x_t, t):
            return f(x_t, t) + theta * bump(x_t, t)
        return [jnp.mean(consistency_loss(g, g, schedule, data(), KEY, times=times, teacher=teacher, sampler=exact_step(),
                                          distance=distance, weight=weight)[0])
                for distance, weight in itertools.product(DISTANCES, CONSISTENCY_WEIGHTS)]

    for value, worse in zip(losses(0.0), losses(0.1)):
        assert value < 1e-5 and worse > 50 * value + 1e-5


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("heun", 2)])
def test_consistency_distillation_error_falls_with_the_solver(sampler, order):
    """sqrt(loss) at the exact function is the error of one teacher's step, O(N^-(order + 1))."""
    f, teacher = exact_consistency(VP, 0.1), GAUSSIAN.denoiser(VP)

    @jax.jit
    def error(times):
        return jnp.sqrt(consistency_loss(f, f, VP, data(2048), KEY, times=times, teacher=teacher, sampler=sampler)[0].mean())

    errors = [error(jnp.concatenate([jnp.linspace(1.0, 0.1, n + 1), jnp.full(16 - n, 0.1)])) for n in (8, 16)]
    assert abs(np.log2(errors[0] / errors[1]) - (order + 1)) < 0.4


def test_consistency_training_has_distillation_s_gradient():
    """For f linear in x, training has on average the gradient of distillation with a DDIM step of the exact denoiser."""
    times, n = jnp.linspace(1.0, 0.05, 7), 40000
    x0, f = data(n), exact_consistency(VP, 0.05)

    def gradient(teacher):
        def each(theta):
            def g(x_t, t):
                return f(x_t, t) + 0.2 * x_t + theta * expand(t, x_t) * x_t
            return consistency_loss(g, f, VP, x0, KEY, times=times, teacher=teacher)[0]
        return np.asarray(tangent(each, 0.0), float)

    train, distil = gradient(None), gradient(GAUSSIAN.denoiser(VP))
    difference = train - distil
    assert abs(difference.mean()) < 4.5 * difference.std() / np.sqrt(n)
    assert abs(distil.mean()) > 20 * difference.std() / np.sqrt(n)  # so that the comparison says something
    assert np.abs(difference).max() > 1e-2


def test_consistency_target_gets_no_gradient():
    f, times = exact_consistency(VP, 0.05), jnp.linspace(1.0, 0.05, 7)

    def loss(theta):
        return jnp.mean(consistency_loss(f, lambda x_t, t: (1 + theta) * f(x_t, t), VP, data(), KEY, times=times)[0])

    assert float(jax.grad(loss)(0.5)) == 0.0


@pytest.mark.parametrize("name", sorted(INTERVALS))
def test_intervals_are_drawn_with_their_probability(name):
    """Frequencies against float64; the entries that fill a grid's capacity are never drawn."""
    from scipy.stats import norm
    times, n = jnp.array([1.0, 0.9, 0.6, 0.3, 0.1, 0.05, 0.05, 0.05]), 20000
    f = exact_consistency(EDM, 0.05)
    _, metrics = jax.jit(lambda: consistency_loss(f, f, EDM, jnp.zeros((n, 2)), KEY, times=times, intervals=name))()
    t, s = np.asarray(metrics["t"]), np.asarray(metrics["s"])
    assert np.all(t > s)
    tau = 20.0 * np.asarray(times, float) ** 7
    mass = {"uniform": np.array([1.0] * 5 + [0, 0]), "lognormal": -np.diff(norm.cdf((np.log(tau) + 1.1) / 2.0))}[name]
    p = mass / mass.sum()
    counts = np.array([np.sum((t == float(times[i])) & (s == float(times[i + 1]))) for i in range(7)])
    assert counts.sum() == n and np.all(counts[5:] == 0)
    assert np.all(np.abs(counts - n * p) <= 4.5 * np.sqrt(n * p * (1 - p)) + 1e-9)


def test_distances_and_weights():
    """The papers' formulas in float64; pseudo-Huber times sqrt(D) with c = 0.00054 sqrt(D)."""
    a, b = np.asarray(noise(5, 4, 3), float), np.asarray(noise(5, 4, 3, seed=2), float)
    norm2, size = np.sum((a - b) ** 2, (1, 2)), 12
    c = 0.00054 * np.sqrt(size)
    expected = {"l2": norm2 / size, "l1": np.abs(a - b).mean((1, 2)), "pseudo_huber": (np.sqrt(norm2 + c**2) - c) / np.sqrt(size)}
    for name, value in expected.items():
        np.testing.assert_allclose(DISTANCES[name](jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)), value, rtol=1e-5)
    assert sorted(expected) == sorted(DISTANCES)
    assert np.isfinite(jax.grad(lambda a: DISTANCES["pseudo_huber"](a, a + 0.0).sum())(jnp.ones((2, 3)))).all()
    np.testing.assert_allclose(CONSISTENCY_WEIGHTS["inverse_gap"](jnp.array([2.0, jnp.inf]), jnp.array([1.5, 3.0])), [2.0, 0.0])


def test_curriculum_is_the_paper_s():
    """N(k) - 1 = min(s0 2^floor(k / K'), s1), K' = floor(K / (log2 floor(s1 / s0) + 1)): 10 to 1280 in eight equal parts."""
    total = 800
    expected = [min(10 * 2 ** (k // 100), 1280) for k in range(total + 50)]
    assert [int(doubling_curriculum(jnp.int32(k), total)) for k in range(0, total + 50, 25)] == expected[::25]


def test_consistency_sampler():
    """The exact function samples the data's law in one step and in three; t_min's own noise is not added twice."""
    n, t_min = 20000, 0.2
    f = exact_consistency(VP, t_min)
    level = (np.float64(VP.sigma(t_min)) / np.float64(VP.alpha(t_min))) ** 2
    for steps in (1, 3):
        x = sample(f, VP, prior(VP, KEY, (n, 2)), KEY, sampler=consistency_sampler(t_min), steps=steps)
        x = np.asarray(x, float)
        np.testing.assert_allclose(x.mean(0), MEAN, atol=0.03)
        np.testing.assert_allclose(np.cov(x.T), GAUSSIAN.covs[0] + level * np.eye(2), atol=0.03)


# Averages of the velocity

def test_shortcut_minimiser():
    """The exact map has no self-consistency loss, but where the target is asked the smallest d as 0, and the flow-matching loss
    Var[v | x_t] = Var[x0 | x_t] / t^2, with eigenvalues c / ((1 - t)^2 c + t^2). Its gradient vanishes; beside it it does not."""
    n, sections = 20000, 32

    def each(theta):
        def predict(x, t, d):
            return average(x, t, t - d) + theta * bump(x, t)
        return shortcut_loss(predict, lambda x, t, d: average(x, t, t - d), FLOW, data(n), KEY, sections=sections)

    @jax.jit
    def run(theta):
        (loss, metrics), (slope, _) = jax.jvp(each, (theta,), (jnp.float32(1.0),))
        return loss, slope, metrics["t"], metrics["d"]

    loss, at, t, d = (np.asarray(a, float) for a in run(jnp.float32(0.0)))
    worse, off, _, _ = (np.asarray(a, float) for a in run(jnp.float32(0.1)))
    assert np.all((d > 0) == (np.arange(n) % 4 == 0))
    longer, smallest, flow = d > 2 / sections, d == 2 / sections, d == 0
    assert loss[longer].max() < 1e-9 and np.abs(at[longer]).max() < 1e-4
    assert worse[longer].mean() > 1e-3 and off[longer].mean() > 0.1
    assert 0 < loss[smallest].max() < 0.03  # two Euler steps of 1 / sections
    variance = (EIGENVALUES / ((1 - t[:, None]) ** 2 * EIGENVALUES + t[:, None] ** 2)).mean(1)
    excess = (loss - variance)[flow]
    assert abs(excess.mean()) < 4.5 * excess.std() / np.sqrt(excess.size)
    error = at[flow].std() / np.sqrt(flow.sum())
    assert abs(at[flow].mean()) < 4.5 * error and off[flow].mean() > 10 * error


def test_shortcut_grid():
    """2 d over 1, 1/2, .., 2 / sections equally often, t a multiple of it in (0, 1], and no step reaches below 0."""
    f = lambda x, t, d: x  # noqa: E731
    _, metrics = jax.jit(lambda: shortcut_loss(f, f, FLOW, jnp.zeros((24000, 2)), KEY, sections=16, every=2))()
    t, d = np.asarray(metrics["t"]), np.asarray(metrics["d"])
    values, counts = np.unique(d[d > 0], return_counts=True)
    np.testing.assert_array_equal(values, [1 / 8, 1 / 4, 1 / 2, 1])
    assert np.all(np.abs(counts - 3000) < 5 * np.sqrt(3000)) and np.all(d[1::2] == 0)
    np.testing.assert_array_equal((t / np.where(d > 0, d, 1 / 16)) % 1, 0)
    assert t.min() > 0 and t.max() == 1.0 and np.all(t >= d)
    for bad in (dict(sections=12), dict(sections=1), dict(every=0)):
        with pytest.raises(UserError, match="power of two"):
            shortcut_loss(f, f, FLOW, jnp.zeros((4, 2)), KEY, **bad)


def test_mean_flow_identity_is_exact():
    """With the marginal velocity in v's place the exact average velocity fulfils the identity: no loss, no gradient."""
    x0 = data()

    def loss(theta):
        return mean_flow_loss(lambda x, t, r: average(x, t, r) + theta * bump(x, t) * expand(1 + r, x), FLOW, x0, KEY, ratio=1.0,
                              velocity=lambda x, t, v: average(x, t, t), power=0.0)

    (value, slope), (worse, steeper) = slopes(loss)
    assert value < 1e-9 and abs(slope) < 1e-5
    assert worse > 1e-3 and steeper > 1e-2


def test_mean_flow_target_against_numeric_differentiation():
    """target = v - (t - r) d/dt u(x_t, t, r) along the path of the pair, by central differences of an arbitrary network."""
    x0, h = data(64), 1e-3

    def predict(x, t, r):
        return jnp.tanh(x * expand(1 + t, x)) + expand(r * t, x) + x**2 / 4

    seen = {}

    def spy(x, t, v):
        seen.update(x=x, t=t, v=v)
        return v

    _, metrics = mean_flow_loss(predict, FLOW, x0, KEY, ratio=1.0, velocity=spy, power=0.0)
    x, t, v, r = (np.asarray(a) for a in (seen["x"], seen["t"], seen["v"], metrics["r"]))
    assert np.all(r <= t) and np.mean(r < t) > 0.9
    ahead, behind = (predict(x + d * v, jnp.asarray(t + d), jnp.asarray(r)) for d in (h, -h))
    target = v - (t - r)[:, None] * (np.asarray(ahead, float) - np.asarray(behind, float)) / (2 * h)
    expected = np.mean((np.asarray(predict(x, jnp.asarray(t), jnp.asarray(r)), float) - target) ** 2, -1)
    np.testing.assert_allclose(metrics["mse"], expected, rtol=5e-3, atol=1e-4)


def test_mean_flow_on_data_has_the_minimiser():
    """With the conditional v of the data: the gradient at the exact average velocity is zero on average, and not elsewhere."""
    n, x0 = 40000, data(40000)

    def each(theta):
        def predict(x, t, r):
            return average(x, t, r) + theta * bump(x, t)
        return mean_flow_loss(predict, FLOW, x0, KEY, ratio=0.5, power=0.0)[0]

    at, off = (np.asarray(tangent(each, where), float) for where in (0.0, 0.2))
    assert abs(at.mean()) < 4.5 * at.std() / np.sqrt(n)
    assert off.mean() > 10 * at.std() / np.sqrt(n)


def test_mean_flow_draws_and_adaptive_weight():
    """A quarter of the examples has r < t; with power 1 the loss is e / (e + c / D); the weight carries no gradient."""
    n = 4000
    predict = lambda x, t, r: 0.5 * x  # noqa: E731
    loss, metrics = jax.jit(lambda: mean_flow_loss(predict, FLOW, data(n), KEY))()
    t, r, mse = (np.asarray(metrics[k], float) for k in ("t", "r", "mse"))
    assert np.all(r <= t) and abs(np.mean(r < t) - 0.25) < 4.5 * np.sqrt(0.25 * 0.75 / n)
    np.testing.assert_allclose(loss, mse / (mse + 1e-3 / 2), rtol=1e-5)
    plain, adaptive = tangent(lambda theta: jnp.stack([mean_flow_loss(lambda x, t, r: theta * x, FLOW, data(n), KEY, power=p)[0]
                                                       for p in (0.0, 1.0)]), 0.5)
    np.testing.assert_allclose(adaptive, plain / (mse + 1e-3 / 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_average_velocity_samples_exactly(steps):
    """However few the steps, the exact average velocity lands where the flow does."""
    x = prior(FLOW, KEY, (32, 2))
    end = sample(None, FLOW, x, KEY, sampler=average_velocity(average), steps=steps)
    np.testing.assert_allclose(end, flow_map(FLOW, x, jnp.ones(32), jnp.zeros(32)), atol=2e-6)


@pytest.mark.parametrize("name", sorted(FEW_STEP))
def test_an_example_s_draws_depend_on_its_index_alone(name):
    """The first examples of a batch have the same loss as when they are the whole batch."""
    x0, denoise, times = data(8), GAUSSIAN.denoiser(FLOW), jnp.linspace(1.0, 0.1, 5)
    u = lambda x, t, d: x * expand(1 + d, x)  # noqa: E731
    calls = {"reflow": lambda x: reflow_loss(lambda x, t: x, FLOW, x, 2 * x, KEY),
             "consistency": lambda x: consistency_loss(denoise, denoise, FLOW, x, KEY, times=times),
             "progressive": lambda x: progressive_loss(denoise, denoise, FLOW, x, KEY, steps=4),
             "shortcut": lambda x: shortcut_loss(u, u, FLOW, x, KEY),
             "mean_flow": lambda x: mean_flow_loss(u, FLOW, x, KEY)}
    whole, part = jax.jit(lambda x: (calls[name](x)[0][:4], calls[name](x[:4])[0]))(x0)
    np.testing.assert_allclose(whole, part, rtol=2e-5, atol=1e-7)
