"""The modes of the command line as functions of a config and a workdir; a notebook can call them as well."""
import dataclasses
import functools
import json
import os
import sys
import time
from typing import Any, Callable, Dict, Mapping, Optional, Sequence

import jax
import numpy as np

from ldm_jax import api, collection, drawing, paths, pipelines, recipe, stages
from ldm_jax.compilations import watching
from ldm_jax.data.captions import tokenized
from ldm_jax.data.pipeline import batches
from ldm_jax.evaluation import evaluate as measurements
from ldm_jax.evaluation import pictures
from ldm_jax.parallel.processes import the_first_before, wait_for_all
from ldm_jax.parallel.sharding import placer, share
from ldm_jax.training.logs import writing
from ldm_jax.training.loop import train as train_loop
from ldm_jax.types import UserError, to_host, to_signed, writes_files

Config = Mapping[str, Any]


def say(text: str) -> None:
    if writes_files():
        print(text, file=sys.stderr, flush=True)


def train(config: Config, workdir: str, *, mark: Callable[[int], None] = lambda step: None) -> api.Pipeline:
    """Train what `config` describes in `workdir`, going on from where an earlier call stopped, and leave pictures.

    A latent system first trains its first stage in WORKDIR/first_stage, unless that is done or `first_stage_dir` names one.
    `init_dir` names a run whose parameters, or the part `init_part` of them, are started from, see `stages.given`.

    Raises:
      UserError: see `training.loop.train`; a workdir that another config began, or that cannot be written.
    """
    system = recipe.build_system(config)
    if "sampler" in config:
        recipe.build_sampler(recipe.sampler_of(config))
    section = dict(config["train"])
    steps = section.pop("steps")
    tx = recipe.build_optimizer(config, system.trained)
    mesh, rules = recipe.build_mesh(config["mesh"])
    source = tokenized(the_first_before(lambda: recipe.build_source(config["data"], "train")), system.conditioners)
    say(f"data: {source.name}, {source.size} images")
    if system.reconstruct is not None:
        say(system.nets["perceptual"].describe() if "perceptual" in system.nets else "perceptual distance: none")
    adopt(workdir, config)  # after all that a mistake in the config can fail in, so that a workdir is not left with it
    options = dict(batch_size=section["batch_size"], seed=config["seed"], place=placer(mesh), share=share(mesh),
                   num_workers=config["data"].get("num_workers") or 0)
    flip, latents = config["data"]["flip"], config.get("latents") or {"cache": False}

    def examples(state):
        """What is trained on, and whether it is still to be mirrored."""
        if not latents["cache"]:
            return dict(source=source, flip=flip)
        directory = latents["dir"] or os.path.join(workdir, "latents")
        cache = stages.latent_cache(directory, source, system.nets["autoencoder"], state.others, flip=flip, say=say)
        return dict(source=cache, flip=False)

    made = []

    def pipeline_of(state):
        """Of the run as it is now; what one of them has compiled the next need not."""
        params = {**state.ema, **state.others}
        if not made:
            made.append(dataclasses.replace(api.pipeline(system, params, config), mesh=mesh))
        return made[0].with_params(params)

    def draw(pipeline, tag):
        with writing(workdir):
            return drawing.draw(pipeline, source, workdir, tag)

    state = train_loop(
        workdir=workdir, init=system.init, trained=system.trained, loss_fn=system.loss_fn, refresh=system.refresh, steps=steps,
        seed=config["seed"], mesh=mesh, rules=rules, tx=tx, config=config, name=config["system"], warn=say, mark=mark, **section,
        batches=lambda start, state: batches(**examples(state), start=start, **options),
        given=lambda: stages.given(config, workdir, source, system, train=functools.partial(train, mark=mark), say=say),
        on_save=lambda step, state: draw(pipeline_of(state), f"step_{step:07d}"))
    pipeline = pipeline_of(state)
    for path in draw(pipeline, None):
        say(f"wrote {path}")
    if system.reconstruct is not None and not paths.exists(os.path.join(workdir, "eval.json")):
        _report(workdir, _measure_first_stage(pipeline, recipe.build_source(config["data"], "test"), config["eval"]["real"]))
    return pipeline


