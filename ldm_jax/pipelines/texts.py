"""Published pipelines that are told a text."""
import dataclasses
from typing import Any, Callable, Mapping

from ldm_jax.pipelines.source import Source
from ldm_jax.pipelines.wiring import wired
from ldm_jax.sampling import Pipeline
from ldm_jax.systems.conditioners import masked_image
from ldm_jax.systems.conditions import Conditioner, Space
from ldm_jax.systems.prompts import prompt

LENGTH = 77  # tokens of a text in LDM's text-to-image, whatever its tokeniser says
AESTHETIC, UNAESTHETIC = 6.0, 2.5  # the scores that SDXL's refiner is told of the prompt and of the negative


def stable_diffusion(source: Source) -> Pipeline:
    """StableDiffusionPipeline and its image-to-image and inpainting kin, versions 1 and 2."""
    net, params = source.net("unet")
    towers, weights, tokenizers = source.text("text_encoder")
    conditioner = prompt(towers, tokenizers, weights, needs={"context_dim": net.context_dim})
    return wired(source.sampling(), net, params, source.net("vae"), _with_pictures(net, conditioner), steps=50, guidance=7.5,
                 others={name: (towers[name], weights[name]) for name in towers}, size=source.size)


def stable_diffusion_xl(source: Source) -> Pipeline:
    """StableDiffusionXLPipeline and its kin: two text towers or, in a refiner, the second alone, and numbers.

    The numbers are the size of the picture, where it was cropped and, of a refiner, how beautiful it should be.
    """
    net, params = source.net("unet")
    towers, weights, tokenizers = source.text(*(name for name in ("text_encoder", "text_encoder_2") if source.has(name)))
    coder = source.net("vae")
    size = source.size or tuple(n * coder[0].factor for n in net.image_shape[:2])
    scored = bool(source.index.get("requires_aesthetics_score"))
    numbers, against = ((*size, 0, 0, *end) for end in (((AESTHETIC,), (UNAESTHETIC,)) if scored else (size, size)))
    conditioner = prompt(towers, tokenizers, weights, needs={"context_dim": net.context_dim, "vector_dim": net.vector_dim},
                         penultimate=True, time_ids=numbers, negative_time_ids=against,
                         zero_null=source.index.get("force_zeros_for_empty_prompt", True))
    pipeline = wired(source.sampling(), net, params, coder, _with_pictures(net, conditioner), steps=50, guidance=5.0,
                     others={name: (towers[name], weights[name]) for name in towers}, size=source.size)
    return pipeline.with_defaults(strength=0.3) if scored else pipeline


def ldm_text_to_image(source: Source) -> Pipeline:
    """LDMTextToImagePipeline: latent diffusion told a text by a tower of its own."""
    net, params = source.net("unet")
    towers, weights, tokenizers = source.text("bert")
    tokenizers = {name: dataclasses.replace(words, max_length=LENGTH) for name, words in tokenizers.items()}
    conditioner = prompt(towers, tokenizers, weights, needs={"context_dim": net.context_dim})
    return wired(source.sampling(), net, params, source.net("vqvae"), lambda space: {"prompt": conditioner}, steps=50,
                 others={name: (towers[name], weights[name]) for name in towers}, size=source.size)


def _with_pictures(net: Any, conditioner: Conditioner) -> Callable[[Space], Mapping[str, Conditioner]]:
    """The prompt and, for a net with room for a mask and a picture, those."""
    def conditioners(space):
        if net.concat_channels != space.shape[-1] + 1:
            return {"prompt": conditioner}
        return {"prompt": conditioner, "masked_image": masked_image(space)}

    return conditioners
