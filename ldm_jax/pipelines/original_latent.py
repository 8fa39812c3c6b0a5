"""Latent diffusion of Rombach et al. 2022 and Stable Diffusion from their authors' own files."""
import dataclasses
from typing import Any, Dict, List, Mapping, Tuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.data.text import load_tokenizer
from ldm_jax.pipelines.original_file import File
from ldm_jax.pipelines.wiring import wired
from ldm_jax.published import Published
from ldm_jax.sampling import Pipeline
from ldm_jax.systems.conditioners import class_label, masked_image
from ldm_jax.systems.conditions import Conditioner, Space
from ldm_jax.systems.prompts import DROP, prompt
from ldm_jax.types import Array, PyTree, UserError, lookup
from ldm_jax.weights import maps_clip, original_autoencoder, original_bert, original_clip, original_unet, originals, rules, schedulers
from ldm_jax.weights.options import options, refuse

NETS, CODER, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
TWO, FIRST, SECOND = "conditioner.embedders.", "0.transformer.", "1.model."  # of XL's two towers, in the place of TEXT
NUMBERS = 256  # sinusoids of each of the six numbers that XL is told


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
    condition = originals.target(said["cond_stage_config"], "cond_stage_config")[0] if conditional else None
    if conditional:
        lookup(CONDITIONS, condition, "target of a cond_stage_config")
    if arguments["num_classes"] or bool(arguments["vector_dim"]) != (condition == "GeneralConditioner"):
        wrong.append(f"num_classes={unet.get('num_classes')!r} of the unet_config")
    if (concat, said["conditioning_key"] == "hybrid") not in ((None, False), (said["channels"] + 1, True)):
        wrong.append(f"in_channels={unet.get('in_channels')!r} with channels={said['channels']}, "
                     f"conditioning_key={said['conditioning_key']!r}")
    if bool(arguments["context_dim"]) != conditional or said["conditioning_key"] == "concat":
        wrong.append(f"context_dim={arguments['context_dim']!r}, conditioning_key={said['conditioning_key']!r} with "
                     f"cond_stage_config={str(said['cond_stage_config'])[:60]!r}")
    refuse(config, wrong)
    if arguments["vector_dim"]:
        arguments["inputs"]["time_ids_dim"] = NUMBERS
    order = "new" if unet.get("use_new_attention_order") else "legacy"
    layout = original_unet.unet_rules(arguments, order, bool(unet.get("use_linear_in_transformer")))
    net = file.build("unet_of_levels", arguments)
    coder = _first_stage(file, said, coder_arrays)
    others, conditioner = _condition(file, said, net, coder, text_arrays)
    params = file.load(net, layout, arrays, f"arrays {NETS}*")

    def conditioners(space: Space) -> Mapping[str, Conditioner]:
        return {**conditioner, **({"masked_image": masked_image(space)} if concat else {})}

    pipeline = wired(sampling, net, params, coder, conditioners, steps=said["sampling"]["steps"],
                     guidance=said["sampling"]["guidance"], others=others, size=file.size)
    if condition != "FrozenCLIPEmbedder":
        return pipeline
    return dataclasses.replace(pipeline, published=Published(
        f"StableDiffusion{'Inpaint' if concat else ''}Pipeline", {"net": "unet", "autoencoder": "vae", "text_encoder": "text_encoder"},
        {"tokenizer": (file.tokenizer, ("transformers", "CLIPTokenizer"))}, {"scheduler": originals.ldm_scheduler(said)},
        {"safety_checker": (None, None), "feature_extractor": (None, None), "requires_safety_checker": False}))


def _checked(file: File, said: Mapping[str, Any]) -> schedulers.Sampling:
    """How it is sampled, compared with the table of alphas in the file, where there is one."""
    sampling, eta = schedulers.sampling(originals.ldm_scheduler(said)), said["sampling"]["eta"]
    if sampling.sampler == "ddim" and eta:
        sampling = dataclasses.replace(sampling, options={**sampling.options, "eta": eta})
    found = [np.asarray(a, np.float64) for name, a in file.arrays.items() if name.removeprefix("state_dict.") == originals.ALPHAS]
    if found and (found[0].shape != sampling.abar.shape or not np.allclose(found[0], sampling.abar, rtol=2e-3, atol=1e-3)):
        raise UserError(f"{file.path!r} has another {originals.ALPHAS} than its config's timesteps={said['timesteps']}, "
                        f"linear_start={said['linear_start']}, linear_end={said['linear_end']} give; give the config of this file")
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
    two = str(said["cond_stage_config"]).count("GeneralConditioner")
    return originals.split_names(arrays, (NETS, CODER, TWO if two else TEXT), unused, file.path)


