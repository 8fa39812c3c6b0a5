"""What sampling methods are made of: the record `Sampler`, and the coefficients that their steps share.

A step goes from time t to time s:  step(denoise, schedule, x, t, s, key, carry) -> (x, carry), with t, s [B] and one key per
example. Between s < t, with r = exp(logsnr_t - logsnr_s) = (alpha_t sigma_s / (alpha_s sigma_t))^2,

    q(x_s | x_t, x0) = N( (alpha_t sigma_s^2) / (alpha_s sigma_t^2) x_t + alpha_s (1 - r) x0,  (1 - r) sigma_s^2 I )    (1)
    q(x_t | x_s)     = N( alpha_t / alpha_s x_s,  (1 - r) sigma_t^2 I )                                                 (2)

(Kingma et al. 2021, appendix A; Ho et al. 2020, eqs. 6-7 in the discrete case.) r stays in [0, 1] and is exact at both ends. The
probability-flow ODE, whatever the schedule, is

    dx = x0(x, t) d alpha + eps(x, t) d sigma,    x = alpha x0 + sigma eps                                              (3)

or, with the noise ratio tau = sigma / alpha = exp(-lambda), lambda = logsnr / 2,

    d(x / alpha) = eps d tau,      d(x / sigma) = x0 d(1 / tau) = x0 exp(lambda) d lambda                               (4)

(Song et al. 2021, eq. 13; Karras et al. 2022, eq. 4; Lu et al. 2022b.) tau = inf at alpha = 0, where steps in tau or
lambda are undefined, and lambda = inf at sigma = 0: each method says to which simpler step it falls back there.
"""
from typing import Any, Callable, NamedTuple, Optional, Tuple

import jax.numpy as jnp
import numpy as np

from ldm_jax.process.noising import is_traced
from ldm_jax.process.parameterizations import eps_of_x0
from ldm_jax.process.schedules import Schedule
from ldm_jax.types import Array, Denoise, UserError, expand, normal, split_prediction


class Sampler(NamedTuple):
    """One method.

    Attributes:
      step: (denoise, schedule, x, t, s, key, carry) -> (x, carry).
      init: (x, steps) -> the first carry, for methods that remember earlier steps or must know how many are to come.
      order: with n steps the error falls as n^-order; None where the method is random or chooses its own steps.
      calls: network calls in a step.
      name: its row in SAMPLERS, where it was made from one.
      upwards: the grid is walked from its last time to its first, from data to noise.
      on_grid: the denoiser is asked for times of the grid only.
    """
    step: Callable
    init: Callable[[Array, Any], Any] = lambda x, steps: ()
    order: Optional[int] = None
    calls: int = 1
    upwards: bool = False
    name: str = ""
    on_grid: bool = False


def scales(schedule: Schedule, t: Array, x: Array) -> Tuple[Array, Array]:
    """alpha(t) and sigma(t), shaped to multiply x."""
    return expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)


def half_logsnr(schedule: Schedule, t: Array) -> Array:
    """lambda = log(alpha / sigma), shaped like t."""
    return 0.5 * schedule.logsnr(t)


def noise_ratio(schedule: Schedule, t: Array) -> Array:
    """tau = sigma / alpha, shaped like t; inf where alpha = 0."""
    alpha = schedule.alpha(t)
    return jnp.where(alpha > 0, schedule.sigma(t) / jnp.where(alpha > 0, alpha, 1.0), jnp.inf)


def lost(schedule: Schedule, t: Array, s: Array) -> Array:
    """1 - r of equation (1), shaped like t."""
    return -jnp.expm1(schedule.logsnr(t) - schedule.logsnr(s))


def finite_or(value: Array, other: Array) -> Array:
    """`value` where it is finite, `other` elsewhere."""
    return jnp.where(jnp.isfinite(value), value, other)


def estimate(denoise: Denoise, schedule: Schedule, x: Array, t: Array) -> Tuple[Array, Array]:
    """(x0, eps) at (x, t), with x = alpha x0 + sigma eps; sigma(t) > 0."""
    x0, _ = split_prediction(denoise(x, t))
    return x0, eps_of_x0(x0, x, *scales(schedule, t, x))


def ddim_move(schedule: Schedule, x0: Array, eps: Array, t: Array, s: Array, key: Array, eta) -> Array:
    """alpha_s x0 + sqrt(sigma_s^2 - v) eps + sqrt(v) z, v = eta^2 (1 - r) sigma_s^2 (Song, Meng & Ermon 2021, eqs. 12, 16)."""
    a_s, s_s = scales(schedule, s, x0)
    v = expand(eta, x0) ** 2 * expand(lost(schedule, t, s), x0)  # in units of sigma_s^2
    return a_s * x0 + s_s * (jnp.sqrt(jnp.maximum(1 - v, 0.0)) * eps + jnp.sqrt(v) * normal(key, x0.shape))


def decay(eta, h: Array) -> Array:
    """eta h, 0 for eta = 0 also at h = inf; shaped like h."""
    eta = jnp.broadcast_to(jnp.asarray(eta, h.dtype), h.shape)
    return jnp.where(eta == 0, 0.0, eta * jnp.where(eta == 0, 1.0, h))


def exponential_move(schedule: Schedule, x: Array, x0: Array, t: Array, s: Array, eta) -> Array:
    """(sigma_s / sigma_t) exp(-eta h) x + alpha_s (1 - exp(-(1 + eta) h)) x0: exact for a constant x0, without its noise."""
    h = half_logsnr(schedule, s) - half_logsnr(schedule, t)
    d = decay(eta, h)
    keep, take = schedule.sigma(s) / schedule.sigma(t) * jnp.exp(-d), schedule.alpha(s) * -jnp.expm1(-(h + d))
    return expand(keep, x) * x + expand(take, x) * x0


def whole(n):
    """A number of repetitions: an int as it is, so that the loop can be differentiated, a traced number as int32."""
    return n if isinstance(n, int) else jnp.asarray(n, jnp.int32)


def order_if(deterministic, order: int) -> Optional[int]:
    """`order` where `deterministic`, a comparison of an option that may be traced, is known to hold."""
    known = isinstance(deterministic, (bool, np.bool_))
    return order if known and deterministic else None


def check_option(sampler: str, name: str, value, allowed) -> None:
    """Refuses an option with a value outside `allowed`; a traced one cannot be checked and passes.

    Raises:
      UserError: naming the sampler, the option and the choices.
    """
    if not is_traced(value) and not np.all(np.isin(value, allowed)):
        raise UserError(f"{name}={value!r} of sampler {sampler!r} is not known; choose from: {', '.join(map(str, allowed))}")
