"""The table of sampling methods, and the one scan, `sample`, that runs them all. stepping.py derives what they share."""
import inspect
from typing import Any, Callable, Mapping, Optional, Tuple, Union

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.process.adaptive import ode
from ldm_jax.process.grids import GRIDS
from ldm_jax.process.langevin import annealed_langevin, predictor_corrector
from ldm_jax.process.multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde, lms, pndm, unipc
from ldm_jax.process.noising import is_traced
from ldm_jax.process.schedules import Schedule
from ldm_jax.process.singlestep import ddim, ddim_inversion, ddpm, dpmpp_2s, edm, euler, euler_ancestral, euler_maruyama, heun
from ldm_jax.process.stepping import Sampler
from ldm_jax.types import Array, Denoise, UserError, example_keys, expand, fold_in, lookup, normal

# name -> (options) -> Sampler; an option that is a number may be traced.
SAMPLERS = {
    "ddpm": ddpm, "ddim": ddim, "ddim_inversion": ddim_inversion, "euler": euler, "heun": heun, "edm": edm,
    "euler_ancestral": euler_ancestral, "euler_maruyama": euler_maruyama,
    "dpmpp_2s": dpmpp_2s, "dpmpp_2m": dpmpp_2m, "dpmpp_3m": dpmpp_3m, "dpmpp_2m_sde": dpmpp_2m_sde, "dpmpp_3m_sde": dpmpp_3m_sde,
    "unipc": unipc, "pndm": pndm, "lms": lms,
    "annealed_langevin": annealed_langevin, "predictor_corrector": predictor_corrector, "ode": ode,
}


AHEAD = 16  # steps for which a denoiser may prepare at once


def make_sampler(sampler: Union[str, Sampler], **options: Any) -> Sampler:
    """A row of SAMPLERS made with `options`; a Sampler as it is.

    Raises:
      UserError: for an unknown name, an option that the row does not have, or a value it does not allow.
    """
    if not isinstance(sampler, str):
        if options:
            raise UserError(f"options {sorted(options)} were given with a Sampler made already; give them where it is made")
        return sampler
    row = lookup(SAMPLERS, sampler, "sampler")
    known = inspect.signature(row).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(f"sampler {sampler!r} has no option {', '.join(unknown)}; it takes: {', '.join(known) or 'none'}")
    return row(**options)._replace(name=sampler)


def split_options(sampler: str, options: Mapping[str, Any]) -> Tuple[dict, dict]:
    """(static, numbers): options that shape the computation, which a row annotates, and those that may be traced, as float32."""
    known = inspect.signature(lookup(SAMPLERS, sampler, "sampler")).parameters
    static = {name: value for name, value in options.items() if known[name].annotation is not inspect.Parameter.empty}
    return static, {name: jnp.asarray(value, jnp.float32) for name, value in options.items() if name not in static}


def prior(schedule: Schedule, key: Array, shape) -> Array:
    """x_1 ~ N(0, sigma(1)^2 I), one key's worth of noise per example."""
    return schedule.sigma(jnp.float32(1.0)) * normal(key, shape)


def room_for(steps, capacity: Optional[int]) -> int:
    if is_traced(steps):
        if capacity is None:
            raise UserError("steps is traced, so the number of steps to make room for is unknown; give capacity, an int")
        return capacity
    low, high = int(np.min(steps)), int(np.max(steps))
    if low < 1 or high > (capacity or high):
        raise UserError(f"steps={steps} must be at least 1 and at most the capacity, {capacity or high}")
    return capacity or high