def adopt(workdir: str, config: Config) -> None:
    """Make `workdir` this config's, or check that it is.

    Raises:
      UserError: when another config's run is there, or the directory cannot be written.
    """
    path = os.path.join(workdir, "config.json")
    if paths.exists(path) and _begun(workdir):
        differences = recipe.changed(api.read_config(workdir), _plain(config))
        if differences:
            raise UserError(f"{workdir!r} holds a run of another config: {'; '.join(differences[:3])}"
                            + (f" and {len(differences) - 3} more" if differences[3:] else "")
                            + "; give a new --workdir, or the settings of that run")
    wait_for_all("read what is there")
    if writes_files():
        with writing(workdir):
            paths.makedirs(os.path.join(workdir, "samples"))
            paths.write_text(path, json.dumps(_plain(config), indent=2, sort_keys=True))
    wait_for_all("the workdir is this config's")


def _begun(workdir: str) -> bool:
    """Whether anything was trained in `workdir`: a checkpoint of its own or of its first stage."""
    directory = os.path.join(workdir, "checkpoints")
    first = os.path.join(workdir, "first_stage")
    return (paths.isdir(directory) and any(name.isdigit() for name in paths.listdir(directory))) or (paths.isdir(first) and _begun(first))


def _plain(config: Config) -> dict:
    """The config as JSON gives it back."""
    return json.loads(json.dumps(config))


def load(workdir: str, config: Optional[Config] = None, *, weights: Optional[str] = None, original: Optional[str] = None,
         tokenizer: Optional[str] = None, vae: Optional[str] = None, lora: Optional[str] = None, lora_scale: float = 1.0,
         step: Optional[int] = None) -> api.Pipeline:
    """The Pipeline of the run in `workdir`, or of the published checkpoint `weights`, with what `config` says of sampling.

    original, tokenizer, vae: for `weights` that are one file in its authors' layout, see `pipelines.load_original`.
    step: of the run's checkpoint, the newest by default.
    config: `sampler` in place of the run's settings; of published weights also `size` and `dtype`, and of its `sampler` what is not "".

    Raises:
      UserError: see `api.load`.
    """
    adapters = {} if lora is None else {"lora": lora, "lora_scale": lora_scale}
    adapters.update(_where(config or (api.read_config(workdir) if weights is None else {})))
    if weights is None:
        return api.load(workdir, step=step, **(recipe.sampler_of(config) if config else {}), **adapters)
    if step is not None:
        raise UserError(f"--step={step} is of a run's checkpoints; --weights has no steps")
    settings = dict((config or {}).get("sampler") or {})
    if original is None and not pipelines.is_published(weights):
        raise UserError(f"--weights={weights!r} holds no published checkpoint (no model_index.json); give its directory, or with "
                        f"--original=NAME one file in its authors' layout")
    files = {"config": original, "tokenizer": tokenizer, "vae": vae}
    adapters.update({key: value for key, value in files.items() if value is not None})
    how = {key: (config or {}).get(key) for key in ("size", "dtype")}
    chosen = {key: settings[key] for key in ("name", "steps", "guidance", "grid", "batch_size") if settings.get(key)}
    return api.load(weights, **{key: value for key, value in how.items() if value}, **chosen, **adapters)


def _where(config: Config) -> Dict[str, Any]:
    """The mesh to sample on: the config's where that covers the devices that are here, otherwise all of them as `data`; {} for one."""
    if jax.device_count() == 1:
        return {}
    section = config.get("mesh") or {}
    try:
        mesh, rules = recipe.build_mesh(section)
    except UserError:
        mesh, rules = recipe.build_mesh({})
    return {"mesh": mesh, "rules": rules}


def average(workdir: str, stds: Sequence[float], *, step: Optional[int] = None) -> None:
    """Put averages of the relative lengths `stds` together from the snapshots in WORKDIR/averages; see `api.write_average`."""
    for std in stds:
        with writing(workdir):
            directory, at, error = api.write_average(workdir, std, step=step)
        say(f"wrote {directory}: the average of relative length {std} at step {at}, its profile's relative error {error:.2g}")


