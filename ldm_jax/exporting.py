"""A Pipeline as a directory that diffusers opens, and `ldm_jax.load` as well.

What a published directory cannot say is put into its weights, exactly:

    time        a scheduler tells its net k = T t - 1; one that was trained on T t = k + 1 has its first matrix of the time turned by
                one step, for (cos w(k + 1), sin w(k + 1)) is (cos wk, sin wk) turned by the angle w
    latents     x0 = (z - shift) / scale, channel by channel, goes into the 1x1 convolutions around the latent and into the codebook
    classes     diffusers' DiTPipeline takes 1000 for the null class: a smaller table is filled up with copies of the null
"""
import dataclasses
import json
import os
from typing import Any, Dict, Mapping, Optional, Tuple

import jax.numpy as jnp
import numpy as np

from ldm_jax import paths
from ldm_jax.models import lora
from ldm_jax.models.autoencoder import Autoencoder
from ldm_jax.models.clip import TextTower
from ldm_jax.models.dit import DiT
from ldm_jax.models.net import Net
from ldm_jax.models.unet import UNet
from ldm_jax.published import CLASSES, Published, arguments_of, save_net
from ldm_jax.types import Array, PyTree, UserError
from ldm_jax.weights.rules import flatten, unflatten
from ldm_jax.weights.scheduler_configs import flow_config, vp_config

STEPS, NULL = 1000, 1000  # of the schedulers, and DiTPipeline's null class
CLIP = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}  # beside a vocabulary as CLIP's authors have it
WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt", ".onnx", ".msgpack")


def save_pretrained(pipeline: Any, directory: str) -> Optional[str]:
    """Write `pipeline` as a directory in the layout of diffusers; see the head of this file. Returns what it could not say, or None.

    A first stage is one component, which AutoencoderKL.from_pretrained or VQModel.from_pretrained opens. A model becomes the
    pipeline that its parts make; where diffusers has none that passes on a class, its parts are opened and called by themselves.

    Raises:
      UserError: for what has no counterpart, and for a directory that holds something already.
    """
    directory = paths.expand(directory).rstrip(os.sep)
    if paths.exists(directory) and (not paths.isdir(directory) or paths.listdir(directory)):
        raise UserError(f"{directory!r} is there already and not empty; give the name of a new directory")
    with paths.new_directory(directory, "model_index.json") as partial:
        return _write(pipeline, partial)


def _write(pipeline: Any, directory: str) -> Optional[str]:
    if pipeline.system.adapter_scale is not None:
        params = dict(pipeline.params)
        params = lora.merge_all(params, lora.Lora(params.pop("lora"), pipeline.system.adapter_scale))
        pipeline = dataclasses.replace(pipeline, params=params)
    nets = {name: pair for name, pair in pipeline.nets.items() if isinstance(pair[0], (Net, Autoencoder, TextTower))}
    if pipeline.system.reconstruct is not None:
        save_net(directory, *nets["autoencoder"])
        return None
    if pipeline.system.sample is None:
        raise UserError("a classifier of noisy images has no counterpart in diffusers and cannot be exported")
    published, lost = (pipeline.published, None) if pipeline.published else described(pipeline)
    nets = nets if pipeline.published else prepared(pipeline, nets)
    if published.kind == "DiTPipeline":
        nets["net"] = filled(*nets["net"])
    index = {"_class_name": published.kind, **published.entries}
    for name, component in published.components.items():
        save_net(os.path.join(directory, component), *nets[name])
        index[component] = _class_of(os.path.join(directory, component))
    for component, (source, entry) in published.copied.items():
        _copy(source, os.path.join(directory, component))
        bare = os.path.join(directory, component, "tokenizer_config.json")
        if entry[1] == "CLIPTokenizer" and not os.path.exists(bare):
            _json(bare, CLIP)
        index[component] = list(entry)
    for component, config in published.configs.items():
        os.makedirs(os.path.join(directory, component))
        _json(os.path.join(directory, component, "scheduler_config.json"), config)
        index[component] = ["diffusers", config["_class_name"]]
    _json(os.path.join(directory, "model_index.json"), index)
    return lost


