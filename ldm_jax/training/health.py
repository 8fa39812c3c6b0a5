"""The numbers of a run's health that a step computes beside its loss: the error by noise level, the gradient by block.

Both are sums inside the compiled step, over the whole batch and whole arrays however they are sharded, and are fetched with the
other metrics when a line is logged.
"""
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.types import Array, PyTree

LEVELS = 10  # equal parts of t in [0, 1]
SCANNED = "blocks"  # the layers of a scan over blocks: their parameters have a leading axis, one row for each
NO_NUMBERS = ("finite", "asked", "by_level", "block_norms")  # of a step's metrics what is no number to be averaged


def by_level(t: Array, error: Array) -> Array:
    """[2, LEVELS]: the sum of error [B] over the examples of each part of t, t in [i, i + 1) / LEVELS, and how many they are.

    The last part has t = 1 as well. Sums and counts of several batches are added before they are divided.
    """
    part = jnp.clip(jnp.floor(t * LEVELS).astype(jnp.int32), 0, LEVELS - 1)
    mine = part[None] == jnp.arange(LEVELS)[:, None]
    return jnp.stack([jnp.sum(jnp.where(mine, error[None], 0.0), 1), jnp.sum(mine, 1, dtype=jnp.float32)])


def split_metrics(loss: Array, metrics: Mapping[str, Array]) -> Tuple[Dict[str, Array], Any]:
    """What loss_fn says of each example, as (metrics to log, notes): means over the batch, and where it gives the examples' "t" also
    "by_level", name -> `by_level` of their "mse", or of the loss where they have none."""
    metrics = dict(metrics)
    notes, t = metrics.pop("notes", ()), metrics.pop("t", None)
    means = jax.tree.map(jnp.mean, metrics)
    if t is not None:
        name = "mse" if "mse" in metrics else "loss"
        means["by_level"] = {name: by_level(t, metrics.get(name, loss))}
    return {**means, "loss": jnp.mean(loss)}, notes


def _block(path, leaf) -> Tuple[str, bool]:
    """The block that a parameter belongs to, and whether it has a row for each layer of a scan.

    A block is a module of the net: the first two names of the path, of adapters, which lie one deeper, the first three.
    """
    names = [str(getattr(key, "key", key)) for key in path]
    depth = 3 if names[0] == "lora" else 2
    return "/".join(names[:depth]), SCANNED in names[:depth] and leaf.ndim > 0


def block_names(params: PyTree) -> List[str]:
    """The blocks of all trained nets, such as "net/down_0_block_1", and for scanned blocks one for each layer, "net/blocks/07"."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name, scanned = _block(path, leaf)
        found[name] = [f"{name}/{i:02d}" for i in range(leaf.shape[0])] if scanned else [name]
    return [name for names in found.values() for name in names]


def block_squares(grads: PyTree) -> Array:
    """The sum of squares of each of `block_names`, float32 [n]; their sum is the squared norm of the whole gradient."""
    sums = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
        name, scanned = _block(path, leaf)
        square = jnp.square(leaf.astype(jnp.float32))
        square = jnp.sum(square, tuple(range(1, leaf.ndim))) if scanned else jnp.sum(square)[None]
        sums[name] = sums[name] + square if name in sums else square
    return jnp.concatenate(list(sums.values()))


def summary(steps: Sequence[Mapping[str, Any]], blocks: Sequence[str]) -> Dict[str, Any]:
    """One line of the log from the metrics of several steps, as numpy.

    The mean over the steps of each number; "mse_t0.0-0.1" and so on, the mean over all examples of the steps in that part of t, left
    out where there were none; "grad_norms", block's name -> the mean norm of its gradient.
    """
    line: Dict[str, Any] = {name: float(np.mean([step[name] for step in steps])) for name in steps[0] if name not in NO_NUMBERS}
    for name in steps[0].get("by_level", ()):
        sums, counts = np.sum([np.asarray(step["by_level"][name], np.float64) for step in steps], 0)
        line.update({f"{name}_t{i / LEVELS:.1f}-{(i + 1) / LEVELS:.1f}": float(sums[i] / counts[i]) for i in np.flatnonzero(counts)})
    norms = np.mean([step["block_norms"] for step in steps], 0, dtype=np.float64)
    return {**line, "grad_norms": dict(zip(blocks, norms.tolist()))}
