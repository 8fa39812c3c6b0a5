"""Runs of ours as directories that diffusers opens: its pictures are ours, from the same noise."""
import json

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax import recipe
from ldm_jax.sampling import Pipeline
from tests import runs
from tests.parity.peers import close, nchw, noise, started_from
from tests.parity.test_edited_pictures import base

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

STEPS, CLASSES = 10, [1, 7]


def run(path, **changes):
    """A pipeline with random parameters, none zero, of the smoke recipe in `path`; changes: dotted keys, "__" for the dots."""
    config = runs.config(path, "smoke")
    for key, value in changes.items():
        config.unlock()
        *parents, last = key.split("__")
        section = config
        for parent in parents:
            section = section[parent]
        section[last] = value
    config = config.to_dict()
    system = recipe.build_system(config)
    rng = np.random.default_rng(0)

    def random(at, a):
        name = jax.tree_util.keystr(at, simple=True, separator="/")
        if name.startswith("latent/"):
            return np.full(a.shape, 0.7, np.float32) if "scale" in name and "vq" in path else rng.uniform(0.5, 1.5, a.shape)
        if a.ndim > 1:
            return rng.standard_normal(a.shape) * (1.0 if "embedding" in name else np.prod(a.shape[:-1]) ** -0.5)
        return 0.2 * rng.standard_normal(a.shape) + name.endswith("/scale")

    params = jax.tree_util.tree_map_with_path(lambda at, a: random(at, a).astype(np.float32), system.init(jax.random.key(0)))
    return Pipeline(system, params, config.get("sampler", {}))


def stepped(net, scheduler, x, **told):
    """What a user writes where no pipeline passes on the class: the net and the scheduler in a loop."""
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t.expand(len(x)), **told).sample, t, x).prev_sample
    return x


def pictures(x):
    return np.clip(x.numpy().transpose(0, 2, 3, 1) * 0.5 + 0.5, 0, 1)


@pytest.mark.parametrize("changes", [
    {"net__unet__norm_groups": 4},
    pytest.param({"process__parameterization": "x0", "process__schedule__name": "linear", "net__unet__norm_groups": 4},
                 marks=pytest.mark.long),
    {"net__name": "dit", "net__dit__time_shift": 1.0, "sampler__grid": "leading"}], ids=["unet-v-cosine", "unet-x0-linear", "dit-v-cosine"])
def test_pixels_told_a_class(changes, tmp_path):
    ours, x = run("digits", **changes), noise((8, 8, 1))
    assert ours.save_pretrained(str(tmp_path / "out")) is None
    kind = diffusers.DiTTransformer2DModel if "net__name" in changes else diffusers.UNet2DModel
    net = kind.from_pretrained(tmp_path / "out" / ("transformer" if "net__name" in changes else "unet"))
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    want = ours.sample(0, cond=CLASSES, steps=STEPS, guidance=1.0, x_init=x)
    close(pictures(stepped(net, scheduler, nchw(x), class_labels=torch.tensor(CLASSES))), want)
    again = ldm_jax.load(str(tmp_path / "out"))
    assert again.system.num_classes == 10
    close(again.sample(0, cond=CLASSES, steps=STEPS, guidance=2.0, x_init=x), ours.sample(
        0, cond=CLASSES, steps=STEPS, guidance=2.0, x_init=x))


def test_rectified_flow(tmp_path):
    """With the times of ours given to the scheduler; by itself it takes its last step at 1 / 1000."""
    ours, x = run("digits", process__schedule__name="rectified_flow", process__parameterization="flow", sampler__name="euler",
                  net__unet__norm_groups=4), noise((8, 8, 1))
    assert "t = 1/1000" in ours.save_pretrained(str(tmp_path / "out"))
    net = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    scheduler.set_timesteps(sigmas=np.arange(STEPS, 0, -1) / STEPS)
    y = nchw(x)
    with torch.no_grad():
        for t in scheduler.timesteps:
            y = scheduler.step(net(y, t.expand(2), class_labels=torch.tensor(CLASSES)).sample, t, y).prev_sample
    close(pictures(y), ours.sample(0, cond=CLASSES, steps=STEPS, guidance=1.0, x_init=x))