def sample(denoise: Denoise, schedule: Schedule, x: Array, key: Array, *, sampler: Union[str, Sampler] = "ddim", steps=50,
           grid: Union[str, Callable, Array] = "uniform", capacity: Optional[int] = None, trajectory: bool = False,
           ahead: Optional[Callable[[Array], Denoise]] = None, **options):
    """Run a sampling method from x at the grid's first time to its last, in one loop.

    Args:
      denoise: (x_t [B, ...], t [B]) -> x0.
      x: the start, [B, ...] float32; usually `prior(schedule, key, shape)`.
      key: one key, or one per example [B]. The noise of example i depends on its own key only.
      sampler: a row of SAMPLERS, made with `options` (such as eta=0.5), or a Sampler. One that runs upwards starts at the grid's
        last time and ends at its first.
      steps: number of steps, an integer or one for each example [B]; may be traced, then `capacity` must bound it, only the steps
        asked for are run, and no gradient goes backwards through them unless `trajectory` is asked for.
      grid: a row of GRIDS, a function (schedule, steps, capacity) -> times [capacity + 1], or the times themselves, [capacity +
        1] or [capacity + 1, B] with its own for each example; what comes after entry `steps` is not visited.
      ahead: times [AHEAD + 1] -> `denoise` for these times alone, for which it may compute something at once; used where the number of
        steps is traced, with a Sampler that keeps to the grid (`on_grid`).
      trajectory: also return what was visited, {"x": [capacity + 1, B, ...], "t": [capacity + 1] or [capacity + 1, B]}.

    Returns:
      x at the last time, [B, ...]; with `trajectory` a pair.

    Raises:
      UserError: for unknown names, options or numbers of steps.
    """
    sampler = make_sampler(sampler, **options)
    capacity = room_for(steps, capacity)
    count = jnp.asarray(steps)
    times = grid_times(grid, schedule, count if count.ndim else steps, capacity)
    times = jnp.clip(times, 0.0, 1.0)  # a grid's arithmetic, rounded differently when compiled, may end a hair below 0
    if sampler.upwards:
        times = _upwards(times, count)
    keys = example_keys(key, x.shape[0])

    def advance(denoise, i, t, s, x, carry):
        t, s = (jnp.broadcast_to(u, x.shape[:1]) for u in (t, s))
        moved, carry = sampler.step(denoise, schedule, x, t, s, fold_in(keys, i), carry)
        moved = jnp.where(expand(i < count, x), moved, x) if count.ndim else moved
        return moved.astype(x.dtype), carry

    def body(state, inputs):
        i, t, s = inputs
        state = jax.lax.cond(jnp.any(i < count), lambda state: advance(denoise, i, t, s, *state), lambda state: state, state)
        return state, state[0] if trajectory else None

    start = (x, sampler.init(x, steps))
    if is_traced(steps) and not trajectory:  # as many rounds as steps: room for more costs nothing
        last = jnp.max(count)

        def run(denoise, first, last, state):
            return jax.lax.fori_loop(first, last, lambda i, state: advance(denoise, i, times[i], times[i + 1], *state), state)

        if ahead is None or times.ndim > 1:
            return run(denoise, 0, last, start)[0]

        def several(block, state):
            first = block * AHEAD
            near = times[jnp.minimum(first + jnp.arange(AHEAD + 1), capacity)]
            return run(ahead(near), first, jnp.minimum(first + AHEAD, last), state)

        return jax.lax.fori_loop(0, -(-last // AHEAD), several, start)[0]
    (end, _), visited = jax.lax.scan(body, start, (jnp.arange(capacity), times[:-1], times[1:]))
    if trajectory:
        return end, {"x": jnp.concatenate([x[None], visited]), "t": times}
    return end


def grid_times(grid: Union[str, Callable, Array], schedule: Schedule, steps, capacity: int) -> Array:
    """[capacity + 1] times, or [capacity + 1, B] where steps is [B]."""
    if not (isinstance(grid, str) or callable(grid)):
        if len(grid) != capacity + 1:
            raise UserError(f"{len(grid)} times were given as grid; a capacity of {capacity} steps takes {capacity + 1}")
        return jnp.asarray(grid)
    grid = lookup(GRIDS, grid, "grid") if isinstance(grid, str) else grid
    if jnp.ndim(steps):
        return jax.vmap(lambda n: grid(schedule, n, capacity), out_axes=1)(steps)
    return grid(schedule, steps, capacity)


def _upwards(times: Array, count: Array) -> Array:
    """The first `count` + 1 times in reverse, then the first of all again."""
    index = jnp.arange(len(times))
    if times.ndim == 1:
        return times[jnp.maximum(count - index, 0)]
    left = jnp.broadcast_to(count, times.shape[1:])[None] - index[:, None]
    return jnp.take_along_axis(times, jnp.maximum(left, 0), axis=0)
