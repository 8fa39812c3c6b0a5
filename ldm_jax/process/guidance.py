"""Guidance: functions from denoisers to a denoiser, composable in any order.

Because x0 is affine in eps, v, flow and score at given x_t with the same coefficients for both halves, guiding x0 is the same
as guiding any of them.
"""
from typing import Callable, NamedTuple, Tuple

from ldm_jax.types import Array, Denoise, expand, join_prediction, split_prediction


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


def classifier_free(denoise: Denoise, unconditional: Denoise, scale) -> Denoise:
    """u + scale (c - u) (Ho & Salimans 2022, eq. 6 with scale = 1 + w). scale: a number or [B], traced; 1 is off.

    With a negative condition's denoiser in place of the unconditional one it steers away from that condition. A learned variance is
    the conditional one's.
    """
    def guided(x_t, t):
        (c, frac), (u, _) = map(split_prediction, evaluate(denoise, unconditional, x_t, t))
        return join_prediction(u + expand(scale, x_t) * (c - u), frac)

    return guided


GUIDANCE = {"classifier_free": classifier_free}
