"""Continuous schedules in closed form, each with its closed inverse.

Where a paper's formula would need a clip, which has no inverse, or would lose its precision in float32 at an end, the formula
here is an equal one without that: the docstring says which. `noising.py` has the families and the discrete processes.
"""
import math

import jax
import jax.numpy as jnp

from ldm_jax.process.noising import Schedule, from_logsnr, variance_preserving
from ldm_jax.types import UserError

SMALLEST_TIME = 1e-6  # stands for t -> 0 from above, where sigma jumps at t = 0


def _linear_beta(beta_min: float, beta_max: float):
    """log_abar(t) = -(beta_min t + (beta_max - beta_min) t^2 / 2) and its inverse."""
    if not 0 < beta_min <= beta_max:
        raise UserError(f"the noising rate must satisfy 0 < beta_min <= beta_max; got {beta_min!r} and {beta_max!r}")
    d = beta_max - beta_min
    end = -0.5 * (beta_min + beta_max)

    def log_abar(t):
        return -t * (beta_min + 0.5 * d * t)

    def inverse(a):  # the root of the quadratic, in the form that does not cancel
        a = jnp.maximum(a, end)
        return jnp.minimum(-2 * a / (beta_min + jnp.sqrt(beta_min**2 - 2 * d * a)), 1.0)

    return log_abar, inverse


