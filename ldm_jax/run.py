"""The three modes of the command line as functions of a config and a workdir; a notebook can call them as well."""
import contextlib
import json
import os
import sys
import time
from typing import Any, Dict, List, Mapping, Optional, Sequence

import jax
import numpy as np

from ldm_jax import api, recipe
from ldm_jax.data.pipeline import batches
from ldm_jax.evaluation import evaluate as measurements
from ldm_jax.evaluation import pictures
from ldm_jax.systems.latent import measure
from ldm_jax.training.loop import train as train_loop
from ldm_jax.training.sharding import batch_sharding, make_mesh
from ldm_jax.types import UserError, to_signed, to_unit

Config = Mapping[str, Any]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def train(config: Config, workdir: str) -> api.Pipeline:
    """Train what `config` describes in `workdir`, going on from where an earlier call stopped, and leave pictures.

    A latent system first trains its first stage in WORKDIR/first_stage, unless that is done or `first_stage_dir` names one.

    Raises:
      UserError: see `training.loop.train`; a workdir that another config began, or that cannot be written.
    """
    system = recipe.build_system(config)
    if "sampler" in config:
        recipe.build_sampler(config["sampler"])
    section = dict(config["train"])
    steps = section.pop("steps")
    tx = recipe.build_optimizer(config["optimizer"], steps)
    mesh = make_mesh(**config["mesh"])
    source = recipe.build_source(config["data"], "train")
    say(f"data: {source.name}, {source.size} images")
    adopt(workdir, config)  # after all that a mistake in the config can fail in, so that a workdir is not left with it
    options = dict(batch_size=section["batch_size"], seed=config["seed"], flip=config["data"]["flip"],
                   process_index=jax.process_index(), process_count=jax.process_count())
    state = train_loop(
        workdir=workdir, init=system.init, trained=system.trained, loss_fn=system.loss_fn, steps=steps, seed=config["seed"], mesh=mesh,
        tx=tx, config=config, name=config["system"], warn=say, **section,
        batches=lambda start: batches(source, sharding=batch_sharding(mesh), start=start, **options),
        fixed=(lambda: _first_stage(config, workdir, source)) if "first_stage" in config else None,
        on_save=lambda step, state: _draw(_pipeline(system, state, config), source, workdir, f"step_{step:07d}"))
    pipeline = _pipeline(system, state, config)
    for path in _draw(pipeline, source, workdir, None):
        say(f"wrote {path}")
    return pipeline


def _pipeline(system, state, config: Config) -> api.Pipeline:
    return api.Pipeline(system, {**state.ema, **state.fixed}, config.get("sampler") or {})


def adopt(workdir: str, config: Config) -> None:
    """Make `workdir` this config's, or check that it is.

    Raises:
      UserError: when another config's run is there, or the directory cannot be written.
    """
    path = os.path.join(workdir, "config.json")
    if os.path.exists(path) and _begun(workdir):
        differences = recipe.changed(api.read_config(workdir), _plain(config))
        if differences:
            raise UserError(f"{workdir!r} holds a run of another config: {'; '.join(differences[:3])}"
                            + (f" and {len(differences) - 3} more" if differences[3:] else "")
                            + "; give a new --workdir, or the settings of that run")
    with _writing(workdir):
        os.makedirs(os.path.join(workdir, "samples"), exist_ok=True)
        with open(path + ".tmp", "w") as f:
            json.dump(_plain(config), f, indent=2, sort_keys=True)
        os.replace(path + ".tmp", path)


def _begun(workdir: str) -> bool:
    """Whether anything was trained in `workdir`: a checkpoint of its own or of its first stage."""
    directory = os.path.join(workdir, "checkpoints")
    first = os.path.join(workdir, "first_stage")
    return (os.path.isdir(directory) and any(name.isdigit() for name in os.listdir(directory))) or (os.path.isdir(first) and _begun(first))


@contextlib.contextmanager
def _writing(workdir: str):
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to workdir {workdir!r}: {error.strerror or error}; choose another --workdir") from error


def _plain(config: Config) -> dict:
    """The config as JSON gives it back."""
    return json.loads(json.dumps(config))


