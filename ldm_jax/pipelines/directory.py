"""`load_pipeline(directory)` wires the components that a model_index.json names into a Pipeline.

    model_index.json                {"_class_name": ..., component: [library, class], ...}
    COMPONENT/config.json ...       each component in a directory of its own, or all beside model_index.json
    scheduler/scheduler_config.json how it is sampled
"""
import dataclasses
import json
import os
from typing import Any, Callable, Dict, Iterable, Mapping, Optional, Tuple

from ldm_jax import paths
from ldm_jax.pipelines.images import ddim, ddpm, dit, ldm
from ldm_jax.pipelines.scores import score_sde_ve
from ldm_jax.pipelines.source import Source
from ldm_jax.pipelines.texts import ldm_text_to_image, stable_diffusion, stable_diffusion_xl
from ldm_jax.pipelines.upscaling import ldm_super_resolution, stable_diffusion_upscale
from ldm_jax.pipelines.wiring import schedule_and_grid
from ldm_jax.published import Published
from ldm_jax.sampling import Pipeline
from ldm_jax.types import UserError, lookup

INDEX, SCHEDULER = "model_index.json", "scheduler_config.json"

# what judges pictures or marks them after they are made is not run
_UNUSED = ("safety_checker", "requires_safety_checker", "feature_extractor", "image_encoder", "add_watermarker")
_SD = (stable_diffusion, ("vae", "text_encoder", "tokenizer", "unet", "scheduler"), _UNUSED)
_XL = (stable_diffusion_xl, ("vae", "text_encoder_2", "tokenizer_2", "unet", "scheduler"),
       (*_UNUSED, "text_encoder", "tokenizer", "force_zeros_for_empty_prompt", "requires_aesthetics_score"))
# class in model_index.json -> (reader, its components, the other entries that it may have)
PIPELINES = {
    "DDPMPipeline": (ddpm, ("unet", "scheduler"), ()),
    "DDIMPipeline": (ddim, ("unet", "scheduler"), ()),
    "LDMPipeline": (ldm, ("vqvae", "unet", "scheduler"), ()),
    "DiTPipeline": (dit, ("transformer", "scheduler"), ("vae", "id2label")),
    **{f"StableDiffusion{kind}Pipeline": _SD for kind in ("", "Img2Img", "Inpaint")},
    **{f"StableDiffusionXL{kind}Pipeline": _XL for kind in ("", "Img2Img", "Inpaint")},
    "StableDiffusionUpscalePipeline": (stable_diffusion_upscale, (*_SD[1], "low_res_scheduler"),
                                       (*_UNUSED, "watermarker", "max_noise_level")),
    "ScoreSdeVePipeline": (score_sde_ve, ("unet", "scheduler"), ()),
    "LDMTextToImagePipeline": (ldm_text_to_image, ("vqvae", "bert", "tokenizer", "unet", "scheduler"), ()),
    "LDMSuperResolutionPipeline": (ldm_super_resolution, ("vqvae", "unet", "scheduler"), ()),
}


def is_published(directory: str) -> bool:
    """Whether a directory has a model_index.json, or a scheduler with its net."""
    return any(paths.isfile(os.path.join(paths.expand(directory), name)) for name in (INDEX, SCHEDULER))


def load_pipeline(directory: str, *, dtype: str = "float32", param_dtype: str = "float32", place: Optional[Callable] = None,
                  variant: Optional[str] = None, size: Optional[Tuple[int, int]] = None, training: Mapping[str, Any] = {},
                  **overrides: Any) -> Pipeline:
    """The Pipeline of a published checkpoint's directory, which samples as its scheduler says.

    Its x_init is the noise N(0, I) that is diffused, latents where it has a first stage. cond: class ids for DiT; prompts for
    Stable Diffusion, or {"prompt": texts, "negative": texts}. What a safety checker would say of the pictures is not asked.

    Where PNDM moves x by other strides than those between the steps it asks its net at (with "linspace", or with "trailing" where the
    number of steps does not divide T), the pictures here are those of the steps that are asked at.

    Args:
      directory: with model_index.json, or a net's with scheduler_config.json beside its config.json.
      dtype, param_dtype, place: of the computation and the parameters, and where these go, see `published.load_net`. variant: of the
        files, such as "fp16".
      size: (height, width) of the pictures, for models that can make others than the size that they state.
      training: what it is trained with on from here, see `weights.schedulers.Sampling`.
      overrides: in place of the sampler's settings: name, steps, guidance, grid, batch_size.

    Raises:
      UserError: for a pipeline that is not known, missing or damaged files, and options that are not supported.
    """
    directory = paths.expand(directory)
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
    how = {"dtype": dtype, "param_dtype": param_dtype, "place": place, "variant": variant}
    source = Source(directory, index, how, size and tuple(size), training)
    pipeline = reader(source)
    pipeline = dataclasses.replace(pipeline, published=source.published(kind, pipeline.nets))
    settings = {"name", "steps", "guidance", "grid", "batch_size"}
    if extra := sorted(set(overrides) - settings):
        raise UserError(f"unknown override {extra[0]!r}; choose from: {', '.join(sorted({*settings, *how, 'size'}))}")
    return pipeline.with_defaults(**overrides)


def sampler_settings(directory: str) -> Dict[str, Any]:
    """How a published scheduler samples, as the `sampler` section of a recipe has it: name, its options by that name, and grid."""
    directory = paths.expand(directory)
    sampling = Source(directory, _index(directory), {}).sampling()
    return {"name": sampling.sampler, sampling.sampler: dict(sampling.options), "grid": schedule_and_grid(sampling)[1]}


def published_of(directory: str, nets: Iterable[str]) -> Published:
    """What a published directory holds beside the weights of `nets`, names of ours."""
    directory = paths.expand(directory)
    index = _index(directory)
    return Source(directory, index, {}).published(index["_class_name"], nets)


def _index(directory: str) -> Mapping[str, Any]:
    path = os.path.join(directory, INDEX)
    if not paths.isfile(path):  # a net and its scheduler alone
        return {"_class_name": "DDIMPipeline", "unet": ("diffusers", "UNet2DModel"), "scheduler": ("diffusers", "scheduler")}
    try:
        index = json.loads(paths.read_text(path))
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}") from e
    if not isinstance(index, dict):
        raise UserError(f"cannot read {path}: not a JSON object")
    return index
