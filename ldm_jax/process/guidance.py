"""Guidance: functions from denoisers to a denoiser, composable in any order.

Because x0 is affine in eps, v, flow and score at given x_t with the same coefficients for both halves, guiding x0 is the same
as guiding any of them. With c = E[x0 | x_t, y] and u = E[x0 | x_t] the gradient of a classifier is

    grad log p(y | x_t) = (alpha / sigma^2) (c - u)                                                                     (1)

so its guidance and the classifier-free one are the same for exact networks. A learned variance passes through unchanged.
"""
from typing import Callable, NamedTuple, Tuple, Union

import jax
import jax.numpy as jnp

from ldm_jax.process.gaussians import interpolated_log_variance
from ldm_jax.process.schedules import Schedule
from ldm_jax.process.stepping import check_option, lost, noise_ratio
from ldm_jax.process.thresholding import dynamic_threshold, static_clip
from ldm_jax.types import Array, Denoise, UserError, expand, join_prediction, split_prediction

Scale = Union[float, Array, Callable[[Array], Array]]  # a number, [B], or a function of t [B] -> [B]


class Half(NamedTuple):
    """One denoiser of two that a network answers in a single, doubled batch: both(x_t, t) -> (first, second)."""
    both: Callable[[Array, Array], Tuple[Array, Array]]
    index: int

    def __call__(self, x_t, t):
        return self.both(x_t, t)[self.index]


def halves(both: Callable[[Array, Array], Tuple[Array, Array]]) -> Tuple[Half, Half]:
    """The two denoisers of `both`. Guidance that is given the two evaluates `both` once."""
    return Half(both, 0), Half(both, 1)


def evaluate(first: Denoise, second: Denoise, x_t: Array, t: Array) -> Tuple[Array, Array]:
    """(first(x_t, t), second(x_t, t)), in one call where the two are halves of one."""
    if isinstance(first, Half) and isinstance(second, Half) and first.both is second.both:
        pair = first.both(x_t, t)
        return pair[first.index], pair[second.index]
    return first(x_t, t), second(x_t, t)


def _guided_by(denoise: Denoise, other: Denoise, scale: Scale, combine: Callable[[Array, Array, Array], Array]) -> Denoise:
    """combine(c, u, scale) of the two answers; scale comes shaped to multiply them."""
    def guided(x_t, t):
        (c, frac), (u, _) = map(split_prediction, evaluate(denoise, other, x_t, t))
        s = expand(scale(t) if callable(scale) else scale, x_t)
        return join_prediction(combine(c, u, s), frac)

    return guided


def _moments(x: Array) -> Tuple[Array, Array]:
    """Mean and standard deviation of each example, kept as axes of size one."""
    axes = tuple(range(1, x.ndim))
    mean = jnp.mean(x, axes, keepdims=True)
    return mean, jnp.sqrt(jnp.mean((x - mean) ** 2, axes, keepdims=True))


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)


def classifier_free(denoise: Denoise, other: Denoise, scale: Scale) -> Denoise:
    """u + scale (c - u), c from `denoise` and u from `other` (Ho & Salimans 2022, eq. 6 with scale = 1 + w). 1 is off.

    other: the unconditional denoiser; that of a negative condition, to steer away from it; or that of a weaker network, smaller
    or trained for less time, to steer away from its mistakes (autoguidance: Karras et al. 2024). To combine several, nest them.
    scale: a number or [B], traced, or a function of t. A learned variance is the one of `denoise`.
    """
    return _guided_by(denoise, other, scale, lambda c, u, s: u + s * (c - u))


def limited_interval(denoise: Denoise, other: Denoise, scale: Scale, schedule: Schedule, low=0.0, high=jnp.inf) -> Denoise:
    """`classifier_free` where low < sigma / alpha <= high, and no guidance elsewhere (Kynkäänniemi et al. 2024)."""
    return classifier_free(denoise, other, within(schedule, scale, low, high))


def within(schedule: Schedule, scale: Scale, low=0.0, high=jnp.inf) -> Callable[[Array], Array]:
    """The scale of `limited_interval` as a function of t, for any guidance: `scale` where low < sigma / alpha <= high, else 1.

    low, high: numbers or [B], in units of sigma / alpha (the papers' sigma, for data of unit scale); may be traced.
    """
    def at(t):
        tau = noise_ratio(schedule, t)
        return jnp.where((tau > low) & (tau <= high), scale(t) if callable(scale) else scale, 1.0)

    return at


def rescaled(denoise: Denoise, other: Denoise, scale: Scale, amount=0.7) -> Denoise:
    """`classifier_free`, then brought back to the spread of c: g <- amount g std(c) / std(g) + (1 - amount) g.

    (Lin et al. 2024, section 3.4.)
    std is over all values of an example. Applied to x0, whose spread is what overexposes a picture; amount: a number or [B],
    traced.
    """
    def combine(c, u, s):
        g = u + s * (c - u)
        ratio = _moments(c)[1] / jnp.maximum(_moments(g)[1], 1e-12)
        return g * (1 + expand(amount, g) * (ratio - 1))

    return _guided_by(denoise, other, scale, combine)


