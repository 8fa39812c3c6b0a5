"""More pipelines that diffusers saves with random weights: upscalers, score models, and the first latent text-to-image."""
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
    bert,
    bert_tokenizer,
    close,
    nchw,
    noise,
    randomise,
    saved,
    started_from,
    tokenizer,
    tower,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SMALL = np.random.default_rng(1).random((2, 4, 4, 3)).astype(np.float32)
FOUR = dict(block_out_channels=(8, 8, 12), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4, sample_size=16)  # a first stage of factor 4
SKIPS = dict(down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"), up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
             block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=None, time_embedding_type="fourier", sample_size=4,
             mid_block_scale_factor=1.41421356, norm_eps=1e-6, attention_head_dim=None, freq_shift=0)
CONDITION = 2**31 - 1  # folded into a picture's key for the noise of its conditions


def upscaler(folder, **options):
    words = tokenizer(folder / "words", "<|endoftext|>")
    coder = randomise(diffusers.AutoencoderKL(**FOUR, latent_channels=4, scaling_factor=0.08333), seed=1)
    coder.decoder.conv_in.weight.data *= 0.08333  # what it decodes is latents / 0.08333
    unet = randomise(diffusers.UNet2DConditionModel(**dict(
        CROSS, in_channels=7, num_class_embeds=60, only_cross_attention=[True, False], use_linear_projection=True)))
    return saved(diffusers.StableDiffusionUpscalePipeline(
        coder, tower(words), words, unet, diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        diffusers.DDIMScheduler(**SCALED, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False), **options),
        folder / "up")


@pytest.mark.long
def test_stable_diffusion_upscale(tmp_path, monkeypatch):
    """At the usual noise of the small picture and at another; the noise is that of the conditions here."""
    pipeline = upscaler(tmp_path, max_noise_level=50)
    ours, x = ldm_jax.load(str(tmp_path / "up"), batch_size=2), noise((4, 4, 4))
    assert ours.defaults["steps"] == 75 and ours.defaults["guidance"] == 9.0
    keys = fold_in(fold_in(fold_in(example_keys(jax.random.key(0), 2), 1), CONDITION), 0)
    for image, level in ((SMALL, {}), ({"image": SMALL, "level": 50}, {"noise_level": 50})):
        started_from(pipeline, monkeypatch, np.asarray(normal(keys, SMALL.shape)))
        want = pipeline(PROMPTS, nchw(SMALL), negative_prompt=NEGATIVE, guidance_scale=4.0, num_inference_steps=STEPS,
                        latents=nchw(x), output_type="np", **level).images
        cond = {"prompt": PROMPTS, "negative": NEGATIVE}
        close(ours.sample(0, cond=cond, image=image, steps=STEPS, guidance=4.0, x_init=x), want)


def test_what_an_upscaler_refuses(tmp_path):
    pipeline, path = upscaler(tmp_path, max_noise_level=59), tmp_path / "up" / "model_index.json"
    with pytest.raises(UserError, match="level=60 .* from 0 to 59"):
        ldm_jax.load(str(tmp_path / "up")).sample(0, cond=PROMPTS, image={"image": SMALL, "level": 60}, steps=1)
    index = json.loads(path.read_text())
    for change, message in [({"max_noise_level": 60}, "knows 60 levels of noise .* max_noise_level=60"),
                            ({"low_res_scheduler": ["diffusers", "EulerDiscreteScheduler"]}, "'EulerDiscreteScheduler'")]:
        path.write_text(json.dumps({**index, **change}))
        with pytest.raises(UserError, match=message):
            ldm_jax.load(str(tmp_path / "up"))
    path.write_text(json.dumps(index))
    pipeline.vae.register_to_config(scaling_factor=0.5)
    pipeline.vae.save_pretrained(tmp_path / "up" / "vae")
    with pytest.warns(UserWarning, match="scaling_factor=0.5; an upscaler's latents have 0.08333"):
        ours = ldm_jax.load(str(tmp_path / "up"))
    np.testing.assert_allclose(ours.params["latent"]["scale"], 1 / 0.08333, rtol=1e-6)


