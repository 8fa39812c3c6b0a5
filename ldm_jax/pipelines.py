"""Published pipelines: `load_pipeline(directory)` wires the components that a model_index.json names into a Pipeline.

    model_index.json                {"_class_name": ..., component: [library, class], ...}
    COMPONENT/config.json ...       each component in a directory of its own, or all beside model_index.json
    scheduler/scheduler_config.json how it is sampled
"""
import dataclasses
import functools
import json
import os
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import jax.numpy as jnp

from ldm_jax import process
from ldm_jax.data.text import load_tokenizer
from ldm_jax.models.net import Net
from ldm_jax.process import tabled, thresholding
from ldm_jax.process.samplers import grid_times
from ldm_jax.published import load_net
from ldm_jax.sampling import Pipeline
from ldm_jax.systems import System
from ldm_jax.systems.base import diffusion
from ldm_jax.systems.conditioners import class_label
from ldm_jax.systems.conditions import Conditioner, Space
from ldm_jax.systems.latent import latent
from ldm_jax.systems.prompts import prompt
from ldm_jax.types import Array, PyTree, UserError, lookup
from ldm_jax.weights.schedulers import Sampling, read_scheduler

INDEX, SCHEDULER = "model_index.json", "scheduler_config.json"


@dataclasses.dataclass(frozen=True)
class Stepped(Net):
    """A Net that is told its scheduler's step k = t T - 1: "round", "floor", or "exact" for what lies between too."""
    rounding: str = "round"

    def module_time(self, t: Array) -> Array:
        k = jnp.asarray(t, jnp.float32) * self.timesteps - 1.0
        return {"round": jnp.round, "floor": lambda k: jnp.floor(k + 1e-3), "exact": lambda k: k}[self.rounding](k)


def schedule_and_grid(sampling: Sampling) -> Tuple[process.Schedule, Callable]:
    """The process of a published scheduler and the times that it visits, a function like the rows of GRIDS."""
    if sampling.spacing == "flow":
        grid = functools.partial(tabled.flow_grid, timesteps=sampling.steps, shift=sampling.shift)
        return process.SCHEDULES["rectified_flow"](), grid
    options = {"trailing": {}, "leading": dict(offset=sampling.offset, endpoint=sampling.endpoint),
               "linspace": dict(endpoint=sampling.endpoint, rounded=sampling.rounded)}[sampling.spacing]
    grid = functools.partial(tabled.published_grid, spacing=sampling.spacing, levels=sampling.levels, last=sampling.last,
                             whole_table=sampling.whole_table, **options)
    return tabled.from_ratios(sampling.abar, sampling.log_between), grid


def told(net: Net, sampling: Sampling) -> Net:
    """The net with the time that its scheduler tells it."""
    fields = {f.name: getattr(net, f.name) for f in dataclasses.fields(Net)}
    if sampling.spacing == "flow":
        return Net(**{**fields, "timesteps": None, "time_scale": float(sampling.steps)})
    if net.timesteps is None:
        raise UserError("the net takes a noise level for its time and its scheduler has integer steps; they do not fit together")
    return Stepped(**{**fields, "timesteps": sampling.steps}, rounding=sampling.time)


def published(system: System, schedule: process.Schedule, sampling: Sampling) -> System:
    """`system`, started from the noise and with the limits on x0 that the scheduler has, whatever sampler is chosen."""
    def limited(denoise):
        if sampling.threshold is not None:
            quantile, maximum = sampling.threshold
            return thresholding.dynamic_threshold(denoise, quantile=quantile, maximum=maximum)
        return denoise if sampling.clip is None else thresholding.static_clip(denoise, sampling.clip)

    def sample(params, x, keys, cond, *, sampler, steps, capacity, grid="uniform", **options):
        start = 1.0
        if sampling.scaled_start:
            start = schedule.sigma(grid_times(grid, schedule, steps, capacity)[0])
        method = sampler._replace(step=lambda denoise, *rest: sampler.step(limited(denoise), *rest))
        x = x * (start / schedule.sigma(jnp.float32(1.0)))  # what the system multiplies by
        return system.sample(params, x, keys, cond, sampler=method, steps=steps, capacity=capacity, grid=grid, **options)

    return dataclasses.replace(system, sample=sample)


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint's directory, its index, and how its components are read."""
    directory: str
    index: Mapping[str, Any]
    options: Mapping[str, Any]

    def place(self, name: str) -> str:
        """The directory of a component: its own, or the checkpoint's where there is none."""
        own = os.path.join(self.directory, name)
        return own if os.path.isdir(own) else self.directory

    def net(self, name: str, **options: Any) -> Tuple[Any, PyTree]:
        return load_net(self.place(name), **self.options, **options)

    def text(self, *names: str) -> Tuple[Dict[str, Any], Dict[str, PyTree], Dict[str, Callable]]:
        """(towers, parameters, tokenisers) by the towers' names, for "text_encoder" and the like."""
        read = {"dtype": self.options["dtype"], "variant": self.options["variant"]}
        found = {name: load_net(self.place(name), **read) for name in names}
        tokenizers = {name: load_tokenizer(self.place(name.replace("text_encoder", "tokenizer"))) for name in names}
        return {name: net for name, (net, _) in found.items()}, {name: params for name, (_, params) in found.items()}, tokenizers


