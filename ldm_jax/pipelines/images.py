"""Published pipelines without text: of pixels and of latents, unconditional or told a class."""
import dataclasses
from typing import Callable, Mapping, Optional, Tuple

from ldm_jax.models.net import Net
from ldm_jax.pipelines.source import Source
from ldm_jax.pipelines.wiring import wired
from ldm_jax.published import CLASSES
from ldm_jax.sampling import Pipeline
from ldm_jax.systems.conditioners import class_label
from ldm_jax.systems.conditions import Conditioner, Space


def _told_classes(net: Net, count: Optional[int]) -> Tuple[Net, Callable[[Space], Mapping[str, Conditioner]]]:
    """(the net, its conditioners): the class, where it is told one. count: how many of its classes are real, the next being null."""
    if not net.num_classes:
        return net, lambda space: {}
    if count:
        net = dataclasses.replace(net, num_classes=count, class_kind="null")
    drop = {} if net.class_kind == "null" else {"drop": 0.0}
    return net, lambda space: {"class": class_label(dataclasses.replace(space, num_classes=net.num_classes), **drop)}


def _u_net(source: Source, steps: int, first_stage: Optional[str] = None) -> Pipeline:
    net, params = source.net("unet")
    net, conditioners = _told_classes(net, source.index.get(CLASSES))
    return wired(source.sampling(), net, params, first_stage and source.net(first_stage), conditioners, steps=steps, size=source.size)


def ddpm(source: Source) -> Pipeline:
    """DDPMPipeline: a U-Net on pixels."""
    return _u_net(source, 1000)


def ddim(source: Source) -> Pipeline:
    """DDIMPipeline: a U-Net on pixels, or any other by whatever scheduler it has."""
    return _u_net(source, 50)


def ldm(source: Source) -> Pipeline:
    """LDMPipeline: a U-Net on the latents of a first stage."""
    return _u_net(source, 50, "vqvae")


def dit(source: Source) -> Pipeline:
    """DiTPipeline: a transformer on the latents of a first stage, or on pixels where there is none, told the class."""
    net, params = source.net("transformer")
    net, conditioners = _told_classes(net, source.index.get(CLASSES))
    labels = source.index.get("id2label") or {}
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    first_stage = source.net("vae") if source.has("vae") else None
    return wired(source.sampling(), net, params, first_stage, conditioners, steps=50, guidance=4.0, class_names=names,
                 size=source.size)
