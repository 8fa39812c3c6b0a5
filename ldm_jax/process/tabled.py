"""Processes given as a table of alphas, and time grids, as published models were sampled with them.

A sampler there asks the network between whole steps k too, where the noise ratio tau = sigma / alpha is interpolated in k,
either itself or its logarithm; `noising.from_betas` interpolates log alpha instead. At whole steps all three agree.
"""
from typing import Any, Optional, Sequence

import jax.numpy as jnp
import numpy as np

from ldm_jax.process import grids
from ldm_jax.process.noising import Schedule
from ldm_jax.types import Array, UserError


def from_ratios(abar: Sequence[float], log_between: bool = False, name: str = "table") -> Schedule:
    """The variance-preserving process with alpha^2 = abar_k at t_k = (k + 1) / T and sigma / alpha interpolated between.

    log_between: log(sigma / alpha) is linear between two steps; otherwise sigma / alpha is, as it is in both cases before t_0.

    Raises:
      UserError: when the table is not one-dimensional, does not decrease, or leaves (0, 1).
    """
    abar = np.asarray(abar, np.float64)
    if abar.ndim != 1 or not abar.size or not np.all((abar > 0) & (abar < 1)) or np.any(np.diff(abar) >= 0):
        raise UserError(f"abar must be a decreasing 1-D table in (0, 1); got shape {abar.shape}, range "
                        f"[{abar.min(initial=np.inf):g}, {abar.max(initial=-np.inf):g}]")
    T, ratio = len(abar), np.sqrt((1 - abar) / abar)
    knots, values = (np.arange(T + 1) / T).astype(np.float32), np.concatenate([[0.0], ratio]).astype(np.float32)
    logs = np.log(ratio).astype(np.float32)

    def tau(t):
        even = jnp.interp(t, knots, values)
        return jnp.where(t < 1 / T, even, jnp.exp(jnp.interp(t, knots[1:], logs))) if log_between else even

    def t_of_logsnr(l):
        even = jnp.interp(jnp.exp(-0.5 * l), values, knots)
        return jnp.where(-0.5 * l < logs[0], even, jnp.interp(-0.5 * l, logs, knots[1:])) if log_between else even

    return Schedule(name=name, alpha=lambda t: 1 / jnp.hypot(1.0, tau(t)), sigma=lambda t: tau(t) / jnp.hypot(1.0, tau(t)),
                    logsnr=lambda t: -2 * jnp.log(tau(t)), t_of_logsnr=t_of_logsnr, timesteps=T, vanishing=False)


def published_grid(schedule: Schedule, steps, capacity: int, *, spacing: str = "leading", levels: Optional[str] = None,
                   whole_table: bool = False, last: int = -1, **options: Any) -> Array:
    """The grid `spacing` with `options`; with `levels` that grid between its noise levels instead, and with its end moved.

    Args:
      spacing: a row of GRIDS.
      levels: "karras" or "exponential", as many levels between the first and the last one of `spacing`, and then the time 0.
      whole_table: `levels` lie between those of the first and the last step of the process instead.
      last: the integer step at which it ends, -1 for data.
    """
    times = grids.GRIDS[spacing](schedule, steps, capacity, **options)
    if levels is not None:
        T = schedule.timesteps
        ends = (jnp.float32(1 / T), jnp.float32(1.0)) if whole_table else (jnp.take(times, steps - 1), times[0])
        low, high = (jnp.exp(-0.5 * schedule.logsnr(t)) for t in ends)
        times = grids.GRIDS[levels](schedule, steps, capacity, sigma_min=low, sigma_max=high)
    if last >= 0:
        times = jnp.where(jnp.arange(capacity + 1) >= steps, (last + 1) / schedule.timesteps, times)
    return times


def flow_grid(schedule: Schedule, steps, capacity: int, *, timesteps: int = 1000, shift=1.0) -> Array:
    """From 1 to the shifted 1 / T in `steps` equal parts, shifted again, then 0: rectified flow's times as published.

    The shift is t -> shift t / (1 + (shift - 1) t) (Esser et al. 2024, eq. 23).
    """
    def shifted(t):
        return shift * t / ((1 - t) + shift * t)

    i = jnp.minimum(jnp.arange(capacity + 1), steps)
    part = i / jnp.maximum(steps - 1, 1)
    return jnp.where(i >= steps, 0.0, shifted(1 - part * (1 - shifted(1 / timesteps))))
