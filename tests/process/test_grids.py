"""Time grids: their shape and ends under every schedule, their values against the papers' in float64 numpy."""
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.process import grids
from ldm_jax.process.grids import GRIDS, spaced_timesteps
from ldm_jax.process.schedules import SCHEDULES
from ldm_jax.types import UserError

LINEAR, FLOW, EDM = (SCHEDULES[name]() for name in ("linear", "rectified_flow", "edm"))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_grid_goes_down_to_data(name):
    schedule = SCHEDULES[name]()

    @jax.jit
    def all_grids(steps):
        return jnp.stack([grid(schedule, steps, 20) for grid in GRIDS.values()])

    for steps in (1, 7, 20):
        for grid, traced in zip(GRIDS, np.asarray(all_grids(steps))):
            assert traced.shape == (21,) and traced.dtype == np.float32
            assert traced[0] <= 1 and np.all(np.diff(traced[:steps + 1]) < 0) and np.all(traced[steps:] == 0), (grid, traced)
            if name == "linear":
                np.testing.assert_allclose(GRIDS[grid](schedule, steps, 20), traced, atol=1e-6, err_msg=grid)
    assert all_grids._cache_size() == 1


def k_of(times, steps):
    """Integer steps visited, and that they are whole."""
    k = np.asarray(times[:steps], np.float64) * 1000 - 1
    np.testing.assert_allclose(k, np.round(k), atol=1e-3)
    return np.round(k).astype(int).tolist()


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 64, 1000])
def test_whole_steps(steps):
    visited = {name: k_of(grid(LINEAR, steps, steps), steps) for name, grid in {
        **GRIDS, "offset": functools.partial(grids.leading, offset=1), "open": functools.partial(grids.leading, endpoint=False),
        "open_linspace": functools.partial(grids.linspace, endpoint=False)}.items()
        if name in ("trailing", "leading", "linspace", "offset", "open", "open_linspace")}
    assert visited["trailing"] == (np.round(np.arange(1000, 0, -1000 / steps))[:steps] - 1).astype(int).tolist()
    leading = (np.arange(steps) * (1000 // steps))[::-1]
    assert visited["leading"] == leading.tolist()
    assert visited["offset"] == np.minimum(leading + 1, 999).tolist()
    if steps > 1:
        assert visited["linspace"] == [round(Fraction(999 * i, steps - 1)) for i in range(steps)][::-1]
    if steps < 1000:
        assert visited["open"] == (np.arange(steps + 1) * (1000 // (steps + 1)))[::-1][:-1].tolist()
        assert visited["open_linspace"] == [round(Fraction(999 * i, steps)) for i in range(1, steps + 1)][::-1]


def test_all_steps_are_the_process_itself():
    for name in ("uniform", "trailing", "leading", "linspace", "respaced"):
        assert k_of(GRIDS[name](LINEAR, 1000, 1000), 1000) == list(range(999, -1, -1))


def test_linspace_between_steps():
    np.testing.assert_allclose(grids.linspace(LINEAR, 7, 7, rounded=False)[:7] * 1000 - 1, np.linspace(999, 0, 7), atol=1e-3)


def ratio(schedule, times):
    times = np.asarray(times)
    return np.asarray(schedule.sigma(times), np.float64) / np.asarray(schedule.alpha(times), np.float64)


@pytest.mark.parametrize("schedule", [LINEAR, FLOW, EDM, SCHEDULES["ve"]()], ids=lambda s: s.name)
def test_noise_levels(schedule):
    n, low, high = 12, 0.02, 40.0
    i = np.arange(n) / (n - 1)
    for rho in (7.0, 3.0):
        times = grids.karras(schedule, n, n, rho=rho, sigma_min=low, sigma_max=high)
        expected = (high ** (1 / rho) + i * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        np.testing.assert_allclose(ratio(schedule, times)[:n], expected, rtol=1e-4)
    times = grids.exponential(schedule, n, n, sigma_min=low, sigma_max=high)
    np.testing.assert_allclose(ratio(schedule, times)[:n], np.exp(np.linspace(np.log(high), np.log(low), n)), rtol=1e-4)
    times = grids.logsnr_uniform(schedule, n, n, sigma_min=low, sigma_max=high)
    np.testing.assert_allclose(ratio(schedule, times)[:n], np.exp(np.linspace(np.log(high), np.log(low), n + 1))[:-1], rtol=1e-4)


def test_noise_levels_of_the_process_itself():
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    sigmas = np.sqrt(1 / abar - 1)
    found = ratio(LINEAR, grids.karras(LINEAR, 5, 5))
    np.testing.assert_allclose(found[[0, 4]], sigmas[[-1, 0]], rtol=1e-3)
    np.testing.assert_allclose(ratio(EDM, grids.karras(EDM, 5, 5))[[0, 4]], [80.0, 0.002], rtol=1e-4)  # Karras et al., table 1
    assert grids.karras(FLOW, 5, 5)[0] == 1


def test_shifted():
    t = np.linspace(1, 0, 9)
    np.testing.assert_allclose(grids.shifted(FLOW, 8, 8, shift=3.0), 3 * t / (1 + 2 * t), atol=1e-6)
    base = np.asarray(grids.leading(LINEAR, 8, 8))
    np.testing.assert_allclose(grids.shifted(LINEAR, 8, 8, shift=0.5, base="leading"), 0.5 * base / (1 - 0.5 * base), atol=1e-6)


def test_respacing_is_improved_ddpms():
    assert spaced_timesteps(1000, "ddim25").tolist() == list(range(0, 1000, 40))
    assert spaced_timesteps(300, "ddim30").tolist() == list(range(0, 300, 10))
    assert spaced_timesteps(1000, "ddim3").tolist() == [0, 334, 668]
    assert spaced_timesteps(1000, "250").tolist() == [round(i * 999 / 249) for i in range(250)]
    # the paper's code describes 300 steps as "10,15,20": 10 of the first 100, 15 of the second, 20 of the third
    parts = [[round(i * 99 / (n - 1)) + 100 * j for i in range(n)] for j, n in enumerate((10, 15, 20))]
    assert spaced_timesteps(300, "10,15,20").tolist() == spaced_timesteps(300, (10, 15, 20)).tolist() == sum(parts, [])
    assert spaced_timesteps(10, (1, 2, 1)).tolist() == [0, 4, 6, 7]  # parts of 4, 3 and 3 steps
    times = grids.respaced(LINEAR, 45, 50, sections="10,15,20")
    assert times[0] == 1 and times[44] == np.float32(0.001) and np.all(times[45:] == 0)
    assert k_of(grids.respaced(LINEAR, 25, 25), 25) == list(range(960, -1, -40))


def test_explicit():
    times = grids.explicit(LINEAR, 3, 5, timesteps=[999, 500, 3])
    np.testing.assert_allclose(times, [1.0, 0.501, 0.004, 0, 0, 0], atol=1e-7)


@pytest.mark.parametrize("make, says", [
    (lambda: GRIDS["leading"](LINEAR, 1001, 1001), "1..1000"), (lambda: GRIDS["trailing"](LINEAR, 0, 5), "steps"),
    (lambda: grids.karras(LINEAR, 5, 5, sigma_min=3.0, sigma_max=2.0), "sigma_min"),
    (lambda: grids.shifted(FLOW, 5, 5, shift=0), "shift"),
    (lambda: grids.explicit(LINEAR, 2, 2, timesteps=[3, 5]), "decrease"),
    (lambda: grids.explicit(LINEAR, 1, 1, timesteps=[1000]), "999"),
    (lambda: grids.explicit(LINEAR, 3, 3, timesteps=[5, 3]), "steps must be 2"),
    (lambda: spaced_timesteps(1000, "ddim999"), "ddim999"), (lambda: spaced_timesteps(1000, "ddim"), "ddim25"),
    (lambda: spaced_timesteps(10, "5,x"), "10,10,5"), (lambda: spaced_timesteps(10, (6, 2)), "cannot take 6"),
])
def test_refused(make, says):
    with pytest.raises(UserError, match=says):
        make()
