"""Noise schedules by name, and what turns one schedule into another: a shift of its logsnr or of its time, a vanishing end.

Discrete processes and the families are in noising.py, the continuous closed forms in closed_forms.py, VDM's in
learned_schedule.py. A transformation takes a schedule, or a row's name with that row's arguments, and keeps its family and its T.
They compose: snr_shift(zero_terminal("scaled_linear"), 2.0).
"""
from typing import Union

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.process.closed_forms import cosine_continuous, edm, laplace, rectified_flow, sigmoid, sub_vp, ve, vp_sde
from ldm_jax.process.learned_schedule import learned
from ldm_jax.process.noising import (
    FAMILIES,
    Schedule,
    cosine,
    from_betas,
    from_logsnr,
    is_traced,
    linear,
    scaled_linear,
    variance_preserving,
)
from ldm_jax.types import UserError, lookup

__all__ = ["FAMILIES", "SCHEDULES", "Schedule", "cosine", "cosine_continuous", "edm", "from_betas", "from_logsnr", "laplace",
           "learned", "linear", "rectified_flow", "scaled_linear", "sigmoid", "snr_shift", "sub_vp", "time_shift",
           "variance_preserving", "ve", "vp_sde", "zero_terminal"]


def _made(base: Union[str, Schedule], options: dict) -> Schedule:
    return lookup(SCHEDULES, base, "schedule")(**options) if isinstance(base, str) else base


def _check_shift(shift):
    if not is_traced(shift) and not np.all(np.asarray(shift) > 0):
        raise UserError(f"shift must be positive (1 changes nothing); got {shift!r}")


def snr_shift(base: Union[str, Schedule] = "cosine_continuous", shift=2.0, **options) -> Schedule:
    """sigma / alpha at every time is `shift` times that of `base`: logsnr - 2 log(shift).

    With shift = d / 64 it gives pictures of d x d pixels the noise that the base means for 64 x 64 (Hoogeboom et al. 2023,
    section 3.1). On rectified flow it is `time_shift`. shift: a number, may be traced.
    """
    base = _made(base, options)
    _check_shift(shift)
    norm, change = FAMILIES[base.family], 2 * jnp.log(jnp.asarray(shift, jnp.float32))

    def scales(t):
        a, s = base.alpha(t), shift * base.sigma(t)
        n = norm(a, s)
        return a / n, s / n

    return Schedule(
        name=f"snr_shift({base.name})",
        alpha=lambda t: scales(t)[0],
        sigma=lambda t: scales(t)[1],
        logsnr=lambda t: base.logsnr(t) - change,
        t_of_logsnr=lambda l: base.t_of_logsnr(l + change),
        timesteps=base.timesteps, family=base.family, vanishing=base.zero_terminal_snr)


def time_shift(base: Union[str, Schedule] = "rectified_flow", shift=3.0, **options) -> Schedule:
    """`base` at the time shift t / (1 + (shift - 1) t) (Esser et al. 2024, eq. 23, shift = sqrt(m / n) for m pixels against n).

    shift > 1 spends more time at high noise. A number, may be traced.
    """
    base = _made(base, options)
    _check_shift(shift)

    def warp(t):
        return shift * t / ((1 - t) + shift * t)

    def inverse(l):
        u = base.t_of_logsnr(l)
        return u / (shift * (1 - u) + u)

    return Schedule(
        name=f"time_shift({base.name})",
        alpha=lambda t: base.alpha(warp(t)),
        sigma=lambda t: base.sigma(warp(t)),
        logsnr=lambda t: base.logsnr(warp(t)),
        t_of_logsnr=inverse,
        timesteps=base.timesteps, family=base.family, vanishing=base.zero_terminal_snr)


def zero_terminal(base: Union[str, Schedule] = "linear", **options) -> Schedule:
    """`base` with its alpha stretched to end at 0: alpha -> (alpha - alpha_T) alpha_0 / (alpha_0 - alpha_T).

    (Lin et al. 2024, algorithm 1.) alpha is the variance-preserving one, alpha_T its end, alpha_0 its value at the table's first
    entry t_0 = 1 / T, which keeps its place; before t_0 nothing changes. A continuous process has t_0 = 0. sigma is had from
    u = 1 - alpha = sigma^2 / (1 + alpha), exact as t -> 0:

        alpha -> (1 + m) (alpha - alpha_T),   u -> u + m (u - u_0),   m = alpha_T / (alpha_0 - alpha_T)

    Raises:
      UserError: for a process without a finite sigma at alpha = 0 (alpha = 1 throughout), and for one whose end is traced.
    """
    base = _made(base, options)
    if base.family == "ve":
        raise UserError(f"schedule {base.name!r} cannot have zero terminal SNR: it keeps alpha = 1; "
                        "rescale a schedule whose alpha decreases")
    norm, vp = FAMILIES[base.family], FAMILIES["vp"]

    def vp_base(t):  # alpha, 1 - alpha
        a, s = base.alpha(t), base.sigma(t)
        n = vp(a, s)
        return a / n, (s / n) ** 2 / (1 + a / n)

    with jax.ensure_compile_time_eval():
        _, u_0 = vp_base(jnp.float32(1 / base.timesteps if base.timesteps else 0.0))
        alpha_1, u_1 = vp_base(jnp.float32(1.0))
    if is_traced(u_0, u_1):
        raise UserError(f"schedule {base.name!r} is traced: its end must be known to be moved to zero SNR")
    u_0, alpha_1 = float(u_0), float(alpha_1)
    m = alpha_1 / (float(u_1) - u_0)

    def vp_scales(t):
        alpha, u = vp_base(t)
        stretched = u > u_0
        alpha = jnp.where(stretched, (1 + m) * (alpha - alpha_1), alpha)
        u = jnp.where(stretched, u + m * (u - u_0), u)
        # exactly 0 at t = 1, with the slope that leads there
        return alpha - jax.lax.stop_gradient(jnp.where((t >= 1) | (alpha < 0), alpha, 0.0)), jnp.sqrt(u * (2 - u))

    def scales(t):
        a, s = vp_scales(t)
        n = norm(a, s)
        return a / n, s / n

    def logsnr(t):
        a, s = vp_scales(t)
        return 2 * (jnp.log(a) - jnp.log(s))

    def t_of_logsnr(l):
        u = jax.nn.sigmoid(-l) / (1 + jnp.exp(0.5 * jax.nn.log_sigmoid(l)))
        u = jnp.where(u > u_0, (u + m * u_0) / (1 + m), u)
        return jnp.where(l > -jnp.inf, base.t_of_logsnr(2 * jnp.log1p(-u) - jnp.log(u * (2 - u))), 1.0)

    return Schedule(
        name=f"zero_terminal({base.name})",
        alpha=lambda t: scales(t)[0],
        sigma=lambda t: scales(t)[1],
        logsnr=logsnr,
        t_of_logsnr=t_of_logsnr,
        timesteps=base.timesteps, family=base.family, vanishing=True)


SCHEDULES = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "vp_sde": vp_sde,
    "sub_vp": sub_vp,
    "ve": ve,
    "edm": edm,
    "cosine_continuous": cosine_continuous,
    "sigmoid": sigmoid,
    "laplace": laplace,
    "rectified_flow": rectified_flow,
    "learned": learned,
    "snr_shift": snr_shift,
    "time_shift": time_shift,
    "zero_terminal": zero_terminal,
}
