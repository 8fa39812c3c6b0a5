"""Published checkpoints by the functions behind the command line: sampled, changed, trained on, adapted, exported."""
import json
import os

import jax
import numpy as np
import pytest
from PIL import Image

import ldm_jax
from ldm_jax import api, run, stages
from ldm_jax.parallel.sharding import make_mesh
from ldm_jax.recipe import build_system
from ldm_jax.types import UserError
from tests import runs, tiny

PROMPTS = ["a cat", "the ox at dawn", "fox"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.stable_diffusion(tmp_path_factory.mktemp("weights") / "sd")


@pytest.fixture(scope="module")
def pipeline(weights):
    return ldm_jax.load(weights, steps=3, batch_size=1)


def pixels(path):
    return np.asarray(Image.open(path))


def test_prompts_differ_and_do_not_depend_on_how_many_there_are(pipeline):
    three = pipeline.sample(0, cond=PROMPTS)
    assert three.shape == (3, 8, 8, 3) and np.abs(three[0] - three[1]).max() > 0.05
    np.testing.assert_allclose(pipeline.sample(0, cond=PROMPTS[:1]), three[:1], atol=1e-5)
    same = pipeline.sample(0, cond=["a cat"] * 2)
    assert np.abs(same[0] - same[1]).max() > 0.05
    negative = pipeline.sample(0, cond={"prompt": PROMPTS, "negative": "dawn"})
    assert np.abs(negative - three).max() > 0.01


def test_pictures_of_other_sizes(weights, pipeline):
    wide = ldm_jax.load(weights, steps=3, size=(8, 16))
    assert wide.sample(0, cond="a cat").shape == (1, 8, 16, 3)
    with pytest.raises(UserError, match=r"size=\(9, 16\) must be \(height, width\), multiples of 4"):
        ldm_jax.load(weights, size=(9, 16))


@pytest.mark.long
def test_large_pictures_are_written_as_they_are_too(weights, tmp_path):
    """The sheet has white lines between pictures; each by itself has the model's size and nothing else."""
    pipeline = ldm_jax.load(weights, steps=1, size=(128, 8), batch_size=1)
    path = run.sample(pipeline, str(tmp_path), prompts=PROMPTS[:1], num=2)
    again = run.sample(pipeline, str(tmp_path), prompts=PROMPTS[:1], num=2)
    assert again.endswith("_n2_2.png") and pixels(path).shape == (132, 22, 3)
    alone = [pixels(path.replace(".png", f"_picture{i}.png")) for i in (0, 1)]
    assert alone[0].shape == alone[1].shape == (128, 8, 3)
    np.testing.assert_array_equal(pixels(path)[2:-2, 2:10], alone[0])
    np.testing.assert_array_equal(pixels(path)[2:-2, 12:20], alone[1])


def test_a_picture_is_started_from(pipeline):
    """By the last half of ten steps: what is left of it at the sixth time of the schedule is alpha z, and a net of weight zero that
    predicts eps = 0 gives z back."""
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    zero = pipeline._with(params={**pipeline.params, "net": jax.tree.map(np.zeros_like, pipeline.params["net"])})
    out = zero.sample(0, cond="a cat", image=image, strength=0.5, steps=10, x_init=np.zeros((1, 4, 4, 4)))
    net, params = pipeline.nets["autoencoder"]
    mean, logvar = net.posterior(params, image[None] / 127.5 - 1.0)
    again = [np.asarray(net.decode(params, mean + k * np.exp(0.5 * logvar))) * 0.5 + 0.5 for k in (-6, 6)]
    assert np.abs(out - np.clip(np.asarray(net.decode(params, mean)) * 0.5 + 0.5, 0, 1)).max() < np.abs(again[0] - again[1]).max()
    few, many = (np.abs(pipeline.sample(0, cond="a cat", image=image, strength=s, steps=10) - out).mean() for s in (0.1, 1.0))
    assert few < many


def test_what_is_kept_is_kept(pipeline):
    """Where a model has no place for a mask, x is replaced by the noised picture after each step; the last of them is its latents."""
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 1
    net, params = pipeline.nets["autoencoder"]
    out = pipeline.sample(0, cond="a cat", image=image, mask=mask, window=(0.0, 0.999))
    z = net.posterior(params, image[None] / 127.5 - 1.0)[0] * 0.4
    spread = np.exp(0.5 * np.asarray(net.posterior(params, image[None] / 127.5 - 1.0)[1]))
    kept = np.abs(out - z)[:, :, :2]
    assert np.all(kept < 6 * 0.4 * spread[:, :, :2] + 0.05) and np.abs(out - z)[:, :, 2:].max() > 0.3


def test_mistakes(pipeline, weights, tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    for mistake, message in [
            (dict(image=image, strength=0.0), r"strength=0.0 must be in \(0, 1\]"), (dict(mask=image[..., 0]), "give it as image"),
            (dict(image=image, mask=image[..., 0] + 0.5), "a mask must hold 0"), (dict(window=(0.5, 0.2)), "0 <= begin < end <= 1"),
            (dict(image=image, window=(0.5, 1.0)), "begins with x_init"), (dict(image=image[:4]), "pictures of shape"),
            (dict(cond={"promt": "a"}), "cond has the parts promt; give texts"),
            (dict(window=(0.0, 0.5), trajectory=True), "trajectory=True shows pictures")]:
        with pytest.raises(UserError, match=message):
            pipeline.sample(0, **{"cond": "a cat", **mistake})
    with pytest.raises(UserError, match="holds no published checkpoint"):
        run.load(str(tmp_path), weights=str(tmp_path))
    with pytest.raises(UserError, match="give --prompt"):
        run.sample(pipeline, str(tmp_path))
    with pytest.raises(UserError, match="no picture|cannot read the picture"):
        run.sample(pipeline, str(tmp_path), prompts=["a"], image=weights)


@pytest.mark.long
def test_a_model_that_fills_in(tmp_path):
    folder = tiny.stable_diffusion(tmp_path / "sd", masked=True)
    pipeline = ldm_jax.load(folder, steps=2)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    mask = np.zeros((8, 8), bool)
    mask[:, 4:] = True
    a = pipeline.sample(0, cond="a cat", image=image, mask=mask)
    np.testing.assert_array_equal(a, pipeline.sample(0, cond={"prompt": "a cat", "masked_image": {"image": image, "mask": mask}}))
    assert np.abs(a - pipeline.sample(0, cond="a cat", image=255 - image, mask=mask)).max() > 0.01
    with pytest.raises(UserError, match="needs the condition 'masked_image'"):
        pipeline.sample(0, cond={"prompt": "a cat"})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng, lines = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (9, 8, 3), np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": PROMPTS[i % 3]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


@pytest.fixture
def undrawn(monkeypatch):
    """Training on one device that draws no pictures; other tests look at both."""
    monkeypatch.setattr(run.recipe, "build_mesh", lambda section: (make_mesh(devices=jax.devices()[:1]), ()))
    monkeypatch.setattr(run.drawing, "draw", lambda *args: [])


def recipe(weights, pictures, variant="", **changes):
    config = runs.config("sd15", variant)
    config.init_from, config.data.folder.path = weights, pictures
    config.data.folder.update(image_size=8, held_out=0.0)
    config.data.image_shape = (8, 8, 3)
    config.train.update(batch_size=8, steps=2, save_every=2, log_every=2)
    config.optimizer.update(warmup_steps=0, learning_rate=1e-2)
    config.sampler.steps = 2
    config.update(changes)
    return config.to_dict()


def test_training_goes_on_from_it(weights, pictures, tmp_path):
    """It begins with the checkpoint's own parameters and changes the U-Net's; what comes of it is still the kind that it was."""
    config, theirs = recipe(weights, pictures), ldm_jax.load(weights)
    system = build_system(config)
    begun = stages.given(config, "", None, system)
    assert system.trained == ("net",) and set(begun) == {"net", "autoencoder", "latent", "text_encoder"}
    jax.tree.map(np.testing.assert_array_equal, dict(begun), dict(theirs.params))
    assert jax.tree.structure(jax.eval_shape(system.init, jax.random.key(0))) == jax.tree.structure(dict(begun))
    changed = {**begun, "net": jax.tree.map(lambda a: 0.9 * a, begun["net"])}
    ours = api.pipeline(system, changed, config)
    run.export(ours, str(tmp_path / "out"))
    again = ldm_jax.load(str(tmp_path / "out"), batch_size=2)
    path = run.sample(ours, str(tmp_path), prompts=PROMPTS[:2], num=3, negative="ox")
    assert os.path.basename(path) == "sampled_seed0_n3.png" and pixels(path).std() > 5
    np.testing.assert_allclose(again.sample(0, cond=PROMPTS[:2], steps=2), ours.sample(0, cond=PROMPTS[:2]), atol=1e-5)


@pytest.mark.long
def test_adapters_are_trained_written_and_merged(weights, pictures, undrawn, tmp_path):
    workdir = str(tmp_path / "run")
    run.train(recipe(weights, pictures, "lora"), workdir)
    ours = ldm_jax.load(workdir)
    assert set(ours.system.trained) == {"lora"}
    bare = run.load(workdir, runs.config("sd15").to_dict())  # a recipe that names no checkpoint leaves name and grid to the run
    assert (bare.defaults["name"], bare.defaults["steps"]) == ("ddim", 50) and callable(bare.defaults["grid"])
    run.export(ours, str(tmp_path / "lora"))
    want = ours.sample(0, cond=PROMPTS)
    plain = ldm_jax.load(weights, steps=2)
    assert np.abs(plain.sample(0, cond=PROMPTS) - want).max() > 1e-3
    np.testing.assert_allclose(plain.with_lora(str(tmp_path / "lora")).sample(0, cond=PROMPTS), want, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, dict(ldm_jax.load(weights, lora=str(tmp_path / "lora")).params),
                 dict(plain.with_lora(str(tmp_path / "lora")).params))
    without = plain.with_lora(str(tmp_path / "lora"), 0.0)
    np.testing.assert_allclose(without.sample(0, cond=PROMPTS), plain.sample(0, cond=PROMPTS), atol=1e-6)
    run.export(ours, str(tmp_path / "whole"), merged=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), dict(ldm_jax.load(str(tmp_path / "whole")).params),
                 dict(plain.with_lora(str(tmp_path / "lora")).params))
    with pytest.raises(UserError, match="is there already"):
        run.export(ours, str(tmp_path / "lora"))
    with pytest.raises(UserError, match="has trained no adapters"):
        plain.save_lora(str(tmp_path / "none"))


@pytest.mark.long
def test_another_process_and_another_loss(weights, pictures, tmp_path):
    """Rectified flow from a checkpoint of eps: the net and the first stage are its own, the process and the sampler the recipe's."""
    config = recipe(weights, pictures)
    config["process"].update(schedule=dict(name="rectified_flow"), parameterization="flow")
    config["sampler"].update(name="euler", grid="uniform")
    system = build_system(config)
    params = system.read()
    ours = api.pipeline(system, params, config)
    assert system.schedule.family == "flow" and ours.published is None
    batch = {"image": np.zeros((2, 8, 8, 3), np.uint8), "prompt_text_encoder": np.ones((2, 77), np.int32)}
    assert np.all(jax.jit(system.loss_fn)(params, batch, jax.random.key(0))[0] > 0.1)
    assert np.isfinite(ours.sample(0, cond="a cat")).all()
    with pytest.raises(UserError, match="this one has a process of its own"):
        ours.save_pretrained(str(tmp_path / "out"))


def test_a_run_is_exported_and_gone_on_from(tmp_path):
    """A recipe's own run, written out, is what the same recipe starts from with init_from; its conditions keep their rates."""
    config = runs.config("digits", "smoke").to_dict()
    system = build_system(config)
    first = api.pipeline(system, {"net": tiny.filled(system.nets["net"], 0)}, config)
    run.export(first, str(tmp_path / "out"))
    config = {**config, "init_from": str(tmp_path / "out"), "conditioners": {"class": {"drop": 0.3}}}
    system = build_system(config)
    second = api.pipeline(system, stages.given(config, "", None, system), config)
    assert second.system.conditioners["class"].drop == 0.3
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 1))
    np.testing.assert_allclose(second.sample(0, cond=[1, 2], x_init=x), first.sample(0, cond=[1, 2], x_init=x), atol=2e-4)


def test_recipes_that_do_not_fit(weights, pictures):
    build = lambda **changes: build_system({**recipe(weights, pictures), **changes})
    with pytest.raises(UserError, match="init_from is empty"):
        build(init_from="")
    with pytest.raises(UserError, match="take drop alone; not 'size'"):
        build(conditioners={"prompt": {"drop": 0.1, "size": 3}})
    with pytest.raises(UserError, match="no condition 'class'; it takes: prompt"):
        build(conditioners={"class": {"drop": 0.1}})
    with pytest.raises(UserError, match="must be \\(height, width\\), multiples of 4"):
        build(data={**recipe(weights, pictures)["data"], "image_shape": (6, 6, 3)})
    with pytest.raises(UserError, match="is for a model of diffusion"):
        build(system="classifier")