def test_ldm_super_resolution(tmp_path, monkeypatch):
    """Of pictures of another size than the net's own."""
    coder = randomise(diffusers.VQModel(**FOUR, latent_channels=3, num_vq_embeddings=40), seed=1)
    unet = randomise(diffusers.UNet2DModel(**dict(PLAIN, in_channels=6, out_channels=3)))
    rule = diffusers.DDIMScheduler(**SCALED, clip_sample=False)
    pipeline = saved(diffusers.LDMSuperResolutionPipeline(coder, unet, rule), tmp_path)
    ours, x = ldm_jax.load(str(tmp_path), size=(16, 24), batch_size=2), noise((4, 6, 3))
    image = np.random.default_rng(1).random((2, 4, 6, 3)).astype(np.float32)
    started_from(pipeline, monkeypatch, x)
    close(ours.sample(0, image=image, steps=STEPS, x_init=x),
          pipeline(nchw(image) * 2 - 1, num_inference_steps=STEPS, output_type="np").images)
    with pytest.raises(UserError, match="needs the condition 'low_resolution'"):
        ours.sample(0)


def draws_of_a_corrector(key, i, steps, repeats, shape):
    """What our picture i is noised with, in the peer's order: `repeats` draws of the corrector, then one of the predictor."""
    own = fold_in(example_keys(key, i + 1)[i:], 1)
    for step in range(steps):
        at = fold_in(own, step)
        yield from (np.asarray(normal(fold_in(fold_in(at, 1), j), (1, *shape))) for j in range(repeats))
        yield np.asarray(normal(fold_in(at, 0), (1, *shape)))


def test_score_sde_ve(tmp_path, monkeypatch):
    """The peer's correction depends on its batch, so it makes one picture at a time; both see the same noise throughout."""
    unet = randomise(diffusers.UNet2DModel(**SKIPS))
    rule = diffusers.ScoreSdeVeScheduler(num_train_timesteps=40, snr=0.2, sigma_min=0.02, sigma_max=0.4, sampling_eps=0.02,
                                         correct_steps=2)
    pipeline = saved(diffusers.ScoreSdeVePipeline(unet, rule), tmp_path)
    ours, x = ldm_jax.load(str(tmp_path), batch_size=2), noise((4, 4, 3)) + 1.0  # half of the peer's pixels would be cut off at 0 otherwise
    assert ours.defaults["steps"] == 40
    got, want = ours.sample(0, steps=STEPS, x_init=x), []
    for i in range(2):
        started_from(pipeline, monkeypatch, x[i:i + 1], *draws_of_a_corrector(jax.random.key(0), i, STEPS, 2, x.shape[1:]))
        want.append(pipeline(1, num_inference_steps=STEPS, output_type="np").images)
    close(got, np.concatenate(want))


def test_ldm_text_to_image(tmp_path):
    words = bert_tokenizer(tmp_path / "words", model_max_length=512)
    coder = randomise(diffusers.AutoencoderKL(**CODER, latent_channels=4, scaling_factor=0.4), seed=1)
    unet = randomise(diffusers.UNet2DConditionModel(**CROSS))
    rule = diffusers.DDIMScheduler(**SCALED, clip_sample=False)
    pipeline = saved(diffusers.LDMTextToImagePipeline(coder, bert(len(words)), words, unet, rule), tmp_path / "ldm")
    ours, x = ldm_jax.load(str(tmp_path / "ldm"), batch_size=2), noise((4, 4, 4))
    assert ours.defaults["guidance"] == 1.0 and sorted(ours.nets) == ["autoencoder", "bert", "latent", "net"]
    want = pipeline(PROMPTS, height=32, width=32, guidance_scale=4.0, num_inference_steps=STEPS, latents=nchw(x), output_type="np").images
    close(ours.sample(0, cond=PROMPTS, steps=STEPS, guidance=4.0, x_init=x), want)
    with pytest.warns(UserWarning, match="does not see 'fox fox fox'"):
        ours.system.conditioners["prompt"].read("fox " * 78)