def adaptive_projected(denoise: Denoise, other: Denoise, scale: Scale, parallel=0.0, radius=jnp.inf) -> Denoise:
    """c + (scale - 1) (d_orthogonal + parallel d_parallel), d = c - u, split along c (Sadat et al. 2024).

    Before the split d is shortened to a norm of at most `radius`. parallel = 1 with radius = inf is `classifier_free`; 0 leaves
    out what saturates the colours. Numbers or [B], traced. The paper's momentum across steps is not included: a denoiser has no
    memory.
    """
    def combine(c, u, s):
        d = c - u
        d = d * jnp.minimum(1.0, expand(radius, d) / jnp.maximum(jnp.sqrt(_dot(d, d)), 1e-12))
        along = _dot(d, c) / jnp.maximum(_dot(c, c), 1e-12) * c
        return c + (s - 1) * (d - along + expand(parallel, d) * along)

    return _guided_by(denoise, other, scale, combine)


def _gradient(log_prob: Callable[[Array, Array], Array], x_t: Array, t: Array) -> Array:
    return jax.grad(lambda x: jnp.sum(log_prob(x, t)))(x_t)


def classifier(denoise: Denoise, log_prob: Callable[[Array, Array], Array], scale: Scale, schedule: Schedule) -> Denoise:
    """eps <- eps - scale sigma grad log p(y | x_t): x0 + scale (sigma^2 / alpha) grad (Dhariwal & Nichol 2021, algorithm 2).

    0 is off; with an exact classifier 1 turns the unconditional denoiser into the conditional one, equation (1). At alpha = 0,
    where x_t says nothing of y, the denoiser stays as it is.

    Args:
      log_prob: (x_t [B, ...], t [B]) -> log p(y | x_t) [B], y being each example's own class.
      scale: a number or [B], traced, or a function of t.
    """
    def guided(x_t, t):
        x0, frac = split_prediction(denoise(x_t, t))
        alpha = schedule.alpha(t)
        factor = jnp.where(alpha > 0, schedule.sigma(t) ** 2 / jnp.where(alpha > 0, alpha, 1.0), 0.0)
        s = scale(t) if callable(scale) else scale
        return join_prediction(x0 + expand(s * factor, x_t) * _gradient(log_prob, x_t, t), frac)

    return guided


def classifier_mean_shift(denoise: Denoise, log_prob: Callable[[Array, Array], Array], scale: Scale, schedule: Schedule,
                          times: Array, variance: str = "small") -> Denoise:
    """Shifts the mean of a step of `ddpm` by scale Sigma grad log p(y | x_t) (Dhariwal & Nichol 2021, algorithm 1).

    In terms of x0 that is scale Sigma / (alpha_s (1 - r)) grad, with the variance Sigma of the step from t to the next time s: it
    agrees with `classifier` as the steps become small, and for the step into sigma = 0 with the small variance it is no guidance.

    Args:
      log_prob, scale: as in `classifier`.
      times: the grid of the run, [capacity + 1] or [capacity + 1, B]; the next time is its largest below t.
      variance: that of `ddpm`: "small", "large" or "learned".
    """
    check_option("ddpm", "variance", variance, ("small", "large", "learned"))
    times = jnp.asarray(times)

    def guided(x_t, t):
        x0, frac = split_prediction(denoise(x_t, t))
        column = times if times.ndim == 2 else times[:, None]
        s = jnp.max(jnp.where(column < t[None] - 1e-6, column, 0.0), axis=0)  # the margin is for times rounded by another program
        mass = lost(schedule, t, s)
        if variance == "learned":
            if frac is None:
                raise UserError("variance='learned' needs a network that learns one; choose from: large, small")
            sigma2 = jnp.exp(interpolated_log_variance(schedule, t, s, frac)) / expand(mass, x_t)
        else:
            sigma2 = expand(schedule.sigma(s if variance == "small" else t) ** 2, x_t)
        shift = expand(scale(t) if callable(scale) else scale, x_t) * sigma2 / expand(schedule.alpha(s), x_t)
        return join_prediction(x0 + shift * _gradient(log_prob, x_t, t), frac)

    return guided


# name -> (denoise, ...) -> denoise. The three first names are one function, which steers away from another denoiser.
GUIDANCE = {
    "classifier_free": classifier_free, "negative": classifier_free, "autoguidance": classifier_free,
    "limited_interval": limited_interval, "rescaled": rescaled, "adaptive_projected": adaptive_projected,
    "classifier": classifier, "classifier_mean_shift": classifier_mean_shift,
    "static_clip": static_clip, "dynamic_threshold": dynamic_threshold,
}
