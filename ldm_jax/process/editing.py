"""Editing with a sampler: starting from a noised picture, keeping a part of one, passing between two, and going back to noise.

All are thin functions over `sample`; `denoise`, `schedule`, `grid`, `sampler`, `steps`, `capacity`, `trajectory` and the
sampler's options mean what they mean there, and pictures are in the space that is diffused.
"""
from typing import Any, Callable, List, Optional, Tuple, Union

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.process.samplers import grid_times, make_sampler, room_for, sample
from ldm_jax.process.schedules import Schedule
from ldm_jax.process.stepping import Sampler, lost, scales
from ldm_jax.types import Array, Denoise, UserError, example_keys, expand, fold_in, normal

ENCODERS = ("ddim_inversion", "heun", "ode")  # rows of SAMPLERS that can leave sigma = 0


def noised(schedule: Schedule, x0: Array, t: Array, key: Array) -> Array:
    """alpha_t x0 + sigma_t z at times t, a scalar or [B]."""
    alpha, sigma = scales(schedule, t, x0)
    return alpha * x0 + sigma * normal(key, x0.shape)


def last_steps(times: Array, steps, strength) -> Tuple[Array, Array]:
    """(times, how many steps) of the last floor(strength steps) steps of a grid, at least one.

    times: [capacity + 1], or [capacity + 1, B]. strength: in (0, 1], a number or [B]; both may be traced.
    """
    capacity = len(times) - 1
    total, strength = jnp.broadcast_arrays(jnp.asarray(steps), jnp.asarray(strength))
    kept = jnp.clip(jnp.floor(strength * total + 1e-3), 1, total).astype(jnp.int32)
    index = jnp.minimum(jnp.arange(capacity + 1).reshape((-1,) + (1,) * kept.ndim) + (total - kept)[None], total[None])
    if times.ndim == 1:
        return times[index], kept
    return jnp.take_along_axis(times, jnp.broadcast_to(index.reshape(capacity + 1, -1), times.shape), axis=0), kept


def between(times: Array, steps, window: Tuple[Any, Any]) -> Tuple[Array, Array]:
    """(times, how many steps) of the steps of a grid [capacity + 1] that start at 1 - window[1] < t <= 1 - window[0].

    window: parts of the way from noise to data. Windows that meet share no step and leave none out.
    """
    real = jnp.arange(len(times)) < steps
    first, last = (jnp.sum(real & (times > 1 - part + 1e-5)) for part in window)
    return times[jnp.minimum(first + jnp.arange(len(times)), last)], last - first


def sdedit(denoise: Denoise, schedule: Schedule, x0: Array, key: Array, *, strength=0.6, steps=50,
           grid: Union[str, Callable, Array] = "uniform", capacity: Optional[int] = None, **options: Any) -> Any:
    """Image to image (Meng et al. 2022): noise x0 to where the last `strength` of the grid's steps begin, and sample from there.

    strength: see `last_steps`.
    """
    capacity = room_for(steps, capacity)
    times, kept = last_steps(grid_times(grid, schedule, steps, capacity), steps, strength)
    keys = example_keys(key, x0.shape[0])
    x = noised(schedule, x0, times[0], fold_in(keys, 0))
    return sample(denoise, schedule, x, fold_in(keys, 1), steps=kept, grid=times, capacity=capacity, **options)


def keeping(sampler: Sampler, known: Array, mask: Array) -> Sampler:
    """`sampler` with the part of x where mask = 1 replaced, after each step, by `known` noised to the time reached.

    (Song et al. 2021, appendix I.2.) A step to a later time than it starts from, t < s, is a draw from q(x_s | x_t) instead.
    """
    def step(denoise, schedule, x, t, s, key, carry):
        def down(x, carry):
            x, carry = sampler.step(denoise, schedule, x, t, s, fold_in(key, 0), carry)
            return (mask * noised(schedule, known, s, fold_in(key, 1)) + (1 - mask) * x).astype(known.dtype), carry

        def up(x, carry):
            (a_t, _), (a_s, s_s) = scales(schedule, t, x), scales(schedule, s, x)
            noise = jnp.sqrt(expand(lost(schedule, s, t), x)) * s_s * normal(fold_in(key, 1), x.shape)
            return (a_s / a_t * x + noise).astype(known.dtype), carry

        return jax.lax.cond(jnp.any(s > t), up, down, x, carry)

    return sampler._replace(step=step)


def resampling_path(steps: int, jump: int, resamples: int) -> List[int]:
    """Entries of a grid in the order in which RePaint visits them: after every `jump` steps, back up over these and down again.

    (Lugmayr et al. 2022, section 4.2; `resamples` counts the passes, the first included, and the way up is one draw.)
    """
    path = [0]
    for i in range(1, steps + 1):
        path.append(i)
        if i % jump == 0 and i < steps:
            path += list(range(i - jump, i + 1)) * (resamples - 1)
    return path


