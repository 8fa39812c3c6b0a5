"""How parameters start: initialisers, and `initialise`, which draws a whole network's noise at once.

XLA takes about a second on a CPU to compile each call of the random generator, and a small U-Net has seventy kernels. So
`initialise` asks the initialisers for their standard deviations alone and multiplies by noise that is drawn in a few calls.
Used by themselves, as in `module.init`, the initialisers draw as any do.
"""
import contextlib
import contextvars
import math
from typing import Any, Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.types import Array, PyTree

CONSTANT = ("scale", "bias")  # parameters that start without noise, by the last part of their name
POOLED = 2**18  # parameters up to this size share one draw; greater ones share with their like, so that a draw can be sharded
_spread_only = contextvars.ContextVar("spread_only", default=False)


def spread(std: Callable) -> Callable:
    """The initialiser of uniform values with mean 0 and standard deviation std(shape)."""
    def init(key, shape, dtype=jnp.float32):
        value = jnp.full(shape, std(shape), dtype)
        return value if _spread_only.get() else value * _noise(key, shape)

    return init


def _noise(key: Array, shape) -> Array:
    return jax.random.uniform(key, shape, jnp.float32, -math.sqrt(3.0), math.sqrt(3.0))


def _fans(shape):
    field = math.prod(shape[:-2])
    return field * shape[-2], field * shape[-1]


fan_avg = spread(lambda shape: math.sqrt(2.0 / sum(_fans(shape))))  # Glorot & Bengio 2010; Ho et al. 2020; Peebles & Xie 2023
small = spread(lambda shape: 0.02)
unit = spread(lambda shape: 1.0)
zeros = nn.initializers.zeros_init()
ones = nn.initializers.ones_init()


@contextlib.contextmanager
def _spreads():
    token = _spread_only.set(True)
    try:
        yield
    finally:
        _spread_only.reset(token)


def initialise(module: nn.Module, key: Array, *inputs: Any) -> PyTree:
    """Fresh parameters of `module` for inputs of these shapes: a plain nested dict of float32 arrays. For use under jit."""
    with _spreads():
        params = module.lazy_init(key, *inputs)["params"]
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    names, leaves = [path[-1].key for path, _ in paths], [leaf for _, leaf in paths]
    draws = {}
    for i, leaf in enumerate(leaves):
        if names[i] not in CONSTANT:
            draws.setdefault(None if leaf.size <= POOLED else leaf.shape, []).append(i)
    for j, (shape, members) in enumerate(draws.items()):
        if shape is None:
            sizes = [leaves[i].size for i in members]
            ends = [sum(sizes[:k + 1]) for k in range(len(sizes))]
            noise = jnp.split(_noise(jax.random.fold_in(key, j), (ends[-1],)), ends[:-1])
        else:
            noise = _noise(jax.random.fold_in(key, j), (len(members), *shape))
        for i, n in zip(members, noise):
            leaves[i] = leaves[i] * n.reshape(leaves[i].shape)
    return jax.tree.unflatten(treedef, leaves)
