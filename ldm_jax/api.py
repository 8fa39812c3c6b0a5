"""What a Colab calls: `load(path)` gives a Pipeline, of a run or of a published checkpoint."""
import dataclasses
import json
import os
import warnings
from typing import Any, Dict, Mapping, Optional, Tuple

import jax

from ldm_jax import paths
from ldm_jax.sampling import Pipeline
from ldm_jax.types import UserError


def load(path: str, config: Any = None, *, lora: Optional[str] = None, lora_scale: float = 1.0, step: Optional[int] = None,
         ema: Any = None, mesh: Any = None, rules: Any = (), **overrides: Any) -> Pipeline:
    """The Pipeline of a run's workdir, with the averaged parameters of its newest good checkpoint; or of a published checkpoint.

    Args:
      path: the --workdir of a run, or a directory with model_index.json, see `pipelines.load_pipeline`; or, with `config`, a file in
        its authors' own layout.
      config: what that file holds, such as "sd1" or "adm_256", see `pipelines.load_original`.
      lora, lora_scale: a file of LoRA adapters that is added to the weights, see `Pipeline.with_lora`.
      step: of a run, the checkpoint or snapshot that is taken in place of the newest.
      ema: of a run that kept snapshots, the relative length of the average that is put together from them, such as 0.08, see
        `training.averages`; of an authors' file see `pipelines.load_original`.
      mesh, rules: a `jax.sharding.Mesh`, or the arguments of `parallel.sharding.make_mesh`, such as {"data": -1} for all devices: what
        the parameters are placed on, by the rules, and each batch of pictures is split over. One device by default.
      overrides: in place of the run's sampler settings: name, steps, guidance, grid, batch_size, and classifier_dir, the workdir of a
        classifier of noisy images, with classifier_scale.

    Raises:
      UserError: when there is no run at `path`, or no checkpoint in it that can be read.
    """
    if lora is not None:
        return load(path, config, step=step, ema=ema, mesh=mesh, rules=rules, **overrides).with_lora(lora, lora_scale)
    from ldm_jax import pipelines
    from ldm_jax.parallel.sharding import make_mesh, place, sharding_of, shardings
    mesh = make_mesh(**mesh) if isinstance(mesh, Mapping) else mesh
    if config is not None:
        original = pipelines.load_original(path, config, **overrides, **({} if ema is None else {"ema": ema}))
        if mesh is None:
            return original
        placed = jax.tree.map(place, original.params, shardings(original.params, mesh, rules))
        return dataclasses.replace(original, mesh=mesh, params=placed)
    if pipelines.is_published(path):
        if step is not None or ema is not None:
            raise UserError(f"step and ema choose among what a run kept; {path!r} is a published checkpoint")
        where = {} if mesh is None else {"place": lambda name, shape, dtype: sharding_of(name, shape, mesh, rules)}
        return dataclasses.replace(pipelines.load_pipeline(path, **where, **overrides), mesh=mesh)
    if paths.isfile(paths.expand(path)):
        raise UserError(f"{path!r} is a file; say what it holds with config=..., such as config='sd1'; "
                        f"ldm_jax.pipelines.ORIGINALS lists them")
    config, system, state = _restored(path, step if ema is None else None, mesh, rules)
    if ema is not None:
        state["ema"], _, _ = reconstruct(path, config, state["ema"], std=ema, step=step)
    known = pipeline(system, {**state["ema"], **state["others"]}, config)
    defaults = {"classifier_dir": "", "classifier_scale": 1.0, **known.defaults}
    unknown = sorted(set(overrides) - set(defaults))
    if unknown:
        raise UserError(f"unknown override {unknown[0]!r}; choose from: {', '.join(sorted(defaults))}")
    defaults.update(overrides)
    classifier = load(defaults["classifier_dir"], mesh=mesh) if defaults["classifier_dir"] else None
    return dataclasses.replace(known, defaults=defaults, classifier=classifier, mesh=mesh)


