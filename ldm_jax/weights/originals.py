"""The configs of models that are published in layouts of their own, by the names and with the defaults of their own programs.

    adm, adm_classifier   Dhariwal & Nichol 2021, Nichol & Dhariwal 2021: the flags of guided-diffusion and improved-diffusion
    ldm                   Rombach et al. 2022, Stable Diffusion: the yaml's model.params; XL's are put in the same words
    dit                   Peebles & Xie 2023: the arguments of the class DiT

A row of ORIGINALS is (family, config). `original_config` finds one and puts changes on top of it.
"""
import copy
import difflib
import os
import re
from typing import Any, Dict, Iterable, List, Mapping, Tuple, Union

from ldm_jax import paths
from ldm_jax.types import UserError, lookup
from ldm_jax.weights.options import options, refuse
from ldm_jax.weights.original_dit import SIZES as DIT_SIZES

DIFFUSION = {"diffusion_steps": 1000, "noise_schedule": "linear", "timestep_respacing": "", "predict_xstart": False,
             "sigma_small": False, "learn_sigma": False, "rescale_timesteps": False, "use_ddim": False}
DIFFUSION_ONLY = {"noise_schedule": ("linear", "cosine"),
                  "timestep_respacing": lambda n: bool(re.fullmatch(r"(ddim)?\d*", str(n)))}
DIFFUSION_NO_EFFECT = {"use_kl", "rescale_learned_sigmas"}  # of training

UNCONDITIONAL = "__is_unconditional__"
LDM = {"unet_config": {}, "first_stage_config": {}, "cond_stage_config": UNCONDITIONAL, "timesteps": 1000,
       "beta_schedule": "linear", "linear_start": 1e-4, "linear_end": 2e-2, "image_size": 256, "channels": 3,
       "parameterization": "eps", "use_ema": True, "scale_factor": 1.0, "scale_by_std": False, "conditioning_key": None,
       "concat_mode": True, "sampling": {}}
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}  # their name -> that of diffusers
TARGETS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
LDM_ONLY = {"beta_schedule": tuple(SCHEDULES), "parameterization": tuple(TARGETS), "cosine_s": (8e-3,), "given_betas": (None,),
            "num_timesteps_cond": (None, 1), "cond_stage_forward": (None,), "use_positional_encodings": (False,),
            "conditioning_key": (None, "crossattn", "hybrid"), "concat_keys": (("mask", "masked_image"),),
            "masked_image_key": ("masked_image",)}
LDM_NO_EFFECT = {  # of training, or of samplers other than those here
    "first_stage_key", "cond_stage_key", "cond_stage_trainable", "log_every_t", "monitor", "loss_type", "scheduler_config",
    "ckpt_path", "ignore_keys", "load_only_unet", "clip_denoised", "original_elbo_weight", "l_simple_weight", "v_posterior",
    "learn_logvar", "logvar_init", "finetune_keys", "ucg_training"}
SAMPLING = {"sampler": "ddim", "steps": 50, "eta": 0.0, "guidance": 1.0}  # ours: how the paper's pictures were made

ALPHAS = "alphas_cumprod"  # compared with the config's
LDM_UNUSED = (  # what is no parameter
    r"(sqrt_|log_|sqrt_recip_|sqrt_recipm1_)?(one_minus_)?alphas_cumprod(_prev)?", r"betas", r"posterior_.*", r"logvar",
    r"lvlb_weights", r"cond_ids", r"denoiser\.sigmas", r"model_ema\.(decay|num_updates)")
TRAINER = (r"optimizer_states\..*", r"lr_schedulers\..*", r"callbacks\..*", r"loops\..*", r"global_step", r"hparams.*")


