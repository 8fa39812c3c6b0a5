"""Objectives for networks that sample in one or a few steps: straighter paths, longer steps, averages of the velocity.

A path is x_t = alpha x0 + sigma eps; its velocity is v = alpha'(t) x0 + sigma'(t) eps, which is eps - x0 on rectified flow. Time
runs from data, 0, to noise, 1, as in Salimans & Ho 2022 and Geng et al. 2025; Liu et al. 2022 and Frans et al. 2024 count the
other way, so their steps forward are steps down here. The average velocity of the probability flow between r <= t is

    u(x_t, t, r) = (x_t - x_r) / (t - r),   u(x_t, t, t) = E[v | x_t],   so that   x_r = x_t - (t - r) u(x_t, t, r).        (1)

All losses are means over an example's values, [B], with metrics. Consistency models are in consistency.py.
"""
import functools
from typing import Callable, Optional, Tuple, Union

import jax
import jax.numpy as jnp

from ldm_jax.process.consistency import consistency_loss
from ldm_jax.process.samplers import Sampler, prior, sample
from ldm_jax.process.schedules import Schedule
from ldm_jax.process.stepping import scales
from ldm_jax.process.times import draw_times, logit_normal
from ldm_jax.process.weights import loss_weight
from ldm_jax.types import Array, Denoise, UserError, expand, fold_in, normal, split_prediction, uniform


def path(schedule: Schedule, x0: Array, eps: Array, t: Array) -> Tuple[Array, Array]:
    """x_t = alpha x0 + sigma eps and its velocity alpha' x0 + sigma' eps, each [B, ...]."""
    one = jnp.ones_like(t)
    (alpha, d_alpha), (sigma, d_sigma) = (jax.jvp(f, (t,), (one,)) for f in (schedule.alpha, schedule.sigma))
    return (expand(alpha, x0) * x0 + expand(sigma, x0) * eps, expand(d_alpha, x0) * x0 + expand(d_sigma, x0) * eps)


def _mean_square(error: Array) -> Array:
    return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))


# Reflow

def reflow_pairs(denoise: Denoise, schedule: Schedule, key: Array, shape, **options) -> Tuple[Array, Array]:
    """(x0, eps), each [B, ...]: noise, and the sample that the model makes of it (Liu et al. 2022: the rectified coupling).

    options: as of `sample`, such as steps=100; the sampler must be deterministic for the pairs to be joined by the flow.
    """
    x_1 = prior(schedule, fold_in(key, 0), shape)
    return sample(denoise, schedule, x_1, fold_in(key, 1), **options), x_1 / schedule.sigma(jnp.float32(1.0))


def reflow_loss(predict: Callable[[Array, Array], Array], schedule: Schedule, x0: Array, eps: Array, key: Array, *,
                times: Union[str, Callable] = "uniform") -> Tuple[Array, dict]:
    """|v - predict(x_t, t)|^2 between given pairs (Liu et al. 2022, eq. 1); zero loss where the paths of the pairs never cross.

    predict: (x_t [B, ...], t [B]) -> velocity; x0, eps: pairs, as from `reflow_pairs`; times: a row of TIMES, or a function of
    its form. Metrics {"mse": [B], "t": [B]}.
    """
    t, correction = draw_times(times, fold_in(key, 0), x0.shape[0], schedule)
    x_t, v = path(schedule, x0, eps, t)
    mse = _mean_square(v - predict(x_t, t).astype(jnp.float32))
    return correction * mse, {"mse": mse, "t": t}


# Progressive distillation