def _class_of(component: str) -> Tuple[str, str]:
    with open(os.path.join(component, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    return ("diffusers", config["_class_name"]) if "_class_name" in config else ("transformers", config["architectures"][0])


def _copy(source: str, target: str) -> None:
    """The small files of a tokeniser or a scheduler."""
    os.makedirs(target)
    for name in paths.listdir(source):
        path = os.path.join(source, name)
        if not name.endswith((*WEIGHTS, ".index.json")) and name not in ("model_index.json", "config.json") and paths.isfile(path):
            with open(os.path.join(target, name), "wb") as file:
                file.write(paths.read_bytes(path))


def _json(path: str, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)


def described(pipeline: Any) -> Tuple[Published, Optional[str]]:
    """What the directory of a run of ours holds, and what it cannot say of how the run is sampled.

    Raises:
      UserError: for a process or conditions that published pipelines do not have.
    """
    system, defaults = pipeline.system, pipeline.defaults
    extra = sorted(set(system.nets) - {"net", "autoencoder", "latent"})
    if extra:
        raise UserError(f"a model with {extra[0]!r} can be exported where it keeps the process of the published directory that it came "
                        f"from; this one has a process of its own, or came from a file")
    (net, _), first = pipeline.nets["net"], "autoencoder" in system.nets
    method = defaults["name"], dict(defaults.get(defaults["name"]) or {}), defaults["grid"]
    if system.schedule.family == "flow":
        config, lost = flow_config(system.parameterization, method[0], method[2])
    elif system.schedule.family == "vp":
        T = steps_of(system.schedule)
        abar = np.asarray(system.schedule.alpha(jnp.arange(1, T + 1, dtype=jnp.float32) / T), np.float64) ** 2
        config, lost = vp_config(abar, system.parameterization, *method, system.learned_variance)
    else:
        raise UserError(f"the schedule {system.schedule.name!r} has no counterpart in diffusers; variance-preserving ones and "
                        f"rectified flow have")
    transformer = isinstance(net.module, DiT)
    if transformer:
        kind, components = "DiTPipeline", {"net": "transformer", "autoencoder": "vae"}
    elif first:
        kind, components = "LDMPipeline", {"net": "unet", "autoencoder": "vqvae"}
    else:
        kind, components = "DDIMPipeline" if config["_class_name"] == "DDIMScheduler" else "DDPMPipeline", {"net": "unet"}
    entries = {"vae": [None, None]} if transformer and not first else {}
    if system.num_classes:
        entries[CLASSES] = system.num_classes
    if transformer and pipeline.class_names:
        entries["id2label"] = {str(i): name for i, name in enumerate(pipeline.class_names)}
    if not first:
        components.pop("autoencoder", None)
    return Published(kind, components, configs={"scheduler": config}, entries=entries), lost


def steps_of(schedule: Any) -> int:
    """T of the scheduler."""
    return schedule.timesteps or STEPS


def prepared(pipeline: Any, nets: Mapping[str, Tuple[Any, PyTree]]) -> Dict[str, Tuple[Any, PyTree]]:
    """The nets of a run as they are published, see the head of this file."""
    nets, system = dict(nets), pipeline.system
    net, params = nets["net"]
    params = told(net, params, None if system.schedule.family == "flow" else steps_of(system.schedule))
    nets["net"] = net, params
    if "autoencoder" in nets:
        nets["autoencoder"] = normalised(*nets["autoencoder"], pipeline.params["latent"])
    return nets


def told(net: Net, params: PyTree, T: Optional[int]) -> PyTree:
    """The parameters with which a net that takes its time in another unit takes a scheduler's: k = T t - 1, or 1000 t for T None.

    Raises:
      UserError: for a unit that a turn by one step does not lead to.
    """
    theirs = STEPS if T is None else T
    if T is not None and net.timesteps == T and getattr(net, "unit", 1.0) == 1.0:
        return params
    arguments = arguments_of(net, params)
    time = arguments["time"] if isinstance(net.module, UNet) else dict(order="cos_sin", shift=arguments["time_shift"])
    if net.timesteps is not None or net.time_scale != theirs or time.get("kind", "sinusoids") != "sinusoids":
        raise UserError(f"the net takes its time as timesteps={net.timesteps}, time_scale={net.time_scale:g}; to be exported with this "
                        f"process it must be one of {f'timesteps={T} and ' if T else ''}time_scale={theirs}")
    if T is None:
        return params
    flat = flatten(params)
    for path in [path for path in flat if path.split("/")[-2:] == ["time_1", "kernel"]]:
        flat[path] = turned(flat[path], **{key: time[key] for key in ("order", "shift") if key in time})
    return unflatten(flat)


def turned(kernel: Array, order: str = "sin_cos", shift: Optional[float] = None) -> Array:
    """The matrix K' [..., dim, D] for which emb(k) K' = emb(k + 1) K, emb being `models.layers.timestep_embedding`."""
    kernel = np.asarray(kernel, np.float64)
    dim = kernel.shape[-2]
    half = dim // 2
    w = 10000.0 ** -(np.arange(half) / (half - ((0 if order == "cos_sin" else 1) if shift is None else shift)))
    parts = [kernel[..., :half, :], kernel[..., half:2 * half, :]]
    cos, sin = parts if order == "cos_sin" else parts[::-1]
    c, s = np.cos(w)[:, None], np.sin(w)[:, None]
    parts = [c * cos + s * sin, c * sin - s * cos]
    rest = kernel[..., 2 * half:, :]
    return np.concatenate([*(parts if order == "cos_sin" else parts[::-1]), rest], -2).astype(np.float32)


def filled(net: Net, params: PyTree) -> Tuple[Net, PyTree]:
    """A transformer's table of classes with copies of the null class up to DiTPipeline's, where it is smaller."""
    if not net.num_classes or net.num_classes >= NULL:
        return net, params

    def fill(table):
        return np.concatenate([table, np.repeat(np.asarray(table)[-1:], NULL + 1 - len(table), 0)])

    flat = {path: fill(a) if path.split("/")[-2:] == ["class", "embedding"] else a for path, a in flatten(params).items()}
    return dataclasses.replace(net, num_classes=NULL), unflatten(flat)


def normalised(coder: Autoencoder, params: PyTree, statistics: Mapping[str, Array]) -> Tuple[Autoencoder, PyTree]:
    """The first stage whose latents are (z - shift) / scale.

    Raises:
      UserError: for one without its 1x1 convolutions, and for a codebook whose channels have several scales.
    """
    scale, shift = (np.asarray(statistics[name], np.float64) for name in ("scale", "shift"))
    if coder.codes and np.ptp(scale) > 1e-6 * np.max(scale):
        raise UserError(f"the latents of a codebook have the scales {scale.round(4).tolist()}; the nearest code is the same under one "
                        f"scale alone, so this run cannot be exported")
    if not all(name in params for name in ("quant_in", "quant_out")):
        raise UserError("an autoencoder built with quant=False has no place for the scale of its latents; it cannot be exported")
    spread = [] if coder.codes else [-2 * np.log(scale)]
    inward, outward = params["quant_in"], params["quant_out"]
    gain = np.concatenate([1 / scale, *(np.ones_like(scale) for _ in spread)])
    kernel, bias = np.asarray(inward["kernel"]) * gain, np.asarray(inward["bias"]) * gain
    bias = bias + np.concatenate([-shift / scale, *spread])
    out = {**params, "quant_in": {"kernel": kernel, "bias": bias},
           "quant_out": {"kernel": np.asarray(outward["kernel"]) * scale[:, None],
                         "bias": np.asarray(outward["bias"]) + shift @ np.asarray(outward["kernel"], np.float64)}}
    if coder.codes:
        out["codebook"] = {"embedding": (np.asarray(params["codebook"]["embedding"]) - shift) / scale}
    params = unflatten({path: np.asarray(a, np.float32) for path, a in flatten(out).items()})
    return dataclasses.replace(coder, scale=1.0, shift=0.0), params
