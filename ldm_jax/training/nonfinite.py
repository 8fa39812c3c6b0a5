"""What is found out about a step whose loss or gradient is not finite, and what is kept.

Such a step and all after it leave the state as it was (see `loop.train_step`), so that when the loop learns of it, up to two steps
late, the state is still that of before the first bad step, and its batch and keys can be had again: they are functions of the step.
That step is run again here, without the update and with every layer watched.
"""
import json
import os
from typing import Any, Dict, List, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ldm_jax import paths
from ldm_jax.parallel.sharding import in_parts
from ldm_jax.training.checkpoint import Checkpoints
from ldm_jax.training.health import block_names, block_squares
from ldm_jax.training.state import TrainState
from ldm_jax.training.watch import described, first_bad, watch
from ldm_jax.types import Array, LossFn, PyTree, example_keys, fold_in, writes_files

SHOWN = 5  # ids and names in the message; the report has all


def diagnose(loss_fn: LossFn, state: TrainState, batch: PyTree, key: Array, *, replicated: NamedSharding,
             accumulate: int = 1) -> Dict[str, Any]:
    """Run the step that follows `state` again and say where it stops being finite.

    Arguments as those of the step; replicated: the sharding of what is fetched. Every process calls it.

    Returns:
      numpy and strings: "loss" [B]; "t" [B] or None; "data": field -> bool [B], whether an example's values in it are finite;
      "parameters": the names of those that are not; "where": the first values that are not, in words, None where all are;
      "blocks": those whose gradient or its square is not.
    """
    def name(path):
        return jax.tree_util.keystr(path, simple=True, separator="/")

    def finite(a, axes):
        return jnp.all(jnp.isfinite(a), axes) if jnp.issubdtype(a.dtype, jnp.inexact) else jnp.ones(a.shape[:a.ndim - len(axes)], bool)

    def mean_loss(params, others, batch, keys):
        loss, metrics = loss_fn({**others, **params}, batch, keys)
        return jnp.mean(loss), (loss, metrics.get("t"))

    watched, places = watch(jax.value_and_grad(mean_loss, has_aux=True))

    def run(state, batch, key, part):
        keys = example_keys(fold_in(key, state.step), jax.tree.leaves(batch)[0].shape[0])
        mine = jax.tree.map(lambda a: a[part], in_parts((batch, keys), accumulate))
        ((_, terms), grads), flags = watched(state.params, state.others, *mine)
        return terms, block_squares(grads), flags

    def inputs(state, batch):
        return (jax.tree.map(lambda a: finite(a, tuple(range(1, a.ndim))), batch),
                jax.tree.map(lambda a: finite(a, tuple(range(a.ndim))), {**state.others, **state.params}))

    data, parameters = jax.device_get(jax.jit(inputs, out_shardings=replicated)(state, batch))
    run = jax.jit(run, out_shardings=replicated)
    results = [jax.device_get(run(state, batch, key, part)) for part in range(accumulate)]
    whole = lambda values: None if values[0] is None else np.stack(values, 1).reshape(-1)
    losses = [loss for (loss, _), _, _ in results]
    order = sorted(range(accumulate), key=lambda part: bool(np.all(np.isfinite(losses[part]))))  # parts with a bad loss first
    found = next(filter(None, (first_bad(places, results[part][2]) for part in order)), None)
    squares = np.max([np.nan_to_num(squares, nan=np.inf, posinf=np.inf) for _, squares, _ in results], 0).astype(np.float64)
    bad = (squares == squares.max()) & (squares.sum() > np.finfo(np.float32).max)  # the largest, where their sum alone overflows
    return {"loss": whole(losses), "t": whole([t for (_, t), _, _ in results]),
            "data": {name(path): flags for path, flags in jax.tree_util.tree_flatten_with_path(data)[0]},
            "parameters": [name(path) for path, flag in jax.tree_util.tree_flatten_with_path(parameters)[0] if not flag],
            "where": found and described(*found), "blocks": [b for b, is_bad in zip(block_names(state.params), bad) if is_bad]}


def _some(values: Sequence[Any]) -> str:
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return ", ".join(str(v) for v in values[:SHOWN]) + more


