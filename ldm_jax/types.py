"""Conventions of the whole library, the shapes of its five signatures, and the few array helpers that every part needs.

Time         t in [0, 1]; 0 is data, 1 is noise. x_t = alpha(t) x0 + sigma(t) eps, eps ~ N(0, I).
             logsnr(t) = 2 log(alpha / sigma), strictly decreasing. A discrete process of T steps lives on the grid
             t_k = (k + 1) / T, k = 0..T-1.
Guidance     scale 1 is off: u + scale (c - u). Papers that write w = scale - 1 are converted at the border.
Images       NHWC. float32 in [-1, 1] inside, uint8 in [0, 255] on disk and on the wire, float32 in [0, 1] for the user.
Precision    networks compute in their own dtype; schedules, losses, sampler state and statistics are float32.
Randomness   keys come from `jax.random.key`, are folded by step inside the compiled step, and no object stores one. What is
             drawn for example i depends on (key, i) alone: never on the size of the batch or the number of devices.
Letters      x_t, x0, eps, v, alpha, sigma, logsnr, params, key, cond are the papers'.

The signatures:

    Schedule   alpha(t), sigma(t), logsnr(t), t_of_logsnr(l)                    process/schedules.py
    net        apply(params, x_t, t, cond, train, rngs) -> raw output           models/
    denoise    (x_t, t) -> x0, or (x0, frac) where a variance is learned        all that samplers and guidance see
    step       (denoise, schedule, x, t, s, key, carry) -> (x, carry)           process/samplers.py
    loss_fn    (params, batch, key) -> (per-example loss [B], metrics)          all that the trainer sees

frac, in [0, 1] and shaped like x0, places a learned log variance between the two bounds of Nichol & Dhariwal 2021, eq. 15; the
bounds depend on the step taken, so the sampler forms the variance.
"""
from typing import Any, Callable, Mapping, Optional, Tuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
PyTree = Any
Cond = Optional[Mapping[str, Array]]  # conditioner's name -> array with a leading batch axis
Denoise = Callable[[Array, Array], Any]
LossFn = Callable[[PyTree, PyTree, Array], Tuple[Array, Mapping[str, Array]]]


class UserError(ValueError):
    """A mistake that the user can mend: names the value, what is allowed and what to do, in one or two lines."""


def lookup(table: Mapping[str, Any], name: str, kind: str) -> Any:
    """The row `name` of a table of names.

    Raises:
      UserError: when there is no such row; the message lists those that exist.
    """
    if name not in table:
        raise UserError(f"unknown {kind} {name!r}; choose from: {', '.join(sorted(table))}")
    return table[name]


def expand(a: Array, x: Array) -> Array:
    """`a`, a scalar or [B], with trailing axes of size one so that it broadcasts against x [B, ...]."""
    a = jnp.asarray(a)
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim)) if a.ndim else a


def example_keys(key: Array, n: int) -> Array:
    """One key per example, [n]: key i depends on (key, i) only. A key that is batched already is returned as it is."""
    if key.ndim:
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))


def fold_in(keys: Array, tag) -> Array:
    """`jax.random.fold_in` of one `tag` into a key, or into each of the keys [B]."""
    if keys.ndim:
        return jax.vmap(jax.random.fold_in, (0, None))(keys, tag)
    return jax.random.fold_in(keys, tag)


def normal(key: Array, shape: Tuple[int, ...]) -> Array:
    """Standard normal noise, float32 [B, ...], drawn example by example (see `example_keys`)."""
    keys = example_keys(key, shape[0])
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:], jnp.float32))(keys)


def uniform(key: Array, n: int) -> Array:
    """Uniform numbers in (0, 1], float32 [n], drawn example by example."""
    return 1.0 - jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float32))(example_keys(key, n))


def split_prediction(prediction: Any) -> Tuple[Array, Optional[Array]]:
    """A denoiser's answer as (x0, frac), frac None where no variance is learned."""
    return prediction if isinstance(prediction, tuple) else (prediction, None)


def join_prediction(x0: Array, frac: Optional[Array]) -> Any:
    """The inverse of `split_prediction`: what a wrapper of a denoiser returns."""
    return x0 if frac is None else (x0, frac)


def to_host(tree: PyTree) -> PyTree:
    """The arrays as numpy, whole, also those that other processes hold parts of; then every process must call it."""
    def one(a):
        if not isinstance(a, jax.Array) or a.is_fully_addressable or a.is_fully_replicated:
            return np.asarray(a)
        from jax.experimental.multihost_utils import process_allgather
        return np.asarray(process_allgather(a, tiled=True))

    return jax.tree.map(one, tree)


def writes_files() -> bool:
    """Whether this process writes what all have made: the first does."""
    return jax.process_index() == 0


def to_signed(image: Array) -> Array:
    """uint8 [0, 255] -> float32 [-1, 1]; floating-point images are taken to be in [-1, 1] already."""
    return image.astype(jnp.float32) / 127.5 - 1.0 if image.dtype == jnp.uint8 else image.astype(jnp.float32)


def to_unit(image: Array) -> Array:
    """float32 [-1, 1] -> float32 [0, 1], clipped: what a user gets."""
    return jnp.clip(image * 0.5 + 0.5, 0.0, 1.0)
