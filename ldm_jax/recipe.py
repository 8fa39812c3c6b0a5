"""The door: what a config says, as objects. Beyond this file nothing sees a config.

A choice is a section {"name": NAME, NAME: {its options}}: the other rows' options may stand beside it, so that
`--config.net.name=dit` is all it takes to switch.
"""
import os
from typing import Any, Mapping, Sequence

from ldm_jax import process
from ldm_jax.types import UserError, lookup


def choose(table: Mapping[str, Any], choice: Mapping[str, Any], kind: str, **more: Any) -> Any:
    """table[name](**options of that name, **more)."""
    make = lookup(table, choice["name"], kind)
    return make(**{**dict(choice.get(choice["name"]) or {}), **more})


def build_source(data: Mapping[str, Any], split: str):
    """The split of the data source that the `data` section names.

    Raises:
      UserError: when its pictures or classes are not those that the config states.
    """
    from ldm_jax.data.sources import SOURCES
    source = choose(SOURCES, data, "data source", split=split)
    stated = tuple(data["image_shape"]), data["num_classes"]
    if stated != (source.image_shape, source.num_classes if data["num_classes"] is not None else None):
        raise UserError(f"data {source.name!r} has images {source.image_shape} in {source.num_classes} classes, the config states "
                        f"{stated[0]} in {stated[1]}; set data.image_shape and data.num_classes to what the data has")
    return source


def _autoencoder(config: Mapping[str, Any]):
    from ldm_jax import models
    return choose(models.AUTOENCODERS, config["autoencoder"], "autoencoder", image_shape=tuple(config["data"]["image_shape"]))


def _net(config: Mapping[str, Any], image_shape):
    from ldm_jax import models
    channels = image_shape[-1] * (2 if config["process"].get("learned_variance") else 1)
    return choose(models.NETS, config["net"], "net", image_shape=image_shape, num_classes=config["data"]["num_classes"],
                  out_channels=channels)


def _process(config: Mapping[str, Any]) -> dict:
    section = dict(config["process"])
    return {**section, "schedule": choose(process.SCHEDULES, section["schedule"], "schedule"),
            "image_shape": tuple(config["data"]["image_shape"]), "num_classes": config["data"]["num_classes"]}


def pixel(config: Mapping[str, Any]):
    """Diffusion of the pictures themselves."""
    from ldm_jax import systems
    return systems.diffusion(_net(config, tuple(config["data"]["image_shape"])), **_process(config))


def autoencoder(config: Mapping[str, Any]):
    """A first stage."""
    from ldm_jax import systems
    return systems.autoencoding(_autoencoder(config), image_shape=tuple(config["data"]["image_shape"]), **config["loss"])


def latent(config: Mapping[str, Any]):
    """Diffusion in the latents of the autoencoder that `first_stage` describes."""
    from ldm_jax import systems
    first = _autoencoder(config["first_stage"])
    return systems.latent(_net(config, first.latent_shape), first, **_process(config))


SYSTEMS = {"pixel": pixel, "autoencoder": autoencoder, "latent": latent}


def build_system(config: Mapping[str, Any]):
    """The system of a whole config; it needs no data, only the shapes that the config states."""
    return lookup(SYSTEMS, config["system"], "system")(config)


def build_sampler(section: Mapping[str, Any]) -> process.Sampler:
    """The sampling method of a `sampler` section. Built before training too, so that a mistake in it is known before hours are spent."""
    lookup(process.GRIDS, section["grid"], "grid")
    return process.samplers.make_sampler(section["name"], **dict(section.get(section["name"]) or {}))


def build_optimizer(config: Mapping[str, Any], steps: int):
    """The optax transformation of an `optimizer` section for a run of `steps`."""
    from ldm_jax.training.state import learning_rate, optimizer
    section = dict(config)
    rate = learning_rate(section.pop("learning_rate"), steps=steps, warmup_steps=section.pop("warmup_steps"), decay=section.pop("decay"))
    name = section.pop("name")
    return optimizer(name, rate, clip_norm=section.pop("clip_norm"), **dict(section.get(name) or {}))


def cifar10_or_shapes() -> dict:
    """The choice of data for smoke runs: CIFAR-10 where a prepared copy is found (where TFDS keeps its data, or in
    ../shared/data/tfds beside a checkout), otherwise drawn shapes of the same size and number of classes."""
    from ldm_jax.data.directories import data_dirs, find
    beside = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "..", "shared", "data", "tfds")
    for directory in (None, os.path.normpath(beside)):
        if find("cifar10", data_dirs(directory)):
            return dict(name="tfds", tfds=dict(name="cifar10", data_dir=directory))
    return dict(name="shapes", shapes=dict(size=32))


FREE = ("train.steps", "train.log_every", "train.save_every", "train.keep", "sampler", "eval", "mesh", "data.tfds.data_dir",
        "data.folder.path")


def changed(old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str] = FREE, prefix: str = "") -> list:
    """Keys, dotted, whose values differ between two configs, but for those in `free`, which a run may change on its way."""
    out = []
    for key in sorted({*old, *new}):
        name, a, b = prefix + key, old.get(key), new.get(key)
        if name in free:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += changed(a, b, free, name + ".")
        elif a != b:
            out.append(f"{name} ({a!r} there, {b!r} now)")
    return out
