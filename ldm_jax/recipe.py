"""The door: what a config says, as objects. Beyond this file nothing sees a config.

A choice is a section {"name": NAME, NAME: {its options}}: the other rows' options may stand beside it, so that
`--config.net.name=dit` is all it takes to switch.
"""
import dataclasses
import inspect
import os
from typing import Any, Mapping, Sequence

from ldm_jax import process
from ldm_jax.types import UserError, lookup


def choose(table: Mapping[str, Any], choice: Mapping[str, Any], kind: str, **more: Any) -> Any:
    """table[name](**options of that name, **more)."""
    make = lookup(table, choice["name"], kind)
    return make(**{**dict(choice.get(choice["name"]) or {}), **more})


def choose_or_none(table: Mapping[str, Any], choice: Mapping[str, Any], kind: str, **more: Any) -> Any:
    """As `choose`, or None where the name is "none"."""
    return None if choice["name"] == "none" else choose({**table, "none": None}, choice, kind, **more)


def build_source(data: Mapping[str, Any], split: str):
    """The split of the data source that the `data` section names; of the train split its first `limit` examples, where that is set.

    Raises:
      UserError: when its pictures, classes or further fields are not those that the config states.
    """
    from ldm_jax.data.base import first
    from ldm_jax.data.sources import SOURCES
    fields = _fields(data)
    if fields and "fields" not in inspect.signature(lookup(SOURCES, data["name"], "data source")).parameters:
        raise UserError(f"data {data['name']!r} has no fields beside image and class; the config states {', '.join(fields)} (data.fields)")
    source = choose(SOURCES, data, "data source", split=split, **({"fields": tuple(fields)} if fields else {}))
    for name, shape in fields.items():
        if source.fields[name].shape != shape:
            raise UserError(f"field {name!r} of data {source.name!r} has shape {source.fields[name].shape}, the config states {shape}; "
                            f"set data.fields to what the data has")
    stated = tuple(data["image_shape"]), data["num_classes"]
    if stated != (source.image_shape, source.num_classes if data["num_classes"] is not None else None):
        raise UserError(f"data {source.name!r} has images {source.image_shape} in {source.num_classes} classes, the config states "
                        f"{stated[0]} in {stated[1]}; set data.image_shape and data.num_classes to what the data has")
    return first(source, data["limit"]) if split == "train" and data.get("limit") else source


def _autoencoder(config: Mapping[str, Any]):
    from ldm_jax import models
    return choose(models.AUTOENCODERS, config["autoencoder"], "autoencoder", image_shape=tuple(config["data"]["image_shape"]))


def _fields(data: Mapping[str, Any]) -> dict:
    """name -> shape of what the `data` section states beside image and class, in its optional key `fields`."""
    return {name: tuple(shape) for name, shape in sorted((data.get("fields") or {}).items())}


def _conditioners(config: Mapping[str, Any], shape) -> dict:
    """The conditioners of the `conditioners` section, name -> options: a name is a row of CONDITIONERS, or has one as its `kind`."""
    from ldm_jax.systems.conditioners import CONDITIONERS
    from ldm_jax.systems.conditions import Space
    data, out = config["data"], {}
    space = Space(tuple(data["image_shape"]), tuple(shape), data["num_classes"], _fields(data))
    for name, section in (config.get("conditioners") or {}).items():
        options = dict(section or {})
        row = lookup(CONDITIONERS, options.pop("kind", name), "conditioner")
        known = list(inspect.signature(row).parameters)[1:]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise UserError(f"conditioner {name!r} has no option {unknown[0]!r}; it takes: {', '.join(known)}")
        out[name] = row(space, **options)
    return out


def _net(config: Mapping[str, Any], image_shape, conditioners):
    from ldm_jax import models
    from ldm_jax.systems.conditions import needs
    channels = image_shape[-1] * (2 if config["process"].get("learned_variance") else 1)
    sizes, row = needs(conditioners), lookup(models.NETS, config["net"]["name"], "net")
    homeless = sorted(set(sizes) - set(inspect.signature(row).parameters))
    if homeless:
        raise UserError(f"net {config['net']['name']!r} has no {homeless[0]}, which the conditioners {sorted(conditioners)} need")
    return choose(models.NETS, config["net"], "net", image_shape=image_shape, out_channels=channels, **sizes)


def _process(config: Mapping[str, Any], of: str = "") -> dict:
    """The arguments of `systems.base.diffusion` that the `process` section states. of: the name of a schedule that states none."""
    section = dict(config["process"])
    if section["schedule"]["name"] == of:
        return {name: value for name, value in section.items() if name in ("times", "weight")}
    return {**section, "schedule": choose(process.SCHEDULES, section["schedule"], "schedule")}


