"""A Pipeline makes pictures of a trained system by one compiled function, in batches of which two are under way at a time."""
import contextlib
import dataclasses
import functools
from typing import Any, Collection, Dict, Mapping, Optional, Tuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ldm_jax import process, request
from ldm_jax.machine import compiler_options
from ldm_jax.models.lora import Lora
from ldm_jax.parallel.sharding import batch_parts, batch_sharding, place
from ldm_jax.published import Published
from ldm_jax.systems import System
from ldm_jax.types import Array, PyTree, UserError, fold_in, lookup, normal, to_host, to_unit

_CAPACITY = 1024  # grids are compiled for this many steps or the next power of two, so that other step counts cost no compilation
BATCH = 256  # pictures at a time, at most, where no batch_size is given
_PADDED, _CALLS, _FILLING = 4, 8, 4  # see `batch_size_for`


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A trained system, ready to use.

    Attributes:
      system: what was trained.
      params: its parameters by name, the averaged ones where there is an average.
      defaults: what `sample` takes where it is told nothing: the `sampler` section of the run's config.
      class_names: names of the classes, where the data has them.
      classifier: a classifier of noisy images that takes part in every picture whose class is asked for, see `sample`.
      published: the published directory that it was loaded from; None for a run.
      mesh: what the parameters lie on, over which each batch of pictures is split; None for one device.
    """
    system: System
    params: Mapping[str, PyTree]
    defaults: Mapping[str, Any]
    class_names: Tuple[str, ...] = ()
    classifier: Optional["Pipeline"] = None
    published: Optional[Published] = None
    mesh: Optional[Mesh] = None

    def __post_init__(self):
        if self.system.sample is not None:
            object.__setattr__(self, "_sample", jax.jit(
                functools.partial(_sample, self.system.sample), compiler_options=compiler_options(),
                static_argnames=("classify", "sampler", "static", "grid", "capacity", "trajectory", "begun", "decoded")))
            object.__setattr__(self, "_sizes", {})

    def with_defaults(self, **changes: Any) -> "Pipeline":
        """The same with other `defaults`."""
        return self._with(defaults={**self.defaults, **changes})

    def with_params(self, params: Mapping[str, PyTree]) -> "Pipeline":
        """The same with other `params`."""
        return self._with(params=params)

    def _with(self, **changes: Any) -> "Pipeline":
        """The same with other params or defaults, and with what has been compiled already."""
        other = dataclasses.replace(self, **changes)
        if self.system.sample is not None:
            object.__setattr__(other, "_sample", self._sample)
            object.__setattr__(other, "_sizes", self._sizes)
        return other

    def save_pretrained(self, directory: str) -> Optional[str]:
        """Write a directory that diffusers opens, see `ldm_jax.exporting.save_pretrained`."""
        from ldm_jax import exporting
        return exporting.save_pretrained(self, directory)

    def with_lora(self, path: str, scale: float = 1.0) -> "Pipeline":
        """The same model with the LoRA adapters of a file added to its weights: W + scale (alpha / r) A B.

        Several are added one after the other; this Pipeline stays as it is.

        Raises:
          UserError: see `ldm_jax.lora.load_lora`.
        """
        from ldm_jax.lora import load_lora
        return self._with(params=load_lora(path, self.system.nets, self.params, strength=scale))

    def save_lora(self, path: str) -> None:
        """Write the adapters that a run has trained as a file, or into a directory, that diffusers' load_lora_weights opens.

        Raises:
          UserError: for a run without adapters, and for nets that have no place in such files.
        """
        from ldm_jax.lora import save_lora
        if self.system.adapter_scale is None:
            raise UserError("this run has trained no adapters; set lora.rank in its config, or export the whole model")
        save_lora(path, self.system.nets, self.params, Lora(self.params["lora"], self.system.adapter_scale))

    @property
    def nets(self) -> Dict[str, Tuple[Any, PyTree]]:
        """name -> (net, params); net.apply(params, ...) is the raw network."""
        return {name: (net, self.params[name]) for name, net in self.system.nets.items()}

    def sample(self, key: Any, num: Optional[int] = None, cond: Any = None, steps: Optional[int] = None, sampler: Optional[str] = None,
               guidance: Any = None, x_init: Optional[Array] = None, *, grid: Any = None, batch_size: Optional[int] = None,
               trajectory: bool = False, classifier: Optional["Pipeline"] = None, classifier_scale: Any = None,
               image: Any = None, mask: Any = None, strength: Optional[float] = None,
               window: Tuple[float, float] = (0.0, 1.0), guidance_interval: Optional[Tuple[float, float]] = None,
               **options: Any) -> Any:
        """Make pictures. Picture i depends on (key, i) and its condition, not on how many are made or on the batch size.

        The network is compiled in the first call. Calls with another key, other values of the conditions, guidance, classifier_scale,
        strength, window and of the sampler's numbers, and with other steps, up to 1024 or between the powers of two above, take what is
        there; so do other `num` as far as `batch_size_for` says. Compiled anew are: another sampler, grid or option that is a
        word; conditions, image, mask, classifier or window where there were none, and the other way round; conditions of another length,
        such as tokens; a number for each picture where there was one for all; a dtype or device; and with trajectory other steps.

        Args:
          key: a `jax.random.key`, an int seed, or keys [num], one for each picture.
          num: how many; by default as many as `cond` or `x_init` has, else 16.
          cond: what the run's conditioner takes, such as class ids [num], one for each picture or one for all; where there are several
            conditioners, a mapping from their names. What is left out is null, as None is altogether.
          steps, sampler, guidance, grid: the run's where None. sampler is a row of `process.SAMPLERS`, grid one of `process.GRIDS` or a
            function of the same form, such as functools.partial(grids.karras, rho=5); guidance is u + guidance (c - u): 1 is off.
            u is without the conditions that training has dropped.
          x_init: the starting noise [num, ...], N(0, I), in the space that is diffused.
          batch_size: pictures at a time, at most; see `batch_size_for`. The last batch is padded, and while one is computed the one
            before it is fetched.
          trajectory: also return the pictures at every step, [steps + 1, num, H, W, C].
          classifier: a Pipeline of a classifier of noisy images, which guides each picture to the class that cond names, also where the
            model itself knows no classes; in place of the run's. classifier_scale: how strongly, a number or one for each picture.
          image: pictures, uint8 or in [0, 1], one for all or one for each, that are changed: noised to where the last `strength` of the
            steps begin (Meng et al. 2022). A model of enlarged pictures takes the small ones here.
          mask: [H, W], 1 where `image` is made anew; the rest of it is kept. strength: in (0, 1], by default 0.8, and 1 with a mask,
            for which it starts from noise alone.
          window: the part of the way from noise (0) to data (1) that is made. One that ends before 1 gives x_t, one that begins after 0
            takes it as x_init: a model for the first part and another for the rest (Podell et al. 2023, section 2.5).
          guidance_interval: (low, high) of sigma / alpha, outside which there is no guidance, and no unconditional half is computed
            (Kynkäänniemi et al. 2024).
          options: the sampler's own, such as eta=0.5 for "ddim"; a number, or one for each picture.

        Returns:
          [num, H, W, C] float32 in [0, 1].

        Raises:
          UserError: for an unknown name, a class out of range, arrays that do not fit, or a classifier of something else.
        """
        if self.system.sample is None:
            raise UserError("this is a first stage, which reconstructs pictures and samples none; load the run that was trained on it"
                            if self.system.reconstruct is not None else "this is a classifier, which samples no pictures; give it as "
                            "classifier=... where a diffusion model samples")
        sampler = sampler or self.defaults["name"]
        steps = request.positive("steps", self.defaults["steps"] if steps is None else steps)
        grid = grid or self.defaults["grid"]
        if isinstance(grid, str):
            lookup(process.GRIDS, grid, "grid")
        options = {**dict(self.defaults.get(sampler) or {}), **options}
        process.samplers.make_sampler(sampler, **options)
        key = request.typed_key(key)
        classifier, wanted = classifier or self.classifier, classifier is not None
        given, edit = request.pictures(self.system, image, mask, strength, self.defaults.get("strength", 0.8), window)
        interval = request.interval_of(self.defaults.get("guidance_interval") if guidance_interval is None else guidance_interval)
        cond, labels = request.conditions(self.system, cond, given, classifier and classifier.system)
        num = request.positive("num", request.length((cond, labels, edit["image"], edit["known"]), x_init) if num is None else num)
        guidance = request.guidance_scales(self.system, guidance, self.defaults["guidance"], cond, num)
        cond, labels = request.for_each((cond, labels), num)
        edited = {name: request.for_each(edit[name], num) for name in ("image", "known")}
        if wanted and labels is None:
            raise UserError("classifier guidance needs to know the class of each picture; give it in cond")
        scale = self.defaults.get("classifier_scale", 1.0) if classifier_scale is None else classifier_scale
        judge = None
        if classifier is not None and labels is not None:
            judge = classifier.params, labels, request.scales("classifier_scale", scale, num)
        shape = tuple(self.system.sample_shape)
        x_init = request.start_of(x_init, (num, *shape))
        if key.shape not in ((), (num,)):
            raise UserError(f"key has shape {key.shape} for num={num} pictures; give one key, or one each")
        if trajectory and not edit["decoded"]:
            raise UserError(f"trajectory=True shows pictures, and window={window} ends before there are any")
        static, numbers = request.split_options(sampler, options, num)
        capacity = steps if trajectory else max(_CAPACITY, 1 << (steps - 1).bit_length())
        of_run = {"strength": edit["strength"], "window": edit["window"], "guidance_interval": interval}
        kind = dict(classify=None if judge is None else classifier.system.classify, sampler=sampler, static=tuple(sorted(static.items())),
                    grid=grid, capacity=capacity, trajectory=trajectory, begun=edit["begun"], decoded=edit["decoded"])
        size = self._size(num, request.positive("batch_size", batch_size or self.defaults.get("batch_size") or BATCH), kind,
                          (cond, guidance, edited, numbers, of_run, judge and judge[1:]))

        def dispatch(start: int) -> Any:
            take = np.minimum(np.arange(start, start + size), num - 1)
            x, keys = _draws(*_key_rows(key, take), None if x_init is not None else shape)
            x, keys, *part, changes, values = self._rows((x, keys, *_take((cond, guidance, edited, numbers), take)))
            x = x if x_init is None else self._rows(x_init[take])
            judged = None if judge is None else (judge[0], *self._rows(_take(judge[1:], take)))
            with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
                return self._sample(self.params, x, keys, *part, judged, jnp.int32(steps), values, {**changes, **of_run}, **kind)

        pictures, ahead = [], []
        for start in range(0, num, size):
            ahead.append(dispatch(start))
            if len(ahead) > 1:
                pictures.append(to_host(ahead.pop(0)))
        pictures.append(to_host(ahead.pop()))
        if not trajectory:
            return np.concatenate(pictures)[:num]
        return np.concatenate([end for end, _ in pictures])[:num], np.concatenate([path for _, path in pictures], axis=1)[:, :num]

    def _size(self, num: int, most: int, kind: Mapping[str, Any], rows: PyTree) -> int:
        """Pictures at a time, and that it is compiled now for what is static, `kind`, and arguments like `rows`."""
        leaves, tree = jax.tree.flatten(rows)
        program = (tuple(kind.items()), tree, tuple((a.shape[1:], a.ndim, a.dtype.name) for a in leaves))
        compiled = self._sizes.setdefault(program, set())
        size = batch_size_for(num, most, compiled, 1 if self.mesh is None else batch_parts(self.mesh))
        compiled.add(size)
        return size

    def _rows(self, tree: PyTree) -> PyTree:
        """Every array that has rows on the mesh."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda a: place(a, batch_sharding(self.mesh, a.shape)) if a.ndim else a, tree)

