"""Published pipelines that start from pictures, fill them in, or hand over half-way: the peer's pictures from the same noise."""
import jax
import numpy as np
import pytest

import ldm_jax
from tests.parity.peers import (
    CODER,
    CROSS,
    NEGATIVE,
    PROMPTS,
    SCALED,
    XL,
    close,
    nchw,
    noise,
    randomise,
    saved,
    scheduler,
    started_from,
    tokenizer,
    tower,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SIZE = (8, 16)  # pictures of another size than the net's own
PICTURES = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)


def certain(coder):
    """The autoencoder with so narrow a posterior that its draws do not matter."""
    coder.quant_conv.weight.data[4:], coder.quant_conv.bias.data[4:] = 0.0, -40.0
    return coder


def coder():
    return certain(randomise(diffusers.AutoencoderKL(**CODER, latent_channels=4, scaling_factor=0.4), seed=1))


def unit(pictures):
    return torch.from_numpy(pictures.transpose(0, 3, 1, 2) / 255.0).float()


def draws(pipeline, monkeypatch, latents):
    """The peer's noise for latents is `latents`; what it draws from the posterior does not matter."""
    started_from(pipeline, monkeypatch, *[latents] * 4)


@pytest.mark.long
@pytest.mark.parametrize("name, strength", [("euler", 0.7), ("dpm-karras", 0.45)])
def test_image_to_image(name, strength, tmp_path, monkeypatch):
    words = tokenizer(tmp_path / "words", "<|endoftext|>")
    unet = randomise(diffusers.UNet2DConditionModel(**CROSS))
    pipeline = saved(diffusers.StableDiffusionImg2ImgPipeline(coder(), tower(words), words, unet, scheduler(name), None, None,
                                                              requires_safety_checker=False), tmp_path / "sd")
    ours, x = ldm_jax.load(str(tmp_path / "sd"), batch_size=2, size=SIZE), noise((4, 8, 4))
    draws(pipeline, monkeypatch, x)
    want = pipeline(PROMPTS, image=unit(PICTURES), strength=strength, negative_prompt=NEGATIVE, guidance_scale=3.0,
                    num_inference_steps=10, output_type="np").images
    close(ours.sample(0, cond={"prompt": PROMPTS, "negative": NEGATIVE}, steps=10, guidance=3.0, x_init=x, image=PICTURES,
                      strength=strength), want)


@pytest.mark.parametrize("strength", [pytest.param(1.0, marks=pytest.mark.long), 0.6])
def test_inpainting(strength, tmp_path, monkeypatch):
    words = tokenizer(tmp_path / "words", "<|endoftext|>")
    unet = randomise(diffusers.UNet2DConditionModel(**dict(CROSS, in_channels=9)))
    pipeline = saved(diffusers.StableDiffusionInpaintPipeline(coder(), tower(words), words, unet, scheduler("euler"), None, None,
                                                              requires_safety_checker=False), tmp_path / "sd")
    ours, x = ldm_jax.load(str(tmp_path / "sd"), batch_size=2, size=SIZE), noise((4, 8, 4))
    mask = np.zeros(SIZE, np.uint8)
    mask[3:, 5:12] = 255
    draws(pipeline, monkeypatch, x)
    want = pipeline(PROMPTS, image=unit(PICTURES), mask_image=torch.from_numpy(mask / 255.0).float()[None, None], strength=strength,
                    guidance_scale=3.0, height=8, width=16, num_inference_steps=5, output_type="np").images
    close(ours.sample(0, cond=PROMPTS, steps=5, guidance=3.0, x_init=x, image=PICTURES, mask=mask, strength=strength), want)


def refiner(tmp_path):
    words = tokenizer(tmp_path / "others", "!")
    second = tower(words, transformers.CLIPTextModelWithProjection, hidden_size=8, projection_dim=10, hidden_act="gelu")
    unet = diffusers.UNet2DConditionModel(**dict(XL, cross_attention_dim=8, projection_class_embeddings_input_dim=10 + 5 * 6))
    return saved(diffusers.StableDiffusionXLImg2ImgPipeline(
        coder(), None, second, None, words, randomise(unet, seed=2), scheduler("euler"), requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False, add_watermarker=False), tmp_path / "refiner")


def test_refiner(tmp_path, monkeypatch):
    pipeline = refiner(tmp_path)
    ours, x = ldm_jax.load(str(tmp_path / "refiner"), batch_size=2, size=SIZE), noise((4, 8, 4))
    draws(pipeline, monkeypatch, x)
    want = pipeline(PROMPTS, image=unit(PICTURES), num_inference_steps=10, output_type="np").images
    close(ours.sample(0, cond=PROMPTS, steps=10, x_init=x, image=PICTURES), want)


def base(tmp_path, schedule="euler"):
    words, others = tokenizer(tmp_path / "w", "<|endoftext|>"), tokenizer(tmp_path / "o", "!")
    second = tower(others, transformers.CLIPTextModelWithProjection, hidden_size=8, projection_dim=10, hidden_act="gelu")
    kind = scheduler(schedule) if isinstance(schedule, str) else schedule
    return saved(diffusers.StableDiffusionXLPipeline(coder(), tower(words), second, words, others, randomise(
        diffusers.UNet2DConditionModel(**XL)), kind, add_watermarker=False), tmp_path / "base")


@pytest.mark.long
def test_base_and_refiner_share_the_way(tmp_path):
    first, second = base(tmp_path), refiner(tmp_path)
    x = noise((4, 4, 4))
    half = first(PROMPTS, height=8, width=8, num_inference_steps=10, denoising_end=0.7, latents=nchw(x), output_type="latent").images
    want = second(PROMPTS, image=half, num_inference_steps=10, denoising_start=0.7, output_type="np").images
    ours = [ldm_jax.load(str(tmp_path / name), batch_size=2) for name in ("base", "refiner")]
    x_t = ours[0].sample(0, cond=PROMPTS, steps=10, x_init=x, window=(0.0, 0.7))
    assert x_t.shape == (2, 4, 4, 4)
    close(ours[1].sample(0, cond=PROMPTS, steps=10, x_init=x_t, window=(0.7, 1.0)), want)


@pytest.mark.long
def test_turbo(tmp_path, monkeypatch):
    """One step, or a few with fresh noise, of Euler's ancestral method without guidance."""
    pipeline = base(tmp_path, diffusers.EulerAncestralDiscreteScheduler(**SCALED, timestep_spacing="trailing"))
    ours, x = ldm_jax.load(str(tmp_path / "base"), batch_size=2), noise((4, 4, 4))
    want = pipeline(PROMPTS, height=8, width=8, num_inference_steps=1, guidance_scale=0.0, latents=nchw(x), output_type="np").images
    close(ours.sample(0, cond=PROMPTS, steps=1, guidance=1.0, x_init=x), want)
    from ldm_jax.types import example_keys, fold_in, normal
    keys = fold_in(example_keys(jax.random.key(0), 2), 1)
    started_from(pipeline, monkeypatch, *(np.asarray(normal(fold_in(keys, i), x.shape)) for i in range(3)))
    want = pipeline(PROMPTS, height=8, width=8, num_inference_steps=3, guidance_scale=0.0, latents=nchw(x), output_type="np").images
    close(ours.sample(0, cond=PROMPTS, steps=3, guidance=1.0, x_init=x), want)