def _first_stage(config: Config, workdir: str, source) -> Dict[str, Any]:
    """The trained autoencoder and the statistics of its latents: what the latent system holds fixed."""
    directory = config.get("first_stage_dir") or None
    if directory:
        ours, theirs = config["first_stage"]["autoencoder"], api.read_config(directory).get("autoencoder")
        if _plain(ours) != theirs:
            raise UserError(f"first_stage_dir={directory!r} holds autoencoder {theirs}, the config states {_plain(ours)}; make them equal")
        pipeline = api.load(directory)
    else:
        pipeline = train(config["first_stage"], os.path.join(workdir, "first_stage"))
    autoencoder, params = pipeline.nets["autoencoder"]
    size = config["first_stage"]["train"]["batch_size"]
    ids = np.random.default_rng(config["seed"]).permutation(source.size)[:max(size, min(source.size, 4096))]
    images = (source.read(part)["image"] for part in np.array_split(ids, -(-len(ids) // size)))
    statistics = measure(autoencoder, params, images, jax.random.key(config["seed"]))
    say("latents: shift {shift}, scale {scale}".format(**{k: np.round(np.asarray(v), 3) for k, v in statistics.items()}))
    return {"autoencoder": params, "latent": statistics}


def _draw(pipeline: api.Pipeline, source, workdir: str, tag: Optional[str]) -> List[str]:
    """Pictures of a run: with a tag the small one that follows training, without it the three that end it."""
    def path(name):
        return os.path.join(workdir, "samples", f"{tag}_{name}.png" if tag else f"{name}.png")

    if pipeline.system.reconstruct is not None:
        real = source.read(range(16))["image"]
        again = _reconstruct(pipeline, real)
        return [pictures.save(path("reconstructions"), [real[:8], again[:8], real[8:], again[8:]])]
    classes = pipeline.system.num_classes
    rows, columns = (min(classes, 20), 10) if classes else (8, 8)
    cond = np.repeat(np.arange(rows), columns) if classes else None
    images = pipeline.sample(0, num=rows * columns, cond=cond).reshape(rows, columns, *pipeline.system.image_shape)
    out = [pictures.save(path("grid"), images)]
    if tag:
        return out
    steps = pipeline.defaults["steps"]
    _, visited = pipeline.sample(0, num=rows, cond=cond[::columns] if classes else None, trajectory=True)
    shown = np.unique(np.linspace(0, steps, 11).round().astype(int))
    out.append(pictures.save(path("denoising"), list(visited[shown].swapaxes(0, 1))))
    real = source.read(np.random.default_rng(0).permutation(source.size)[:source.size and 2000])
    beside = []
    for row in range(rows):
        mine = real["image"][real["class"] == row] if classes else real["image"][row * 5:]
        beside.append(np.concatenate([pictures.to_uint8(mine[:5]), pictures.to_uint8(images[row, :5])]))
    out.append(pictures.save(path("real_and_generated"), beside))
    return out


def _reconstruct(pipeline: api.Pipeline, images: np.ndarray, size: int = 250) -> np.ndarray:
    """uint8 images through a first stage, [N, H, W, C] in [0, 1]."""
    run = jax.jit(lambda params, image, key: to_unit(pipeline.system.reconstruct(params, to_signed(image), key)))
    parts = [images[i:i + size] for i in range(0, len(images), size)]
    return np.concatenate([np.asarray(run(pipeline.params, part, jax.random.key(0))) for part in parts])


def sample(workdir: str, *, num: Optional[int], classes: Optional[Sequence[int]], seed: int, sampler: Optional[Config] = None) -> str:
    """Draw pictures from a run and write WORKDIR/samples/sampled_*.png; returns the path. sampler: in place of the run's settings."""
    pipeline = api.load(workdir, **(sampler or {}))
    if classes is None and pipeline.system.num_classes:
        classes = np.arange(num or 16) % pipeline.system.num_classes
    num = num or (len(classes) if classes is not None else 16)
    cond = None if classes is None else np.resize(np.asarray(classes), num)
    start = time.perf_counter()
    images = pipeline.sample(seed, num=num, cond=cond)
    seconds = time.perf_counter() - start
    columns = int(np.ceil(np.sqrt(num)))
    with _writing(workdir):
        path = _unused(os.path.join(workdir, "samples", f"sampled_seed{seed}_n{num}.png"))
        pictures.save(path, [images[i:i + columns] for i in range(0, num, columns)])
    say(f"wrote {path}: {num} pictures in {seconds:.1f} s, {num / seconds:.1f} images/s, compilation included")
    return path


def _unused(path: str) -> str:
    """`path`, numbered if a file is there already."""
    stem, end = os.path.splitext(path)
    number = 1
    while os.path.exists(path):
        number += 1
        path = f"{stem}_{number}{end}"
    return path


def evaluate(workdir: str, config: Optional[Config] = None) -> Dict[str, float]:
    """Measure a finished run as its `eval` section says (that of `config` if given); print a table, write WORKDIR/eval.json."""
    config = config or api.read_config(workdir)
    pipeline, section = api.load(workdir, **(config.get("sampler") or {})), config["eval"]
    train_source, test_source = (recipe.build_source(config["data"], split) for split in ("train", "test"))
    test = test_source.read(range(min(test_source.size, section["real"])))
    if pipeline.system.reconstruct is not None:
        values = measurements.evaluate_reconstruction(lambda images: _reconstruct(pipeline, images), test)
    elif pipeline.system.num_classes is None:
        raise UserError("--mode=eval measures class-conditional samples by classifiers; this run has no classes")
    else:
        real = train_source.read(np.random.default_rng(0).permutation(train_source.size)[:section["real"]])
        values = measurements.evaluate_samples(lambda ids: pipeline.sample(section["seed"], num=len(ids), cond=ids), real, test,
                                               samples=section["samples"])
    print(measurements.table(values), flush=True)
    with _writing(workdir), open(os.path.join(workdir, "eval.json"), "w") as f:
        json.dump(values, f, indent=2)
    return values
