"""Where arrays live: a Mesh with four axes, and regex rules from parameter names to them. One device is a mesh too.

    data       the batch is split over it; parameters are whole on each of its devices
    fsdp       the batch is split over it as well, and so are parameters, their average and the optimiser's moments
    sequence   the rows of the pictures, and with them a DiT's tokens, are split over it; not for networks that train convolutions
    tensor     the channels inside a block: its first matrix by columns, its last by rows

No network knows of it: XLA's partitioner (Xu et al. 2021, GSPMD) carries the split from the arrays that are named here to all others,
so that sharding a network differently is a change of rules.
"""
import re
from typing import Any, Optional, Sequence, Tuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ldm_jax.types import Array, PyTree, UserError

AXES = ("data", "fsdp", "sequence", "tensor")
Rules = Sequence[Tuple[str, Optional[Tuple[Optional[str], ...]]]]

# By the names that all networks' layers share, for the last axes of an array. An axis that does not divide is left whole.
DEFAULT_RULES: Rules = (
    (r"(^|/)(q|k|v|mlp_in|ff_in|emb|conv_1)/kernel$", ("fsdp", "tensor")),
    (r"(^|/)(q|k|v|mlp_in|ff_in|emb|conv_1)/bias$", ("tensor",)),
    (r"(^|/)(out|mlp_out|ff_out|conv_2|modulation)/kernel$", ("tensor", "fsdp")),
)

SMALLEST_SHARDED = 2**14  # values; below, splitting over fsdp costs more in communication than it saves in memory


