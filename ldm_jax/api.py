"""What a Colab calls: `load(path)` gives a Pipeline, of a run or of a published checkpoint."""
import dataclasses
import json
import os
import warnings
from typing import Any, Mapping, Optional

import jax

from ldm_jax import paths
from ldm_jax.sampling import Pipeline
from ldm_jax.types import UserError


def load(path: str, config: Any = None, *, lora: Optional[str] = None, lora_scale: float = 1.0, **overrides: Any) -> Pipeline:
    """The Pipeline of a run's workdir, with the averaged parameters of its newest good checkpoint; or of a published checkpoint.

    Args:
      path: the --workdir of a run, or a directory with model_index.json, see `pipelines.load_pipeline`; or, with `config`, a file in
        its authors' own layout.
      config: what that file holds, such as "sd1" or "adm_256", see `pipelines.load_original`.
      lora, lora_scale: a file of LoRA adapters that is added to the weights, see `Pipeline.with_lora`.
      overrides: in place of the run's sampler settings: name, steps, guidance, grid, batch_size, and classifier_dir, the workdir of a
        classifier of noisy images, with classifier_scale.

    Raises:
      UserError: when there is no run at `path`, or no checkpoint in it that can be read.
    """
    if lora is not None:
        return load(path, config, **overrides).with_lora(lora, lora_scale)
    from ldm_jax import pipelines
    from ldm_jax.recipe import build_system
    from ldm_jax.training.checkpoint import Checkpoints
    if config is not None:
        return pipelines.load_original(path, config, **overrides)
    if pipelines.is_published(path):
        return pipelines.load_pipeline(path, **overrides)
    if paths.isfile(paths.expand(path)):
        raise UserError(f"{path!r} is a file; say what it holds with config=..., such as config='sd1'; "
                        f"ldm_jax.pipelines.ORIGINALS lists them")
    config = read_config(path)
    system = build_system(config)
    parameters = jax.eval_shape(system.init, jax.random.key(0))
    wanted = {"ema": {n: t for n, t in parameters.items() if n in system.trained},
              "others": {n: t for n, t in parameters.items() if n not in system.trained}}
    directory = os.path.join(path, "checkpoints")
    found = None
    if paths.isdir(directory):
        with Checkpoints(directory, read_only=True) as checkpoints:
            found = checkpoints.restore(wanted, warn=warnings.warn)
    if found is None:
        raise UserError(f"no checkpoint in {directory!r} yet; train first: python -m ldm_jax.main --config=... --workdir={path}")
    _, state, _ = found
    known = pipeline(system, {**state["ema"], **state["others"]}, config)
    defaults = {"classifier_dir": "", "classifier_scale": 1.0, **known.defaults}
    unknown = sorted(set(overrides) - set(defaults))
    if unknown:
        raise UserError(f"unknown override {unknown[0]!r}; choose from: {', '.join(sorted(defaults))}")
    defaults.update(overrides)
    classifier = load(defaults["classifier_dir"]) if defaults["classifier_dir"] else None
    return dataclasses.replace(known, defaults=defaults, classifier=classifier)


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
