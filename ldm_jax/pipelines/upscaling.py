"""Published pipelines that enlarge a picture, which is concatenated to the latents at their own size."""
import dataclasses
import warnings

from ldm_jax.pipelines.source import Source
from ldm_jax.pipelines.wiring import wired
from ldm_jax.sampling import Pipeline
from ldm_jax.systems.conditioners import stepped_low_resolution
from ldm_jax.systems.prompts import prompt
from ldm_jax.types import UserError
from ldm_jax.weights.schedulers import read_scheduler

SCALE = 0.08333  # of the latents of every upscaler of Stable Diffusion; the config of its first stage may say another
LEVEL, HIGHEST = 20, 350  # the noise of the small picture: the usual one, and the highest where the index does not say


def stable_diffusion_upscale(source: Source) -> Pipeline:
    """StableDiffusionUpscalePipeline: told a text, a small picture with noise in it, and how much noise that is, as a class."""
    kind = source.index["low_res_scheduler"][1]
    if kind != "DDPMScheduler":
        raise UserError(f"low_res_scheduler is a {kind!r}; the small picture's noise is known for a 'DDPMScheduler' alone")
    net, params = source.net("unet")
    highest = source.index.get("max_noise_level", HIGHEST)
    if not (net.class_kind == "number" or net.class_kind == "plain" and net.num_classes > highest):
        raise UserError(f"the U-Net knows {net.num_classes} levels of noise in the small picture (num_class_embeds) and "
                        f"max_noise_level={highest} needs more than that; load a checkpoint whose parts belong together")
    net = dataclasses.replace(net, class_kind="number", num_classes=None)
    coder, weights = source.net("vae")
    if coder.scale != SCALE:
        warnings.warn(f"the first stage has scaling_factor={coder.scale}; an upscaler's latents have {SCALE}, which is used")
    coder = dataclasses.replace(coder, scale=SCALE)
    towers, texts, tokenizers = source.text("text_encoder")
    text = prompt(towers, tokenizers, texts, needs={"context_dim": net.context_dim})
    abar = read_scheduler(source.place("low_res_scheduler")).abar

    def conditioners(space):
        return {"prompt": text, "low_resolution": stepped_low_resolution(space, factor=coder.factor, abar=abar, highest=highest,
                                                                         usual=min(LEVEL, highest))}

    return wired(source.sampling(), net, params, (coder, weights), conditioners, steps=75, guidance=9.0,
                 others={name: (towers[name], texts[name]) for name in towers}, size=source.size)


def ldm_super_resolution(source: Source) -> Pipeline:
    """LDMSuperResolutionPipeline: told a small picture alone. Its latents are not scaled, whatever the first stage's config says.

    Under schedulers that work in noise levels (Euler, LMS) the reference scales the small picture along with the latents; here it
    stays as the net was trained with it.
    """
    net, params = source.net("unet")
    coder, weights = source.net("vqvae")
    coder = dataclasses.replace(coder, scale=1.0)
    return wired(source.sampling(), net, params, (coder, weights), steps=100, size=source.size, conditioners=lambda space: {
        "low_resolution": stepped_low_resolution(space, factor=coder.factor)})
