"""`load_original(path, config)`: models published as one file in a layout of their own, wired into Pipelines.

A row of `weights.originals.ORIGINALS` names the config; what it says of the names and shapes in the file must be so.
"""
import dataclasses
import os
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.data.text import load_tokenizer
from ldm_jax.models.classifier import noisy_classifier
from ldm_jax.models.dit import sincos_positions
from ldm_jax.pipelines.wiring import schedule_and_grid, wired
from ldm_jax.published import BUILDERS, PARAM_DTYPES, load_net
from ldm_jax.sampling import Pipeline
from ldm_jax.systems.classifying import classifying
from ldm_jax.systems.conditioners import class_label, low_resolution, masked_image
from ldm_jax.systems.conditions import Conditioner, Space
from ldm_jax.systems.prompts import DROP, prompt
from ldm_jax.types import Array, PyTree, UserError, lookup
from ldm_jax.weights import (files, maps_clip, original_autoencoder, original_clip, original_dit, original_unet, originals, rules,
                             schedulers)
from ldm_jax.weights.options import options, refuse

SETTINGS = ("name", "steps", "guidance", "grid", "batch_size")
LOADERS = {**BUILDERS, "noisy_classifier": noisy_classifier}
NETS, CODER, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


@dataclasses.dataclass(frozen=True)
class File:
    """A file of weights, by name and not read yet, and how its nets are made.

    Attributes:
      ema: whether the averaged weights are wanted; None for those that the program of the model samples with.
      vae, tokenizer: directories, None where none is given.
      size: of the pictures, None for the config's.
    """
    path: str
    arrays: Mapping[str, Any]
    dtype: str
    param_dtype: str
    ema: Optional[bool]
    vae: Optional[str]
    tokenizer: Optional[str]
    size: Optional[Tuple[int, int]]

    def net(self, builder: str, arguments: Mapping[str, Any], layout: List[rules.Rule], arrays: Mapping[str, Any],
            what: str) -> Tuple[Any, PyTree]:
        """(net, parameters) of the arrays that are all of one net; `what` names them in errors."""
        net = LOADERS[builder](**arguments, dtype=self.dtype)
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        dtype = lookup(PARAM_DTYPES, self.param_dtype, "param_dtype")
        return net, rules.load(layout, arrays, shapes, dtype=dtype, what=f"the {what} in {self.path!r}")

    def refuse(self, **given: Any) -> None:
        """Raises UserError for what is given and this kind of model has no use for."""
        if wrong := [name for name, value in given.items() if value is not None]:
            raise UserError(f"this model takes no {wrong[0]}; leave {wrong[0]}= out")