def respaced(flags: Mapping[str, Any]) -> Tuple[Dict[str, Any], int, float]:
    """(the config of a scheduler, how many steps, the unit of the net's time) for the flags of a diffusion."""
    said = options(flags, DIFFUSION, DIFFUSION_ONLY, DIFFUSION_NO_EFFECT)
    T, spacing = said["diffusion_steps"], str(said["timestep_respacing"])
    steps = int(spacing.removeprefix("ddim") or T)
    if not 0 < steps <= T:
        refuse(flags, [f"timestep_respacing={spacing!r} of {T} steps"])
    config = {"num_train_timesteps": T, "prediction_type": "sample" if said["predict_xstart"] else "epsilon", "clip_sample": True,
              "timestep_spacing": "leading" if spacing.startswith("ddim") else "linspace"}
    if said["noise_schedule"] == "linear":
        config.update(beta_schedule="linear", beta_start=0.1 / T, beta_end=20.0 / T)
    else:
        config.update(beta_schedule="squaredcos_cap_v2")
    if said["use_ddim"]:
        config.update(_class_name="DDIMScheduler")
    else:
        fixed = "fixed_small" if said["sigma_small"] else "fixed_large"
        config.update(_class_name="DDPMScheduler", variance_type="learned_range" if said["learn_sigma"] else fixed)
    return config, steps, 1000.0 / T if said["rescale_timesteps"] else 1.0


SAMPLERS = {  # as published: from step 1, and for the first two to step 0 instead of data
    "ddim": {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    "plms": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False},
    "euler": {"_class_name": "EulerDiscreteScheduler"}}


def ldm_scheduler(said: Mapping[str, Any]) -> Dict[str, Any]:
    """The config of the scheduler that a yaml's values amount to."""
    return {"num_train_timesteps": said["timesteps"], "beta_schedule": SCHEDULES[said["beta_schedule"]],
            "beta_start": said["linear_start"], "beta_end": said["linear_end"], "steps_offset": 1, "timestep_spacing": "leading",
            "prediction_type": TARGETS[said["parameterization"]], **SAMPLERS[said["sampling"]["sampler"]]}


def ldm_options(params: Mapping[str, Any]) -> Dict[str, Any]:
    """model.params of a yaml, with the defaults and checked; the nested configs are not."""
    said = {**options(params, LDM, LDM_ONLY, LDM_NO_EFFECT), **{key: params[key] for key in params if key.endswith("_config")}}
    said |= {key: float(said[key]) for key in ("linear_start", "linear_end", "scale_factor")}  # YAML leaves 1e-4 a text
    own = {"_class_name": "sampling", **said["sampling"]}
    said["sampling"] = options(own, SAMPLING, {"sampler": tuple(SAMPLERS)})
    refuse(own, [f"{key}={own[key]!r}" for key in ("eta",) if own.get(key) and said["sampling"]["sampler"] != "ddim"])
    if said["conditioning_key"] is None and said["cond_stage_config"] != UNCONDITIONAL:  # their default
        said["conditioning_key"] = "concat" if said["concat_mode"] else "crossattn"
    return said


def target(config: Mapping[str, Any], what: str) -> Tuple[str, Dict[str, Any]]:
    """(the last name of the target, the params) of a nested config."""
    known = {"target", "params", "base_learning_rate"}
    if not isinstance(config, Mapping) or not isinstance(config.get("target"), str) or set(config) - known:
        raise UserError(f"{what}={str(config)[:80]!r} must have a target, the name of a class, and params")
    name = config["target"].split(".")[-1]
    return name, {"_class_name": name, **(config.get("params") or {})}


_ADM = dict(image_size=256, attention_resolutions="32,16,8", class_cond=True, diffusion_steps=1000, learn_sigma=True,
            noise_schedule="linear", num_channels=256, num_head_channels=64, num_res_blocks=2, resblock_updown=True,
            use_scale_shift_norm=True, timestep_respacing="250")
_UPSAMPLER = {key: value for key, value in _ADM.items() if key != "image_size"}
_IDDPM = dict(num_channels=128, num_res_blocks=3, learn_sigma=True, diffusion_steps=4000, noise_schedule="cosine",
              rescale_timesteps=True, timestep_respacing="250")
