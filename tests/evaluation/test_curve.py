"""The comparison of first stages: from files of runs to a table and a picture."""
import json

import numpy as np
import pytest

from ldm_jax.evaluation import curve
from ldm_jax.evaluation.evaluate import evaluate_reconstruction
from ldm_jax.evaluation.metrics import psnr, ssim

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 255, (6, 16, 16, 3), dtype=np.uint8)


def measured(noise, kept, codes=None):
    again = np.clip(IMAGES / 255 + noise * RNG.normal(size=IMAGES.shape), 0, 1)
    return again, evaluate_reconstruction(again, IMAGES, kept=kept, codes=codes)


def run(directory, kind, values):
    directory.mkdir()
    (directory / "eval.json").write_text(json.dumps(values))
    (directory / "config.json").write_text(json.dumps({"autoencoder": {"name": kind}}))
    return str(directory)


def test_what_is_measured_of_a_first_stage():
    codes = np.array([[0, 0, 1, 1]] * 6)  # two codes, used alike
    again, values = measured(0.1, (4, 9.0), codes)
    rounded = np.rint(again * 255).astype(np.uint8)
    assert values["values kept of a picture"] == 4 and values["values that a picture has"] == 768 and values["bytes kept"] == 4.5
    assert values["mean PSNR of reconstructed test images (dB)"] == pytest.approx(np.mean(psnr(rounded, IMAGES)))
    assert values["mean SSIM of the same"] == pytest.approx(np.mean(ssim(rounded, IMAGES)))
    assert values["codes in use"] == 2 and values["their perplexity"] == pytest.approx(2.0)
    few, many = (measured(0.1, (n, 8))[1] for n in (60, 600))
    assert few["bytes that JPEG takes"] <= 100 < many["bytes that JPEG takes"] <= 600
    assert few["mean PSNR of JPEG (dB)"] < many["mean PSNR of JPEG (dB)"] and "codes in use" not in few


def test_a_table_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [run(tmp_path / "b", "kl", measured(0.1, (600, 8))[1]), run(tmp_path / "a", "kl", measured(0.2, (300, 8))[1]),
            run(tmp_path / "c", "vq", measured(0.3, (64, 9.0), np.zeros((6, 4), int))[1])]
    assert curve.main([f"--out={tmp_path / 'curve.png'}", *runs]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["300 numbers", "600 numbers", "64 codes"]
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_what_is_no_first_stage_is_named(tmp_path, capsys):
    assert curve.main([f"--out={tmp_path / 'curve.png'}", str(tmp_path)]) == 2
    assert "holds no measured first stage" in capsys.readouterr().err