def pixel(config: Mapping[str, Any]):
    """Diffusion of the pictures themselves."""
    from ldm_jax import systems
    shape = tuple(config["data"]["image_shape"])
    conditioners = _conditioners(config, shape)
    return systems.diffusion(_net(config, shape, conditioners), conditioners=conditioners, image_shape=shape, **_process(config))


def autoencoder(config: Mapping[str, Any]):
    """A first stage."""
    from ldm_jax import models, systems
    from ldm_jax.weights.files import read_arrays
    image_shape = tuple(config["data"]["image_shape"])
    return systems.autoencoding(
        _autoencoder(config), image_shape=image_shape, perceptual=choose_or_none(models.PERCEPTUALS, config["perceptual"], "perceptual"),
        discriminator=choose_or_none(models.DISCRIMINATORS, config["discriminator"], "discriminator", image_shape=image_shape),
        read_arrays=read_arrays, **config["loss"])


def latent(config: Mapping[str, Any]):
    """Diffusion in the latents of the autoencoder that `first_stage` describes."""
    from ldm_jax import models, systems
    first, tile = _autoencoder(config["first_stage"]), config["first_stage"]["autoencoder"].get("tile")
    first = models.tiled(first, tile, overlap=tile // 4) if tile else first
    conditioners = _conditioners(config, first.latent_shape)
    of_pictures = [name for name, conditioner in conditioners.items() if "image" in conditioner.fields]
    if of_pictures and (config.get("latents") or {}).get("cache"):
        raise UserError(f"conditioner {of_pictures[0]!r} is drawn from the pictures, which a cache of latents lacks; "
                        f"set latents.cache=False")
    return systems.latent(_net(config, first.latent_shape, conditioners), first, conditioners=conditioners,
                          image_shape=tuple(config["data"]["image_shape"]), **_process(config))


def classifier(config: Mapping[str, Any]):
    """A classifier of noisy images, for classifier guidance in the space of the pictures."""
    from ldm_jax import models, systems
    settings, shape = _process(config), tuple(config["data"]["image_shape"])
    net = choose(models.CLASSIFIERS, config["classifier"], "classifier", image_shape=shape,
                 num_classes=config["data"]["num_classes"])
    return systems.classifying(net, num_classes=config["data"]["num_classes"],
                               image_shape=shape, schedule=settings["schedule"], times=settings["times"])


def published(config: Mapping[str, Any]):
    """What the published checkpoint in `init_from` holds, trained on from there by the `process` section.

    A schedule of the name "published" leaves the schedule and the parameterization as they are there.
    """
    sections, stated = config.get("conditioners") or {}, tuple(config["data"]["image_shape"])
    unknown = sorted({key for section in sections.values() for key in section} - {"drop"})
    if unknown:
        raise UserError(f"the conditioners of init_from={config['init_from']!r} are its own, and take drop alone; not {unknown[0]!r}")
    training = {**_process(config, of="published"), "drops": {name: s["drop"] for name, s in sections.items() if "drop" in s}}
    pipeline = _published(config, training)
    if pipeline.system.image_shape != stated:
        raise UserError(f"init_from={config['init_from']!r} makes pictures {pipeline.system.image_shape}, the config states {stated}; "
                        f"set data.image_shape")
    return dataclasses.replace(pipeline.system, read=lambda: _published(config, training).params)


def _published(config: Mapping[str, Any], training: Mapping[str, Any]):
    from ldm_jax.pipelines import load_pipeline
    return load_pipeline(config["init_from"], dtype=config.get("dtype") or "float32", size=tuple(config["data"]["image_shape"][:2]),
                         training=training)


SYSTEMS = {"pixel": pixel, "autoencoder": autoencoder, "latent": latent, "classifier": classifier, "published": published}


def build_system(config: Mapping[str, Any]):
    """The system of a whole config; it needs no data, only the shapes that the config states.

    With `init_from` the nets are those of that published checkpoint, and the sections that describe nets do not matter. With a `lora`
    section of a rank above 0 adapters of the nets are trained in place of them.
    """
    system, section = _whole_system(config), config.get("lora") or {"rank": 0}
    if not section["rank"]:
        return system
    from ldm_jax.systems.adapting import adapted
    return adapted(system, **section)


def _whole_system(config: Mapping[str, Any]):
    kind = lookup(SYSTEMS, config["system"], "system")
    if not config.get("init_from"):
        if kind is published:
            raise UserError("init_from is empty; give the directory of a published checkpoint: --config.init_from=DIR")
        return kind(config)
    if kind not in (pixel, latent, published):
        raise UserError(f"init_from={config['init_from']!r} is for a model of diffusion; config.system is {config['system']!r}")
    return published(config)


def sampler_of(config: Mapping[str, Any]) -> dict:
    """The `sampler` section, in which the name and the grid "" are those of the scheduler in `init_from`, or left out without that."""
    section = dict(config.get("sampler") or {})
    if config.get("init_from") and section and not (section["name"] and section["grid"]):
        from ldm_jax.pipelines import sampler_settings
        theirs = sampler_settings(config["init_from"])
        if not section["name"]:
            section.update({"name": theirs["name"], theirs["name"]: {**(section.get(theirs["name"]) or {}), **theirs[theirs["name"]]}})
        section["grid"] = section["grid"] or theirs["grid"]
    return {key: value for key, value in section.items() if value != ""}


def build_sampler(section: Mapping[str, Any]) -> process.Sampler:
    """The sampling method of a `sampler` section. Built before training too, so that a mistake in it is known before hours are spent."""
    if isinstance(section["grid"], str):
        lookup(process.GRIDS, section["grid"], "grid")
    return process.samplers.make_sampler(section["name"], **dict(section.get(section["name"]) or {}))


def build_mesh(section: Mapping[str, Any]):
    """(mesh, rules) of a `mesh` section."""
    from ldm_jax.parallel.sharding import make_mesh
    axes = dict(section)
    rules = axes.pop("rules", ())
    return make_mesh(**axes), rules


def batch_fields(config: Mapping[str, Any], system) -> dict:
    """name -> (shape, dtype) of one example of what the config's run is trained on; it needs no data."""
    data, cached = config["data"], (config.get("latents") or {}).get("cache")
    fields = {name: (shape, "float32") for name, shape in _fields(data).items() if name != "text"}
    if data["num_classes"] is not None:
        fields["class"] = ((), "int32")
    for conditioner in system.conditioners.values():
        if conditioner.tokens is not None:
            fields.update({name: (a.shape[1:], str(a.dtype)) for name, a in conditioner.tokens([""]).items()})
    if not cached:
        return {"image": (tuple(data["image_shape"]), "uint8"), **fields}
    autoencoder = system.nets["autoencoder"]
    names = ("mean",) if autoencoder.codes else ("mean", "logvar")
    return {**{name: (tuple(autoencoder.latent_shape), "float16") for name in names}, **fields}


def build_optimizer(config: Mapping[str, Any], trained: Sequence[str]):
    """The optax transformation of a config's `optimizer` section, and of its `optimizers`: net's name -> its own section."""
    from ldm_jax.training.state import by_name, learning_rate, optimizer

    def build(section):
        rate = learning_rate(section["learning_rate"], steps=config["train"]["steps"], warmup_steps=section["warmup_steps"],
                             decay=section["decay"])
        return optimizer(section["name"], rate, clip_norm=section["clip_norm"], **dict(section.get(section["name"]) or {}))

    special = {name: build(section) for name, section in (config.get("optimizers") or {}).items() if name in trained}
    return by_name(build(config["optimizer"]), special)


def cifar10_or_shapes() -> dict:
    """The choice of data for smoke runs: CIFAR-10 where a prepared copy is found (where TFDS keeps its data, or in
    ../shared/data/tfds beside a checkout), otherwise drawn shapes of the same size and number of classes."""
    from ldm_jax.data.directories import data_dirs, find
    beside = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "..", "shared", "data", "tfds")
    for directory in (None, os.path.normpath(beside)):
        if find("cifar10", data_dirs(directory)):
            return dict(name="tfds", tfds=dict(name="cifar10", data_dir=directory))
    return dict(name="shapes", shapes=dict(size=32))


FREE = ("train.steps", "train.log_every", "train.save_every", "train.keep", "train.keep_every", "train.keep_best",
        "train.averages.every", "train.steps_per_dispatch", "sampler", "eval", "mesh", "latents", "data.tfds.data_dir",
        "data.folder.path", "data.num_workers")

ABSENT = {"init_dir": "", "init_part": "", "train.averages": {"stds": []}}  # what a key means to a run from before there was that key


def changed(old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str] = FREE, prefix: str = "") -> list:
    """Keys, dotted, whose values differ between two configs, but for those in `free`, which a run, or its first stage, may change on
    its way."""
    out = []
    for key in sorted({*old, *new}):
        name = prefix + key
        short = name.removeprefix("first_stage.")
        if short in free:
            continue
        a, b = (config.get(key, ABSENT.get(short)) for config in (old, new))
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += changed(a, b, free, name + ".")
        elif a != b:
            out.append(f"{name} ({a!r} there, {b!r} now)")
    return out