def batch_size_for(num: int, most: int, compiled: Collection[int] = (), parts: int = 1) -> int:
    """How many pictures at a time `num` are made in: a size that is compiled already where it serves, otherwise a new one.

    A new one is the next power of two, at most `most`, and a multiple of `parts`. One of `compiled` serves if it is no larger than
    `most`, makes at most 4 pictures, padding included, for each that is asked for, and needs at most 8 calls for each of the new one's,
    or 2 where it is less than 4: one picture at a time does not fill a device. Of several it is the one of fewest calls, then of least
    padding. So after 16 pictures, 4 to 128 compile nothing.

    Args:
      most: batch_size. compiled: the sizes of the same program that there are. parts: of the mesh, over which a batch is split.
    """
    most = -(-most // parts) * parts
    new = min(parts << (-(-num // parts) - 1).bit_length(), most)
    calls = lambda size: -(-num // size)
    serves = [size for size in compiled if size <= most and size * calls(size) <= _PADDED * -(-num // parts) * parts
              and calls(size) <= (_CALLS if size >= _FILLING else 2) * calls(new)]
    return min(serves, key=lambda size: (calls(size), size), default=new)


def _take(tree: PyTree, take: np.ndarray) -> PyTree:
    """The rows `take` of every array that has rows."""
    return jax.tree.map(lambda a: a[take] if a.ndim else a, tree)


def _key_rows(key: Array, take: np.ndarray) -> Tuple[Array, np.ndarray]:
    """(one key, or those of the rows; the rows), for `_draws`."""
    if key.ndim:
        key = jax.random.wrap_key_data(np.asarray(jax.random.key_data(key))[take], impl=jax.random.key_impl(key))
    return key, take.astype(np.int32)


@functools.partial(jax.jit, static_argnums=2)
def _draws(key: Array, rows: Array, shape: Optional[Tuple[int, ...]]) -> Tuple[Optional[Array], Array]:
    """(starting noise where `shape` is given, keys of the steps) of the pictures `rows`."""
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    return None if shape is None else normal(fold_in(keys, 0), (len(rows), *shape)), fold_in(keys, 1)


def _sample(make, params, x, keys, cond, guidance, judged, steps, numbers, edit, *, classify, sampler, static, grid, capacity, trajectory,
            begun, decoded):
    method = process.samplers.make_sampler(sampler, **numbers, **dict(static))
    tilt = {}
    if classify is not None:
        weights, labels, scale = judged
        tilt = dict(log_prob_scale=scale, log_prob=lambda x_t, t: jnp.take_along_axis(
            jax.nn.log_softmax(classify(weights, x_t, t)), labels[:, None], 1)[:, 0])
    out = make(params, x, keys, cond, sampler=method, steps=steps, capacity=capacity, grid=grid, guidance=guidance, trajectory=trajectory,
               begun=begun, decoded=decoded, **edit, **tilt)
    return jax.tree.map(to_unit, out) if decoded else out
