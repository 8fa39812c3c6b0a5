"""Dhariwal & Nichol's U-Nets on pixels and their classifiers, and DiT, from their authors' own files."""
import dataclasses
from typing import Any, Dict, Mapping, Tuple

import numpy as np

from ldm_jax.models.dit import sincos_positions
from ldm_jax.pipelines.original_file import File
from ldm_jax.pipelines.wiring import schedule_and_grid, wired
from ldm_jax.sampling import Pipeline
from ldm_jax.systems.classifying import classifying
from ldm_jax.systems.conditioners import class_label, low_resolution
from ldm_jax.systems.conditions import Conditioner, Space
from ldm_jax.types import UserError
from ldm_jax.weights import original_dit, original_unet, originals, schedulers
from ldm_jax.weights.options import refuse


def _diffusion(config: Mapping[str, Any]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """The flags of a net, and those of its diffusion; learn_sigma belongs to both."""
    own = {*originals.DIFFUSION, *originals.DIFFUSION_NO_EFFECT}
    return ({key: value for key, value in config.items() if key not in own or key == "learn_sigma"},
            {key: value for key, value in config.items() if key in own or key == "_class_name"})


def _respaced(flags: Mapping[str, Any]) -> Tuple[schedulers.Sampling, int]:
    """(how it is sampled, in how many steps)."""
    config, steps, unit = originals.respaced(flags)
    sampling = schedulers.sampling(config)
    if sampling.sampler == "ddim":  # their method forms eps anew from the clipped x0
        sampling = dataclasses.replace(sampling, options={}, clip=1.0)
    return dataclasses.replace(sampling, unit=unit), steps


def adm(file: File, config: Mapping[str, Any]) -> Pipeline:
    """The U-Nets of Dhariwal & Nichol 2021 and Nichol & Dhariwal 2021, on pixels."""
    file.refuse(vae=file.vae, tokenizer=file.tokenizer, ema=file.ema)
    flags, diffusion = _diffusion(config)
    arguments = {**original_unet.adm_arguments(flags), "timesteps": 1000}
    order = "new" if flags.get("use_new_attention_order") else "legacy"
    net, params = file.net("unet_of_levels", arguments, original_unet.unet_rules(arguments, order), file.arrays, "weights")

    def conditioners(space: Space) -> Mapping[str, Conditioner]:
        found = {}
        if net.num_classes:
            found["class"] = class_label(dataclasses.replace(space, num_classes=net.num_classes), drop=0.0)
        if net.concat_channels:
            found["low_resolution"] = _enlarged(space, flags["large_size"] // flags["small_size"])
        return found

    sampling, steps = _respaced(diffusion)
    return wired(sampling, net, params, None, conditioners, steps=steps, size=file.size)


def _enlarged(space: Space, factor: int) -> Conditioner:
    """A small picture, enlarged bilinearly and without noise."""
    base = low_resolution(space, factor=factor, max_noise=0.0)
    concat = lambda found: {"concat": found["concat"]}
    return dataclasses.replace(base, needs={"concat_channels": space.shape[-1]}, null=lambda n: concat(base.null(n)),
                               encode=lambda *arguments: concat(base.encode(*arguments)))


def adm_classifier(file: File, config: Mapping[str, Any]) -> Pipeline:
    """The classifiers of noisy images of Dhariwal & Nichol 2021."""
    file.refuse(vae=file.vae, tokenizer=file.tokenizer, ema=file.ema, size=file.size)
    flags, diffusion = _diffusion(config)
    arguments = original_unet.classifier_arguments(flags)
    sampling, _ = _respaced({"_class_name": "adm_classifier", **diffusion})
    if sampling.unit != 1.0:
        refuse(config, ["rescale_timesteps=True"])
    arguments["timesteps"] = sampling.steps
    net, params = file.net("noisy_classifier", arguments, original_unet.classifier_rules(arguments), file.arrays, "weights")
    system = classifying(net, image_shape=net.image_shape, schedule=schedule_and_grid(sampling)[0], num_classes=net.num_classes)
    return Pipeline(system, {"classifier": params}, {})


def dit(file: File, config: Mapping[str, Any]) -> Pipeline:
    """DiT, on the latents of the first stage in the directory `vae`."""
    file.refuse(tokenizer=file.tokenizer, size=file.size)
    if file.vae is None:
        raise UserError("DiT's file has no first stage; give the directory of one, such as sd-vae-ft-ema's, as vae=...")
    arguments, arrays = original_dit.dit_arguments(config), file.arrays
    trained = [prefix for prefix in ("ema.", "model.") if any(name.startswith(prefix) for name in arrays)]
    if trained:  # a checkpoint of training: both, and the optimiser's
        prefix = "model." if file.ema is False else "ema."
        arrays, _, _ = originals.split_names(arrays, [prefix, *({"ema.", "model."} - {prefix}), "opt."], (), file.path)
    elif file.ema is False:
        raise UserError(f"{file.path!r} holds averaged weights alone; leave ema=False out")
    H, W, _ = arguments["image_shape"]
    positions = np.asarray(arrays.get(original_dit.POSITIONS, ()), np.float32)
    wanted = sincos_positions(H // arguments["patch"], W // arguments["patch"], arguments["width"])[None]
    if positions.shape != wanted.shape or not np.allclose(positions, wanted, atol=2e-3):
        raise UserError(f"{file.path!r} has no {original_dit.POSITIONS}, or others than the sines and cosines of "
                        f"{wanted.shape[1]} patches {wanted.shape}: its is {positions.shape}; give the config of this file")
    arrays = {name: array for name, array in arrays.items() if name != original_dit.POSITIONS}
    net, params = file.net("dit", arguments, original_dit.dit_rules(arguments), arrays, "weights")
    variance = "learned_range" if net.out_channels > net.image_shape[2] else "fixed_large"
    sampling = schedulers.sampling({"_class_name": "DDPMScheduler", "variance_type": variance, "clip_sample": False,
                                    "timestep_spacing": "linspace"})
    return wired(sampling, net, params, file.first_stage(), steps=250, guidance=4.0,
                 conditioners=lambda space: {"class": class_label(dataclasses.replace(space, num_classes=net.num_classes))})
