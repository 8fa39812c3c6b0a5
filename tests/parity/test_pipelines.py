"""Pipelines that diffusers saves with random weights, read by `ldm_jax.load`: the same pictures from the same noise."""
import json

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax.types import UserError, example_keys, fold_in, normal
from tests.parity.peers import (
    CODER,
    CROSS,
    NEGATIVE,
    PLAIN,
    PROMPTS,
    SCALED,
    STEPS,
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

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def test_pixels(tmp_path, monkeypatch):
    """Ancestral sampling, the peer's noise being that of the pictures here."""
    unet = randomise(diffusers.UNet2DModel(**dict(PLAIN, sample_size=[6, 4])))
    pipeline = saved(diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(clip_sample_range=0.8)), tmp_path)
    ours, x = ldm_jax.load(str(tmp_path), batch_size=2), noise((6, 4, 3))
    assert ours.defaults["steps"] == 1000 and ours.defaults["name"] == "ddpm"
    keys = fold_in(example_keys(jax.random.key(0), 2), 1)
    started_from(pipeline, monkeypatch, x, *(np.asarray(normal(fold_in(keys, i), x.shape)) for i in range(STEPS - 1)))
    close(ours.sample(0, steps=STEPS, x_init=x), pipeline(2, num_inference_steps=STEPS, output_type="np").images)


def test_a_net_and_its_scheduler_alone(tmp_path):
    """In one directory, with model_index.json or without."""
    diffusers.UNet2DModel(**PLAIN).save_pretrained(tmp_path)
    diffusers.DDIMScheduler(clip_sample_range=0.8).save_pretrained(tmp_path)
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    for index in (None, {"_class_name": "DDPMPipeline", **parts}):
        if index:
            (tmp_path / "model_index.json").write_text(json.dumps(index))
        ours = ldm_jax.load(str(tmp_path), guidance=2.0)
        assert ours.defaults["name"] == "ddim" and ours.defaults["ddim"] == {"bound": 0.8} and ours.defaults["guidance"] == 2.0
        assert ours.system.sample_shape == (4, 4, 3) and list(ours.nets) == ["net"]


def test_latent_unconditional(tmp_path, monkeypatch):
    coder = randomise(diffusers.VQModel(**CODER, latent_channels=3, num_vq_embeddings=40, scaling_factor=0.4), seed=1)
    unet = randomise(diffusers.UNet2DModel(**PLAIN))
    pipeline = saved(diffusers.LDMPipeline(coder, unet, diffusers.DDIMScheduler(**SCALED, clip_sample=False)), tmp_path)
    ours, x = ldm_jax.load(str(tmp_path), batch_size=2), noise((4, 4, 3))
    started_from(pipeline, monkeypatch, x)
    close(ours.sample(0, steps=STEPS, x_init=x), pipeline(2, num_inference_steps=STEPS, output_type="np").images)


def test_dit(tmp_path, monkeypatch):
    net = randomise(diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=6, num_layers=2, in_channels=4,
                                                    out_channels=8, sample_size=4))
    coder = randomise(diffusers.AutoencoderKL(**CODER, latent_channels=4, scaling_factor=0.4), seed=1)
    pipeline = saved(diffusers.DiTPipeline(net, coder, scheduler("dpm-karras")), tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "id2label": {str(i): f"name {i}" for i in range(1000)}}))
    ours, x = ldm_jax.load(str(tmp_path), batch_size=2), noise((4, 4, 4))
    assert ours.class_names[11] == "name 11"
    started_from(pipeline, monkeypatch, x)
    want = pipeline([7, 999], guidance_scale=3.0, num_inference_steps=STEPS, output_type="np").images
    close(ours.sample(0, cond=[7, 999], steps=STEPS, guidance=3.0, x_init=x), want)


@pytest.mark.parametrize("name", [pytest.param("pndm", marks=pytest.mark.long), "euler-v"])
def test_stable_diffusion(name, tmp_path):
    words = tokenizer(tmp_path / "words", "<|endoftext|>")
    coder = randomise(diffusers.AutoencoderKL(**CODER, latent_channels=4, scaling_factor=0.4), seed=1)
    unet = randomise(diffusers.UNet2DConditionModel(**CROSS))
    pipeline = saved(diffusers.StableDiffusionPipeline(coder, tower(words), words, unet, scheduler(name), None, None,
                                                       requires_safety_checker=False), tmp_path / "sd")
    ours, x = ldm_jax.load(str(tmp_path / "sd"), batch_size=2), noise((4, 4, 4))
    negative = NEGATIVE if name == "pndm" else None
    want = pipeline(PROMPTS, negative_prompt=negative, guidance_scale=4.0, height=8, width=8, num_inference_steps=STEPS,
                    latents=nchw(x), output_type="np").images
    close(ours.sample(0, cond={"prompt": PROMPTS, "negative": negative}, steps=STEPS, guidance=4.0, x_init=x), want)


def test_stable_diffusion_xl(tmp_path):
    words, others = tokenizer(tmp_path / "words", "<|endoftext|>"), tokenizer(tmp_path / "others", "!")
    coder = randomise(diffusers.AutoencoderKL(**CODER, latent_channels=4, scaling_factor=0.4), seed=1)
    second = tower(others, transformers.CLIPTextModelWithProjection, hidden_size=8, projection_dim=10, hidden_act="gelu")
    pipeline = saved(diffusers.StableDiffusionXLPipeline(coder, tower(words), second, words, others,
                                                         randomise(diffusers.UNet2DConditionModel(**XL)), scheduler("euler"),
                                                         add_watermarker=False), tmp_path / "xl")
    ours, x = ldm_jax.load(str(tmp_path / "xl"), batch_size=2), noise((4, 4, 4))
    want = pipeline(PROMPTS, height=8, width=8, num_inference_steps=STEPS, latents=nchw(x), output_type="np").images
    close(ours.sample(0, cond=PROMPTS, steps=STEPS, x_init=x), want)


def test_refusals(tmp_path):
    pipeline = diffusers.DDIMPipeline(diffusers.UNet2DModel(**PLAIN), diffusers.DDIMScheduler())
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    for change, message in [({"_class_name": "Kandinsky"}, "unknown published pipeline 'Kandinsky'; choose from: DDIM"),
                            ({"unet": [None, None]}, "has no 'unet', which a DDIMPipeline needs"),
                            ({"tower": ["a", "b"]}, "entries that are not supported: tower")]:
        path.write_text(json.dumps({**index, **change}))
        with pytest.raises(UserError, match=message):
            ldm_jax.load(str(tmp_path))
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="unknown override 'stepz'; choose from: batch_size, dtype"):
        ldm_jax.load(str(tmp_path), stepz=3)
    with pytest.raises(UserError, match="this model takes no condition"):
        ldm_jax.load(str(tmp_path)).sample(0, 1, cond=["a cat"], steps=1)