_IDDPM_LSUN = dict(_IDDPM, image_size=256, num_res_blocks=2, num_heads=1, use_scale_shift_norm=False, attention_resolutions="16",
                   diffusion_steps=1000, noise_schedule="linear", rescale_timesteps=False)


def _nested(name: str, **params: Any) -> Dict[str, Any]:
    return {"target": name, "params": params}


def _unet(**params: Any) -> Dict[str, Any]:
    return _nested("UNetModel", **params)


def _vq(embed_dim: int, n_embed: int, ch_mult: Tuple[int, ...], attn_resolutions: Tuple[int, ...] = ()) -> Dict[str, Any]:
    return _nested("VQModelInterface", embed_dim=embed_dim, n_embed=n_embed, ddconfig=dict(
        double_z=False, z_channels=embed_dim, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=ch_mult, num_res_blocks=2,
        attn_resolutions=attn_resolutions, dropout=0.0))


_KL = _nested("AutoencoderKL", embed_dim=4, ddconfig=dict(
    double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2,
    attn_resolutions=(), dropout=0.0))
_FACES = dict(
    linear_start=0.0015, linear_end=0.0195, image_size=64, channels=3, first_stage_config=_vq(3, 8192, (1, 2, 4)),
    unet_config=_unet(in_channels=3, out_channels=3, model_channels=224, attention_resolutions=(8, 4, 2), num_res_blocks=2,
                      channel_mult=(1, 2, 3, 4), num_head_channels=32), sampling=dict(steps=200, eta=1.0))
_CHURCHES = dict(
    linear_start=0.0015, linear_end=0.0155, image_size=32, channels=4, scale_by_std=True, first_stage_config=_KL,
    unet_config=_unet(in_channels=4, out_channels=4, model_channels=192, attention_resolutions=(1, 2, 4, 8), num_res_blocks=2,
                      channel_mult=(1, 2, 2, 4, 4), num_heads=8, use_scale_shift_norm=True, resblock_updown=True),
    sampling=dict(steps=400, eta=0.0))
_CIN = dict(
    linear_start=0.0015, linear_end=0.0195, image_size=32, channels=4, conditioning_key="crossattn",
    first_stage_config=_vq(4, 16384, (1, 2, 2, 4), (32,)),
    cond_stage_config=_nested("ClassEmbedder", embed_dim=512, n_classes=1000),
    unet_config=_unet(in_channels=4, out_channels=4, model_channels=256, attention_resolutions=(4, 2, 1), num_res_blocks=2,
                      channel_mult=(1, 2, 4), num_head_channels=32, use_spatial_transformer=True, transformer_depth=1,
                      context_dim=512),
    sampling=dict(steps=200, eta=1.0))
_CIN_2 = dict(
    linear_start=0.0015, linear_end=0.0195, image_size=64, channels=3, conditioning_key="crossattn", use_ema=False,
    first_stage_config=_vq(3, 8192, (1, 2, 4)),
    cond_stage_config=_nested("ClassEmbedder", embed_dim=512, n_classes=1001, null_class="last"),
    unet_config=_unet(in_channels=3, out_channels=3, model_channels=192, attention_resolutions=(8, 4, 2), num_res_blocks=2,
                      channel_mult=(1, 2, 3, 5), num_heads=1, use_spatial_transformer=True, transformer_depth=1, context_dim=512),
    sampling=dict(steps=20, guidance=3.0))
_SD = dict(linear_start=0.00085, linear_end=0.0120, image_size=64, channels=4, conditioning_key="crossattn", scale_factor=0.18215,
           use_ema=False, first_stage_config=_KL)
_SD_UNET = dict(in_channels=4, out_channels=4, model_channels=320, attention_resolutions=(4, 2, 1), num_res_blocks=2,
                channel_mult=(1, 2, 4, 4), use_spatial_transformer=True, transformer_depth=1)
_SD_1 = dict(_SD, cond_stage_config=_nested("FrozenCLIPEmbedder"), unet_config=_unet(**_SD_UNET, num_heads=8, context_dim=768),
             sampling=dict(sampler="plms", guidance=7.5))