def _sampled(source: Source) -> Tuple[Sampling, process.Schedule, Callable]:
    sampling = read_scheduler(source.place("scheduler"))
    return sampling, *schedule_and_grid(sampling)


def _wired(source: Source, net: Net, params: PyTree, autoencoder: Optional[Tuple[Any, PyTree]], conditioners: Callable, *,
           steps: int, guidance: float = 1.0, others: Mapping[str, Tuple[Any, PyTree]] = {},
           class_names: Tuple[str, ...] = ()) -> Pipeline:
    """The Pipeline of a net, with the latents of `autoencoder` where there is one.

    conditioners: Space -> name -> conditioner. others: what they use, name -> (net, parameters).
    """
    sampling, schedule, grid = _sampled(source)
    net, C = told(net, sampling), net.image_shape[-1]
    if net.out_channels not in (C, 2 * C):
        raise UserError(f"the net gives {net.out_channels} channels for x_t of {C}; it must be as many, or twice that where it "
                        f"learns a variance")
    learned = net.out_channels == 2 * C
    if sampling.options.get("variance") == "learned" and not learned:
        raise UserError("the scheduler has variance_type='learned_range' and the net gives no variance")
    options = dict(schedule=schedule, parameterization=sampling.target, learned_variance=learned)
    weights = {"net": params, **{name: p for name, (_, p) in others.items()}}
    if autoencoder is None:
        space = Space(net.image_shape, net.image_shape)
        system = diffusion(net, image_shape=net.image_shape, conditioners=conditioners(space), **options)
    else:
        coder, weights["autoencoder"] = autoencoder
        h, w, c = net.image_shape
        shape = (h * coder.factor, w * coder.factor, coder.image_shape[-1])
        coder = dataclasses.replace(coder, image_shape=shape, latent_shape=(h, w, coder.latent_shape[-1]))
        system = latent(net, coder, image_shape=shape, conditioners=conditioners(Space(shape, net.image_shape)), **options)
        scale, shift = (jnp.broadcast_to(jnp.asarray(a, jnp.float32), (c,)) for a in (coder.scale, coder.shift))
        weights["latent"] = {"shift": shift, "scale": 1.0 / scale}
    system = published(system, schedule, sampling)
    system = dataclasses.replace(system, nets={**system.nets, **{name: n for name, (n, _) in others.items()}})
    defaults = {"name": sampling.sampler, "steps": min(steps, sampling.steps), "grid": grid, "guidance": guidance,
                "batch_size": 8, sampling.sampler: dict(sampling.options)}
    return Pipeline(system, weights, defaults, class_names)


def _none(space: Space) -> Mapping[str, Conditioner]:
    return {}


def _plain(source: Source, steps: int) -> Pipeline:
    net, params = source.net("unet")
    return _wired(source, net, params, None, _none, steps=steps)


def ddpm(source: Source) -> Pipeline:
    """DDPMPipeline: a U-Net on pixels."""
    return _plain(source, 1000)


def ddim(source: Source) -> Pipeline:
    """DDIMPipeline: a U-Net on pixels, or any other by whatever scheduler it has."""
    return _plain(source, 50)


def ldm(source: Source) -> Pipeline:
    """LDMPipeline: a U-Net on the latents of a first stage."""
    net, params = source.net("unet")
    return _wired(source, net, params, source.net("vqvae"), _none, steps=50)


def dit(source: Source) -> Pipeline:
    """DiTPipeline: a transformer on the latents of a first stage, told the class."""
    net, params = source.net("transformer")
    labels = source.index.get("id2label") or {}
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    return _wired(source, net, params, source.net("vae"), steps=50, guidance=4.0, class_names=names, conditioners=lambda space: {
        "class": class_label(dataclasses.replace(space, num_classes=net.num_classes))})


def stable_diffusion(source: Source) -> Pipeline:
    """StableDiffusionPipeline, versions 1 and 2."""
    net, params = source.net("unet")
    towers, weights, tokenizers = source.text("text_encoder")
    conditioner = prompt(towers, tokenizers, weights, needs={"context_dim": net.context_dim})
    return _wired(source, net, params, source.net("vae"), lambda space: {"prompt": conditioner}, steps=50, guidance=7.5,
                  others={name: (towers[name], weights[name]) for name in towers})


