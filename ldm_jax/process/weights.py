"""Loss weights: the factor on the squared error of a network's own output, whatever that output is.

At given x_t an error of the output is an error of eps times |d output / d eps|, and one of x0 likewise. A weight is written with
the factors that turn the squared output error into the others, all finite where alpha = 0, with logsnr' = d logsnr / dt:

    eps = (alpha slope)^2     |eps error|^2 = eps |output error|^2                                                  (1)
    x0 = (sigma slope)^2      |x0 error|^2 = x0 |output error|^2,    eps = SNR x0                                   (2)
    vlb = -logsnr' eps / 2    the integrand of the variational bound, in nats (Kingma et al. 2021)          (3)

(`slope`: parameterizations.py.) For a discrete process vlb is T times one term of the bound with the variance beta of
q(x_t | x_s), T (1 - exp(logsnr_t - logsnr_s)) (alpha_s slope)^2 / 2, s = t - 1 / T, finite at the first step too: for eps it is
T beta^2 / (2 beta (1 - beta) (1 - abar)) (Ho et al. 2020, eq. 12). As integrals over t, vlb and sigmoid assume uniform t.
"""
from typing import Callable, NamedTuple, Union

import jax
import jax.numpy as jnp

from ldm_jax.process.parameterizations import Parameterization, check_parameterization
from ldm_jax.process.schedules import Schedule
from ldm_jax.types import Array, lookup


class Level(NamedTuple):
    """What a weight may depend on, each [B]: logsnr, and the factors (1), (2) and (3)."""
    logsnr: Array
    eps: Array
    x0: Array
    vlb: Array


def level(schedule: Schedule, row: Parameterization, t: Array) -> Level:
    """The `Level` of the times t [B] for an output of the parameterization `row`."""
    one, T, logsnr = jnp.ones_like(t), schedule.timesteps, schedule.logsnr(t)
    (alpha, d_alpha), (sigma, d_sigma) = (jax.jvp(f, (t,), (one,)) for f in (schedule.alpha, schedule.sigma))
    slope = row.slope(alpha, sigma)
    if T is None:
        vlb = (alpha * d_sigma - d_alpha * sigma) * alpha / sigma * slope**2
    else:
        s = (jnp.round(t * T) - 1) / T
        vlb = -0.5 * T * jnp.expm1(logsnr - schedule.logsnr(s)) * (schedule.alpha(s) * slope) ** 2
    return Level(logsnr=logsnr, eps=(alpha * slope) ** 2, x0=(sigma * slope) ** 2, vlb=vlb)


def simple(at: Level) -> Array:
    """1 on the network's own output (Ho et al. 2020, eq. 14, for eps)."""
    return jnp.ones_like(at.logsnr)


def eps(at: Level) -> Array:
    """1 on the error of eps."""
    return at.eps


def x0(at: Level) -> Array:
    """1 on the error of x0."""
    return at.x0


def vlb(at: Level) -> Array:
    """Equation (3): with uniform t the loss is the diffusion term of the variational bound, in nats per dimension."""
    return at.vlb


def hybrid(at: Level, scale: float = 1e-3) -> Array:
    """simple + scale vlb, for a fixed variance; for a learned one see `diffusion_loss` (Nichol & Dhariwal 2021, eq. 16)."""
    return 1.0 + scale * at.vlb


def min_snr(at: Level, gamma: float = 5.0) -> Array:
    """min(SNR, gamma) on the error of x0 (Hang et al. 2023, section 3.4)."""
    return jnp.minimum(at.eps, gamma * at.x0)


def snr_truncation(at: Level) -> Array:
    """max(SNR, 1) on the error of x0 (Salimans & Ho 2022, section 4)."""
    return jnp.maximum(at.eps, at.x0)


def p2(at: Level, k: float = 1.0, gamma: float = 1.0) -> Array:
    """1 / (k + SNR)^gamma on the error of eps (Choi et al. 2022)."""
    return at.eps * (k + jnp.exp(at.logsnr)) ** -gamma


def sigmoid(at: Level, bias: float = 2.0) -> Array:
    """sigmoid(bias - logsnr) times `vlb`: the same function of logsnr under any schedule (Kingma & Gao 2023)."""
    return jax.nn.sigmoid(bias - at.logsnr) * at.vlb


def edm(at: Level, sigma_data: float = 0.5) -> Array:
    """(sigma^2 + d^2) / (sigma d)^2 on the error of x0, sigma the noise-to-signal ratio, d = sigma_data (Karras et al. 2022)."""
    return at.eps + at.x0 / sigma_data**2


WEIGHTS = {"simple": simple, "eps": eps, "x0": x0, "vlb": vlb, "hybrid": hybrid, "min_snr": min_snr,
           "snr_truncation": snr_truncation, "p2": p2, "sigmoid": sigmoid, "edm": edm}


def loss_weight(weight: Union[str, Callable], schedule: Schedule, parameterization: Union[str, Parameterization],
                t: Array) -> Array:
    """The factor [B] on the squared error of this output at the times t [B]; weight: a row of WEIGHTS or a function like it."""
    weigh = lookup(WEIGHTS, weight, "loss weight") if isinstance(weight, str) else weight
    return weigh(level(schedule, check_parameterization(parameterization, schedule), t))
