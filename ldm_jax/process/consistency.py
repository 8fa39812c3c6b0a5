"""Consistency models: f(x_t, t) is the end, at t_min, of the probability-flow path through x_t, in units of data.

    f(x_t, t) = f(x_s, s) along a path,      f(x_t, t) = x_t / alpha(t) at t = t_min                                      (1)

(Song et al. 2023, section 3). The paper works with x0 + tau z, tau in [tau_min, tau_max]; here tau = sigma / alpha, so its x is
x_t / alpha(t), its T is t = 1 and its tau_min is at t_min, and any schedule will do. f has the signature of a denoiser.
"""
from typing import Callable, Optional, Tuple, Union

import jax
import jax.numpy as jnp

from ldm_jax.process.samplers import Sampler, make_sampler
from ldm_jax.process.schedules import Schedule
from ldm_jax.process.stepping import noise_ratio, scales
from ldm_jax.types import Array, Denoise, UserError, fold_in, lookup, normal, split_prediction, uniform


def consistency_function(predict: Callable[[Array, Array], Array], schedule: Schedule, *, t_min: float = 1e-3,
                         sigma_data: float = 0.5) -> Denoise:
    """f = c_skip x_t / alpha + c_out predict(x_t, t), which meets the boundary condition whatever `predict` says.

    c_skip = d^2 / ((tau - tau_min)^2 + d^2), c_out = d (tau - tau_min) / sqrt(tau^2 + d^2) with d = sigma_data (Song et al. 2023,
    appendix C), written so that alpha = 0 is allowed. With tau_min = 0 this is the denoiser of `edm(sigma_data)`.

    Args:
      predict: (x_t [B, ...], t [B]) -> raw output shaped like x_t, of unit variance; `preconditioned` scales a net's input.
      t_min: the time at which f is the identity.

    Raises:
      UserError: when t_min leaves [0, 1) or sigma_data is not positive.
    """
    if not 0.0 <= t_min < 1.0 or sigma_data <= 0.0:
        raise UserError(f"a consistency function needs 0 <= t_min < 1 and sigma_data > 0; got t_min={t_min}, "
                        f"sigma_data={sigma_data}")

    def f(x_t, t):
        alpha, sigma = scales(schedule, t, x_t)
        signal, gap = alpha * sigma_data, jnp.maximum(sigma - alpha * noise_ratio(schedule, jnp.float32(t_min)), 0.0)
        skip, out = signal * sigma_data / (gap**2 + signal**2), sigma_data * gap / jnp.hypot(sigma, signal)
        return skip * x_t + out * predict(x_t, t).astype(jnp.float32)

    return f


def _mean_square(a: Array, b: Array) -> Array:
    return jnp.mean((a - b) ** 2, axis=tuple(range(1, a.ndim)))


def pseudo_huber(a: Array, b: Array, c: float = 0.00054) -> Array:
    """sqrt(mean (a - b)^2 + c^2) - c, [B]; the metric of Song & Dhariwal 2023 over sqrt(D), with their constant c sqrt(D)."""
    m = _mean_square(a, b)
    return m / (jnp.sqrt(m + c**2) + c)


# name -> (a, b) -> [B]; a learned metric such as LPIPS is any function of this form.
DISTANCES = {
    "l2": _mean_square,
    "l1": lambda a, b: jnp.mean(jnp.abs(a - b), axis=tuple(range(1, a.ndim))),
    "pseudo_huber": pseudo_huber,
}


def uniform_intervals(schedule: Schedule, times: Array) -> Array:
    """The same probability for each interval (Song et al. 2023); none for the empty ones with which a grid fills its capacity."""
    return (times[:-1] > times[1:]).astype(jnp.float32)


def lognormal_intervals(schedule: Schedule, times: Array, mean: float = -1.1, std: float = 2.0) -> Array:
    """p proportional to the mass that log tau ~ N(mean, std^2) has in the interval (Song & Dhariwal 2023, section 3.5)."""
    below = jax.scipy.stats.norm.cdf((-0.5 * schedule.logsnr(times) - mean) / std)
    return below[:-1] - below[1:]


# name -> (schedule, times [N + 1]) -> unnormalised probability of each interval [N]
INTERVALS = {"uniform": uniform_intervals, "lognormal": lognormal_intervals}


def unit_weight(tau_t: Array, tau_s: Array) -> Array:
    """1 (Song et al. 2023)."""
    return jnp.ones_like(tau_t)