def _restored(path: str, step: Optional[int], mesh: Any = None, rules: Any = ()) -> Tuple[dict, Any, Dict[str, Any]]:
    """(config, system, {"ema", "others"}) of the run in `path`."""
    from ldm_jax.parallel.sharding import shardings
    from ldm_jax.recipe import build_system
    from ldm_jax.training.checkpoint import Checkpoints
    config = read_config(path)
    system = build_system(config)
    parameters = jax.eval_shape(system.init, jax.random.key(0))
    wanted = {"ema": {n: t for n, t in parameters.items() if n in system.trained},
              "others": {n: t for n, t in parameters.items() if n not in system.trained}}
    if mesh is not None:
        wanted = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), wanted, shardings(wanted, mesh, rules))
    directory, found = os.path.join(path, "checkpoints"), None
    if paths.isdir(directory):
        with Checkpoints(directory, read_only=True) as checkpoints:
            found = checkpoints.restore(wanted, step=step, warn=warnings.warn)
    if found is None:
        raise UserError(f"no checkpoint in {directory!r} yet; train first: python -m ldm_jax.main --config=... --workdir={path}")
    return config, system, found[1]


def reconstruct(path: str, config: Mapping[str, Any], like: Any, *, std: float, step: Optional[int]) -> Tuple[Any, int, float]:
    """(average, step, error) of the run in `path`, see `training.averages.reconstruct`."""
    from ldm_jax.training import averages
    stds, directory = (config["train"].get("averages") or {}).get("stds", ()), os.path.join(path, "averages")
    if not stds or not paths.isdir(directory):
        raise UserError(f"the run in {path!r} kept no averages; train with --config.train.averages.stds=0.05,0.1 and "
                        f"--config.train.averages.every=N")
    return averages.reconstruct(directory, like, stds=stds, std=std, step=step, warn=warnings.warn)


def write_average(path: str, std: float, *, step: Optional[int] = None) -> Tuple[str, int, float]:
    """(directory, step, error): put the average of relative length `std` together, and write it as a run of its own into
    PATH/ema_STD, which all that takes a run takes. What is not trained comes from the newest checkpoint.

    Raises:
      UserError: see `training.averages.reconstruct`.
    """
    from ldm_jax.training.checkpoint import Checkpoints
    config, _, state = _restored(path, None)
    average, at, error = reconstruct(path, config, state["ema"], std=std, step=step)
    name = f"ema_{std:.3f}" if round(std, 3) == std else f"ema_{std!r}"
    directory = os.path.join(path, name if step is None else f"{name}_step_{step:07d}")
    with Checkpoints(os.path.join(directory, "checkpoints"), keep=1, config=config) as checkpoints:
        checkpoints.drop_after(at)
        checkpoints.save(at, {"ema": average, "others": state["others"]}, {})
        checkpoints.wait()
    paths.write_text(os.path.join(directory, "config.json"), json.dumps(config, indent=2, sort_keys=True))
    return directory, at, error


def pipeline(system: Any, params: Mapping[str, Any], config: Mapping[str, Any]) -> Pipeline:
    """The Pipeline of a system that `config` describes, with the parameters given.

    What was begun from a published checkpoint, and keeps its process, is still the kind that it is.
    """
    from ldm_jax import pipelines
    from ldm_jax.recipe import sampler_of
    same = config.get("init_from") and config["process"]["schedule"]["name"] == "published"
    published = pipelines.published_of(config["init_from"], system.nets) if same else None
    return Pipeline(system, params, sampler_of(config), published=published)


def read_config(workdir: str) -> dict:
    """The config that the run in `workdir` was started with.

    Raises:
      UserError: when there is none.
    """
    path = os.path.join(workdir, "config.json")
    try:
        return json.loads(paths.read_text(path))
    except FileNotFoundError:
        raise UserError(f"{workdir!r} holds no run (no {path}); give the --workdir of a training run") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
