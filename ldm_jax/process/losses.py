"""The training objective: draw t and eps, ask the network, weight the squared error.

    L = E_{t, eps} [ w(logsnr_t) || target(x0, eps) - net(alpha_t x0 + sigma_t eps, t) ||^2 / D ]      (D values in x0)

`TIMES` holds how t is drawn, (key, n) -> t [n] in (0, 1]; `WEIGHTS` holds w, (logsnr, gain) -> the factor on the squared
error of the network's own output, where gain = |d eps / d output| (see parameterizations.py).
"""
from typing import Callable, Tuple, Union

import jax
import jax.numpy as jnp

from ldm_jax.process.parameterizations import check_parameterization
from ldm_jax.process.schedules import Schedule
from ldm_jax.types import Array, expand, fold_in, lookup, normal, uniform


def logit_normal(key: Array, n: int, mean: float = 0.0, std: float = 1.0) -> Array:
    """t = sigmoid(mean + std z): more often in the middle of the path (Esser et al. 2024, eq. 19)."""
    return jax.nn.sigmoid(mean + std * normal(key, (n,)))


TIMES = {"uniform": uniform, "logit_normal": logit_normal}


def simple(logsnr: Array, gain: Array) -> Array:
    """w = 1 on the network's own output (Ho et al. 2020, eq. 14, for eps)."""
    return jnp.ones_like(logsnr)


def min_snr(logsnr: Array, gain: Array, gamma: float = 5.0) -> Array:
    """min(SNR, gamma) on the error of x0, that is min(1, gamma / SNR) on that of eps (Hang et al. 2023, section 3.4)."""
    return jnp.minimum(1.0, gamma * jnp.exp(-logsnr)) * gain**2


WEIGHTS = {"simple": simple, "min_snr": min_snr}


def diffusion_loss(predict: Callable[[Array, Array], Array], schedule: Schedule, parameterization: str, x0: Array, key: Array, *,
                   times: Union[str, Callable] = "uniform", weight: Union[str, Callable] = "simple") -> Tuple[Array, dict]:
    """The weighted denoising error of each example.

    Args:
      predict: (x_t [B, ...], t [B]) -> raw output shaped like x_t.
      x0: data [B, ...], float32.
      times, weight: rows of TIMES and WEIGHTS, or functions of the same form.

    Returns:
      loss [B], the mean over an example's values; metrics {"mse": unweighted error of the output [B], "t": [B]}.
    """
    row = check_parameterization(parameterization, schedule)
    draw = lookup(TIMES, times, "time distribution") if isinstance(times, str) else times
    weigh = lookup(WEIGHTS, weight, "loss weight") if isinstance(weight, str) else weight
    key_t, key_eps = fold_in(key, 0), fold_in(key, 1)
    t = schedule.on_grid(draw(key_t, x0.shape[0]))
    eps = normal(key_eps, x0.shape)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    a, s = expand(alpha, x0), expand(sigma, x0)
    error = row.target(x0, eps, a, s) - predict(a * x0 + s * eps, t).astype(jnp.float32)
    mse = jnp.mean(error**2, axis=tuple(range(1, x0.ndim)))
    return weigh(schedule.logsnr(t), row.gain(alpha, sigma)) * mse, {"mse": mse, "t": t}
