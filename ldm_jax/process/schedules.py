"""Noise schedules: alpha(t) and sigma(t) of x_t = alpha(t) x0 + sigma(t) eps, with logsnr(t) and its exact inverse.

A variance-preserving schedule is fixed by log_abar(t) = log alpha(t)^2, which is 0 at t = 0 and decreases:

    alpha  = exp(log_abar / 2)                                                                  (1)
    sigma  = sqrt(1 - exp(log_abar)) = sqrt(-expm1(log_abar))                                   (2)
    logsnr = log_abar - log(-expm1(log_abar)),   log_abar = log sigmoid(logsnr)                 (3)

expm1 keeps sigma exact as t -> 0, where 1 - alpha^2 would cancel. A discrete process with a table of betas,
abar_k = prod_{j <= k} (1 - beta_j), becomes continuous by linear interpolation of log_abar between the grid points
t_k = (k + 1) / T and (0, 0): the noising rate is constant inside a step, the table is met exactly, the inverse is exact.
"""
import dataclasses
from typing import Callable, Optional

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.types import Array, UserError


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Pure functions of time; every one takes a scalar or an array of any shape.

    Attributes:
      alpha, sigma: the signal's and the noise's scale at time t.
      logsnr: 2 log(alpha / sigma), +inf at t = 0.
      t_of_logsnr: the inverse of `logsnr`.
      timesteps: T where the process is discrete (training draws its times from the grid t_k), otherwise None.
    """
    name: str
    alpha: Callable[[Array], Array]
    sigma: Callable[[Array], Array]
    logsnr: Callable[[Array], Array]
    t_of_logsnr: Callable[[Array], Array]
    timesteps: Optional[int] = None

    def on_grid(self, t: Array) -> Array:
        """The first t_k at or after t; t itself where the process is continuous."""
        T = self.timesteps
        return t if T is None else jnp.clip(jnp.ceil(t * T), 1, T) / T

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether x_1 holds no signal at all: alpha(1) = 0. Then eps says nothing about x0 at t = 1."""
        with jax.ensure_compile_time_eval():
            return bool(self.alpha(jnp.float32(1.0)) <= 0.0)


def variance_preserving(name: str, log_abar: Callable, t_of_log_abar: Callable, timesteps: Optional[int] = None) -> Schedule:
    """The schedule with alpha^2 + sigma^2 = 1 given log_abar(t) = log alpha(t)^2 and its inverse, equations (1)-(3)."""
    def sigma2(t):
        return jnp.abs(jnp.expm1(log_abar(t)))  # abs, not minus: +0 at t = 0

    return Schedule(
        name=name,
        alpha=lambda t: jnp.exp(0.5 * log_abar(t)),
        sigma=lambda t: jnp.sqrt(sigma2(t)),
        logsnr=lambda t: log_abar(t) - jnp.log(sigma2(t)),
        t_of_logsnr=lambda l: t_of_log_abar(jax.nn.log_sigmoid(l)),
        timesteps=timesteps)


def from_betas(betas, name: str = "betas") -> Schedule:
    """A discrete process from any table beta_0..beta_{T-1} in (0, 1); abar_k = prod_{j <= k} (1 - beta_j).

    Raises:
      UserError: when the table is not one-dimensional or leaves (0, 1).
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not betas.size or not np.all((betas > 0) & (betas < 1)):
        raise UserError(f"betas must be a 1-D table of values in (0, 1); got shape {betas.shape}, "
                        f"range [{betas.min(initial=np.inf):g}, {betas.max(initial=-np.inf):g}]")
    T = len(betas)
    t_k = np.arange(T + 1, dtype=np.float64) / T
    log_abar = np.concatenate([[0.0], np.cumsum(np.log1p(-betas))])
    knots, values = t_k.astype(np.float32), log_abar.astype(np.float32)
    return variance_preserving(
        name,
        log_abar=lambda t: jnp.interp(t, knots, values),
        t_of_log_abar=lambda a: jnp.interp(a, values[::-1], knots[::-1]),
        timesteps=T)


def linear(timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """beta_k linear from `beta_start` to `beta_end` (Ho et al. 2020, section 4)."""
    return from_betas(np.linspace(beta_start, beta_end, timesteps), "linear")


def cosine(timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """abar(t) = f(t) / f(0), f(t) = cos^2((t + s) / (1 + s) pi / 2), betas clipped at `max_beta` (Nichol & Dhariwal 2021, eq. 17)."""
    f = np.cos((np.arange(timesteps + 1) / timesteps + s) / (1 + s) * np.pi / 2) ** 2
    return from_betas(np.minimum(1 - f[1:] / f[:-1], max_beta), "cosine")


def rectified_flow() -> Schedule:
    """alpha = 1 - t, sigma = t: straight lines between data and noise (Liu et al. 2022; Lipman et al. 2022). alpha(1) = 0."""
    return Schedule(
        name="rectified_flow",
        alpha=lambda t: 1.0 - t,
        sigma=lambda t: jnp.asarray(t, jnp.float32),
        logsnr=lambda t: 2.0 * (jnp.log1p(-t) - jnp.log(t)),
        t_of_logsnr=lambda l: jax.nn.sigmoid(-0.5 * l))


SCHEDULES = {"linear": linear, "cosine": cosine, "rectified_flow": rectified_flow}