_TXT2IMG = dict(_SD, image_size=32, cond_stage_config=_nested("BERTEmbedder", n_embed=1280, n_layer=32),
                unet_config=_unet(**_SD_UNET, num_heads=8, context_dim=1280), sampling=dict(guidance=5.0))
_SD_2 = dict(_SD, cond_stage_config=_nested("FrozenOpenCLIPEmbedder", layer="penultimate"), sampling=dict(guidance=9.0),
             unet_config=_unet(**_SD_UNET, num_head_channels=64, context_dim=1024, use_linear_in_transformer=True))
_SD_XL = dict(
    _SD, scale_factor=0.13025, image_size=128, cond_stage_config=_nested("GeneralConditioner", text_cfg=dict()),
    unet_config=_unet(**{**_SD_UNET, "attention_resolutions": (4, 2), "channel_mult": (1, 2, 4), "transformer_depth": (1, 2, 10)},
                      num_head_channels=64, context_dim=2048, use_linear_in_transformer=True, num_classes="sequential",
                      adm_in_channels=2816), sampling=dict(sampler="euler", guidance=5.0))


def _inpainting(config: Mapping[str, Any]) -> Dict[str, Any]:
    return _merged(config, dict(conditioning_key="hybrid", unet_config=dict(params=dict(in_channels=9)),
                                sampling=dict(sampler="ddim")))


def _merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> Dict[str, Any]:
    """`config` with `changes`, also of what is nested; where a target changes nothing beside it stays."""
    out = copy.deepcopy(dict(config))
    for key, value in changes.items():
        old = out.get(key)
        nested = isinstance(old, Mapping) and isinstance(value, Mapping)
        same = nested and str(value.get("target", old.get("target"))).split(".")[-1] == str(old.get("target")).split(".")[-1]
        out[key] = _merged(old, value) if same else copy.deepcopy(value)
    return out


