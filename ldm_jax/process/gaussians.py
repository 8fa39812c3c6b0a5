"""Diagonal Gaussians of one reverse step, shared by the hybrid loss, the variational bound and samplers with a learned variance.

With r = exp(logsnr_t - logsnr_s) = (alpha_t sigma_s / (alpha_s sigma_t))^2 for s < t,

    q(x_s | x_t, x0) = N( (alpha_t sigma_s^2) / (alpha_s sigma_t^2) x_t + alpha_s (1 - r) x0,  (1 - r) sigma_s^2 I )    (1)
    q(x_t | x_s)     = N( alpha_t / alpha_s x_s,  (1 - r) sigma_t^2 I )                                                 (2)

(Kingma et al. 2021, appendix A; Ho et al. 2020, eqs. 6-7 in the discrete case.) The variance of (1) is the small one, that of (2)
the large one; a learned variance lies between them. All values are elementwise and in nats.
"""
from typing import Tuple

import jax
import jax.numpy as jnp

from ldm_jax.process.schedules import Schedule
from ldm_jax.types import Array, expand


def kl(mean1: Array, logvar1: Array, mean2: Array, logvar2: Array) -> Array:
    """KL( N(mean1, exp(logvar1)) || N(mean2, exp(logvar2)) ), elementwise nats; the arguments broadcast."""
    d = logvar1 - logvar2
    return 0.5 * (jnp.expm1(d) - d + (mean1 - mean2) ** 2 * jnp.exp(-logvar2))


def discretized_log_likelihood(x: Array, mean: Array, log_std: Array, bins: int = 256) -> Array:
    """log of the mass that N(mean, exp(log_std)^2) puts on x's bin, elementwise nats (Ho et al. 2020, eq. 13).

    x lies in [-1, 1] on `bins` equally spaced levels; a bin reaches half a level to each side, the outermost ones to infinity.
    Exact in the far tails too, where a difference of distribution functions would round to zero.
    """
    half = 1.0 / (bins - 1)
    inverse_std = jnp.exp(-log_std)
    high = jnp.where(x > 1 - half, jnp.inf, (x - mean + half) * inverse_std)
    low = jnp.where(x < -1 + half, -jnp.inf, (x - mean - half) * inverse_std)
    # the bin and its mirror image have the same mass: take the one in the lower tail, where log Phi keeps its precision
    upper = low > -high
    a, b = jnp.where(upper, -high, low), jnp.where(upper, -low, high)
    log_b = jax.scipy.special.log_ndtr(b)
    gap = jax.scipy.special.log_ndtr(jnp.where(jnp.isinf(a), b - 1, a)) - log_b  # < 0, made finite at a = -inf
    return log_b + jnp.where(jnp.isinf(a), 0.0, jnp.log(-jnp.expm1(jnp.minimum(gap, -1e-7))))


def posterior_mean(schedule: Schedule, x0: Array, x_t: Array, t: Array, s: Array) -> Array:
    """The mean of q(x_s | x_t, x0), equation (1): x0, x_t [B, ...], t and s [B], s < t."""
    (a_t, s_t), (a_s, s_s) = ((expand(schedule.alpha(u), x_t), expand(schedule.sigma(u), x_t)) for u in (t, s))
    r = expand(jnp.exp(schedule.logsnr(t) - schedule.logsnr(s)), x_t)
    return a_t / a_s * (s_s / s_t) ** 2 * x_t + a_s * (1 - r) * x0


def posterior_log_variances(schedule: Schedule, t: Array, s: Array) -> Tuple[Array, Array]:
    """(log small, log large): the log variances of equations (1) and (2), each shaped like t.

    A step into s = 0 has no posterior variance; as its small bound it takes that of the step of the same length before it, from
    2t to t (Nichol & Dhariwal 2021 clip the first entry of their table to the second). Where that would start beyond t = 1,
    it starts there, and a single step from 1 to 0 has the large variance for both bounds.
    """
    into_data = s <= 0
    later, earlier = jnp.where(into_data, jnp.minimum(2 * t, 1.0), t), jnp.where(into_data, t, s)

    def log_mass(t, s):  # log(1 - r)
        return jnp.log(-jnp.expm1(schedule.logsnr(t) - schedule.logsnr(s)))

    large = log_mass(t, s) + 2 * jnp.log(schedule.sigma(t))
    small = log_mass(later, earlier) + 2 * jnp.log(schedule.sigma(earlier))
    return jnp.where(later > earlier, small, large), large


def interpolated_log_variance(schedule: Schedule, t: Array, s: Array, frac: Array) -> Array:
    """frac log large + (1 - frac) log small, shaped like frac [B, ...] (Nichol & Dhariwal 2021, eq. 15)."""
    small, large = (expand(bound, frac) for bound in posterior_log_variances(schedule, t, s))
    return frac * large + (1 - frac) * small


def vlb_term(schedule: Schedule, x0: Array, x_t: Array, t: Array, s: Array, prediction: Array, logvar: Array,
             bins: int = 256) -> Array:
    """One step's term of the variational bound, elementwise nats [B, ...] (Ho et al. 2020, eq. 5).

    KL( q(x_s | x_t, x0) || p(x_s | x_t) ) where s > 0, and the decoder -log p(x0 | x_t) of eq. 13 where s = 0, for
    p = N(posterior mean of `prediction`, exp(logvar)).

    Args:
      x0: the data [B, ...], in [-1, 1] on the grid of `bins` levels.
      prediction: the denoiser's x0.
      logvar: broadcasts against x0.
    """
    mean = posterior_mean(schedule, prediction, x_t, t, s)
    small, _ = posterior_log_variances(schedule, t, s)
    divergence = kl(posterior_mean(schedule, x0, x_t, t, s), expand(small, x0), mean, logvar)
    return jnp.where(expand(s <= 0, x0), -discretized_log_likelihood(x0, mean, 0.5 * logvar, bins), divergence)
