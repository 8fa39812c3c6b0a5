"""Time grids: which times a sampler visits, from 1 (noise) down to 0 (data). The grid owns the end points.

A grid is a function (schedule, steps, capacity) -> times [capacity + 1]. `steps` may be a traced number, so that changing it
does not compile again; entries after `steps` repeat the last time and are skipped by the sampling loop. Numeric options may be
traced too.

Grids of a discrete process are stated in its integer steps k, t = (k + 1) / T; a continuous process is given T = 1000 there.
Fewer than all steps may leave the first time below 1: what `sample` is given then should hold the noise of that time, or the
published habit be followed of starting with the noise of t = 1. Grids in noise levels use the
ratio q = sigma / alpha = exp(-logsnr / 2).
"""
from typing import Callable, Optional, Sequence, Union

import jax.numpy as jnp
import numpy as np

from ldm_jax.process.noising import is_traced
from ldm_jax.process.schedules import Schedule
from ldm_jax.types import Array, UserError, lookup

CONTINUOUS_STEPS = 1000  # the T of a continuous process in grids of integer steps
SMALLEST_RATIO = 0.002  # the least q of a continuous process, Karras et al. 2022
LARGEST_RATIO = 160.0  # the most q counted from, just beyond the linear table's: float32 times near 1 resolve no larger


def _index(steps, capacity: int) -> Array:
    """0, 1, .., steps, steps, ..: [capacity + 1] int32."""
    return jnp.minimum(jnp.arange(capacity + 1), steps)


def _rounded_ratio(a: Array, b) -> Array:
    """a / b rounded to the nearest whole number, halves to the even one, in integers: float32 would decide ties at random."""
    q, r = a // b, a % b
    return q + ((2 * r > b) | ((2 * r == b) & (q % 2 == 1)))


def _part(k: Array, of) -> Array:
    """k / of, float32, exactly 1 where they are equal: compiled, a division may be a product with a rounded reciprocal."""
    return jnp.where(k >= of, 1.0, k / jnp.asarray(of, jnp.float32))


def _ending(times: Array, index: Array, steps) -> Array:
    """`times` with 0 at and after entry `steps`."""
    return jnp.where(index >= steps, 0.0, times)


def _steps_of(schedule: Schedule, steps) -> int:
    """T, checked to be no less than `steps` where that is known."""
    T = schedule.timesteps or CONTINUOUS_STEPS
    if not is_traced(steps) and not 1 <= steps <= T:
        raise UserError(f"steps must lie in 1..{T}, the number of time steps of schedule {schedule.name!r}; got {steps}")
    return T


def uniform(schedule: Schedule, steps, capacity: int) -> Array:
    """t_i = 1 - i / steps. On a discrete process it visits t_{T-1} first and, with steps = T, every t_k."""
    i = _index(steps, capacity)
    return _part(steps - i, steps)


def trailing(schedule: Schedule, steps, capacity: int) -> Array:
    """k_i = round(T - i T / steps) - 1: `uniform` on whole steps, starting at k = T - 1 (Lin et al. 2024)."""
    T, i = _steps_of(schedule, steps), _index(steps, capacity)
    return _ending(_part(_rounded_ratio(T * (steps - i), steps), T), i, steps)


