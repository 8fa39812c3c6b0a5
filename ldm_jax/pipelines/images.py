"""Published pipelines without text: of pixels and of latents, unconditional or told a class."""
import dataclasses
from typing import Mapping

from ldm_jax.pipelines.source import Source
from ldm_jax.pipelines.wiring import wired
from ldm_jax.sampling import Pipeline
from ldm_jax.systems.conditioners import class_label
from ldm_jax.systems.conditions import Conditioner, Space
from ldm_jax.types import UserError


def _none(space: Space) -> Mapping[str, Conditioner]:
    return {}


def _plain(source: Source, steps: int) -> Pipeline:
    net, params = source.net("unet")
    return wired(source.sampling(), net, params, None, _none, steps=steps, size=source.size)


def ddpm(source: Source) -> Pipeline:
    """DDPMPipeline: a U-Net on pixels."""
    return _plain(source, 1000)


def ddim(source: Source) -> Pipeline:
    """DDIMPipeline: a U-Net on pixels, or any other by whatever scheduler it has."""
    return _plain(source, 50)


def ldm(source: Source) -> Pipeline:
    """LDMPipeline: a U-Net on the latents of a first stage."""
    net, params = source.net("unet")
    return wired(source.sampling(), net, params, source.net("vqvae"), _none, steps=50, size=source.size)


def dit(source: Source) -> Pipeline:
    """DiTPipeline: a transformer on the latents of a first stage, told the class."""
    net, params = source.net("transformer")
    if source.size:
        raise UserError(f"size={source.size}: a transformer makes pictures of the size that it was trained on; leave it out")
    labels = source.index.get("id2label") or {}
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    return wired(source.sampling(), net, params, source.net("vae"), steps=50, guidance=4.0, class_names=names,
                 conditioners=lambda space: {"class": class_label(dataclasses.replace(space, num_classes=net.num_classes))})
