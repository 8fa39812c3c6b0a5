"""Time grids: which times a sampler visits, from 1 (noise) down to 0 (data). The grid owns the end points.

A grid is a function (schedule, steps, capacity) -> times [capacity + 1]. `steps` may be a traced number, so that changing it
does not compile again; entries after `steps` repeat the last time and are skipped by the sampling loop.
"""
import jax.numpy as jnp

from ldm_jax.process.schedules import Schedule
from ldm_jax.types import Array


def uniform(schedule: Schedule, steps, capacity: int) -> Array:
    """t_i = 1 - i / steps. On a discrete process it visits t_{T-1} first and, with steps = T, every t_k."""
    return 1.0 - jnp.minimum(jnp.arange(capacity + 1), steps) / jnp.asarray(steps, jnp.float32)


GRIDS = {"uniform": uniform}