def _first_stage(file: File, said: Mapping[str, Any], arrays: Mapping[str, Any]) -> Tuple[Any, PyTree]:
    if file.vae is not None:
        return file.first_stage()
    scale = said["scale_factor"]
    if said["scale_by_std"]:
        found = [a for name, a in file.arrays.items() if name.removeprefix("state_dict.") == "scale_factor"]
        if len(found) != 1:
            raise UserError(f"{file.path!r} has no scale_factor, which its config's scale_by_std=True promises")
        scale = float(np.asarray(found[0]))
    kind, params = originals.target(said["first_stage_config"], "first_stage_config")
    builder, arguments = original_autoencoder.autoencoder_arguments(kind, params, scale)
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


def _condition(file: File, said: Mapping[str, Any], net: Any, coder: Any, arrays: Mapping[str, Any]):
    """(the nets of the cond_stage_config and their parameters by name, the conditioner by name)."""
    if said["cond_stage_config"] == originals.UNCONDITIONAL:
        file.refuse(tokenizer=file.tokenizer)
        if arrays:
            raise UserError(f"{file.path!r} has {len(arrays)} arrays {TEXT}*, and its config is unconditional; give the config of "
                            f"this file")
        return {}, {}
    kind, params = originals.target(said["cond_stage_config"], "cond_stage_config")
    if kind == "GeneralConditioner":
        H, W = file.size or (n * coder[0].factor for n in net.image_shape[:2])
        return _of_two(file, params, net, arrays, (H, W, 0, 0, H, W))
    return CONDITIONS[kind](file, params, net, arrays)


def _of_class(file: File, params: Mapping[str, Any], net: Any, arrays: Mapping[str, Any]):
    """ClassEmbedder. null_class: the id that stands for no class, "last", or None where there is none."""
    file.refuse(tokenizer=file.tokenizer)
    given = options(params, {"embed_dim": None, "n_classes": 1000, "null_class": None},
                    {"embed_dim": (net.context_dim,), "null_class": lambda n: n in (None, "last") or isinstance(n, int)},
                    {"key", "ucg_rate"})
    classes = given["n_classes"]
    null = classes - 1 if given["null_class"] == "last" else given["null_class"]
    if null not in (None, classes - 1):
        refuse(params, [f"null_class={null} of {classes} classes, which is not the last"])
    table = ClassTable(classes, given["embed_dim"])
    weights = file.load(table, [rules.Rule("embedding.weight", "embedding")], arrays, f"arrays {TEXT}*")
    space = Space((1, 1, 1), (1, 1, 1), classes - (null is not None))
    empty = table.apply(weights, jnp.asarray([0 if null is None else null]))
    conditioner = dataclasses.replace(
        class_label(space, drop=0.0 if null is None else DROP), needs={"context_dim": table.width},
        encode=lambda params, ids, keys, codec: {"context": table.apply(params["class_table"], ids)},
        null=lambda n: {"context": jnp.broadcast_to(empty, (n, 1, table.width))})
    return {"class_table": (table, weights)}, {"class": conditioner}


def _of_clip(file: File, params: Mapping[str, Any], net: Any, arrays: Mapping[str, Any]):
    """FrozenCLIPEmbedder."""
    return _of_texts(file, net, {"text_encoder": _clip(file, params, arrays, "transformer.")})


def _of_open_clip(file: File, params: Mapping[str, Any], net: Any, arrays: Mapping[str, Any]):
    """FrozenOpenCLIPEmbedder."""
    return _of_texts(file, net, {"text_encoder": _open_clip(file, params, arrays, "model.")})


