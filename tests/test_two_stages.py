"""Latent diffusion from the command line: a first stage, then a denoiser in its latents, each resumable and given only once."""
import json
import os

import numpy as np
import pytest

import ldm_jax
from tests.runs import main

pytestmark = pytest.mark.slow

TINY = ("--config.first_stage.train.steps=4", "--config.first_stage.train.save_every=4", "--config.first_stage.autoencoder.kl.width=8",
        "--config.first_stage.optimizer.warmup_steps=1", "--config.optimizer.warmup_steps=1", "--config.train.steps=4",
        "--config.train.save_every=2", "--config.train.batch_size=8", "--config.first_stage.train.batch_size=8",
        "--config.net.unet.width=8", "--config.sampler.steps=2", "--config.train.log_every=2", "--config.first_stage.train.log_every=2")
CIFAR = "--config=configs/ldm_cifar.py:smoke"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "ldm"
    return workdir, main(CIFAR, f"--workdir={workdir}", *TINY)


def test_both_stages_leave_checkpoints_and_pictures(finished):
    workdir, result = finished
    assert result.returncode == 0, result.stderr
    assert (workdir / "first_stage" / "samples" / "reconstructions.png").exists() and (workdir / "samples" / "grid.png").exists()
    assert json.loads(open(workdir / "first_stage" / "metrics.jsonl").readlines()[-1])["step"] == 4
    pipeline = ldm_jax.load(str(workdir))
    assert pipeline.sample(0, cond=[3]).shape == (1, 32, 32, 3)
    assert set(pipeline.nets) == {"net", "autoencoder", "latent"}


def test_the_latents_are_normalised_by_what_was_stored(finished):
    """On pictures of the training data, (z - shift) / scale has zero mean and unit variance in each channel."""
    from ldm_jax.recipe import build_source
    pipeline = ldm_jax.load(str(finished[0]))
    config = json.load(open(finished[0] / "config.json"))
    images = build_source(config["data"], "train").read(range(1000))["image"].astype(np.float32) / 127.5 - 1.0
    autoencoder, params = pipeline.nets["autoencoder"]
    mean, logvar = map(np.asarray, autoencoder.encode(params, images))
    statistics = pipeline.params["latent"]
    z = (mean - np.asarray(statistics["shift"])) / np.asarray(statistics["scale"])
    width = np.exp(logvar).mean((0, 1, 2)) / np.asarray(statistics["scale"]) ** 2
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0.0, atol=0.15)
    np.testing.assert_allclose(z.var((0, 1, 2)) + width, 1.0, atol=0.2)


def test_no_stage_is_trained_twice(finished):
    workdir, _ = finished
    before = [open(workdir / p / "metrics.jsonl").read() for p in ("", "first_stage")]
    result = main(CIFAR, f"--workdir={workdir}", *TINY)
    assert result.returncode == 0, result.stderr
    assert [open(workdir / p / "metrics.jsonl").read() for p in ("", "first_stage")] == before


def test_a_first_stage_from_elsewhere(finished, tmp_path):
    workdir, _ = finished
    result = main(CIFAR, f"--workdir={tmp_path / 'second'}", *TINY, f"--config.first_stage_dir={workdir / 'first_stage'}",
                  "--config.net.name=dit", "--config.net.dit.width=16", "--config.net.dit.depth=1", "--config.net.dit.num_heads=1")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "second" / "first_stage").exists() and (tmp_path / "second" / "samples" / "grid.png").exists()
    theirs, ours = (ldm_jax.load(str(path)).params["autoencoder"] for path in (workdir / "first_stage", tmp_path / "second"))
    np.testing.assert_array_equal(theirs["decoder"]["conv_out"]["kernel"], ours["decoder"]["conv_out"]["kernel"])
    wrong = main(CIFAR, f"--workdir={tmp_path / 'third'}", *TINY, f"--config.first_stage_dir={workdir / 'first_stage'}",
                 "--config.first_stage.autoencoder.kl.latent_channels=3")
    assert wrong.returncode == 2 and "latent_channels" in wrong.stderr and "Traceback" not in wrong.stderr
    missing = main(CIFAR, f"--workdir={tmp_path / 'third'}", *TINY, f"--config.first_stage_dir={tmp_path}")
    assert missing.returncode == 2 and "holds no run" in missing.stderr


def test_a_first_stage_is_evaluated_but_samples_nothing(finished):
    first = finished[0] / "first_stage"
    result = main(f"--workdir={first}", "--mode=eval")
    assert result.returncode == 0 and "PSNR" in result.stdout, result.stderr
    refused = main(f"--workdir={first}", "--mode=sample")
    assert refused.returncode == 2 and "first stage" in refused.stderr
    assert os.path.exists(first / "eval.json")