def leading(schedule: Schedule, steps, capacity: int, offset=0, endpoint: bool = True) -> Array:
    """k_i = (steps - 1 - i) (T // steps) + offset: from k = `offset` up in whole strides, which leaves out the noisiest steps.

    (Song, Meng & Ermon 2021; Stable Diffusion has offset = 1.) With endpoint=False the stride is
    T // (steps + 1) and the lowest of the steps + 1 values is left out.
    """
    T, i = _steps_of(schedule, steps), _index(steps, capacity)
    stride = jnp.maximum(T // (steps + (0 if endpoint else 1)), 1)
    k = (steps - (1 if endpoint else 0) - i) * stride + offset
    return _ending(_part(jnp.clip(k, 0, T - 1) + 1, T), i, steps)


def linspace(schedule: Schedule, steps, capacity: int, offset=0, endpoint: bool = True, rounded: bool = True) -> Array:
    """k_i evenly from T - 1 to 0, both included, plus `offset` where that stays within the process.

    (Nichol & Dhariwal 2021, section 4.) endpoint=False divides by steps instead of steps - 1, so that k = 0 is not visited;
    rounded=False leaves k between whole steps.
    """
    T, i = _steps_of(schedule, steps), _index(steps, capacity)
    last = jnp.maximum(steps - 1, 1) if endpoint else steps
    k = (T - 1) * jnp.maximum(last - i, 0)
    k = (_rounded_ratio(k, last) if rounded else k / last) + offset
    return _ending(_part(jnp.clip(k, 0, T - 1) + 1, T), i, steps)


def _ratios(schedule: Schedule, sigma_min, sigma_max):
    """The q to go to and to start from: the given ones, or the process's own."""
    if sigma_max is None:
        sigma_max = jnp.minimum(jnp.exp(-0.5 * schedule.logsnr(jnp.float32(1.0))), LARGEST_RATIO)
    if sigma_min is None:
        T = schedule.timesteps
        least = jnp.exp(-0.5 * schedule.logsnr(jnp.float32(1 / (T or CONTINUOUS_STEPS))))
        sigma_min = least if T else jnp.maximum(least, SMALLEST_RATIO)
    if not is_traced(sigma_min, sigma_max) and not 0 < sigma_min < sigma_max:
        raise UserError(f"the grid needs 0 < sigma_min < sigma_max; got {float(sigma_min):g} and {float(sigma_max):g}")
    return sigma_min, sigma_max


def _in_ratios(schedule: Schedule, log_ratio: Array, i: Array, steps, whole: bool) -> Array:
    """Times of log q, 0 at the end; with `whole` the first is exactly 1."""
    times = schedule.t_of_logsnr(-2 * log_ratio)
    return _ending(jnp.where(i == 0, 1.0, times) if whole else times, i, steps)


def karras(schedule: Schedule, steps, capacity: int, rho=7.0, sigma_min=None, sigma_max=None) -> Array:
    """q_i^(1/rho) linear from sigma_max to sigma_min in `steps` values, then 0 (Karras et al. 2022, eq. 5).

    sigma_max, sigma_min: values of q. None for the process's own: q(1), at most 160, where the grid starts at t = 1 all the same,
    and q(1 / T), of a continuous process at least 0.002.
    """
    low, high = _ratios(schedule, sigma_min, sigma_max)
    i = _index(steps, capacity)
    part = _part(i, jnp.maximum(steps - 1, 1))
    q = high ** (1 / rho) + part * (low ** (1 / rho) - high ** (1 / rho))
    return _in_ratios(schedule, rho * jnp.log(q), i, steps, sigma_max is None)


def exponential(schedule: Schedule, steps, capacity: int, sigma_min=None, sigma_max=None) -> Array:
    """log q linear from sigma_max to sigma_min in `steps` values, then 0: `karras` in the limit of large rho."""
    low, high = _ratios(schedule, sigma_min, sigma_max)
    i = _index(steps, capacity)
    part = _part(i, jnp.maximum(steps - 1, 1))
    return _in_ratios(schedule, jnp.log(high) + part * (jnp.log(low) - jnp.log(high)), i, steps, sigma_max is None)


def logsnr_uniform(schedule: Schedule, steps, capacity: int, sigma_min=None, sigma_max=None) -> Array:
    """`steps` equal intervals of logsnr from sigma_max to sigma_min, the last of which ends at 0 instead (Lu et al. 2022).

    `exponential` has one interval less between the two and a step of its own from sigma_min to 0.
    """
    low, high = _ratios(schedule, sigma_min, sigma_max)
    i = _index(steps, capacity)
    part = _part(i, steps)
    return _in_ratios(schedule, jnp.log(high) + part * (jnp.log(low) - jnp.log(high)), i, steps, sigma_max is None)


def shifted(schedule: Schedule, steps, capacity: int, shift=3.0, base: Union[str, Callable] = "uniform") -> Array:
    """t -> shift t / (1 + (shift - 1) t) on the grid `base`: shift > 1 visits more of the noise (Esser et al. 2024, eq. 23)."""
    if not is_traced(shift) and not np.all(np.asarray(shift) > 0):
        raise UserError(f"shift must be positive (1 changes nothing); got {shift!r}")
    t = (lookup(GRIDS, base, "grid") if isinstance(base, str) else base)(schedule, steps, capacity)
    return shift * t / ((1 - t) + shift * t)


def explicit(schedule: Schedule, steps, capacity: int, timesteps: Optional[Sequence[float]] = None) -> Array:
    """The integer steps k listed in `timesteps`, decreasing, then 0. `steps` is to be their number. None: `trailing`.

    Raises:
      UserError: for a list that does not decrease, leaves 0..T-1, exceeds `capacity` or has another length than an untraced
        `steps`.
    """
    if timesteps is None:
        return trailing(schedule, steps, capacity)
    T = schedule.timesteps or CONTINUOUS_STEPS
    k = np.asarray(timesteps, np.float64)
    if k.ndim != 1 or not k.size or np.any(np.diff(k) >= 0) or k[0] > T - 1 or k[-1] < 0:
        raise UserError(f"timesteps must decrease within {T - 1}..0; got {list(timesteps)!r}")
    if k.size > capacity or not (is_traced(steps) or steps == k.size):
        raise UserError(f"an explicit grid has as many steps as timesteps: steps must be {k.size}, and capacity at least that")
    times = np.zeros(capacity + 1)
    times[:k.size] = (k + 1) / T
    return _ending(jnp.asarray(times, jnp.float32), _index(steps, capacity), steps)


def spaced_timesteps(T: int, sections: Union[str, int, Sequence[int]]) -> np.ndarray:
    """Integer steps of improved DDPM's respacing, increasing (Nichol & Dhariwal 2021, section 4).

    sections: "ddimN" for every s-th step from 0 with the least whole stride s that gives N; or counts, such as 25 or (10, 10, 5)
    or "10,10,5", one for each of as many equal parts of the process, each spaced evenly from its first step to its last.

    Raises:
      UserError: when no stride gives N, or a part has fewer steps than asked for.
    """
    if isinstance(sections, str) and sections.startswith("ddim"):
        N = _count(sections[4:])
        stride = -(-T // N)
        if not 1 <= N <= T or -(-T // stride) != N:
            raise UserError(f"no whole stride takes {N} of {T} steps ('ddim{N}'); choose another number, "
                            f"such as {-(-T // max(stride, 1))}")
        return np.arange(0, T, stride)
    if isinstance(sections, str):
        sections = [_count(part) for part in sections.split(",")]
    counts = [sections] if isinstance(sections, (int, np.integer)) else list(sections)
    sizes = [T // len(counts) + (part < T % len(counts)) for part in range(len(counts))]
    spaced, start = [], 0
    for count, size in zip(counts, sizes):
        if not 1 <= count <= size:
            raise UserError(f"cannot take {count} of the {size} steps of one part of the process; choose a number in 1..{size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        spaced.append(start + np.round(stride * np.arange(count)).astype(int))
        start += size
    return np.concatenate(spaced)


def _count(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise UserError(f"respacing must read like 'ddim25', '25' or '10,10,5'; got {text!r} in place of a number")
    return int(text)


def respaced(schedule: Schedule, steps, capacity: int, sections: Union[None, str, int, Sequence[int]] = None) -> Array:
    """The steps of `spaced_timesteps`, noisiest first, then 0. None: "ddimN" for N = steps, which may then be traced."""
    T = _steps_of(schedule, steps)
    if sections is not None or not is_traced(steps):
        return explicit(schedule, steps, capacity, spaced_timesteps(T, f"ddim{steps}" if sections is None else sections)[::-1])
    i = _index(steps, capacity)
    k = (steps - 1 - i) * -(-T // steps)
    return _ending(_part(jnp.clip(k, 0, T - 1) + 1, T), i, steps)


GRIDS = {"uniform": uniform, "trailing": trailing, "leading": leading, "linspace": linspace, "karras": karras,
         "exponential": exponential, "logsnr_uniform": logsnr_uniform, "shifted": shifted, "explicit": explicit,
         "respaced": respaced}