def inpaint(denoise: Denoise, schedule: Schedule, x: Array, key: Array, *, known: Array, mask: Array,
            sampler: Union[str, Sampler] = "ddpm", steps=50, grid: Union[str, Callable, Array] = "uniform",
            capacity: Optional[int] = None, resamples: int = 1, jump: int = 1, trajectory: bool = False, **options: Any) -> Any:
    """Pictures that agree with `known` where mask = 1.

    Args:
      x: the start, noise [B, ...].
      known, mask: broadcast against x; the mask is 1 where the picture is given, 0 where it is wanted.
      resamples: 1 replaces the known part after each step; more is RePaint (Lugmayr et al. 2022, algorithm 1), which harmonises
        the two parts by going over every `jump` steps that many times. It needs `steps` as an int and a method without memory.

    Raises:
      UserError: when RePaint is asked of traced steps or of a method that remembers earlier steps.
    """
    sampler = make_sampler(sampler, **options)
    capacity = room_for(steps, capacity)
    times = grid_times(grid, schedule, steps, capacity)
    if resamples < 1 or jump < 1:
        raise UserError(f"resamples={resamples} and jump={jump} must be at least 1")
    if resamples > 1:
        if not isinstance(steps, (int, np.integer)):
            raise UserError("RePaint's path through the grid needs steps as an int; otherwise take resamples=1")
        if jax.tree.leaves(sampler.init(x, steps)):
            raise UserError("RePaint goes back and forth in time: take a method that remembers nothing, such as 'ddpm' or 'ddim'")
        path = resampling_path(steps, jump, resamples)
        times, steps, capacity = times[jnp.asarray(path)], len(path) - 1, len(path) - 1
    known, mask = (jnp.broadcast_to(a, x.shape).astype(x.dtype) for a in (known, mask))
    keys = example_keys(key, x.shape[0])
    x = mask * noised(schedule, known, times[0], fold_in(keys, 0)) + (1 - mask) * x
    return sample(denoise, schedule, x, fold_in(keys, 1), sampler=keeping(sampler, known, mask), steps=steps, grid=times,
                  capacity=capacity, trajectory=trajectory)


def slerp(a: Array, b: Array, weight) -> Array:
    """Along the great circle from a (weight 0) to b (weight 1): (sin((1 - w) o) a + sin(w o) b) / sin(o) (Shoemake 1985).

    o is the angle between the examples [B, ...] of a and b; parallel ones are interpolated linearly. Between two draws of noise
    it keeps their norm, which a straight line would shorten. weight: a number or [B].
    """
    axes = tuple(range(1, a.ndim))
    norms = jnp.sqrt(jnp.sum(a**2, axes, keepdims=True) * jnp.sum(b**2, axes, keepdims=True))
    cos = jnp.clip(jnp.sum(a * b, axes, keepdims=True) / jnp.maximum(norms, 1e-30), -1.0, 1.0)
    angle, w = jnp.arccos(cos), expand(weight, a)
    straight = jnp.abs(jnp.sin(angle)) < 1e-4
    sin = jnp.where(straight, 1.0, jnp.sin(angle))
    return (jnp.where(straight, 1 - w, jnp.sin((1 - w) * angle) / sin) * a + jnp.where(straight, w, jnp.sin(w * angle) / sin) * b)


def encode(denoise: Denoise, schedule: Schedule, x0: Array, *, sampler: Union[str, Sampler] = "ddim_inversion", steps=50,
           grid: Union[str, Callable, Array] = "uniform", capacity: Optional[int] = None, trajectory: bool = False,
           **options: Any) -> Any:
    """The noise, at the grid's first time, from which the probability-flow ODE leads to x0: the grid is walked upwards.

    sampler: one of ENCODERS, or a Sampler whose steps may start at the grid's last time. A round trip through "ddim_inversion"
    and "ddim" errs at the order of its `iterations`, one through "heun" both ways at second order.

    Raises:
      UserError: for a method that cannot leave sigma = 0.
    """
    if isinstance(sampler, str) and sampler not in ENCODERS:
        raise UserError(f"sampler {sampler!r} cannot start from data; choose from: {', '.join(ENCODERS)}")
    upwards = make_sampler(sampler, **options)._replace(upwards=True)
    unused = jax.random.key(0)  # the methods are deterministic
    return sample(denoise, schedule, x0, unused, sampler=upwards, steps=steps, grid=grid, capacity=capacity,
                  trajectory=trajectory)


def translate(source: Denoise, target: Denoise, schedule: Schedule, x0: Array, *, encoder: Union[str, Sampler] = "ddim_inversion",
              decoder: Union[str, Sampler] = "ddim", steps=50, grid: Union[str, Callable, Array] = "uniform",
              capacity: Optional[int] = None) -> Array:
    """x0 encoded under one denoiser and decoded under another, such as two conditions of one network (Su et al. 2023).

    With the same denoiser twice it is the round trip, which returns x0 up to the error stated at `encode`.
    """
    x_1 = encode(source, schedule, x0, sampler=encoder, steps=steps, grid=grid, capacity=capacity)
    return sample(target, schedule, x_1, jax.random.key(0), sampler=decoder, steps=steps, grid=grid, capacity=capacity)
