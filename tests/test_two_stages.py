"""Latent diffusion from the command line: a first stage, then a denoiser in its latents, each resumable and given only once."""
import json
import os
import shutil

import numpy as np
import pytest

import ldm_jax
from tests.runs import main, mains

pytestmark = pytest.mark.slow

TINY = ("--config.first_stage.train.steps=4", "--config.first_stage.train.save_every=4",
        "--config.first_stage.train.batch_size=8", "--config.first_stage.train.log_every=2",
        "--config.first_stage.optimizer.name=adam", "--config.first_stage.optimizer.warmup_steps=1",
        "--config.first_stage.optimizer.learning_rate=0.001", "--config.first_stage.loss.adversarial_start=2",
        "--config.first_stage.discriminator.patchgan.width=4", "--config.first_stage.discriminator.patchgan.layers=1",
        "--config.first_stage.eval.real=20", "--config.first_stage.autoencoder.kl.width=4",
        "--config.first_stage.autoencoder.kl.factor=2", "--config.first_stage.autoencoder.kl.mults=(1,1)",
        "--config.first_stage.autoencoder.kl.latent_channels=2", "--config.first_stage.autoencoder.vq.width=4",
        "--config.first_stage.autoencoder.vq.factor=2", "--config.first_stage.autoencoder.vq.mults=(1,1)",
        "--config.first_stage.autoencoder.vq.latent_channels=2", "--config.optimizer.name=adam",
        "--config.optimizer.warmup_steps=1", "--config.train.steps=4", "--config.train.save_every=2",
        "--config.train.batch_size=8", "--config.train.log_every=2", "--config.net.name=dit", "--config.net.dit.width=16",
        "--config.net.dit.depth=1", "--config.net.dit.num_heads=1", "--config.net.unet.width=8",
        "--config.net.unet.mults=(1,1)", "--config.net.unet.attention=()", "--config.sampler.steps=2", "--config.data.limit=50")