def vp_sde(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """The variance-preserving SDE: beta(t) linear, log alpha^2 = -int_0^t beta (Song et al. 2021, appendix C)."""
    return variance_preserving("vp_sde", *_linear_beta(beta_min, beta_max))


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """The sub-VP SDE: `vp_sde`'s alpha with sigma = 1 - alpha^2 (Song et al. 2021, appendix C)."""
    log_abar, inverse = _linear_beta(beta_min, beta_max)

    def sigma(t):
        return jnp.abs(jnp.expm1(log_abar(t)))

    return Schedule(
        name="sub_vp",
        alpha=lambda t: jnp.exp(0.5 * log_abar(t)),
        sigma=sigma,
        logsnr=lambda t: log_abar(t) - 2 * jnp.log(sigma(t)),
        t_of_logsnr=lambda l: inverse(-2 * jnp.arcsinh(0.5 * jnp.exp(-0.5 * l))),
        family="sub_vp")


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Schedule:
    """alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t for t > 0 (Song et al. 2021, appendix C).

    The process adds sigma_min at once: sigma jumps to 0 at t = 0, which is data here as everywhere. A logsnr above that of
    sigma_min has the time `SMALLEST_TIME`.
    """
    if not 0 < sigma_min < sigma_max:
        raise UserError(f"noise levels must satisfy 0 < sigma_min < sigma_max; got {sigma_min!r} and {sigma_max!r}")
    low, span = math.log(sigma_min), math.log(sigma_max / sigma_min)
    return Schedule(
        name="ve",
        alpha=lambda t: jnp.ones_like(t, jnp.float32),
        sigma=lambda t: jnp.where(t > 0, jnp.exp(low + span * t), 0.0),
        logsnr=lambda t: jnp.where(t > 0, -2 * (low + span * t), jnp.inf),
        t_of_logsnr=lambda l: jnp.where(l < jnp.inf, jnp.clip((-0.5 * l - low) / span, SMALLEST_TIME, 1.0), 0.0),
        family="ve")


def edm(sigma_max: float = 80.0, rho: float = 7.0) -> Schedule:
    """alpha = 1, sigma = sigma_max t^rho: sigma^(1/rho) is linear in t (Karras et al. 2022, eq. 5 with sigma_min = 0).

    Karras et al. take sigma itself as time; t only names the noise levels, so it changes nothing in the process.
    """
    if not (sigma_max > 0 and rho > 0):
        raise UserError(f"sigma_max and rho of schedule 'edm' must be positive; got {sigma_max!r} and {rho!r}")
    top = math.log(sigma_max)
    return Schedule(
        name="edm",
        alpha=lambda t: jnp.ones_like(t, jnp.float32),
        sigma=lambda t: sigma_max * jnp.asarray(t, jnp.float32) ** rho,
        logsnr=lambda t: -2 * (top + rho * jnp.log(t)),
        t_of_logsnr=lambda l: jnp.minimum(jnp.exp((-0.5 * l - top) / rho), 1.0),
        family="ve")


def cosine_continuous(s: float = 0.0) -> Schedule:
    """alpha = cos(theta(t)) / cos(theta(0)), theta(t) = (t + s) / (1 + s) pi / 2, variance preserving. alpha(1) = 0.

    Nichol & Dhariwal 2021, eq. 17, without the clip; with s = 0, logsnr = -2 log tan(pi t / 2) (Hoogeboom et al. 2023). alpha is
    written as the sine of the complement, sigma^2 as sin(theta(t) - theta(0)) sin(theta(t) + theta(0)) / cos^2(theta(0)): both
    ends exact.
    """
    if not s >= 0:
        raise UserError(f"the offset s of schedule 'cosine_continuous' must be at least 0; got {s!r}")
    w, start = math.pi / (2 * (1 + s)), math.pi * s / (2 * (1 + s))
    cos0, sin0 = math.cos(start), math.sin(start)

    def alpha(t):
        return jnp.sin(w * (1 - t)) / cos0

    def sigma(t):
        return jnp.sqrt(jnp.sin(w * t) * jnp.sin(w * t + 2 * start)) / cos0

    def t_of_logsnr(l):
        cos = jnp.exp(0.5 * jax.nn.log_sigmoid(l)) * cos0
        sin = jnp.sqrt(sin0**2 + jax.nn.sigmoid(-l) * cos0**2)
        return jnp.minimum(jnp.arctan2(sin * cos0 - cos * sin0, cos * cos0 + sin * sin0) / w, 1.0)

    return Schedule(
        name="cosine_continuous", alpha=alpha, sigma=sigma,
        logsnr=lambda t: 2 * (jnp.log(alpha(t)) - jnp.log(sigma(t))),
        t_of_logsnr=t_of_logsnr)


def sigmoid(start: float = -3.0, end: float = 3.0, tau: float = 1.0, floor: float = 1e-9) -> Schedule:
    """alpha^2 = (S(end) - S(start + (end - start) t)) / (S(end) - S(start)), S(u) = 1 / (1 + exp(-u / tau)) (Chen 2023).

    `floor` is mixed in, alpha^2 -> floor + (1 - floor) alpha^2, where the paper clips. Differences of S are written with sinh and
    cosh, S(u) - S(v) = sinh((u - v) / 2 tau) / (2 cosh(u / 2 tau) cosh(v / 2 tau)), so that neither end cancels.
    """
    if not (start < end and tau > 0 and 0 < floor < 1):
        raise UserError(f"schedule 'sigmoid' needs start < end, tau > 0 and floor in (0, 1); got start={start!r}, end={end!r}, "
                        f"tau={tau!r}, floor={floor!r}")
    d = (end - start) / (2 * tau)
    cosh_start, cosh_end = math.cosh(start / (2 * tau)), math.cosh(end / (2 * tau))

    def parts(t):  # alpha^2 and sigma^2
        cosh = jnp.cosh(start / (2 * tau) + d * t) * math.sinh(d)
        signal = jnp.sinh(d * (1 - t)) * cosh_start / cosh
        return floor + (1 - floor) * signal, (1 - floor) * jnp.sinh(d * t) * cosh_end / cosh

    def t_of_logsnr(l):  # exp(2 d t) from the ratio of the two sinh
        p = jax.nn.sigmoid(-l) * cosh_start
        y = jnp.maximum(jax.nn.sigmoid(l) - floor, 0.0) * cosh_end
        return jnp.minimum(jnp.log1p(2 * math.sinh(d) * p / (y + p * math.exp(-d))) / (2 * d), 1.0)

    return Schedule(
        name="sigmoid",
        alpha=lambda t: jnp.sqrt(parts(t)[0]),
        sigma=lambda t: jnp.sqrt(parts(t)[1]),
        logsnr=lambda t: jnp.log(parts(t)[0]) - jnp.log(parts(t)[1]),
        t_of_logsnr=t_of_logsnr)


def laplace(mu: float = 0.0, b: float = 0.5, logsnr_min: float = -6.0) -> Schedule:
    """logsnr = mu - b sgn(1/2 - u) log(1 - 2 |u - 1/2|): for uniform u, logsnr is Laplace(mu, b) (Hang et al. 2024).

    Variance preserving. u = t (1 - delta) stops short of 1, where alpha would be 0 with an infinite slope: logsnr(1) =
    `logsnr_min`, as far as t resolves in float32. Most of the noising happens near the ends, so steps that are even in logsnr
    suit it better than steps that are even in t.
    """
    if not (b > 0 and logsnr_min < mu):
        raise UserError(f"schedule 'laplace' needs b > 0 and logsnr_min < mu; got mu={mu!r}, b={b!r}, logsnr_min={logsnr_min!r}")
    delta = 0.5 * math.exp((logsnr_min - mu) / b)

    def logsnr(t):
        u, complement = t * (1 - delta), (1 - t) + t * delta
        return mu + b * jnp.where(u < 0.5, -jnp.log(2 * u), jnp.log(2 * complement))

    def t_of_logsnr(l):
        z = (l - mu) / b
        u = jnp.where(z > 0, 0.5 * jnp.exp(-jnp.maximum(z, 0.0)), 1 - 0.5 * jnp.exp(jnp.minimum(z, 0.0)))
        return jnp.minimum(u / (1 - delta), 1.0)

    return from_logsnr("laplace", logsnr, t_of_logsnr)


def rectified_flow() -> Schedule:
    """alpha = 1 - t, sigma = t: straight lines between data and noise (Liu et al. 2022; Lipman et al. 2022). alpha(1) = 0."""
    return Schedule(
        name="rectified_flow",
        alpha=lambda t: 1.0 - t,
        sigma=lambda t: jnp.asarray(t, jnp.float32),
        logsnr=lambda t: 2.0 * (jnp.log1p(-t) - jnp.log(t)),
        t_of_logsnr=lambda l: jax.nn.sigmoid(-0.5 * l),
        family="flow")
