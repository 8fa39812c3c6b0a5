"""How a network's inside is split over a mesh: every layer's output as the batch is.

XLA's partitioner splits what it is told nothing of as it likes, which inside a scan over blocks can be by channels, with the whole batch on
every device. No layer has to know: what a module returns is constrained from outside, where `jax.set_mesh` has named a mesh.
"""
import functools
from typing import Any, Mapping

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P

from ldm_jax.types import PyTree

BATCH_AXES = ("data", "fsdp")


def applied(module: nn.Module, params: PyTree, x: Any, *args: Any, kept: Mapping[str, PyTree] = {}, **options: Any) -> Any:
    """module.apply of parameters to a batch x [B, ...], split over the mesh's data and fsdp axes where there is a mesh.

    kept: further collections of variables, see `models.kept`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH_AXES if mesh.shape.get(axis, 1) > 1)
    run = functools.partial(module.apply, {"params": params, **kept}, x, *args, **options)
    if not axes:
        return run()
    parts = 1
    for axis in axes:
        parts *= mesh.shape[axis]
    if len(x) % parts:
        return run()

    def constrained(a: Any) -> Any:
        if getattr(a, "ndim", 0) < 2 or a.shape[0] != len(x):
            return a
        return jax.lax.with_sharding_constraint(a, P(axes, *[P.UNCONSTRAINED] * (a.ndim - 1)))

    def interceptor(call, args, kwargs, context):
        out = call(*args, **kwargs)
        return jax.tree.map(constrained, out) if context.method_name == "__call__" else out

    with nn.intercept_methods(interceptor):
        return run()
