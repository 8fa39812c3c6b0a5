"""What a Colab calls: `load(path)` gives a Pipeline, and a Pipeline makes pictures."""
import dataclasses
import functools
import json
import os
import warnings
from typing import Any, Dict, Mapping, Optional, Tuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import process
from ldm_jax.systems import System
from ldm_jax.types import Array, PyTree, UserError, example_keys, fold_in, lookup, normal, to_unit

_CAPACITY = 64  # grids are compiled for this many steps or the next power of two, so that other step counts cost no compilation


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A trained system, ready to use.

    Attributes:
      system: what was trained.
      params: its parameters by name, the averaged ones where there is an average.
      defaults: what `sample` takes where it is told nothing: the `sampler` section of the run's config.
      class_names: names of the classes, where the data has them.
    """
    system: System
    params: Mapping[str, PyTree]
    defaults: Mapping[str, Any]
    class_names: Tuple[str, ...] = ()

    def __post_init__(self):
        if self.system.sample is not None:
            object.__setattr__(self, "_sample", jax.jit(
                functools.partial(_sample, self.system.sample), static_argnames=("sampler", "static", "grid", "capacity", "trajectory")))

    @property
    def nets(self) -> Dict[str, Tuple[Any, PyTree]]:
        """name -> (net, params); net.apply(params, ...) is the raw network."""
        return {name: (net, self.params[name]) for name, net in self.system.nets.items()}

    def sample(self, key: Any, num: Optional[int] = None, cond: Any = None, steps: Optional[int] = None, sampler: Optional[str] = None,
               guidance: Any = None, x_init: Optional[Array] = None, *, grid: Any = None, batch_size: Optional[int] = None,
               trajectory: bool = False, **options: Any) -> Any:
        """Make pictures. Picture i depends on (key, i) and its condition, not on how many are made or on the batch size.

        Args:
          key: a `jax.random.key`, or an int seed.
          num: how many; by default as many as `cond` or `x_init` has, else 16.
          cond: class ids [num]; None is unconditional.
          steps, sampler, guidance, grid: the run's where None. sampler is a row of `process.SAMPLERS`, grid one of `process.GRIDS` or a
            function of the same form, such as functools.partial(grids.karras, rho=5); guidance is u + guidance (c - u): 1 is off.
          x_init: the starting noise [num, ...], N(0, I), in the space that is diffused.
          batch_size: pictures at a time; the last batch is padded.
          trajectory: also return the pictures at every step, [steps + 1, num, H, W, C].
          options: the sampler's own, such as eta=0.5 for "ddim"; a number, or one for each picture.

        Returns:
          [num, H, W, C] float32 in [0, 1].

        Raises:
          UserError: for an unknown name, a class out of range, or arrays that do not fit.
        """
        if self.system.sample is None:
            raise UserError("this is a first stage, which reconstructs pictures and samples none; load the run that was trained on it")
        sampler = sampler or self.defaults["name"]
        steps = _positive("steps", self.defaults["steps"] if steps is None else steps)
        grid = grid or self.defaults["grid"]
        if isinstance(grid, str):
            lookup(process.GRIDS, grid, "grid")
        options = {**dict(self.defaults.get(sampler) or {}), **options}
        process.samplers.make_sampler(sampler, **options)
        key = _key(key)
        num = _positive("num", num if num is not None else _length(cond, x_init))
        guidance = self._guidance(guidance, cond, num)
        cond = self._condition(cond, num)
        shape = self.system.sample_shape
        if x_init is None:
            x_init = jax.jit(normal, static_argnums=1)(fold_in(example_keys(key, num), 0), (num, *shape))
        x_init = jnp.asarray(x_init, jnp.float32)
        if x_init.shape != (num, *shape):
            raise UserError(f"x_init has shape {x_init.shape}; this model starts from {(num, *shape)}")
        keys = fold_in(example_keys(key, num), 1)
        size = min(num, _positive("batch_size", batch_size or self.defaults.get("batch_size") or 256))
        static, numbers = process.samplers.split_options(sampler, options)
        capacity = steps if trajectory else max(_CAPACITY, 1 << (steps - 1).bit_length())
        for name, value in numbers.items():
            if value.shape not in ((), (num,)):
                raise UserError(f"{name} has shape {value.shape} for num={num} pictures; give one number, or one each")
        pictures = []
        for start in range(0, num, size):
            take = np.minimum(np.arange(start, start + size), num - 1)
            part = jax.tree.map(lambda a: a[take], (x_init, keys, cond, guidance))
            out = self._sample(self.params, *part, jnp.int32(steps), jax.tree.map(lambda a: a[take] if a.ndim else a, numbers),
                               sampler=sampler, static=tuple(sorted(static.items())), grid=grid, capacity=capacity, trajectory=trajectory)
            pictures.append(jax.tree.map(np.asarray, out))
        if not trajectory:
            return np.concatenate(pictures)[:num]
        return np.concatenate([end for end, _ in pictures])[:num], np.concatenate([path for _, path in pictures], axis=1)[:, :num]

    def _condition(self, cond: Any, num: int):
        classes = self.system.num_classes
        if classes is None:
            if cond is not None:
                raise UserError("this model takes no condition; leave cond out")
            return None
        if cond is None:
            return {"class": jnp.full((num,), classes, jnp.int32)}
        try:
            ids = np.asarray(cond)
            if ids.dtype.kind not in "iu":
                raise TypeError
        except (TypeError, ValueError):
            raise UserError(f"cond={str(cond)[:60]!r}: this model takes class ids, integers from 0 to {classes - 1}") from None
        if ids.shape not in ((), (1,), (num,)):
            raise UserError(f"cond has shape {ids.shape} for num={num} pictures; give one class id each, or one for all")
        if ids.min() < 0 or ids.max() >= classes:
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise UserError(f"class id {bad} is out of range; this model knows 0 to {classes - 1}")
        return {"class": jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (num,))}

    def _guidance(self, guidance: Any, cond: Any, num: int):
        """[num] scales, or None where guidance is off, in which case the unconditional half is not computed."""
        scale = np.asarray(self.defaults["guidance"] if guidance is None else guidance, np.float32)
        if scale.shape not in ((), (1,), (num,)):
            raise UserError(f"guidance has shape {scale.shape} for num={num} pictures; give one number, or one each")
        return None if cond is None or np.all(scale == 1.0) else jnp.broadcast_to(scale, (num,))


def _sample(make, params, x, keys, cond, guidance, steps, numbers, *, sampler, static, grid, capacity, trajectory):
    method = process.samplers.make_sampler(sampler, **numbers, **dict(static))
    out = make(params, x, keys, cond, sampler=method, steps=steps, capacity=capacity, grid=grid, guidance=guidance, trajectory=trajectory)
    return jax.tree.map(to_unit, out)


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise UserError(f"{name}={value!r} is not a positive whole number")
    return int(value)


def _length(cond: Any, x_init: Any) -> int:
    for array in (cond, x_init):
        if array is not None and np.ndim(array):
            return len(array)
    return 16 if cond is None else 1


def _key(key: Any) -> Array:
    """A typed key from a typed key, an int seed, or the older uint32 [2] form."""
    if isinstance(key, (int, np.integer)):
        return jax.random.key(int(key))
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def load(path: str, **overrides: Any) -> Pipeline:
    """The Pipeline of a run's workdir, with the averaged parameters of its newest good checkpoint.

    Args:
      path: the --workdir of a run.
      overrides: in place of the run's sampler settings: name, steps, guidance, grid, batch_size.

    Raises:
      UserError: when there is no run at `path`, or no checkpoint in it that can be read.
    """
    from ldm_jax.recipe import build_system
    from ldm_jax.training.checkpoint import Checkpoints
    config = read_config(path)
    system = build_system(config)
    parameters = jax.eval_shape(system.init, jax.random.key(0))
    wanted = {"ema": {n: t for n, t in parameters.items() if n in system.trained},
              "fixed": {n: t for n, t in parameters.items() if n not in system.trained}}
    directory = os.path.join(path, "checkpoints")
    found = None
    if os.path.isdir(directory):
        with Checkpoints(directory, read_only=True) as checkpoints:
            found = checkpoints.restore(wanted, warn=warnings.warn)
    if found is None:
        raise UserError(f"no checkpoint in {directory!r} yet; train first: python -m ldm_jax.main --config=... --workdir={path}")
    _, state, _ = found
    defaults = dict(config.get("sampler") or {})
    unknown = sorted(set(overrides) - set(defaults))
    if unknown:
        raise UserError(f"unknown override {unknown[0]!r}; choose from: {', '.join(sorted(defaults))}")
    return Pipeline(system, {**state["ema"], **state["fixed"]}, {**defaults, **overrides})


def read_config(workdir: str) -> dict:
    """The config that the run in `workdir` was started with.

    Raises:
      UserError: when there is none.
    """
    path = os.path.join(workdir, "config.json")
    try:
        with open(path) as f:
            return json.load(f)
    except FileNotFoundError:
        raise UserError(f"{workdir!r} holds no run (no {path}); give the --workdir of a training run") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