def export(pipeline: api.Pipeline, directory: str, *, merged: bool = False) -> None:
    """Write a directory that diffusers opens, see `exporting.save_pretrained`.

    merged: a run of LoRA adapters is written as the whole model that they make, not as the adapters alone.
    """
    if pipeline.system.adapter_scale is not None and not merged:
        path = os.path.join(directory, "pytorch_lora_weights.safetensors")
        if paths.exists(path):
            raise UserError(f"{path!r} is there already; give the name of a new directory")
        paths.makedirs(directory)
        pipeline.save_lora(path)
        return say(f"wrote {path}")
    lost = pipeline.save_pretrained(directory)
    say(f"wrote {directory}" + (f"; what it cannot say: {lost}" if lost else ""))


def sample(pipeline: api.Pipeline, workdir: str, *, num: Optional[int] = None, classes: Optional[Sequence[int]] = None, seed: int = 0,
           prompts: Optional[Sequence[str]] = None, negative: Optional[str] = None, image: Optional[str] = None,
           mask: Optional[str] = None, strength: Optional[float] = None, mark: Callable[[int], None] = lambda part: None) -> str:
    """Draw pictures and write WORKDIR/samples/sampled_*.png, or from 1,001 on a directory of arrays, see `collection`; returns the path.

    Conditions other than the class and the prompt are those of real examples, of the test split where there is one, and shown above
    the results. Pictures of 128 pixels and more are also written one by one.

    Args:
      num: how many; by default one for each class id or prompt that is given, otherwise 16.
      classes: ids, repeated to as many as `num`; without them all classes in turn, or those of the real examples.
      prompts: repeated likewise. negative: what guidance steers away from, for all.
      image, mask: files, see `Pipeline.sample`; they are scaled to the model's size.
    """
    system, cond = pipeline.system, {}
    num = num or len(prompts or classes or ()) or 16
    if negative is not None and not prompts:
        raise UserError("--negative_prompt needs a --prompt to steer away from it")
    if prompts and "prompt" not in system.conditioners:
        raise UserError(f"--prompt was given, and this model takes no text; it takes: {', '.join(system.conditioners) or 'no condition'}")
    if prompts:
        texts = [prompts[i % len(prompts)] for i in range(num)]
        cond["prompt"] = {"prompt": texts, "negative": None if negative is None else [negative] * num}
    pictured = {"masked_image", "low_resolution"} if image else set()
    missing = set(system.conditioners) - drawing.class_of(system) - set(cond) - pictured
    if missing == {"prompt"}:
        raise UserError("this model takes a text; give --prompt")
    if missing and pipeline.published:
        raise UserError(f"this model takes {', '.join(sorted(missing))}; give --image, and --mask where a part of it is kept")
    if missing:
        cond = {**drawing.conditions_of(system, drawing.held_out(api.read_config(workdir)), num, seed)[0], **cond}
    known = system.num_classes or (pipeline.classifier and pipeline.classifier.system.num_classes)
    name = next(iter(drawing.class_of(system)), "class")
    if classes is not None or (known and name not in cond):
        cond[name] = np.resize(np.arange(known) if classes is None else np.asarray(classes), num)
    H, W, C = system.image_shape
    edit = {} if image is None else {"image": pictures.read(image, None if "low_resolution" in system.conditioners else (H, W), C)}
    if mask is not None:
        edit["mask"] = pictures.read(mask, (H, W), 1)[..., 0] > 127
    if num > collection.PART:
        directory, start = os.path.join(workdir, "samples", f"sampled_seed{seed}_n{num}"), time.perf_counter()
        with writing(workdir), watching() as seen:
            new = collection.collect(pipeline, directory, num=num, seed=seed, cond=cond, mark=mark, strength=strength, **edit)
        say(f"wrote {directory}: {new} new pictures of {num} in {_rates(new, time.perf_counter() - start, seen.seconds)}")
        return directory
    start = time.perf_counter()
    with watching() as seen:
        images = pipeline.sample(seed, num=num, cond=cond or None, strength=strength, **edit)
    seconds = time.perf_counter() - start
    with writing(workdir):
        paths.makedirs(os.path.join(workdir, "samples"))
        path = _unused(os.path.join(workdir, "samples", f"sampled_seed{seed}_n{num}.png"))
        shown = {name: value for name, value in cond.items() if name != "prompt"}
        pictures.save(path, drawing.interleaved([*drawing.shown(system, shown), images], int(np.ceil(np.sqrt(num)))))
        for i, picture in enumerate(images if images.shape[1] >= 128 else ()):
            pictures.save(f"{os.path.splitext(path)[0]}_picture{i}.png", [picture[None]], gap=0)
    say(f"wrote {path}: {num} pictures in {_rates(num, seconds, seen.seconds)}")
    return path