@pytest.mark.long
def test_latents_of_a_transformer_told_a_class(tmp_path, monkeypatch):
    """DiTPipeline with guidance, its null class 1000; each latent channel with a shift and a scale of its own."""
    ours = run("ldm_cifar", net__name="dit", net__dit__time_shift=1.0, first_stage__autoencoder__kl__norm_groups=4)
    x = noise(ours.system.sample_shape)
    ours.save_pretrained(str(tmp_path / "out"))
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    started_from(pipeline, monkeypatch, x)
    theirs = pipeline(CLASSES, guidance_scale=2.0, num_inference_steps=STEPS, output_type="np").images
    close(ours.sample(0, cond=CLASSES, steps=STEPS, guidance=2.0, x_init=x), theirs)
    again = ldm_jax.load(str(tmp_path / "out"))
    close(again.sample(0, cond=CLASSES, steps=STEPS, guidance=2.0, x_init=x), theirs)
    again.save_pretrained(str(tmp_path / "again"))
    close(ldm_jax.load(str(tmp_path / "again")).sample(0, cond=CLASSES, steps=STEPS, guidance=2.0, x_init=x), theirs)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    coder, params = ours.nets["autoencoder"]
    mean, logvar = coder.posterior(params, images)
    mean, logvar, scale, shift = map(np.asarray, (mean, logvar, ours.params["latent"]["scale"], ours.params["latent"]["shift"]))
    with torch.no_grad():
        posterior = pipeline.vae.encode(nchw(images)).latent_dist
    np.testing.assert_allclose(posterior.mean.numpy().transpose(0, 2, 3, 1), (mean - shift) / scale, atol=1e-4)
    np.testing.assert_allclose(posterior.logvar.numpy().transpose(0, 2, 3, 1), logvar - 2 * np.log(scale), atol=1e-4)


def test_latents_of_a_codebook(tmp_path, monkeypatch):
    ours = run("ldm_cifar_vq", net__unet__norm_groups=4, first_stage__autoencoder__vq__norm_groups=4, conditioners=None)
    x = noise(ours.system.sample_shape)
    ours.save_pretrained(str(tmp_path / "out"))
    pipeline = diffusers.LDMPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    started_from(pipeline, monkeypatch, x)
    close(ours.sample(0, num=2, steps=STEPS, x_init=x), pipeline(2, num_inference_steps=STEPS, output_type="np").images)


def test_a_first_stage_is_a_component(tmp_path):
    ours = run("autoencoder_cifar", autoencoder__kl__norm_groups=4)
    ours.save_pretrained(str(tmp_path / "out"))
    images = np.random.default_rng(1).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    coder, params = ours.nets["autoencoder"]
    with torch.no_grad():
        theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out")
        want = theirs(nchw(images)).sample.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(coder.decode(params, coder.posterior(params, images)[0]), want, atol=1e-4)


def test_what_was_loaded_is_written_as_it_was(tmp_path):
    """Prompts and all; with changed weights it is the changed model that is written."""
    pipeline, x = base(tmp_path), noise((4, 4, 4))
    ours = ldm_jax.load(str(tmp_path / "base"), batch_size=2)
    ours.save_pretrained(str(tmp_path / "out"))
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(again) is type(pipeline) and type(again.scheduler) is type(pipeline.scheduler)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        theirs, mine = getattr(pipeline, name).state_dict(), getattr(again, name).state_dict()
        assert set(theirs) == set(mine)
        assert all(torch.equal(theirs[key].reshape(mine[key].shape), mine[key]) for key in theirs), name
    again.set_progress_bar_config(disable=True)
    told = dict(height=8, width=8, num_inference_steps=3, latents=nchw(x), output_type="np")
    close(again(["a cat", "an ox"], **told).images, pipeline(["a cat", "an ox"], **told).images)
    changed = Pipeline(ours.system, {**ours.params, "net": jax.tree.map(lambda a: 0.9 * a, ours.params["net"])}, ours.defaults,
                       published=ours.published)
    changed.save_pretrained(str(tmp_path / "changed"))
    index = json.loads((tmp_path / "changed" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline" and index["force_zeros_for_empty_prompt"] is True
    want = changed.sample(0, cond=["a cat", "an ox"], steps=3, x_init=x)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "changed")
    again.set_progress_bar_config(disable=True)
    close(want, again(["a cat", "an ox"], **told).images)