def load_original(path: str, config: Union[str, Mapping[str, Any]], *, vae: Optional[str] = None, tokenizer: Optional[str] = None,
                  dtype: str = "float32", param_dtype: str = "float32", ema: Optional[bool] = None,
                  size: Optional[Tuple[int, int]] = None, **overrides: Any) -> Pipeline:
    """The Pipeline of a file in the layout in which its authors published it. Its arrays are read one at a time.

    A classifier of noisy images is a Pipeline too, to be given as classifier=... where a diffusion model samples. DiT is guided in
    all channels of its latents; the program of its paper, unless asked, leaves the last one alone.

    Args:
      path: .pt, .ckpt, .pth, .bin or .safetensors.
      config: a name in `weights.originals.ORIGINALS`; {"layout": name, ...} with what differs from it, by the names of the model's own
        program: the flags of guided-diffusion, the yaml's model.params of Rombach et al., the arguments of DiT's class; or the path
        of a whole yaml.
      vae: a first stage's directory, in diffusers' layout; in place of the one in the file, where there is one.
      tokenizer: the directory of CLIP's tokeniser, for models that are told a text.
      dtype, param_dtype: of the computation and the parameters, see `published.load_net`.
      ema: take the averaged weights. By default: where the yaml's use_ema is true and the file has them; DiT's always.
      size: (height, width) of the pictures, for U-Nets.
      overrides: in place of the sampler's settings: name, steps, guidance, grid, batch_size.

    Raises:
      UserError: for an unknown config, options that are not supported, a file that cannot be read, and names and shapes in it that are
        missing, left over or differ.
    """
    if extra := sorted(set(overrides) - set(SETTINGS)):
        known = ("vae", "tokenizer", "dtype", "param_dtype", "ema", "size", *SETTINGS)
        raise UserError(f"unknown override {extra[0]!r}; choose from: {', '.join(sorted(known))}")
    family, said = originals.original_config(config)
    path = os.path.expanduser(os.fspath(path))
    file = File(path, files.open_arrays(path), dtype, param_dtype, ema, vae, tokenizer, size and tuple(size))
    pipeline = FAMILIES[family](file, {"_class_name": family, **said})
    return dataclasses.replace(pipeline, defaults={**pipeline.defaults, **overrides})


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
        raise UserError(f"{file.path!r} has no {original_dit.POSITIONS}, or others than the sines and cosines of {wanted.shape[1]} "
                        f"patches {wanted.shape}: its is {positions.shape}; give the config of this file")
    arrays = {name: array for name, array in arrays.items() if name != original_dit.POSITIONS}
    net, params = file.net("dit", arguments, original_dit.dit_rules(arguments), arrays, "weights")
    sampling = schedulers.sampling({"_class_name": "DDPMScheduler", "variance_type": "learned_range" if net.out_channels > net.image_shape[2]
                                    else "fixed_large", "clip_sample": False, "timestep_spacing": "linspace"})
    return wired(sampling, net, params, load_net(file.vae, dtype=file.dtype, param_dtype=file.param_dtype), steps=250, guidance=4.0,
                 conditioners=lambda space: {"class": class_label(dataclasses.replace(space, num_classes=net.num_classes))})


def ldm(file: File, config: Mapping[str, Any]) -> Pipeline:
    """Latent diffusion of Rombach et al. 2022, and Stable Diffusion 1 and 2."""
    said = originals.ldm_options(config)
    sampling = _checked(file, said)
    arrays, coder_arrays, text_arrays = _ldm_parts(file, said)
    kind, unet = originals.target(said["unet_config"], "unet_config")
    if kind != "UNetModel":
        refuse(config, [f"unet_config.target={kind!r}"])
    H, W = said["image_size"] if isinstance(said["image_size"], tuple) else (said["image_size"],) * 2
    arguments = {**original_unet.ldm_arguments(unet, (H, W, said["channels"])), "timesteps": sampling.steps}
    concat, conditional, wrong = arguments["concat_channels"], said["cond_stage_config"] != originals.UNCONDITIONAL, []
    if conditional:
        lookup(CONDITIONS, originals.target(said["cond_stage_config"], "cond_stage_config")[0], "target of a cond_stage_config")
    if arguments["num_classes"] or arguments["vector_dim"]:
        wrong.append(f"num_classes={unet.get('num_classes')!r} of the unet_config")
    if (concat, said["conditioning_key"] == "hybrid") not in ((None, False), (said["channels"] + 1, True)):
        wrong.append(f"in_channels={unet.get('in_channels')!r} with channels={said['channels']}, conditioning_key={said['conditioning_key']!r}")
    if bool(arguments["context_dim"]) != conditional:
        wrong.append(f"context_dim={arguments['context_dim']!r} with cond_stage_config={str(said['cond_stage_config'])[:60]!r}")
    refuse(config, wrong)
    order = "new" if unet.get("use_new_attention_order") else "legacy"
    layout = original_unet.unet_rules(arguments, order, bool(unet.get("use_linear_in_transformer")))
    net, params = file.net("unet_of_levels", arguments, layout, arrays, f"arrays {NETS}*")
    others, conditioner = _condition(file, said, net, text_arrays)

    def conditioners(space: Space) -> Mapping[str, Conditioner]:
        return {**conditioner, **({"masked_image": masked_image(space)} if concat else {})}

    return wired(sampling, net, params, _first_stage(file, said, coder_arrays), conditioners, steps=said["sampling"]["steps"],
                 guidance=said["sampling"]["guidance"], others=others, size=file.size)