def findings(found: Mapping[str, Any], ids: Sequence[int]) -> List[str]:
    """What `diagnose` found in a few lines, none where all is finite; ids [B] of the examples."""
    bad = np.flatnonzero(~np.isfinite(found["loss"]))
    lines = []
    if len(bad):
        times = "" if found["t"] is None else f"; t {found['t'][bad].min():.4f} to {found['t'][bad].max():.4f}"
        lines.append(f"loss of {len(bad)} of {len(found['loss'])} examples: ids {_some([int(ids[i]) for i in bad])} of the data{times}")
    for field, finite in found["data"].items():
        if not np.all(finite):
            lines.append(f"in the data itself: {field!r} of ids {_some([int(ids[i]) for i in np.flatnonzero(~finite)])}")
    if found["parameters"]:
        lines.append(f"in the parameters before the step: {_some(found['parameters'])}")
    if found["where"]:
        lines.append(f"first: {found['where']}")
    if found["blocks"] and not len(bad):
        what = "gradient" if found["where"] else "gradient's norm, which is too large for float32,"
        lines.append(f"the losses are finite, the {what} is not: {_some(found['blocks'])}")
    return lines


def advice(found: Mapping[str, Any], lines: Sequence[str], directory: str) -> str:
    """What to do about it."""
    if not lines:
        return "  run again, the step is finite: a fault of the machine, or of the data when they were read; the same command goes on"
    mend = "" if all(np.all(finite) for finite in found.get("data", {}).values()) else "mend or leave out these examples, or "
    return (f"The same command comes to the same step. In a new --workdir {mend}lower optimizer.learning_rate or clip_norm, or compute "
            f"in float32; to begin from the kept state set init_dir={directory} in the config.")


def _listed(value: Any) -> Any:
    """Arrays as JSON: numbers that it has no names for become "nan", "inf" and "-inf"."""
    value = np.asarray(value)
    return [v if np.isfinite(v) else str(v) for v in value.tolist()]


def keep(directory: str, state: TrainState, position: Mapping[str, int], config: Any) -> None:
    """Save `state` in `directory` as a run of its own, which `ldm_jax.load` opens and `init_dir` starts from."""
    with Checkpoints(os.path.join(directory, "checkpoints"), keep=1, config=config) as checkpoints:
        checkpoints.save(int(state.step), state, position)
        checkpoints.wait()
    if config is not None and writes_files():
        paths.write_text(os.path.join(directory, "config.json"), json.dumps(config, indent=2, sort_keys=True))


def stopped(workdir: str, loss_fn: LossFn, state: TrainState, batch: PyTree, ids: Sequence[int], key: Array, *,
            position: Mapping[str, int], replicated: NamedSharding, accumulate: int = 1, config: Any = None,
            checkpoints: Sequence[int] = ()) -> str:
    """The message of a run that stops because the step after `state` is not finite.

    The state goes to WORKDIR/nonfinite_STEP with report.json: "step", "ids" [B], and what `diagnose` returns.

    Args:
      batch, ids, position: of that step: its examples, which of the source they are, and where in the data it is.
      checkpoints: the steps that the run has checkpoints of; none of them is touched.
    """
    step = int(state.step) + 1
    directory = os.path.join(workdir, f"nonfinite_{step:07d}")
    keep(directory, state, position, config)
    try:
        found = diagnose(loss_fn, state, batch, key, replicated=replicated, accumulate=accumulate)
        lines = findings(found, ids)
    except Exception as error:  # most likely memory: the watched step needs somewhat more than a step
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        found, lines = {}, [f"running it again to see where failed: {reason}"]
    if writes_files():
        report = {"step": step, "ids": [int(i) for i in ids], **found, "summary": lines}
        paths.write_text(os.path.join(directory, "report.json"), json.dumps(report, indent=1, default=_listed))
    return "\n".join([
        f"not finite at step {step}:", *(f"  {line}" for line in lines),
        f"  kept: {directory} (report.json, and the state of step {step - 1} as a run of its own); "
        f"checkpoints of the run: {', '.join(map(str, checkpoints)) or 'none'}", advice(found, lines, directory)])
