"""How training draws its times: functions (key, n, schedule) -> t [n] in (0, 1], one key or one per example [n].

`draw_times` puts them on the grid of a discrete process. A draw that is not meant to change the objective returns (t, correction
[n]), the correction being 1 / (density of t): importance sampling, whose memory of past losses is a small value of its own.
"""
from typing import Callable, NamedTuple, Tuple, Union

import jax
import jax.numpy as jnp

from ldm_jax import types
from ldm_jax.process.schedules import Schedule
from ldm_jax.types import Array, UserError, fold_in, lookup, normal

SMALLEST_TIME = 2.0**-23  # the least t drawn: at 0 there is no noise to predict


def uniform(key: Array, n: int, schedule: Schedule) -> Array:
    """t uniform in (0, 1]."""
    return types.uniform(key, n)


def stratified(key: Array, n: int, schedule: Schedule) -> Array:
    """t_i = u + i / n modulo 1 with one u: every t is uniform, and each interval of length 1 / n gets one.

    (Kingma et al. 2021.) The one draw of the library that depends on the size of the batch, as it must: it lowers the variance of
    the batch's mean.
    """
    u = jax.random.uniform(key[0] if key.ndim else key, (), jnp.float32)
    return 1.0 - (u + jnp.arange(n) / n) % 1.0


def logit_normal(key: Array, n: int, schedule: Schedule, mean: float = 0.0, std: float = 1.0) -> Array:
    """t = sigmoid(mean + std z): more often in the middle of the path (Esser et al. 2024, eq. 19)."""
    return jax.nn.sigmoid(mean + std * normal(key, (n,)))


def mode(key: Array, n: int, schedule: Schedule, scale: float = 1.29) -> Array:
    """t = 1 - u - scale (cos^2(pi u / 2) - 1 + u), u uniform; scale > 0 favours the middle (Esser et al. 2024, eq. 20).

    Raises:
      UserError: when `scale` leaves [-1, 2 / (pi - 2)], where t is monotone in u.
    """
    if not -1 <= scale <= 2 / (jnp.pi - 2):
        raise UserError(f"scale of time distribution 'mode' must lie in [-1, {2 / (jnp.pi - 2):.4f}]; got {scale!r}")
    u = 1.0 - types.uniform(key, n)
    return 1 - u - scale * (jnp.cos(0.5 * jnp.pi * u) ** 2 - 1 + u)


def lognormal(key: Array, n: int, schedule: Schedule, mean: float = -1.2, std: float = 1.2) -> Array:
    """log(sigma / alpha) = mean + std z, through the schedule's inverse (Karras et al. 2022, table 1)."""
    return schedule.t_of_logsnr(-2 * (mean + std * normal(key, (n,))))


TIMES = {"uniform": uniform, "stratified": stratified, "logit_normal": logit_normal, "mode": mode, "lognormal": lognormal}


def draw_times(times: Union[str, Callable], key: Array, n: int, schedule: Schedule) -> Tuple[Array, Array]:
    """(t [n] on the schedule's grid, correction [n]) from a row of TIMES, `importance(state)`, or a function of the same form."""
    draw = lookup(TIMES, times, "time distribution") if isinstance(times, str) else times
    drawn = draw(key, n, schedule)
    t, correction = drawn if isinstance(drawn, tuple) else (drawn, jnp.ones(n, jnp.float32))
    return schedule.on_grid(jnp.clip(t, SMALLEST_TIME, 1.0)), correction


class Importance(NamedTuple):
    """The last losses seen in each of equal intervals of time.

    Attributes:
      history: [bins, K] float32.
      seen: losses seen so far in each interval, [bins] int32.
    """
    history: Array
    seen: Array


def init_importance(bins: int = 1000, length: int = 10) -> Importance:
    """An empty memory; `bins` = T for a discrete process, `length` = 10 losses of each as in Nichol & Dhariwal 2021."""
    return Importance(jnp.zeros((bins, length), jnp.float32), jnp.zeros(bins, jnp.int32))


def _bin(state: Importance, t: Array) -> Array:
    bins = state.seen.shape[0]
    return jnp.clip(jnp.ceil(t * bins - 1e-3).astype(jnp.int32) - 1, 0, bins - 1)


def update_importance(state: Importance, t: Array, loss: Array) -> Importance:
    """The memory after the losses [B] at the times t [B], those without the 1 / p correction; the oldest make room."""
    k, length = _bin(state, t), state.history.shape[1]
    same = k[:, None] == k[None, :]
    before, after = jnp.tril(same, -1).sum(1), jnp.triu(same, 1).sum(1)
    slot = (state.seen[k] + before) % length
    rows = jnp.where(after < length, k, state.seen.shape[0])  # more than K at once: the earlier ones are dropped
    return Importance(state.history.at[rows, slot].set(loss.astype(jnp.float32), mode="drop"), state.seen.at[k].add(1))


def importance_probabilities(state: Importance, uniform_share: float = 1e-3) -> Array:
    """p [bins], proportional to sqrt(E[loss^2]) (Nichol & Dhariwal 2021, eq. 18), mixed with a little of the uniform; uniform
    until every interval's memory is full."""
    bins, length = state.history.shape
    root = jnp.sqrt(jnp.mean(state.history**2, 1))
    p = (1 - uniform_share) * root / jnp.maximum(root.sum(), jnp.finfo(jnp.float32).tiny) + uniform_share / bins
    ready = jnp.all(state.seen >= length) & (root.sum() > 0)
    return jnp.where(ready, p, 1 / bins)


def importance(state: Importance, uniform_share: float = 1e-3) -> Callable:
    """The draw (key, n, schedule) -> (t [n], 1 / (bins p) [n]) of `importance_probabilities`: less variance, the same mean."""
    def draw(key: Array, n: int, schedule: Schedule) -> Tuple[Array, Array]:
        p = importance_probabilities(state, uniform_share)
        bins = p.shape[0]
        k = jnp.minimum(jnp.searchsorted(jnp.cumsum(p), types.uniform(fold_in(key, 0), n)), bins - 1)
        return (k + types.uniform(fold_in(key, 1), n)) / bins, 1 / (bins * p[k])

    return draw
