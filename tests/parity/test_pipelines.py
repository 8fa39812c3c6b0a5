"""Pipelines that diffusers saves with random weights, read by `ldm_jax.load`: the same pictures from the same noise."""
import json
import sys

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax.data.bytepairs import LETTERS
from ldm_jax.types import UserError, example_keys, fold_in, normal

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TOLERANCE, STEPS = 1e-3, 5
SCALED = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
U_NET = dict(sample_size=4, block_out_channels=(8, 12), norm_num_groups=4, layers_per_block=1)
PLAIN = dict(U_NET, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
             attention_head_dim=4)
CROSS = dict(U_NET, cross_attention_dim=12, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
CODER = dict(block_out_channels=(8, 12), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
             up_block_types=("UpDecoderBlock2D",) * 2, sample_size=8)
XL = dict(CROSS, cross_attention_dim=12 + 8, addition_embed_type="text_time", addition_time_embed_dim=6,
          use_linear_projection=True, projection_class_embeddings_input_dim=10 + 6 * 6)
PROMPTS, NEGATIVE = ["a Cat, at dawn", "an ox (big)"], ["bad", "ugly fox"]
WORDS = "cat dawn ox fox big bad"


def randomise(model, seed=0):
    """No parameter is zero, nor such that a sum explodes; no answer is so small that it does not matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.data = noise * (1.0 if "embedding" in name else float(np.prod(p.shape[1:])) ** -0.5)
        else:
            p.data = 0.2 * noise + float("norm" in name and name.endswith("weight"))
    return model.eval()


def tokenizer(folder, pad):
    letters = sorted(LETTERS, key=lambda c: (c != "!", c))
    merges = list(dict.fromkeys((word[:i], word[i] + ("</w>" if i + 1 == len(word) else ""))
                                for word in WORDS.split() for i in range(1, len(word))))
    tokens = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(dict.fromkeys(tokens))}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, "pad_token": pad}))
    return transformers.CLIPTokenizer.from_pretrained(folder)


def tower(words, kind=transformers.CLIPTextModel, **options):
    return randomise(kind(transformers.CLIPTextConfig(**{**dict(
        vocab_size=len(words), hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id), **options})))


def saved(pipeline, folder):
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(shape, n=2, seed=3):
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


def nchw(a):
    return torch.from_numpy(a.transpose(0, 3, 1, 2).copy())


def close(got, want):
    assert got.shape == want.shape and 0.05 < np.std(want) and np.mean((want > 0.01) & (want < 0.99)) > 0.2
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


def started_from(pipeline, monkeypatch, *draws):
    """The peer's draws, in their order."""
    left = iter([nchw(x) for x in draws])
    for module in {sys.modules[type(pipeline).__module__], sys.modules[type(pipeline.scheduler).__module__]}:
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: next(left), raising=False)


SCHEDULERS = {
    "pndm": (diffusers.PNDMScheduler, dict(SCALED, skip_prk_steps=True, steps_offset=1)),
    "euler": (diffusers.EulerDiscreteScheduler, dict(SCALED, steps_offset=1, timestep_spacing="leading")),
    "euler-v": (diffusers.EulerDiscreteScheduler, dict(SCALED, prediction_type="v_prediction", timestep_spacing="trailing",
                                                       rescale_betas_zero_snr=True)),
    "dpm-karras": (diffusers.DPMSolverMultistepScheduler, dict(SCALED, use_karras_sigmas=True)),
}


def scheduler(name):
    kind, options = SCHEDULERS[name]
    return kind(**options)


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


@pytest.mark.parametrize("name", ["pndm", "euler-v"])
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
    with pytest.raises(UserError, match="unknown override 'step'; choose from: batch_size, dtype"):
        ldm_jax.load(str(tmp_path), step=3)
    with pytest.raises(UserError, match="this model takes no condition"):
        ldm_jax.load(str(tmp_path)).sample(0, 1, cond=["a cat"], steps=1)
