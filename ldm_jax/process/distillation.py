"""Score distillation: a direction in which to move an image x so that a diffusion model finds it more likely.

With x_t = alpha x + sigma eps, the difference between the noise a denoiser finds in x_t and the noise that was put there is

    eps_hat(x_t) - eps = (x_t - alpha x0_hat) / sigma - (x_t - alpha x) / sigma = (alpha / sigma) (x - x0_hat(x_t, t)),       (1)

the right-hand side without cancellation. Each method replaces `x` or adds a second difference; the gradient with respect to the
parameters theta of whatever draws x(theta) is the returned one times dx / dtheta, which `surrogate_loss` hands to jax.grad.
The network is never differentiated. Guidance is a guided denoiser.
"""
from typing import Callable, Tuple, Union

import jax
import jax.numpy as jnp

from ldm_jax.process.schedules import Schedule
from ldm_jax.process.stepping import scales
from ldm_jax.types import Array, Denoise, fold_in, lookup, normal, split_prediction, uniform

# name -> (alpha, sigma) -> w(t) alpha / sigma, where w(t) is the weight on eps_hat - eps. The product stays finite at alpha = 0.
DISTILLATION_WEIGHTS = {
    "sigma2": lambda alpha, sigma: alpha * sigma,  # w = sigma^2 (Poole et al. 2022)
    "uniform": lambda alpha, sigma: alpha / sigma,  # w = 1
    "alpha_sigma2": lambda alpha, sigma: alpha**2 * sigma,  # w = alpha sigma^2 (Chen et al. 2023, Fantasia3D, late stage)
    "x0": lambda alpha, sigma: jnp.ones_like(alpha),  # w = sigma / alpha: the gradient is x - x0_hat
}


def _draw(schedule: Schedule, x: Array, key: Array, weight: Union[str, Callable], t_min, t_max):
    """A time per example, the noising at that time with one eps, w alpha / sigma shaped to multiply x."""
    weigh = lookup(DISTILLATION_WEIGHTS, weight, "distillation weight") if isinstance(weight, str) else weight
    t = schedule.on_grid(t_max - (t_max - t_min) * (1.0 - uniform(fold_in(key, 0), x.shape[0])))
    eps = normal(fold_in(key, 1), x.shape)
    alpha, sigma = scales(schedule, t, x)
    return t, lambda x: alpha * x + sigma * eps, weigh(alpha, sigma)


def _x0(denoise: Denoise, x_t: Array, t: Array) -> Array:
    return split_prediction(denoise(x_t, t))[0]


def sds_gradient(denoise: Denoise, schedule: Schedule, x: Array, key: Array, *, weight: Union[str, Callable] = "sigma2",
                 t_min=0.02, t_max=0.98) -> Tuple[Array, dict]:
    """w(t) (eps_hat(alpha x + sigma eps, t) - eps), one t and eps per example (Poole et al. 2022, DreamFusion, eq. 3).

    Args:
      denoise: (x_t [B, ...], t [B]) -> x0; usually guided.
      x: images or latents [B, ...], float32.
      key: one key, or one per example.
      weight: a row of DISTILLATION_WEIGHTS, or (alpha, sigma) -> w alpha / sigma.
      t_min, t_max: t is uniform between them; numbers or traced, so that they may be annealed.

    Returns:
      The gradient with respect to x, [B, ...], and metrics {"t": [B]}.
    """
    t, noised, scale = _draw(schedule, x, key, weight, t_min, t_max)
    gradient = scale * (x - _x0(denoise, noised(x), t))
    return jax.lax.stop_gradient(gradient), {"t": t}


def vsd_gradient(denoise: Denoise, own: Denoise, schedule: Schedule, x: Array, key: Array, *,
                 weight: Union[str, Callable] = "sigma2", t_min=0.02, t_max=0.98) -> Tuple[Array, dict]:
    """w(t) (eps_hat(x_t, t) - eps_own(x_t, t)) (Wang et al. 2023, ProlificDreamer: variational score distillation).

    own: a denoiser trained on the current x with the usual loss, such as `denoise` with a low-rank addition. Where it knows x as
    the only image, its answer is x and this is `sds_gradient`. Other arguments and the result as there.
    """
    t, noised, scale = _draw(schedule, x, key, weight, t_min, t_max)
    x_t = noised(x)
    return jax.lax.stop_gradient(scale * (_x0(own, x_t, t) - _x0(denoise, x_t, t))), {"t": t}


def dds_gradient(denoise: Denoise, source_denoise: Denoise, schedule: Schedule, x: Array, source: Array, key: Array, *,
                 weight: Union[str, Callable] = "sigma2", t_min=0.02, t_max=0.98) -> Tuple[Array, dict]:
    """w(t) (eps_hat(x_t, t) - eps_source(source_t, t)) at the same t and eps (Hertz et al. 2023: delta denoising score).

    What distillation does to the source under its own description is taken away, which leaves the edit. source: the image that is
    edited, shaped like x; source_denoise: the denoiser conditioned on its description. Other arguments and the result as in
    `sds_gradient`.
    """
    t, noised, scale = _draw(schedule, x, key, weight, t_min, t_max)
    difference = (x - _x0(denoise, noised(x), t)) - (source - _x0(source_denoise, noised(source), t))
    return jax.lax.stop_gradient(scale * difference), {"t": t}


DISTILLATIONS = {"sds": sds_gradient, "vsd": vsd_gradient, "dds": dds_gradient}


def surrogate_loss(x: Array, gradient: Array) -> Array:
    """[B]: a loss whose gradient in x is exactly `gradient` and whose value is |gradient|^2 / 2 (sums over an example)."""
    gradient = jax.lax.stop_gradient(gradient)
    axes = tuple(range(1, x.ndim))
    return jnp.sum(gradient * (x - jax.lax.stop_gradient(x)), axes) + 0.5 * jnp.sum(gradient**2, axes)
