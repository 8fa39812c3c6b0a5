"""The noising process x_t = alpha(t) x0 + sigma(t) eps as a value: alpha, sigma, logsnr(t) and its exact inverse.

logsnr = 2 log(alpha / sigma) says how noisy x_t is; the family says how x_t is scaled. Within a family either scale follows:

    vp      alpha^2 + sigma^2 = 1    alpha = sqrt(sigmoid(logsnr)), sigma = sqrt(sigmoid(-logsnr))                      (1)
    flow    alpha + sigma = 1        alpha = sigmoid(logsnr / 2),   sigma = sigmoid(-logsnr / 2)                        (2)
    ve      alpha = 1                sigma = exp(-logsnr / 2)                                                           (3)
    sub_vp  sigma = 1 - alpha^2      alpha = exp(-asinh(exp(-logsnr / 2) / 2))                                          (4)

So a pair (a, s) known up to a common factor fixes (alpha, sigma) = (a, s) / norm(a, s), with the family's norm in FAMILIES. Being
algebraic, that stays exact and differentiable at alpha = 0 and sigma = 0, where logsnr is infinite.

A variance-preserving schedule is fixed by log_abar(t) = log alpha(t)^2, which is 0 at t = 0 and decreases:

    alpha  = exp(log_abar / 2)                                                                  (5)
    sigma  = sqrt(1 - exp(log_abar)) = sqrt(-expm1(log_abar))                                   (6)
    logsnr = log_abar - log(-expm1(log_abar)),   log_abar = log sigmoid(logsnr)                 (7)

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

# family -> norm(a, s), homogeneous of degree one, which is 1 on the family's own (alpha, sigma)
FAMILIES = {
    "vp": lambda a, s: jnp.sqrt(a * a + s * s),
    "flow": lambda a, s: a + s,
    "ve": lambda a, s: a,
    "sub_vp": lambda a, s: 0.5 * (s + jnp.sqrt(s * s + 4 * a * a)),
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Pure functions of time; every one takes a scalar or an array of any shape.

    Attributes:
      alpha, sigma: the signal's and the noise's scale at time t.
      logsnr: 2 log(alpha / sigma), +inf at t = 0 (a learned schedule may end before that).
      t_of_logsnr: the inverse of `logsnr`, in [0, 1].
      timesteps: T where the process is discrete (training draws its times from the grid t_k), otherwise None.
      family: a row of FAMILIES.
      vanishing: whether alpha(1) = 0; None to find out by evaluation, which a schedule of traced numbers cannot.
    """
    name: str
    alpha: Callable[[Array], Array]
    sigma: Callable[[Array], Array]
    logsnr: Callable[[Array], Array]
    t_of_logsnr: Callable[[Array], Array]
    timesteps: Optional[int] = None
    family: str = "vp"
    vanishing: Optional[bool] = None

    def on_grid(self, t: Array) -> Array:
        """The first t_k at or after t (to 1e-3 of a step, so that t_k is its own); t itself where the process is continuous."""
        T = self.timesteps
        if T is None:
            return t
        k = jnp.maximum(jnp.ceil(t * T - 1e-3), 1)
        return jnp.where(k >= T, 1.0, k / T)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether x_1 holds no signal at all: alpha(1) = 0. Then eps says nothing about x0 at t = 1."""
        if self.vanishing is not None:
            return self.vanishing
        with jax.ensure_compile_time_eval():
            return bool(self.alpha(jnp.float32(1.0)) <= 0.0)


def is_traced(*values) -> bool:
    """Whether any of the values is traced, so that its size cannot be checked."""
    return any(isinstance(value, jax.core.Tracer) for value in values)


def variance_preserving(name: str, log_abar: Callable, t_of_log_abar: Callable, timesteps: Optional[int] = None) -> Schedule:
    """The schedule with alpha^2 + sigma^2 = 1 given log_abar(t) = log alpha(t)^2 and its inverse, equations (5)-(7)."""
    def sigma2(t):
        return jnp.abs(jnp.expm1(log_abar(t)))  # abs, not minus: +0 at t = 0

    return Schedule(
        name=name,
        alpha=lambda t: jnp.exp(0.5 * log_abar(t)),
        sigma=lambda t: jnp.sqrt(sigma2(t)),
        logsnr=lambda t: log_abar(t) - jnp.log(sigma2(t)),
        t_of_logsnr=lambda l: t_of_log_abar(jax.nn.log_sigmoid(l)),
        timesteps=timesteps)


def from_logsnr(name: str, logsnr: Callable, t_of_logsnr: Callable, vanishing: Optional[bool] = None) -> Schedule:
    """The variance-preserving schedule of a given logsnr(t) and its inverse, equation (1)."""
    return Schedule(
        name=name,
        alpha=lambda t: jnp.exp(0.5 * jax.nn.log_sigmoid(logsnr(t))),
        sigma=lambda t: jnp.exp(0.5 * jax.nn.log_sigmoid(-logsnr(t))),
        logsnr=logsnr,
        t_of_logsnr=t_of_logsnr,
        vanishing=vanishing)


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


def check_timesteps(timesteps: int) -> int:
    """`timesteps`, the T of a discrete process.

    Raises:
      UserError: unless it is a whole number of at least 1.
    """
    if not isinstance(timesteps, (int, np.integer)) or timesteps < 1:
        raise UserError(f"timesteps must be a whole number of at least 1; got {timesteps!r}")
    return timesteps


def linear(timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """beta_k linear from `beta_start` to `beta_end` (Ho et al. 2020, section 4)."""
    return from_betas(np.linspace(beta_start, beta_end, check_timesteps(timesteps)), "linear")


def scaled_linear(timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """sqrt(beta_k) linear from sqrt(`beta_start`) to sqrt(`beta_end`): Stable Diffusion's (Rombach et al. 2022)."""
    if not (0 < beta_start < 1 and 0 < beta_end < 1):
        raise UserError(f"beta_start and beta_end must lie in (0, 1); got {beta_start!r} and {beta_end!r}")
    return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, check_timesteps(timesteps)) ** 2, "scaled_linear")


def cosine(timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """abar(t) = f(t) / f(0), f(t) = cos^2((t + s) / (1 + s) pi / 2), clipped betas (Nichol & Dhariwal 2021, eq. 17)."""
    if not s >= 0:
        raise UserError(f"the offset s of schedule 'cosine' must be at least 0; got {s!r}")
    f = np.cos((np.arange(check_timesteps(timesteps) + 1) / timesteps + s) / (1 + s) * np.pi / 2) ** 2
    return from_betas(np.minimum(1 - f[1:] / f[:-1], max_beta), "cosine")
