"""The training objective: draw t and eps, ask the network, weight the squared error.

    L = E_{t, eps} [ w(t) || target(x0, eps) - net(alpha_t x0 + sigma_t eps, t) ||^2 / D ]      (D values in x0)

`TIMES` (times.py) holds how t is drawn, `WEIGHTS` (weights.py) holds w, `PARAMETERIZATIONS` (parameterizations.py) the target.
"""
from typing import Callable, Optional, Tuple, Union

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.process.gaussians import interpolated_log_variance, vlb_term
from ldm_jax.process.parameterizations import Parameterization, check_parameterization, split_variance
from ldm_jax.process.schedules import Schedule
from ldm_jax.process.times import TIMES, draw_times, logit_normal
from ldm_jax.process.weights import WEIGHTS, loss_weight
from ldm_jax.types import Array, PyTree, expand, fold_in, normal

__all__ = ["TIMES", "WEIGHTS", "diffusion_loss", "init_uncertainty", "logit_normal", "uncertainty"]

CONTINUOUS_STEPS = 1000  # steps into which the bound divides a continuous process for its learned variance


def _mean(values: Array) -> Array:
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def init_uncertainty(features: int = 128) -> PyTree:
    """Parameters of `uncertainty`, all zero: u = 0."""
    return jnp.zeros(features, jnp.float32)


def uncertainty(params: PyTree, logsnr: Array) -> Array:
    """u(logsnr) [B], the log of the loss to expect at a noise level: a linear layer on fixed random Fourier features of
    log(sigma / alpha) / 4 (Karras et al. 2024)."""
    rng = np.random.default_rng(0)
    frequency, phase = (rng.normal(size=params.size).astype(np.float32), rng.uniform(size=params.size).astype(np.float32))
    noise = jnp.clip(-logsnr / 8, -5.0, 5.0)
    features = jnp.sqrt(2.0) * jnp.cos(2 * jnp.pi * (noise[:, None] * frequency[None] + phase[None]))
    return features @ params / np.sqrt(params.size)


def diffusion_loss(predict: Callable[[Array, Array], Array], schedule: Schedule, parameterization: Union[str, Parameterization],
                   x0: Array, key: Array, *, times: Union[str, Callable] = "uniform", weight: Union[str, Callable] = "simple",
                   learned_variance: bool = False, vlb_scale: float = 1e-3,
                   log_uncertainty: Optional[Callable[[Array], Array]] = None) -> Tuple[Array, dict]:
    """The weighted denoising error of each example.

    With `learned_variance` it is the hybrid objective L_simple + vlb_scale L_vlb, L_vlb in bits per dimension over all T steps,
    through which only the variance learns: the mean enters it with its gradient stopped (Nichol & Dhariwal 2021, eq. 16). With
    `log_uncertainty` it is L exp(-u) + u (Karras et al. 2024).

    Args:
      predict: (x_t [B, ...], t [B]) -> raw output shaped like x_t, with twice the channels where the variance is learned.
      x0: data [B, ...], float32.
      key: one key, or one per example [B].
      times, weight: rows of TIMES and WEIGHTS, or functions of the same form, such as
        functools.partial(weights.min_snr, gamma=3.0).
      log_uncertainty: logsnr [B] -> u [B], such as `uncertainty` with its parameters.

    Returns:
      loss [B], the mean over an example's values; metrics, each [B]: "mse", the unweighted error of the output; "t"; "loss",
      without the correction of importance sampling (what `update_importance` wants) and without uncertainty; "vlb" where the
      variance is learned.
    """
    row = check_parameterization(parameterization, schedule)
    t, correction = draw_times(times, fold_in(key, 0), x0.shape[0], schedule)
    eps = normal(fold_in(key, 1), x0.shape)
    a, s = expand(schedule.alpha(t), x0), expand(schedule.sigma(t), x0)
    x_t = a * x0 + s * eps
    output = predict(x_t, t).astype(jnp.float32)
    output, frac = split_variance(output) if learned_variance else (output, None)
    mse = _mean((row.target(x0, eps, a, s) - output) ** 2)
    loss = loss_weight(weight, schedule, row, t) * mse
    metrics = {"mse": mse, "t": t}
    if learned_variance:
        T = schedule.timesteps or CONTINUOUS_STEPS
        earlier = jnp.maximum(t - 1 / T, 0.0) if schedule.timesteps is None else (jnp.round(t * T) - 1) / T
        logvar = interpolated_log_variance(schedule, t, earlier, frac)
        mean_x0 = jax.lax.stop_gradient(row.x0(output, x_t, a, s))
        metrics["vlb"] = T * _mean(vlb_term(schedule, x0, x_t, t, earlier, mean_x0, logvar)) / jnp.log(2.0)
        loss = loss + vlb_scale * metrics["vlb"]
    metrics["loss"] = loss
    if log_uncertainty is not None:
        u = log_uncertainty(schedule.logsnr(t))
        loss = loss * jnp.exp(-u) + u
    return correction * loss, metrics