def make_mesh(data: int = -1, fsdp: int = 1, sequence: int = 1, tensor: int = 1, devices: Optional[Sequence[jax.Device]] = None) -> Mesh:
    """A mesh of data * fsdp * sequence * tensor devices; data=-1 takes all that the other axes leave.

    Neighbouring devices, which have the fastest links, share the later axes.

    Raises:
      UserError: when the axes do not multiply to the number of devices.
    """
    devices = list(devices or jax.devices())
    others = fsdp * sequence * tensor
    if data == -1 and min(fsdp, sequence, tensor) > 0:
        data = len(devices) // others
    if data * others != len(devices) or min(data, fsdp, sequence, tensor) < 1:
        raise UserError(f"mesh data={data} x fsdp={fsdp} x sequence={sequence} x tensor={tensor} does not cover {len(devices)} device(s); "
                        f"give factors of {len(devices)}, or data=-1 for all that the others leave")
    return jax.make_mesh((data, fsdp, sequence, tensor), AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh, shape: Tuple[int, ...] = (0,)) -> NamedSharding:
    """Of an array [B, ...]: B over data and fsdp, and the rows of pictures [B, H, W, C] over sequence.

    Raises:
      UserError: when the pictures' rows do not divide.
    """
    n = mesh.shape["sequence"]
    if n == 1 or len(shape) != 4:
        return NamedSharding(mesh, P(("data", "fsdp")))
    if shape[1] % n:
        raise UserError(f"pictures of {shape[1]} rows do not divide over mesh.sequence={n}; choose a factor of {shape[1]}")
    return NamedSharding(mesh, P(("data", "fsdp"), "sequence"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def share(mesh: Mesh) -> Tuple[int, int]:
    """(i, n): this process's devices hold the i-th of n equal parts of every batch.

    Processes that the sequence or tensor axis joins hold the same part.
    """
    parts = batch_parts(mesh)
    mine = sorted({s[0].start or 0 for s in batch_sharding(mesh).addressable_devices_indices_map((parts,)).values()})
    if mine != list(range(mine[0], mine[0] + len(mine))) or mine[0] % len(mine):
        raise UserError(f"the devices of process {jax.process_index()} hold the parts {mine} of {parts} of a batch, which are not "
                        f"neighbours; choose mesh axes that divide the {jax.local_device_count()} devices of a process, or are multiples")
    return mine[0] // len(mine), parts // len(mine)


def place(a: Any, sharding: NamedSharding, first: int = 0, size: Optional[int] = None) -> Array:
    """The array on the devices, of which this process gives its part: `a` is rows first ... first + len(a) - 1 of `size` rows."""
    if is_key(a):
        return jax.random.wrap_key_data(place(np.asarray(jax.random.key_data(a)), sharding, first, size), impl=jax.random.key_impl(a))
    if size is None and sharding.is_fully_addressable:
        return jax.device_put(a, sharding)
    a = np.asarray(a)
    if not a.ndim:
        return jax.make_array_from_callback((), sharding, lambda index: a)
    size = len(a) if size is None else size

    def part(index):
        start, stop, _ = index[0].indices(size)
        return a[(slice(start - first, stop - first), *index[1:])]

    return jax.make_array_from_callback((size, *a.shape[1:]), sharding, part)


def placer(mesh: Mesh):
    """What `data.pipeline.batches` places its arrays with."""
    return lambda a, first, size: place(a, batch_sharding(mesh, (size, *a.shape[1:])), first, size)


def in_parts(batch: PyTree, parts: int) -> PyTree:
    """[n, ...] -> [parts, n / parts, ...]: part p has the examples p, p + parts, ..., so that each is spread over all devices."""
    return jax.tree.map(lambda a: jnp.moveaxis(a.reshape((a.shape[0] // parts, parts) + a.shape[1:]), 1, 0), batch)


def is_key(a: Any) -> bool:
    """Whether `a` is an array of typed keys."""
    return isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key)


def _largest_axis(shape: Tuple[int, ...], size: int) -> P:
    """The largest axis that `size` divides goes to "fsdp"; small arrays and those with no such axis are replicated."""
    axes = [i for i, n in enumerate(shape) if n % size == 0]
    if size == 1 or not axes or np.prod(shape) < SMALLEST_SHARDED:
        return P()
    axis = max(axes, key=lambda i: shape[i])
    return P(*("fsdp" if i == axis else None for i in range(len(shape))))


def _where_it_fits(shape: Tuple[int, ...], axes: Tuple[Optional[str], ...], mesh: Mesh) -> P:
    """`axes` for the last axes of an array, without those that are of one device, do not divide, or do not pay."""
    if len(axes) > len(shape):
        return P()
    keep = lambda axis, n: (axis and mesh.shape[axis] > 1 and n % mesh.shape[axis] == 0
                            and (axis != "fsdp" or np.prod(shape) >= SMALLEST_SHARDED))
    tail = [axis if keep(axis, n) else None for axis, n in zip(axes, shape[len(shape) - len(axes):])]
    return P(*[None] * (len(shape) - len(axes)), *tail) if any(tail) else P()


def _as_told(name: str, shape: Tuple[int, ...], pattern: str, axes: Tuple[Optional[str], ...], mesh: Mesh) -> P:
    """A user's rule, to the letter."""
    unknown = [axis for axis in axes if axis not in (None, *AXES)]
    if unknown or len(axes) > len(shape):
        problem = f"names the axis {unknown[0]!r}" if unknown else f"names {len(axes)} axes"
        raise UserError(f"the rule {pattern!r} {problem}; {name} has shape {shape}, and the mesh has the axes {', '.join(AXES)} "
                        f"(None leaves an axis whole)")
    for axis, n in zip(axes, shape[len(shape) - len(axes):]):
        if axis and n % mesh.shape[axis]:
            raise UserError(f"the rule {pattern!r} splits {name}, of shape {shape}, over {axis}={mesh.shape[axis]}, which does not "
                            f"divide {n}; change the rule or the mesh")
    return P(*[None] * (len(shape) - len(axes)), *axes)


def shardings(tree: PyTree, mesh: Mesh, rules: Rules = ()) -> PyTree:
    """A NamedSharding for every array of `tree` (arrays or ShapeDtypeStructs).

    rules: (regex, axes) pairs tried in order against the array's path, before DEFAULT_RULES; axes are those of the array's last
      axes, such as ("net/.*/q/kernel$", ("fsdp", "tensor")), and () keeps it whole. What no rule matches has its largest axis that
      "fsdp" divides split over it.

    Raises:
      UserError: for a rule that does not fit what it matches.
    """
    def choose(path, leaf):
        return sharding_of(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh, rules)

    return jax.tree_util.tree_map_with_path(choose, tree)


def sharding_of(name: str, shape: Tuple[int, ...], mesh: Mesh, rules: Rules = ()) -> NamedSharding:
    """That of one array, by its path; see `shardings`."""
    for pattern, axes in rules:
        if re.search(pattern, name):
            return NamedSharding(mesh, _as_told(name, shape, pattern, tuple(axes or ()), mesh))
    for pattern, axes in DEFAULT_RULES:
        if re.search(pattern, name):
            return NamedSharding(mesh, _where_it_fits(shape, axes, mesh))
    return NamedSharding(mesh, _largest_axis(shape, mesh.shape["fsdp"]))


def check_sequence(trained: PyTree, mesh: Mesh) -> None:
    """Raises UserError for a sequence axis and kernels of convolutions among the parameters that are trained.

    XLA's partitioner gives wrong gradients for such kernels when pictures are split by rows and kernels by channels.
    """
    if mesh.shape["sequence"] > 1 and any(a.ndim == 4 for a in jax.tree.leaves(trained)):
        raise UserError(f"mesh.sequence={mesh.shape['sequence']} is for networks without convolutions, such as a DiT; use data, fsdp and "
                        f"tensor for this one")


def check_rules(rules: Rules, tree: PyTree) -> None:
    """Raises UserError for rules that are none, and for one that matches no array of `tree`."""
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    for rule in rules:
        try:
            pattern, _ = rule
            found = any(re.search(pattern, name) for name in names)
        except (TypeError, ValueError, re.error) as error:
            raise UserError(f"the rule {rule!r} is not a pair (regular expression, axes), such as ('q/kernel$', ('fsdp', 'tensor')): "
                            f"{error}") from None
        if not found:
            raise UserError(f"the rule {pattern!r} matches no parameter; they have names such as {names[0]} and {names[-1]}")