def progressive_target(teacher: Denoise, schedule: Schedule, x_t: Array, t: Array, s: Array) -> Array:
    """The x0 with which one DDIM step from t to s equals the teacher's two over (t + s) / 2 (Salimans & Ho 2022, algorithm 2).

    With m = (t + s) / 2, x1 the teacher's answer at t and x2 that at m, the two steps unroll to

        x0 = (w1 x1 + w2 x2) / (w1 + w2),   w1 = (sigma_s alpha_m / sigma_m) (1 - e^{(l_t - l_m) / 2}),
                                            w2 = alpha_s (1 - e^{(l_m - l_s) / 2}),          l = logsnr:

    the paper's quotient without its cancellation, and x2 at s = 0.
    """
    m = 0.5 * (t + s)
    l_t, l_m, l_s = (schedule.logsnr(u) for u in (t, m, s))
    (a_t, s_t), (a_m, s_m) = (scales(schedule, u, x_t) for u in (t, m))
    x1 = split_prediction(teacher(x_t, t))[0]
    x2 = split_prediction(teacher(a_m * x1 + s_m / s_t * (x_t - a_t * x1), m))[0]
    w1 = -schedule.sigma(s) * schedule.alpha(m) / schedule.sigma(m) * jnp.expm1(0.5 * (l_t - l_m))
    w2 = -schedule.alpha(s) * jnp.expm1(0.5 * (l_m - l_s))
    return x1 + expand(w2 / (w1 + w2), x_t) * (x2 - x1)


def progressive_loss(student: Denoise, teacher: Denoise, schedule: Schedule, x0: Array, key: Array, *, steps,
                     weight: Union[str, Callable] = "snr_truncation") -> Tuple[Array, dict]:
    """w(logsnr_t) |progressive_target - student(x_t, t)|^2 at t = i / steps, i = 1..steps (Salimans & Ho 2022, algorithm 2).

    Args:
      student, teacher: (x_t [B, ...], t [B]) -> x0. The student will take `steps` DDIM steps, the teacher takes twice as many.
      steps: may be traced, so that halving it does not compile again.
      weight: a row of WEIGHTS, or a function of its form, for an output of x0.

    Returns:
      loss [B] and metrics {"mse": unweighted error of x0 [B], "t": [B]}.
    """
    i = jnp.ceil(uniform(fold_in(key, 0), x0.shape[0]) * steps)
    t, s = i / steps, (i - 1) / steps
    alpha, sigma = scales(schedule, t, x0)
    x_t = alpha * x0 + sigma * normal(fold_in(key, 1), x0.shape)
    goal = jax.lax.stop_gradient(progressive_target(teacher, schedule, x_t, t, s))
    mse = _mean_square(goal - split_prediction(student(x_t, t))[0])
    return loss_weight(weight, schedule, "x0", t) * mse, {"mse": mse, "t": t}


# Averages of the velocity

def shortcut_loss(predict: Callable[[Array, Array, Array], Array], target: Callable[[Array, Array, Array], Array],
                  schedule: Schedule, x0: Array, key: Array, *, sections: int = 128, every: int = 4) -> Tuple[Array, dict]:
    """Flow matching at d = 0, and twice a step of d is a step of 2 d (Frans et al. 2024, section 3).

        predict(x_t, t, 0)   -> v
        predict(x_t, t, 2 d) -> (target(x_t, t, d) + target(x_t - d target(x_t, t, d), t - d, d)) / 2

    predict(x_t, t, d) is u(x_t, t, t - d) of equation (1). Examples 0, every, 2 every, ... take the second form, with 2 d uniform
    over 1, 1/2, .., 2 / sections and t a multiple of 2 d; the others the first, t a multiple of 1 / sections. The smallest d is
    asked of the target as 0.

    Args:
      predict: (x_t [B, ...], t [B], d [B]) -> average velocity.
      target: the same with averaged parameters, perhaps guided; no gradient. It is asked about the examples x0[::every] only: a
        condition it closes over must be taken at those.
      sections: a power of two, the largest number of sampling steps.

    Returns:
      loss [B] and metrics {"mse": [B], "t": [B], "d": the step asked of `predict` [B]}.

    Raises:
      UserError: when `sections` is not a power of two above 1, or `every` is below 1.
    """
    if sections < 2 or sections & (sections - 1) or every < 1:
        raise UserError(f"shortcut_loss needs sections, a power of two above 1, and every >= 1; got sections={sections}, "
                        f"every={every}")
    n, levels = x0.shape[0], sections.bit_length() - 1
    bootstrap = jnp.arange(n) % every == 0
    level = jnp.where(bootstrap, jnp.ceil(uniform(fold_in(key, 0), n) * levels) - 1, levels)
    times = 2.0**level
    t = jnp.ceil(uniform(fold_in(key, 1), n) * times) / times
    x_t, goal = path(schedule, x0, normal(fold_in(key, 2), x0.shape), t)

    x, now, half = x_t[::every], t[::every], 0.5 / times[::every]
    asked = jnp.where(half > 1.0 / sections, half, 0.0)
    first = target(x, now, asked).astype(jnp.float32)
    second = target(x - expand(half, x) * first, now - half, asked).astype(jnp.float32)
    goal = jax.lax.stop_gradient(goal.at[::every].set(0.5 * (first + second)))

    d = jnp.where(bootstrap, 1.0 / times, 0.0)
    mse = _mean_square(goal - predict(x_t, t, d).astype(jnp.float32))
    return mse, {"mse": mse, "t": t, "d": d}