def stable_diffusion_xl(source: Source) -> Pipeline:
    """StableDiffusionXLPipeline: two text towers, and the size of the picture as numbers."""
    net, params = source.net("unet")
    towers, weights, tokenizers = source.text("text_encoder", "text_encoder_2")
    coder = source.net("vae")
    H, W = (n * coder[0].factor for n in net.image_shape[:2])
    conditioner = prompt(towers, tokenizers, weights, needs={"context_dim": net.context_dim, "vector_dim": net.vector_dim},
                         penultimate=True, time_ids=(H, W, 0, 0, H, W),
                         zero_null=source.index.get("force_zeros_for_empty_prompt", True))
    return _wired(source, net, params, coder, lambda space: {"prompt": conditioner}, steps=50, guidance=5.0,
                  others={name: (towers[name], weights[name]) for name in towers})


# what judges pictures or marks them after they are made is not run
_UNUSED = ("safety_checker", "requires_safety_checker", "feature_extractor", "image_encoder", "add_watermarker")
# class in model_index.json -> (reader, its components, the other entries that it may have)
PIPELINES = {
    "DDPMPipeline": (ddpm, ("unet", "scheduler"), ()),
    "DDIMPipeline": (ddim, ("unet", "scheduler"), ()),
    "LDMPipeline": (ldm, ("vqvae", "unet", "scheduler"), ()),
    "DiTPipeline": (dit, ("transformer", "vae", "scheduler"), ("id2label",)),
    "StableDiffusionPipeline": (stable_diffusion, ("vae", "text_encoder", "tokenizer", "unet", "scheduler"), _UNUSED),
    "StableDiffusionXLPipeline": (
        stable_diffusion_xl, ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler"),
        (*_UNUSED, "force_zeros_for_empty_prompt")),
}


def is_published(directory: str) -> bool:
    """Whether a directory has a model_index.json, or a scheduler with its net."""
    return any(os.path.isfile(os.path.join(os.path.expanduser(directory), name)) for name in (INDEX, SCHEDULER))


def load_pipeline(directory: str, *, dtype: str = "float32", variant: Optional[str] = None, **overrides: Any) -> Pipeline:
    """The Pipeline of a published checkpoint's directory, which samples as its scheduler says.

    Its x_init is the noise N(0, I) that is diffused, latents where it has a first stage. cond: class ids for DiT; prompts for
    Stable Diffusion, or {"prompt": texts, "negative": texts}. What a safety checker would say of the pictures is not asked.

    Where a scheduler moves x by other strides than those between the steps it asks its net at (DDIM and PNDM with "linspace", or
    with "trailing" where the number of steps does not divide T), the pictures here are those of the steps that are asked at.

    Args:
      directory: with model_index.json, or a net's with scheduler_config.json beside its config.json.
      dtype: of the computation, see `published.load_net`. variant: of the files, such as "fp16".
      overrides: in place of the sampler's settings: name, steps, guidance, grid, batch_size.

    Raises:
      UserError: for a pipeline that is not known, missing or damaged files, and options that are not supported.
    """
    directory = os.path.expanduser(os.fspath(directory))
    index = _index(directory)
    kind = index.get("_class_name")
    reader, components, others = lookup(PIPELINES, kind, "published pipeline")
    given = {name for name in index if not name.startswith("_")}
    missing = sorted(name for name in set(components) if name not in given or not index[name] or None in index[name])
    if missing:
        raise UserError(f"{directory!r} has no {missing[0]!r}, which a {kind} needs; download the whole checkpoint")
    unknown = sorted(given - set(components) - set(others))
    if unknown:
        raise UserError(f"the {INDEX} of this {kind} has entries that are not supported: {', '.join(unknown)}")
    pipeline = reader(Source(directory, index, {"dtype": dtype, "variant": variant}))
    settings = {"name", "steps", "guidance", "grid", "batch_size"}
    if extra := sorted(set(overrides) - settings):
        raise UserError(f"unknown override {extra[0]!r}; choose from: {', '.join(sorted({*settings, 'dtype', 'variant'}))}")
    return dataclasses.replace(pipeline, defaults={**pipeline.defaults, **overrides})


def _index(directory: str) -> Mapping[str, Any]:
    path = os.path.join(directory, INDEX)
    if not os.path.isfile(path):  # a net and its scheduler alone
        return {"_class_name": "DDIMPipeline", "unet": ("diffusers", "UNet2DModel"), "scheduler": ("diffusers", "scheduler")}
    try:
        with open(path, encoding="utf-8") as file:
            index = json.load(file)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}") from e
    if not isinstance(index, dict):
        raise UserError(f"cannot read {path}: not a JSON object")
    return index