def _of_bert(file: File, params: Mapping[str, Any], net: Any, arrays: Mapping[str, Any]):
    """BERTEmbedder."""
    arguments = original_bert.bert_arguments(params)
    prefix = "transformer."
    unused = [prefix.replace(".", r"\.") + name for name in original_bert.UNUSED]
    (arrays,) = originals.split_names(arrays, [prefix], unused, file.path)
    layout = original_bert.bert_rules(arguments)
    tower = _tower(file, "bert_text", arguments, layout, original_bert.by_block(arrays), max_length=arguments["max_length"])
    return _of_texts(file, net, {"text_encoder": tower})


def _of_two(file: File, params: Mapping[str, Any], net: Any, arrays: Mapping[str, Any], numbers: Tuple[int, ...]):
    """The conditioner of Stable Diffusion XL: both towers, the states before their last blocks, and the second's pooled output.

    text_config: see `original_clip.clip_arguments`. text_cfg: see `original_clip.open_arguments`, of ViT-bigG-14.
    """
    given = options(params, {"text_config": {}, "text_cfg": {}})
    first, second = originals.split_names(arrays, (FIRST, SECOND), (), file.path)
    clip = {"text_config": given["text_config"]}
    towers = {"text_encoder": _clip(file, clip, first, ""),
              "text_encoder_2": _open_clip(file, {"arch": "ViT-bigG-14", "text_cfg": given["text_cfg"]}, second, "", True)}
    return _of_texts(file, net, towers, penultimate=True, time_ids=numbers, zero_null=True)


def _clip(file: File, params: Mapping[str, Any], arrays: Mapping[str, Any], prefix: str):
    """(tower, parameters, tokeniser)."""
    arrays = maps_clip.today(*originals.split_names(arrays, [prefix], (), file.path))
    arguments = original_clip.clip_arguments(params, arrays)
    return _tower(file, "clip_text", arguments, maps_clip.clip_text_rules(arguments), arrays)


def _open_clip(file: File, params: Mapping[str, Any], arrays: Mapping[str, Any], prefix: str, projects: bool = False):
    """The same of OpenCLIP's, whose texts are filled up with the id 0."""
    arguments = original_clip.open_arguments(params, projects)
    unused = [prefix.replace(".", r"\.") + name for name in original_clip.open_unused(arguments, params)]
    (arrays,) = originals.split_names(arrays, [prefix], unused, file.path)
    return _tower(file, "clip_text", arguments, original_clip.open_rules(arguments), arrays, pad_id=original_clip.PAD)


def _tower(file: File, builder: str, arguments: Mapping[str, Any], layout: List[rules.Rule], arrays: Mapping[str, Any],
           **changes: Any):
    kind = {"clip_text": "CLIPTokenizer", "bert_text": "BertTokenizer"}[builder]
    if file.tokenizer is None:
        raise UserError(f"this model is told a text; give the directory of its tokeniser, a {kind}'s files, as tokenizer=...")
    tokenizer = dataclasses.replace(load_tokenizer(file.tokenizer, kind), **changes)
    tower, weights = file.net(builder, arguments, layout, arrays, "arrays of the text tower")
    largest = max(tokenizer.vocab.values())
    if largest >= tower.vocab_size or tokenizer.max_length > tower.max_length:
        raise UserError(f"the tokeniser in {file.tokenizer!r} has ids up to {largest} and texts of {tokenizer.max_length} tokens; "
                        f"the tower takes ids below {tower.vocab_size} and {tower.max_length} tokens. Give the model's own tokeniser")
    return tower, weights, tokenizer


def _of_texts(file: File, net: Any, found: Mapping[str, Tuple], **how: Any):
    towers, weights, tokenizers = ({name: parts[i] for name, parts in found.items()} for i in range(3))
    needs = {"context_dim": net.context_dim, **({"vector_dim": net.vector_dim} if net.vector_dim else {})}
    others = {name: (towers[name], weights[name]) for name in towers}
    return others, {"prompt": prompt(towers, tokenizers, weights, needs=needs, **how)}


CONDITIONS = {"ClassEmbedder": _of_class, "BERTEmbedder": _of_bert, "FrozenCLIPEmbedder": _of_clip,
              "FrozenOpenCLIPEmbedder": _of_open_clip, "GeneralConditioner": _of_two}