def mean_flow_loss(predict: Callable[[Array, Array, Array], Array], schedule: Schedule, x0: Array, key: Array, *,
                   times: Union[str, Callable] = functools.partial(logit_normal, mean=-0.4), ratio: float = 0.25,
                   velocity: Optional[Callable[[Array, Array, Array], Array]] = None, power: float = 1.0,
                   constant: float = 1e-3) -> Tuple[Array, dict]:
    """The identity u = v - (t - r) du/dt of the average velocity, as a regression (Geng et al. 2025, section 4.1).

        target = v - (t - r) (v . grad_x u + d_t u),   e = |u - stop_gradient target|^2 / D,
        loss = e / stop_gradient(e + constant / D)^power

    The derivative is one jvp of `predict` along (v, 1, 0).

    Args:
      predict: (x_t [B, ...], t [B], r [B]) -> u(x_t, t, r), differentiable in forward mode.
      times: how t and r are drawn, a row of TIMES or a function of its form; t is the larger of two draws.
      ratio: the part of the examples with r < t; the others have r = t, which is flow matching.
      velocity: (x_t, t, v) -> what takes the place of v, without gradient: for guidance inside the network (section 4.2) the
        guided velocity s v + (1 - s) u(x_t, t, t), u without the condition; or a teacher's velocity.
      power, constant: of the adaptive weight; power = 0 is the plain squared error.

    Returns:
      loss [B] and metrics {"mse": e [B], "t": [B], "r": [B]}.
    """
    n = x0.shape[0]
    (first, c1), (second, c2) = (draw_times(times, fold_in(key, i), n, schedule) for i in (0, 1))
    t = jnp.maximum(first, second)
    r = jnp.where(uniform(fold_in(key, 2), n) <= ratio, jnp.minimum(first, second), t)
    x_t, v = path(schedule, x0, normal(fold_in(key, 3), x0.shape), t)
    if velocity is not None:
        v = jax.lax.stop_gradient(velocity(x_t, t, v))
    u, du = jax.jvp(predict, (x_t, t, r), (v, jnp.ones_like(t), jnp.zeros_like(r)))
    goal = jax.lax.stop_gradient(v - expand(t - r, x0) * du.astype(jnp.float32))
    mse = _mean_square(u.astype(jnp.float32) - goal)
    weight = jax.lax.stop_gradient(mse + constant / (x0.size // n)) ** -power
    return c1 * c2 * weight * mse, {"mse": mse, "t": t, "r": r}


def average_velocity(predict: Callable[[Array, Array, Array], Array]) -> Sampler:
    """x_s = x_t - (t - s) u(x_t, t, s), equation (1): the sampler of shortcut and MeanFlow networks; it asks no denoiser.

    predict: (x_t [B, ...], t [B], s [B]) -> u; of a shortcut network, lambda x, t, s: predict(x, t, t - s).
    """
    def step(denoise, schedule, x, t, s, key, carry):
        return x - expand(t - s, x) * predict(x, t, s).astype(jnp.float32), carry

    return Sampler(step)


FEW_STEP = {"reflow": reflow_loss, "consistency": consistency_loss, "progressive": progressive_loss, "shortcut": shortcut_loss,
            "mean_flow": mean_flow_loss}