CIFAR, VQ = (f"--config=configs/{name}.py:smoke" for name in ("ldm_cifar", "ldm_cifar_vq"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "ldm"
    return workdir, main(CIFAR, f"--workdir={workdir}", *TINY)


def metrics(workdir):
    return [json.loads(line) for line in open(workdir / "metrics.jsonl")]


def test_both_stages_leave_checkpoints_pictures_and_figures(finished):
    workdir, result = finished
    assert result.returncode == 0, result.stderr
    first = workdir / "first_stage"
    assert (first / "samples" / "reconstructions.png").exists() and (workdir / "samples" / "grid.png").exists()
    last = metrics(first)[-1]
    assert last["step"] == 4 and last["discriminator"] > 0 and last["adversarial_weight"] > 0 and last["perceptual"] > 0 and last["kl"] > 0
    assert metrics(first)[0]["discriminator"] == 0  # of the two steps before it starts
    assert "in place of LPIPS" in result.stderr
    measured = json.load(open(first / "eval.json"))
    assert measured["values kept of a picture"] == 512 and -1 < measured["mean SSIM of the same"] < measured["mean SSIM of JPEG"] < 1
    pipeline = ldm_jax.load(str(workdir))
    assert pipeline.sample(0, cond=[3]).shape == (1, 32, 32, 3)
    assert set(pipeline.nets) == {"net", "autoencoder", "latent"}


def test_the_cache_holds_both_mirror_images_as_the_encoder_gives_them(finished):
    from ldm_jax.data.latents import open_latents
    from ldm_jax.recipe import build_source
    workdir, _ = finished
    config, pipeline = json.load(open(workdir / "config.json")), ldm_jax.load(str(workdir))
    source, autoencoder = build_source(config["data"], "train"), pipeline.nets["autoencoder"]
    cache = open_latents(str(workdir / "latents"), stamp={}, like=source)
    assert source.size == 50 and cache.size == 100
    batch, ids = cache.read([7, 57, 49]), [7, 7, 49]
    images = source.read(ids)["image"].astype(np.float32) / 127.5 - 1.0
    images[1] = images[1, :, ::-1]
    mean, logvar = autoencoder[0].posterior(autoencoder[1], images)
    np.testing.assert_allclose(batch["mean"], mean, rtol=2e-3, atol=2e-3)  # float16
    np.testing.assert_allclose(batch["logvar"], logvar, rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(batch["class"], source.read(ids)["class"])


def test_the_latents_are_normalised_by_what_was_stored(finished):
    """On pictures of the training data, (z - shift) / scale has zero mean and unit variance in each channel."""
    from ldm_jax.recipe import build_source
    pipeline = ldm_jax.load(str(finished[0]))
    config = json.load(open(finished[0] / "config.json"))
    images = build_source(config["data"], "train").read(range(50))["image"].astype(np.float32) / 127.5 - 1.0
    autoencoder, params = pipeline.nets["autoencoder"]
    mean, logvar = map(np.asarray, autoencoder.encode(params, images))
    statistics = pipeline.params["latent"]
    z = (mean - np.asarray(statistics["shift"])) / np.asarray(statistics["scale"])
    width = np.exp(logvar).mean((0, 1, 2)) / np.asarray(statistics["scale"]) ** 2
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0.0, atol=0.1)
    np.testing.assert_allclose(z.var((0, 1, 2)) + width, 1.0, atol=0.1)


def test_no_stage_is_trained_twice_and_nothing_is_encoded_twice(finished):
    workdir, _ = finished
    before = [metrics(workdir / p) for p in ("", "first_stage")], os.stat(workdir / "latents" / "index.json").st_mtime_ns
    result = main(CIFAR, f"--workdir={workdir}", *TINY, "--config.train.steps=6")
    assert result.returncode == 0, result.stderr
    after = [metrics(workdir / p) for p in ("", "first_stage")], os.stat(workdir / "latents" / "index.json").st_mtime_ns
    assert after[1] == before[1] and after[0][1] == before[0][1] and after[0][0][:len(before[0][0])] == before[0][0]
    assert after[0][0][-1]["step"] == 6


def test_latents_of_another_autoencoder_are_refused(finished, tmp_path):
    workdir, _ = finished
    index = json.load(open(workdir / "latents" / "index.json"))
    shutil.copytree(workdir / "latents", tmp_path / "latents")
    (tmp_path / "latents" / "index.json").write_text(json.dumps({**index, "stamp": {**index["stamp"], "autoencoder": "0" * 16}}))
    result = main(CIFAR, f"--workdir={workdir}", *TINY, "--config.train.steps=8", f"--config.latents.dir={tmp_path / 'latents'}")
    assert result.returncode == 2 and "another autoencoder" in result.stderr and "Traceback" not in result.stderr
    assert index["stamp"]["autoencoder"] in result.stderr


@pytest.mark.long
def test_stages_from_elsewhere(finished, tmp_path):
    workdir, _ = finished
    result = main(CIFAR, f"--workdir={tmp_path / 'second'}", *TINY, f"--config.first_stage_dir={workdir / 'first_stage'}",
                  f"--config.latents.dir={workdir / 'latents'}")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "second" / "first_stage").exists() and not (tmp_path / "second" / "latents").exists()
    assert (tmp_path / "second" / "samples" / "grid.png").exists()
    theirs, ours = (ldm_jax.load(str(path)).params["autoencoder"] for path in (workdir / "first_stage", tmp_path / "second"))
    np.testing.assert_array_equal(theirs["decoder"]["conv_out"]["kernel"], ours["decoder"]["conv_out"]["kernel"])

    result = main(CIFAR, f"--workdir={tmp_path / 'third'}", *TINY, f"--config.init_dir={workdir}", "--config.train.steps=2",
                  "--config.optimizer.learning_rate=0.0", "--config.latents.cache=False")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "third" / "first_stage").exists() and not (tmp_path / "third" / "latents").exists()
    theirs, ours = (ldm_jax.load(str(path)).params["net"]["patch_in"]["kernel"] for path in (workdir, tmp_path / "third"))
    np.testing.assert_array_equal(theirs, ours)


def test_stages_that_do_not_fit_are_refused_by_name(finished, tmp_path):
    first = finished[0] / "first_stage"
    cases = [((f"--config.first_stage_dir={first}", "--config.first_stage.autoencoder.kl.latent_channels=3"), "latent_channels"),
             ((f"--config.first_stage_dir={tmp_path}",), "holds no run"),
             ((f"--config.init_dir={finished[0]}", "--config.net.dit.width=32"), "other parameters")]
    lines = [[CIFAR, f"--workdir={tmp_path / 'fourth'}", *TINY, *flags] for flags, _ in cases]
    for result, (_, words) in zip(mains(lines, tmp_path), cases):
        assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr, result.stderr


@pytest.mark.long
def test_a_first_stage_is_evaluated_but_samples_nothing(finished):
    first = finished[0] / "first_stage"
    result = main(f"--workdir={first}", "--mode=eval")
    assert result.returncode == 0 and "PSNR of JPEG" in result.stdout, result.stderr
    refused = main(f"--workdir={first}", "--mode=sample")
    assert refused.returncode == 2 and "first stage" in refused.stderr


@pytest.mark.long
def test_a_codebook_in_place_of_the_kl_term(tmp_path):
    result = main(VQ, f"--workdir={tmp_path}", *TINY)
    assert result.returncode == 0, result.stderr
    measured, last = json.load(open(tmp_path / "first_stage" / "eval.json")), metrics(tmp_path / "first_stage")[-1]
    assert measured["values kept of a picture"] == 256 and measured["codes in use"] >= measured["their perplexity"] > 1
    assert last["commitment"] > 0 and last["perplexity"] > 1 and "kl" not in last
    assert "logvar" not in json.load(open(tmp_path / "latents" / "index.json"))["fields"]
    assert (tmp_path / "samples" / "grid.png").exists()