def _rates(count: int, seconds: float, compiling: float) -> str:
    """How fast pictures were made, with and without what was compiled for them."""
    return (f"{seconds:.1f} s, {count / seconds:.1f} images/s, compilation included; it took {compiling:.1f} s, "
            f"{count / max(seconds - compiling, 1e-3):.1f} images/s without it")


def _unused(path: str) -> str:
    """`path`, numbered if a file is there already."""
    stem, end = os.path.splitext(path)
    number = 1
    while paths.exists(path):
        number += 1
        path = f"{stem}_{number}{end}"
    return path


def evaluate(workdir: str, config: Optional[Config] = None, *, step: Optional[int] = None) -> Dict[str, float]:
    """Measure a finished run as its `eval` section says (that of `config` if given); print a table, write WORKDIR/eval.json."""
    config = config or api.read_config(workdir)
    pipeline, section = api.load(workdir, step=step, **_where(config), **recipe.sampler_of(config)), config["eval"]
    train_source, test_source = (recipe.build_source(config["data"], split) for split in ("train", "test"))
    test = test_source.read(range(min(test_source.size, section["real"])))
    if pipeline.system.reconstruct is not None:
        values = _measure_first_stage(pipeline, test_source, section["real"])
    elif pipeline.system.classify is not None:
        values = _measure_classifier(pipeline, test)
    elif not drawing.class_of(pipeline.system):
        raise UserError("--mode=eval measures class-conditional samples by classifiers; this run makes none")
    else:
        (name,) = drawing.class_of(pipeline.system)
        real = train_source.read(np.random.default_rng(0).permutation(train_source.size)[:section["real"]])
        values = measurements.evaluate_samples(lambda ids: pipeline.sample(section["seed"], num=len(ids), cond={name: ids}), real, test,
                                               samples=section["samples"])
    return _report(workdir, values)


def _measure_classifier(pipeline: api.Pipeline, test: Mapping[str, np.ndarray]) -> Dict[str, float]:
    """The accuracy on noisy test images, times and noise drawn as in training."""
    loss_fn = jax.jit(pipeline.system.loss_fn)
    size = min(100, len(test["image"]))
    parts = [to_host(loss_fn(pipeline.params, {name: a[i:i + size] for name, a in test.items()}, jax.random.key(i))[1])
             for i in range(0, len(test["image"]) - size + 1, size)]
    names = {"accuracy": "noisy test images labelled right", "accuracy_early": "those of t < 1/2 labelled right"}
    return {name: float(np.mean([np.mean(part[short]) for part in parts])) for short, name in names.items()}


def _measure_first_stage(pipeline: api.Pipeline, source, count: int) -> Dict[str, float]:
    system = pipeline.system
    images = source.read(range(min(source.size, count)))["image"]
    again, codes = drawing.reconstruct(pipeline, images), None
    if system.codes is not None:
        codes = drawing.in_parts(lambda params, image: system.codes(params, to_signed(image)), pipeline, images)
    return measurements.evaluate_reconstruction(again, images, kept=system.kept, codes=codes)


def _report(workdir: str, values: Dict[str, float]) -> Dict[str, float]:
    if not writes_files():
        return values
    print(measurements.table(values), flush=True)
    with writing(workdir):
        paths.write_text(os.path.join(workdir, "eval.json"), json.dumps(values, indent=2))
    return values