ORIGINALS: Dict[str, Tuple[str, Mapping[str, Any]]] = {
    "adm_64": ("adm", dict(_ADM, image_size=64, num_channels=192, num_res_blocks=3, noise_schedule="cosine", dropout=0.1,
                           use_new_attention_order=True)),
    "adm_128": ("adm", dict(_ADM, image_size=128, num_heads=4, num_head_channels=-1)),
    "adm_256": ("adm", _ADM),
    "adm_256_uncond": ("adm", dict(_ADM, class_cond=False)),
    "adm_512": ("adm", dict(_ADM, image_size=512)),
    "adm_lsun": ("adm", dict(_ADM, class_cond=False, dropout=0.1, timestep_respacing="1000")),
    "adm_upsampler_64_256": ("adm", dict(_UPSAMPLER, small_size=64, large_size=256, num_channels=192, num_heads=4,
                                         num_head_channels=-1)),
    "adm_upsampler_128_512": ("adm", dict(_UPSAMPLER, small_size=128, large_size=512, num_channels=192,
                                          attention_resolutions="32,16")),
    "adm_classifier_64": ("adm_classifier", dict(image_size=64, classifier_depth=4, noise_schedule="cosine")),
    "adm_classifier_128": ("adm_classifier", dict(image_size=128)),
    "adm_classifier_256": ("adm_classifier", dict(image_size=256)),
    "adm_classifier_512": ("adm_classifier", dict(image_size=512)),
    "iddpm_cifar10": ("adm", dict(_IDDPM, image_size=32, dropout=0.3)),
    "iddpm_imagenet64": ("adm", dict(_IDDPM, image_size=64)),
    "iddpm_imagenet64_cond": ("adm", dict(_IDDPM, image_size=64, num_channels=192, class_cond=True, rescale_timesteps=False)),
    "iddpm_lsun": ("adm", _IDDPM_LSUN),
    "ldm_celebahq256": ("ldm", dict(_FACES, sampling=dict(steps=200, eta=0.0))),
    "ldm_ffhq256": ("ldm", _FACES),
    "ldm_lsun_bedrooms256": ("ldm", _FACES),
    "ldm_lsun_churches256": ("ldm", _CHURCHES),
    "ldm_cin256": ("ldm", _CIN),
    "ldm_cin256_v2": ("ldm", _CIN_2),
    "ldm_txt2img_1p4b": ("ldm", _TXT2IMG),
    "sd1": ("ldm", _SD_1),
    "sd1_inpainting": ("ldm", _inpainting(_SD_1)),
    "sd2_base": ("ldm", _SD_2),
    "sd2_v": ("ldm", dict(_SD_2, parameterization="v", image_size=96)),
    "sd2_inpainting": ("ldm", _inpainting(_SD_2)),
    "sdxl": ("ldm", _SD_XL),
    **{f"dit_{size}_{patch}_{pixels}": ("dit", dict(
        input_size=pixels // 8, patch_size=patch, depth=depth, hidden_size=width, num_heads=heads))
       for size, (depth, width, heads) in DIT_SIZES.items() for patch in (2, 4, 8) for pixels in (256, 512)},
}
BASES = {"LatentDiffusion": "ldm", "LatentInpaintDiffusion": "ldm"}  # the target of a whole yaml -> family


def original_config(config: Union[str, Mapping[str, Any]]) -> Tuple[str, Dict[str, Any]]:
    """(family, config) of a row of ORIGINALS by name; of {"layout": row or family, ...} and changes to it; or of a whole yaml.

    A whole yaml, given as its path or as what it holds, is {"model": {"target": ..., "params": ...}, ...}.

    Raises:
      UserError: for an unknown name, a file that cannot be read, and a yaml of another kind of model.
    """
    if isinstance(config, (str, os.PathLike)):
        if not os.fspath(config).endswith((".yaml", ".yml")):
            return _row(ORIGINALS, config)
        config = _yaml(paths.expand(config))
    if not isinstance(config, Mapping):
        raise UserError(f"config={config!r} must be a name, or a mapping with the layout and what differs from it")
    if "model" in config:
        name, params = target(config["model"], "model")
        params.pop("_class_name")
        return lookup(BASES, name, "target of a yaml"), params
    rows = {**ORIGINALS, **{family: (family, {}) for family, _ in ORIGINALS.values()}}
    family, base = _row(rows, config.get("layout"))
    return family, _merged(base, {key: value for key, value in config.items() if key != "layout"})


def _row(rows: Mapping[str, Any], name: Any) -> Any:
    """`rows[name]`; there are too many for an error to list, so it lists those that `name` resembles."""
    if name not in rows:
        near = difflib.get_close_matches(str(name), rows, n=4, cutoff=0.0)
        raise UserError(f"unknown original layout {name!r}; there are {', '.join(sorted(near))} and others, "
                        f"see ldm_jax.pipelines.ORIGINALS")
    return rows[name]


def _yaml(path: str) -> Any:
    import yaml
    try:
        return yaml.safe_load(paths.read_text(path))
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise UserError(f"cannot read {path}: {str(e).splitlines()[0]}") from e


def averaged(name: str) -> str:
    """The name of the average of the parameter model.NAME in a file of `ldm`: its dots are left out."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def split_names(arrays: Mapping[str, Any], prefixes: Iterable[str], unused: Iterable[str], path: str) -> List[Dict[str, Any]]:
    """For each prefix the arrays whose names begin with it, by the rest of their names.

    Raises:
      UserError: for names that neither begin with one nor match a pattern of `unused`.
    """
    prefixes, parts, pattern = list(prefixes), [], re.compile("|".join(unused) or "(?!)")
    used = {name: array for name, array in arrays.items() if not pattern.fullmatch(name)}
    for prefix in prefixes:
        parts.append({name[len(prefix):]: array for name, array in used.items() if name.startswith(prefix)})
    left = sorted(name for name in used if not name.startswith(tuple(prefixes)))
    if left:
        raise UserError(f"{path!r} has {len(left)} arrays that its config does not know: {', '.join(left[:6])}"
                        f"{', ...' if len(left) > 6 else ''}; give the config of this file")
    return parts
