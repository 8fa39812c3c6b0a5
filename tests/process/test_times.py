"""How times are drawn: each distribution against scipy's, on every kind of schedule, and importance sampling as a value."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ldm_jax.process import times
from ldm_jax.process.schedules import SCHEDULES
from ldm_jax.process.times import TIMES, draw_times, importance, init_importance, update_importance
from ldm_jax.types import UserError, example_keys

MADE = {name: SCHEDULES[name]() for name in ("linear", "vp_sde", "edm", "rectified_flow")}
N = 4096


def esser_mode(t, s=1.29):
    """P(t < x) of eq. 20, by inverting it on a fine table."""
    u = np.linspace(0, 1, 100001)
    return 1 - np.interp(t, (1 - u - s * (np.cos(np.pi / 2 * u) ** 2 - 1 + u))[::-1], u[::-1])


CDF = {
    "uniform": lambda t, schedule: t,
    "stratified": lambda t, schedule: t,
    "logit_normal": lambda t, schedule: stats.norm.cdf(np.log(t / (1 - t))),
    "mode": lambda t, schedule: esser_mode(t),
    "lognormal": lambda t, schedule: stats.norm.cdf((-0.5 * np.asarray(schedule.logsnr(jnp.float32(t)), np.float64) + 1.2) / 1.2),
}


@pytest.mark.parametrize("name", TIMES)
def test_distribution(name):
    for schedule in (MADE["vp_sde"], MADE["edm"]):
        t = np.asarray(TIMES[name](jax.random.key(0), N, schedule), np.float64)
        assert t.min() > 0 and t.max() <= 1
        t = np.sort(t)
        if name in CDF:  # Kolmogorov-Smirnov distance, 1.95 / sqrt(N) at a level of 0.1 per cent
            inside = (t > 1e-6) & (t < 1 - 1e-6)
            assert np.abs(CDF[name](t, schedule) - (np.arange(N) + 0.5) / N)[inside].max() < 1.95 / np.sqrt(N)


@pytest.mark.parametrize("name", TIMES)
def test_one_key_per_example_and_the_grid(name):
    keys = example_keys(jax.random.key(3), 8)
    t, correction = draw_times(name, keys, 8, MADE["linear"])
    k = np.asarray(t, np.float64) * 1000
    np.testing.assert_allclose(k, np.round(k), atol=1e-3)
    assert k.min() >= 0.999 and k.max() <= 1000 and np.all(correction == 1)
    if name != "stratified":  # what is drawn for an example does not depend on the batch
        np.testing.assert_array_equal(draw_times(name, jax.random.key(3), 4, MADE["linear"])[0], t[:4])


def test_stratified_has_one_in_every_interval():
    t = np.asarray(TIMES["stratified"](jax.random.key(2), 64, MADE["vp_sde"]), np.float64)
    gaps = np.diff(np.sort(t))
    np.testing.assert_allclose(gaps, 1 / 64, atol=1e-6)


def test_mode_refuses_a_fold():
    for scale in (-1.1, 1.8):
        with pytest.raises(UserError, match="scale"):
            times.mode(jax.random.key(0), 4, MADE["vp_sde"], scale=scale)


def test_importance_memory_is_a_queue():
    state = init_importance(bins=4, length=3)
    queues = {k: [] for k in range(4)}
    rng = np.random.default_rng(0)
    update = jax.jit(update_importance)
    for _ in range(6):
        k, loss = rng.integers(0, 4, 9), rng.uniform(1, 2, 9).astype(np.float32)
        state = update(state, jnp.asarray((k + 1) / 4, jnp.float32), jnp.asarray(loss))
        for i, value in zip(k, loss):
            queues[i] = (queues[i] + [value])[-3:]
    for k in range(4):
        assert sorted(np.asarray(state.history[k]).tolist()) == sorted(float(v) for v in queues[k])
    root = np.array([np.sqrt(np.mean(np.square(queues[k]))) for k in range(4)])
    np.testing.assert_allclose(times.importance_probabilities(state, 0.1), 0.9 * root / root.sum() + 0.1 / 4, rtol=1e-5)


def test_importance_is_uniform_until_full_and_unbiased_after():
    early = update_importance(init_importance(5, 2), jnp.array([0.3]), jnp.array([9.0]))
    np.testing.assert_allclose(times.importance_probabilities(early), 0.2)
    state = init_importance(bins=10, length=1)
    middles = (jnp.arange(10) + 0.5) / 10
    state = update_importance(state, middles, jnp.arange(10) + 1.0)
    draw = jax.jit(lambda state, key: draw_times(importance(state), key, 20000, MADE["rectified_flow"]))
    t, correction = draw(state, jax.random.key(0))
    share = np.histogram(t, bins=np.linspace(0, 1, 11))[0] / 20000
    np.testing.assert_allclose(share, times.importance_probabilities(state), atol=5 * np.sqrt(0.18 * 0.82 / 20000))
    values = correction * t**2  # E[t^2] under the uniform law
    np.testing.assert_allclose(values.mean(), 1 / 3, atol=4 * values.std() / np.sqrt(20000))
    t, _ = draw_times(importance(init_importance(1000)), jax.random.key(0), 50, MADE["linear"])
    np.testing.assert_allclose(np.asarray(t, np.float64) * 1000, np.round(np.asarray(t, np.float64) * 1000), atol=1e-3)
