"""Saving and restoring a run: Orbax, asynchronous, atomic, and verified.

Each step's directory holds the arrays and, as JSON, the position in the data and a fingerprint of every array. A restore
recomputes the fingerprints, so that a flipped bit is found as surely as a missing file; a checkpoint that fails is passed over
for the newest good one. Nothing is pickled.
"""
import concurrent.futures
import contextlib
import hashlib
import json
import os
import threading
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from ldm_jax import paths
from ldm_jax.parallel.processes import wait_for_all
from ldm_jax.types import Array, PyTree, UserError, writes_files

_STATE = "state"


def fingerprint(x: Array) -> Array:
    """sum_i word_i (c i | 1) mod 2^32 over the array's bits in words of up to 32 bits.

    Odd factors make any single changed word change the sum, and integer sums do not depend on how an array is sharded.
    """
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    words = (x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, bits)).astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, n in enumerate(x.shape):
        position = position * jnp.uint32(n) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(words * (position * jnp.uint32(2654435761) | jnp.uint32(1)), dtype=jnp.uint32)


_fingerprint = jax.jit(fingerprint)  # a program for each shape, of which a network has a few dozen, not one for all of its arrays


def fingerprints(tree: PyTree) -> Dict[str, int]:
    """Array's path -> fingerprint."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    return dict(zip(names, map(int, jax.device_get([_fingerprint(x) for _, x in flat]))))


def _compile_fingerprints(abstract: PyTree) -> None:
    """Compile what `fingerprints` needs for arrays like these."""
    for struct in {(a.shape, str(a.dtype), a.sharding): a for a in jax.tree.leaves(abstract)}.values():
        _fingerprint.lower(struct).compile()


def tree_hash(tree: PyTree) -> str:
    """A short name for the values of a tree of arrays."""
    return hashlib.sha256(json.dumps(fingerprints(tree), sort_keys=True).encode()).hexdigest()[:16]


class Checkpoints:
    """The checkpoints of one directory.

    Args:
      directory: created when it is missing.
      keep: how many of the newest steps are kept; all where None.
      keep_every: steps that this divides are kept as well; 0 for none.
      keep_best: the name of a metric, of which the step with the lowest value is kept as well, or with a leading "+" the highest;
        "" for none. A step that was saved without it is not kept for it.
      read_only: open what is there; nothing is created, cleaned or written.

    Raises:
      UserError: when the directory cannot be written, or for numbers of steps that cannot be; with read_only, for damaged metrics,
        which otherwise are removed.
    """

    def __init__(self, directory: str, *, keep: Optional[int] = 2, keep_every: int = 0, keep_best: str = "",
                 config: Optional[Mapping[str, Any]] = None, read_only: bool = False):
        directory = str(directory)
        remote = paths.is_remote(directory)
        self.directory = directory if remote else os.path.abspath(directory)
        if remote:
            paths.connect(directory)
        self._read_only = read_only
        self._good = set()  # steps written or verified by this object; another of the same number is damaged and is replaced
        policy = _kept(keep, keep_every, keep_best)
        if read_only:
            for path in _spoilt_metrics(self.directory):
                raise UserError(f"{path} is damaged; remove it, which harms nothing: training reads it to keep the best checkpoint")
        else:
            if writes_files():
                for path in _spoilt_metrics(self.directory):
                    path.unlink()  # the arrays may be good, and Orbax would open none of the steps
            wait_for_all("the metrics of all steps can be read")
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self.directory, cleanup_tmp_directories=not read_only, preservation_policy=policy,
                custom_metadata=None if read_only or config is None or remote else {"config": config})  # Orbax wants a directory for it
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.directory!r}: {error.strerror or error}; "
                            f"choose another --workdir") from error

    @property
    def steps(self) -> List[int]:
        """The complete steps, oldest first."""
        return sorted(c.step for c in self._checkpointer.checkpoints)

    def save(self, step: int, state: PyTree, data: Mapping[str, int], *, metrics: Optional[Mapping[str, float]] = None) -> None:
        """Start saving; returns as soon as the arrays are copied. A failure of the previous save is raised here.

        They are written as they are: compressing random float32 values took about 30 % of a save's CPU time and spared 8 % of its size.
        """
        context = ocp.Context()
        context.array_options.saving.use_compression = False
        with self._failures(step), context:
            self._checkpointer.wait()
            if step in self._good:
                return
            self._checkpointer.save_checkpointables_async(
                step, {_STATE: state}, force=True, overwrite=step in self.steps, metrics=dict(metrics or {}),
                custom_metadata={"data": dict(data), "fingerprints": fingerprints(state)})
            self._good.add(step)

    def wait(self) -> None:
        """Block until the last save is complete."""
        with self._failures(None):
            self._checkpointer.wait()

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps."""
        for later in self.steps:
            if later > step:
                self._checkpointer.delete(later)

    def saved(self) -> Optional[PyTree]:
        """What the newest checkpoint that says so holds, as nested dicts of ShapeDtypeStructs; None where none does."""
        for step in self.steps[::-1]:
            with contextlib.suppress(Exception):  # as in `restore`
                tree = self._checkpointer.checkpointables_metadata(step).metadata[_STATE]
                if tree is None:  # Orbax says so of some damage
                    continue
                return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
        return None

    def restore(self, abstract: PyTree, *, warn: Callable[[str], None],
                step: Optional[int] = None) -> Optional[Tuple[int, PyTree, Dict[str, int]]]:
        """The newest good checkpoint as (step, state, data position), or that of `step`; None where there is none.

        Where there is none yet, what the first save will need is compiled meanwhile, so that it need not wait for that.

        Args:
          abstract: ShapeDtypeStructs, with shardings or without (then on the first device). May hold a part of what was saved.
          warn: is told, in a line, of every checkpoint that was passed over.

        Raises:
          UserError: when checkpoints exist and none can be read, or there is none of `step`.
        """
        steps = self.steps[::-1]
        if step is not None and step not in steps:
            raise UserError(f"there is no checkpoint of step {step} in {self.directory}; there are: {steps[::-1] or 'none'}")
        steps = steps if step is None else [step]
        for step in steps:
            try:
                state, data = self.load(step, abstract)
            except Exception as error:  # Orbax, tensorstore and JSON each raise their own for a damaged file
                warn(f"checkpoint {step} in {self.directory} is damaged or does not fit ({reason_of(error)}); trying the one before")
                continue
            self._good.add(step)
            return step, state, data
        if steps:
            raise UserError(f"none of the checkpoints {steps} in {self.directory} can be read; "
                            f"restore one from a copy, or start again in another --workdir")
        if not self._read_only and jax.process_count() == 1:  # several processes may have to compile the same things in the same order
            threading.Thread(target=_compile_fingerprints, args=(abstract,), name="fingerprints").start()
        return None

    def load(self, step: int, abstract: PyTree) -> Tuple[PyTree, Dict[str, int]]:
        """(state, data position) of one step, verified. A damaged one raises whatever its reader does, or ValueError."""
        place = _everywhere() if jax.process_count() > 1 else SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or place), abstract)
        notes = self._checkpointer.checkpointables_metadata(step).custom_metadata
        context = ocp.Context()
        context.pytree_options.loading.partial_load = True
        with context:
            state = self._checkpointer.load_checkpointables(step, {_STATE: abstract})[_STATE]
        wrong = [name for name, value in fingerprints(state).items() if notes["fingerprints"].get(name) != value]
        if wrong:
            raise ValueError(f"fingerprint of {wrong[0]} differs" + (f", and of {len(wrong) - 1} more" if wrong[1:] else ""))
        return state, notes["data"]

    @contextlib.contextmanager
    def _failures(self, step: Optional[int]):
        try:
            yield
        except Exception as error:  # a full disk reaches us as one of several exceptions, from a thread of Orbax's
            what = "the last checkpoint" if step is None else f"the checkpoint of step {step}"
            raise UserError(f"{what} could not be written to {self.directory} ({reason_of(error)}); complete: {self.steps or 'none'}. "
                            f"Free some space or mend the permissions, then run the same command to go on") from error

    def close(self) -> None:
        self._checkpointer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise


def _kept(keep: Optional[int], keep_every: int, keep_best: str) -> Any:
    """The policy of what stays: the newest, and those that a number divides, and the best by a metric."""
    if (keep is not None and keep < 1) or keep_every < 0:
        raise UserError(f"keep={keep}, keep_every={keep_every}: give keep of at least 1, and keep_every of at least 0 (0 for none)")
    policies = ocp.training.preservation_policies
    chosen = [policies.LatestN(keep)]
    if keep_every:
        chosen.append(policies.EveryNSteps(keep_every))
    if keep_best:
        name, sign = keep_best.removeprefix("+"), 1.0 if keep_best.startswith("+") else -1.0

        def goodness(metrics: Mapping[str, float]) -> float:
            value = sign * metrics.get(name, np.nan)
            return -np.inf if np.isnan(value) else value

        chosen.append(policies.BestN(get_metric_fn=goodness, n=1, keep_checkpoints_without_metrics=False))
    return policies.AnyPreservationPolicy(chosen)


def _spoilt_metrics(directory: str) -> List[epath.Path]:
    """The files of metrics, one for each step, that are no JSON."""
    def good(path: epath.Path) -> bool:
        try:
            json.loads(path.read_text())
        except (ValueError, FileNotFoundError):  # a step that another process removes meanwhile is not damaged
            return not path.exists()
        return True

    files = list(epath.Path(directory).glob("*/metrics/metrics"))
    with concurrent.futures.ThreadPoolExecutor() as executor:
        return [file for file, fine in zip(files, executor.map(good, files)) if not fine]


def _everywhere() -> NamedSharding:
    """Whole on every device of every process."""
    return NamedSharding(Mesh(np.asarray(jax.devices()), ("all",)), PartitionSpec())


def reason_of(error: BaseException) -> str:
    """The first line of the deepest cause, which is where Orbax keeps the useful one."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