def _checked(file: File, said: Mapping[str, Any]) -> schedulers.Sampling:
    """How it is sampled, compared with the table of alphas in the file, where there is one."""
    sampling, eta = schedulers.sampling(originals.ldm_scheduler(said)), said["sampling"]["eta"]
    if sampling.sampler == "ddim" and eta:
        sampling = dataclasses.replace(sampling, options={**sampling.options, "eta": eta})
    found = [np.asarray(a, np.float64) for name, a in file.arrays.items() if name.removeprefix("state_dict.") == originals.ALPHAS]
    if found and (found[0].shape != sampling.abar.shape or not np.allclose(found[0], sampling.abar, rtol=2e-3, atol=1e-3)):
        raise UserError(f"{file.path!r} has another {originals.ALPHAS} than its config's timesteps={said['timesteps']}, linear_start="
                        f"{said['linear_start']}, linear_end={said['linear_end']} give; give the config of this file")
    return sampling


def _ldm_parts(file: File, said: Mapping[str, Any]) -> List[Dict[str, Any]]:
    """The arrays of the U-Net, the first stage and the text tower, each by its own names."""
    arrays = file.arrays
    if any(name.startswith("state_dict.") for name in arrays):
        (arrays,) = originals.split_names(arrays, ["state_dict."], originals.TRAINER, file.path)
    names = [name for name in arrays if name.startswith(NETS)]
    has = any(name.startswith("model_ema.") and name.split(".")[1] not in ("decay", "num_updates") for name in arrays)
    ema = said["use_ema"] and has if file.ema is None else file.ema
    if ema:
        if not has:
            raise UserError(f"{file.path!r} has no averaged weights (model_ema.*); leave ema=True out")
        averages = {originals.averaged(name): name for name in names}
        arrays = {averages.get(name, name): array for name, array in arrays.items() if name not in names}
    unused = [*originals.LDM_UNUSED, *(CODER.replace(".", r"\.") + pattern for pattern in original_autoencoder.UNUSED)]
    unused += [] if ema else [r"model_ema\..*"]
    unused += [CODER.replace(".", r"\.") + ".*"] if file.vae is not None else []
    unused += ["scale_factor"] if said["scale_by_std"] else []
    return originals.split_names(arrays, (NETS, CODER, TEXT), unused, file.path)


def _first_stage(file: File, said: Mapping[str, Any], arrays: Mapping[str, Any]) -> Tuple[Any, PyTree]:
    if file.vae is not None:
        return load_net(file.vae, dtype=file.dtype, param_dtype=file.param_dtype)
    scale = said["scale_factor"]
    if said["scale_by_std"]:
        found = [a for name, a in file.arrays.items() if name.removeprefix("state_dict.") == "scale_factor"]
        if len(found) != 1:
            raise UserError(f"{file.path!r} has no scale_factor, which its config's scale_by_std=True promises")
        scale = float(np.asarray(found[0]))
    builder, arguments = original_autoencoder.autoencoder_arguments(*originals.target(said["first_stage_config"], "first_stage_config"), scale)
    return file.net(builder, arguments, original_autoencoder.autoencoder_rules(arguments), arrays, f"arrays {CODER}*")


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """A row of numbers for each class, shaped like a net: its parameters are {"embedding": [classes, width]}."""
    classes: int
    width: int

    def init(self, key: Array) -> PyTree:
        return {"embedding": jax.random.normal(key, (self.classes, self.width))}

    def apply(self, params: PyTree, ids: Array) -> Array:
        """ids [B] -> a sequence of one token, float32 [B, 1, width]."""
        return jnp.asarray(params["embedding"], jnp.float32)[ids][:, None]


def _condition(file: File, said: Mapping[str, Any], net: Any, arrays: Mapping[str, Any]):
    """(the nets of the cond_stage_config and their parameters by name, the conditioner by name)."""
    if said["cond_stage_config"] == originals.UNCONDITIONAL:
        file.refuse(tokenizer=file.tokenizer)
        if arrays:
            raise UserError(f"{file.path!r} has {len(arrays)} arrays {TEXT}*, and its config is unconditional; give the config of this file")
        return {}, {}
    kind, params = originals.target(said["cond_stage_config"], "cond_stage_config")
    return CONDITIONS[kind](file, params, net, arrays)


