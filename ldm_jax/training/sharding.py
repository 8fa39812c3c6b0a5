"""Where arrays live: a Mesh with axes ("data", "fsdp"), and regex rules from parameter names to its axes.

One device is a mesh too. The batch is split over both axes; parameters, their average and the optimiser's moments follow
the rules, so that sharding them is a change of configuration and not of a network.
"""
import re
from typing import Optional, Sequence, Tuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ldm_jax.types import PyTree, UserError

Rules = Sequence[Tuple[str, Optional[Tuple[Optional[str], ...]]]]

SMALLEST_SHARDED = 2**14  # values; below, splitting costs more in communication than it saves in memory


def make_mesh(data: int = -1, fsdp: int = 1, devices: Optional[Sequence[jax.Device]] = None) -> Mesh:
    """A mesh of data * fsdp devices; -1 takes all that the other axis leaves.

    Raises:
      UserError: when the axes do not multiply to the number of devices.
    """
    devices = list(devices or jax.devices())
    if data == -1 and fsdp > 0:
        data = len(devices) // fsdp
    if data * fsdp != len(devices):
        raise UserError(f"mesh data={data} x fsdp={fsdp} does not cover {len(devices)} device(s); "
                        f"give factors of {len(devices)}, or data=-1 for all that fsdp leaves")
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over every device."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def in_parts(batch: PyTree, parts: int) -> PyTree:
    """[n, ...] -> [parts, n / parts, ...]: part p has the examples p, p + parts, ..., so that each is spread over all devices."""
    return jax.tree.map(lambda a: jnp.moveaxis(a.reshape((a.shape[0] // parts, parts) + a.shape[1:]), 1, 0), batch)


def _largest_axis(shape: Tuple[int, ...], size: int) -> P:
    """The largest axis that `size` divides goes to "fsdp"; small arrays and those with no such axis are replicated."""
    axes = [i for i, n in enumerate(shape) if n % size == 0]
    if size == 1 or not axes or np.prod(shape) < SMALLEST_SHARDED:
        return P()
    axis = max(axes, key=lambda i: shape[i])
    return P(*("fsdp" if i == axis else None for i in range(len(shape))))


def shardings(tree: PyTree, mesh: Mesh, rules: Rules = ()) -> PyTree:
    """A NamedSharding for every array of `tree` (arrays or ShapeDtypeStructs).

    rules: (regex, axes) pairs tried in order against the array's path, such as ("params/net/.*/kernel", (None, "fsdp"));
    where none matches, the largest axis that "fsdp" divides is split over it.
    """
    def choose(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, axes in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, P(*(axes or ())))
        return NamedSharding(mesh, _largest_axis(leaf.shape, mesh.shape["fsdp"]))

    return jax.tree_util.tree_map_with_path(choose, tree)