def inverse_gap(tau_t: Array, tau_s: Array) -> Array:
    """1 / (tau_t - tau_s) (Song & Dhariwal 2023, section 3.1)."""
    return 1.0 / (tau_t - tau_s)


CONSISTENCY_WEIGHTS = {"uniform": unit_weight, "inverse_gap": inverse_gap}


def consistency_loss(f: Denoise, target: Denoise, schedule: Schedule, x0: Array, key: Array, *, times: Array,
                     teacher: Optional[Denoise] = None, sampler: Union[str, Sampler] = "ddim",
                     distance: Union[str, Callable] = "l2", intervals: Union[str, Callable] = "uniform",
                     weight: Union[str, Callable] = "uniform") -> Tuple[Array, dict]:
    """w d( f(x_t, t), stop_gradient target(x_s, s) ) for neighbouring times t > s of a grid.

    With a `teacher`, x_s is one step of `sampler` from x_t: consistency distillation (Song et al. 2023, eq. 7). Without, x_s has
    the same x0 and eps as x_t: consistency training (eq. 10), which has the same gradient in the limit of a fine grid, as
    alpha_s x0 + sigma_s eps is on average what a first-order step of the exact denoiser gives.

    Args:
      f: the consistency function of the parameters that are trained.
      target: the same of averaged parameters, or f itself (Song & Dhariwal 2023); it gets no gradient.
      x0: data [B, ...], float32.
      times: decreasing grid [N + 1] whose last entry is f's t_min; it may be repeated, so that N changes without compiling.
      sampler: a row of SAMPLERS without state, or a Sampler; Song et al. take Heun.
      distance, intervals, weight: rows of DISTANCES, INTERVALS, CONSISTENCY_WEIGHTS, or functions of the same form.

    Returns:
      loss [B] and metrics {"mse": mean squared difference [B], "t": [B], "s": [B]}.
    """
    measure = lookup(DISTANCES, distance, "distance") if isinstance(distance, str) else distance
    mass = lookup(INTERVALS, intervals, "interval distribution") if isinstance(intervals, str) else intervals
    weigh = lookup(CONSISTENCY_WEIGHTS, weight, "consistency weight") if isinstance(weight, str) else weight
    sampler = make_sampler(sampler)

    cumulative = jnp.cumsum(mass(schedule, times))
    n = jnp.searchsorted(cumulative / cumulative[-1], uniform(fold_in(key, 0), x0.shape[0]))
    n = jnp.minimum(n, times.shape[0] - 2)
    t, s = times[n], times[n + 1]

    eps = normal(fold_in(key, 1), x0.shape)
    x_t, x_s = (alpha * x0 + sigma * eps for alpha, sigma in (scales(schedule, u, x0) for u in (t, s)))
    if teacher is not None:
        x_s, _ = sampler.step(teacher, schedule, x_t, t, s, fold_in(key, 2), sampler.init(x_t, 1))
    goal = jax.lax.stop_gradient(split_prediction(target(x_s, s))[0])
    ours = split_prediction(f(x_t, t))[0]
    loss = weigh(noise_ratio(schedule, t), noise_ratio(schedule, s)) * measure(ours, goal)
    return loss, {"mse": _mean_square(ours, goal), "t": t, "s": s}


def doubling_curriculum(step: Array, total: int, first: int = 10, last: int = 1280) -> Array:
    """Number of intervals at a training step: `first`, doubled again and again up to `last` (Song & Dhariwal 2023, section 3.4).

    first 2^floor(step / K), K = floor(total / (log2 floor(last / first) + 1)), at most `last`. int32, traced.
    """
    doublings = (last // first).bit_length() - 1
    period = max(total // (doublings + 1), 1)
    return jnp.minimum(first * 2 ** jnp.minimum(step // period, doublings + 1), last)


def consistency_sampler(t_min: float = 1e-3) -> Sampler:
    """x_s = alpha_s f(x_t, t) + sqrt(sigma_s^2 - (alpha_s tau_min)^2) z: jump to t_min, noise again.

    Song et al. 2023, algorithm 1. One step gives f(x_1, 1). The denoiser must be a consistency function with this t_min; the last
    step, into t = 0, adds no noise.
    """
    def step(denoise, schedule, x, t, s, key, carry):
        alpha, sigma = scales(schedule, s, x)
        variance = sigma**2 - (alpha * noise_ratio(schedule, jnp.float32(t_min))) ** 2
        return alpha * split_prediction(denoise(x, t))[0] + jnp.sqrt(jnp.maximum(variance, 0.0)) * normal(key, x.shape), carry

    return Sampler(step)