def _of_class(file: File, params: Mapping[str, Any], net: Any, arrays: Mapping[str, Any]):
    """ClassEmbedder. null_class: the id that stands for no class, "last", or None where there is none."""
    file.refuse(tokenizer=file.tokenizer)
    given = options(params, {"embed_dim": None, "n_classes": 1000, "null_class": None},
                    {"embed_dim": (net.context_dim,), "null_class": lambda n: n in (None, "last") or isinstance(n, int)}, {"key", "ucg_rate"})
    classes = given["n_classes"]
    null = classes - 1 if given["null_class"] == "last" else given["null_class"]
    if null not in (None, classes - 1):
        refuse(params, [f"null_class={null} of {classes} classes, which is not the last"])
    table = ClassTable(classes, given["embed_dim"])
    shapes = jax.eval_shape(table.init, jax.random.key(0))
    weights = rules.load([rules.Rule("embedding.weight", "embedding")], arrays, shapes, dtype=lookup(PARAM_DTYPES, file.param_dtype, "param_dtype"),
                         what=f"the arrays {TEXT}* in {file.path!r}")
    space = Space((1, 1, 1), (1, 1, 1), classes - (null is not None))
    empty = table.apply(weights, jnp.asarray([0 if null is None else null]))
    conditioner = dataclasses.replace(
        class_label(space, drop=0.0 if null is None else DROP), needs={"context_dim": table.width},
        encode=lambda params, ids, keys, codec: {"context": table.apply(params["class_table"], ids)},
        null=lambda n: {"context": jnp.broadcast_to(empty, (n, 1, table.width))})
    return {"class_table": (table, weights)}, {"class": conditioner}


def _of_clip(file: File, params: Mapping[str, Any], net: Any, arrays: Mapping[str, Any]):
    """FrozenCLIPEmbedder."""
    arrays = {name.removeprefix("transformer."): array for name, array in arrays.items()}
    arrays = maps_clip.today(arrays)
    arguments = original_clip.clip_arguments(params, arrays)
    return _of_text(file, arguments, maps_clip.clip_text_rules(arguments), net, arrays)


def _of_open_clip(file: File, params: Mapping[str, Any], net: Any, arrays: Mapping[str, Any]):
    """FrozenOpenCLIPEmbedder, whose texts are filled up with the id 0."""
    arguments = original_clip.open_arguments(params)
    (arrays,) = originals.split_names(arrays, ["model."], [rf"model\.{name}" for name in original_clip.open_unused(arguments, params)], file.path)
    return _of_text(file, arguments, original_clip.open_rules(arguments), net, arrays, pad_id=original_clip.PAD)


def _of_text(file: File, arguments, layout, net: Any, arrays: Mapping[str, Any], **changes: Any):
    if file.tokenizer is None:
        raise UserError("this model is told a text; give the directory of CLIP's tokeniser (vocab.json, merges.txt) as tokenizer=...")
    tokenizer = dataclasses.replace(load_tokenizer(file.tokenizer), **changes)
    tower, weights = file.net("clip_text", arguments, layout, arrays, f"arrays {TEXT}*")
    largest = max(tokenizer.vocab.values())
    if largest >= tower.vocab_size or tokenizer.max_length > tower.max_length:
        raise UserError(f"the tokeniser in {file.tokenizer!r} has ids up to {largest} and texts of {tokenizer.max_length} tokens; the text tower "
                        f"takes ids below {tower.vocab_size} and {tower.max_length} tokens. Give the tokeniser of this model")
    towers, tokenizers, own = {"text_encoder": tower}, {"text_encoder": tokenizer}, {"text_encoder": weights}
    conditioner = prompt(towers, tokenizers, own, needs={"context_dim": net.context_dim})
    return {"text_encoder": (tower, weights)}, {"prompt": conditioner}


CONDITIONS = {"ClassEmbedder": _of_class, "FrozenCLIPEmbedder": _of_clip, "FrozenOpenCLIPEmbedder": _of_open_clip}
FAMILIES = {"adm": adm, "adm_classifier": adm_classifier, "dit": dit, "ldm": ldm}
