"""Sampling methods. Each is a step of a few lines; one scan, `sample`, runs them all.

A step goes from time t to time s < t:  step(denoise, schedule, x, t, s, key, carry) -> (x, carry), with t, s [B] and one key
per example. Between the two times, with r = exp(logsnr_t - logsnr_s) = (alpha_t sigma_s / (alpha_s sigma_t))^2,

    q(x_s | x_t, x0) = N( (alpha_t sigma_s^2) / (alpha_s sigma_t^2) x_t + alpha_s (1 - r) x0,  (1 - r) sigma_s^2 I )    (1)
    q(x_t | x_s)     = N( alpha_t / alpha_s x_s,  (1 - r) sigma_t^2 I )                                                 (2)

(Kingma et al. 2021, eqs. 20-29; Ho et al. 2020, eqs. 6-7 in the discrete case.) r stays in [0, 1] and is exact at both ends.
"""
from typing import Any, Callable, NamedTuple, Optional, Union

import jax
import jax.numpy as jnp

from ldm_jax.process.grids import GRIDS
from ldm_jax.process.parameterizations import eps_of_x0
from ldm_jax.process.schedules import Schedule
from ldm_jax.types import Array, Denoise, UserError, example_keys, expand, fold_in, lookup, normal, split_prediction


class Sampler(NamedTuple):
    """One method.

    Attributes:
      step: (denoise, schedule, x, t, s, key, carry) -> (x, carry).
      init: x -> the first carry, for methods that remember earlier steps.
    """
    step: Callable
    init: Callable[[Array], Any] = lambda x: ()


def _coefficients(schedule: Schedule, t: Array, x: Array):
    return expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)


def _snr_ratio(schedule: Schedule, t: Array, s: Array, x: Array) -> Array:
    """r of equation (1), shaped to multiply x."""
    return expand(jnp.exp(schedule.logsnr(t) - schedule.logsnr(s)), x)


def ddpm(variance: str = "small") -> Sampler:
    """Ancestral sampling: a draw from equation (1) with the denoiser's x0 in place of the true one.

    variance: "small" is that of q(x_s | x_t, x0), "large" that of q(x_t | x_s) (Ho et al. 2020, section 3.2). The last step,
    into t = 0, adds no noise.
    """
    if variance not in ("small", "large"):
        raise UserError(f"unknown variance {variance!r} of sampler 'ddpm'; choose from: large, small")

    def step(denoise, schedule, x, t, s, key, carry):
        x0, _ = split_prediction(denoise(x, t))
        (a_t, s_t), (a_s, s_s) = _coefficients(schedule, t, x), _coefficients(schedule, s, x)
        r = _snr_ratio(schedule, t, s, x)
        mean = a_t * s_s**2 / (a_s * s_t**2) * x + a_s * (1 - r) * x0
        std = jnp.sqrt(1 - r) * (s_s if variance == "small" else jnp.where(s_s > 0, s_t, 0.0))
        return mean + std * normal(key, x.shape), carry

    return Sampler(step)


def ddim(eta=0.0) -> Sampler:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - tau^2) eps + tau z, tau = eta sigma_s sqrt(1 - r) (Song, Meng & Ermon 2021, eqs. 12, 16).

    eta = 0 is deterministic, eta = 1 is `ddpm`; a scalar or [B], traced.
    """
    def step(denoise, schedule, x, t, s, key, carry):
        x0, _ = split_prediction(denoise(x, t))
        (a_t, s_t), (a_s, s_s) = _coefficients(schedule, t, x), _coefficients(schedule, s, x)
        tau2 = expand(eta, x) ** 2 * (1 - _snr_ratio(schedule, t, s, x))  # in units of sigma_s^2
        drift = jnp.sqrt(jnp.maximum(1 - tau2, 0.0)) * eps_of_x0(x0, x, a_t, s_t)
        return a_s * x0 + s_s * (drift + jnp.sqrt(tau2) * normal(key, x.shape)), carry

    return Sampler(step)


def euler() -> Sampler:
    """Euler on the probability-flow ODE dx/dt = alpha'(t) x0 + sigma'(t) eps; on rectified flow x_s = x_t + (s - t) (eps - x0)."""
    def step(denoise, schedule, x, t, s, key, carry):
        x0, _ = split_prediction(denoise(x, t))
        alpha, d_alpha = jax.jvp(schedule.alpha, (t,), (jnp.ones_like(t),))
        sigma, d_sigma = jax.jvp(schedule.sigma, (t,), (jnp.ones_like(t),))
        eps = eps_of_x0(x0, x, expand(alpha, x), expand(sigma, x))
        return x + expand(s - t, x) * (expand(d_alpha, x) * x0 + expand(d_sigma, x) * eps), carry

    return Sampler(step)


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "euler": euler}


def prior(schedule: Schedule, key: Array, shape) -> Array:
    """x_1 ~ N(0, sigma(1)^2 I), one key's worth of noise per example."""
    return schedule.sigma(jnp.float32(1.0)) * normal(key, shape)


def sample(denoise: Denoise, schedule: Schedule, x: Array, key: Array, *, sampler: Union[str, Sampler] = "ddim", steps=50,
           grid: Union[str, Callable] = "uniform", capacity: Optional[int] = None, trajectory: bool = False, **options):
    """Run a sampling method from x at the grid's first time to its last, in one scan.

    Args:
      denoise: (x_t [B, ...], t [B]) -> x0.
      x: the start, [B, ...] float32; usually `prior(schedule, key, shape)`.
      key: one key, or one per example [B]. The noise of example i depends on its own key only.
      sampler: a row of SAMPLERS, made with `options` (such as eta=0.5), or a Sampler.
      steps: number of network calls; may be traced, then `capacity` must bound it and only the steps asked for are run.
      trajectory: also return what was visited, {"x": [capacity + 1, B, ...], "t": [capacity + 1]}.

    Returns:
      x at the last time, [B, ...]; with `trajectory` a pair.
    """
    if isinstance(sampler, str):
        sampler = lookup(SAMPLERS, sampler, "sampler")(**options)
    grid = lookup(GRIDS, grid, "grid") if isinstance(grid, str) else grid
    capacity = capacity or int(steps)
    times = grid(schedule, steps, capacity)
    keys = example_keys(key, x.shape[0])

    def advance(i, t, s, x, carry):
        t, s = (jnp.broadcast_to(u, x.shape[:1]) for u in (t, s))
        return sampler.step(denoise, schedule, x, t, s, fold_in(keys, i), carry)

    def body(state, inputs):
        i, t, s = inputs
        state = jax.lax.cond(i < steps, lambda state: advance(i, t, s, *state), lambda state: state, state)
        return state, state[0] if trajectory else None

    start = (x, sampler.init(x))
    (end, _), visited = jax.lax.scan(body, start, (jnp.arange(capacity), times[:-1], times[1:]))
    if trajectory:
        return end, {"x": jnp.concatenate([x[None], visited]), "t": times}
    return end
