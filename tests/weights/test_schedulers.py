"""Published configs of schedulers: the tables they describe, and the options that are refused."""
import json

import numpy as np
import pytest

from ldm_jax.process import PARAMETERIZATIONS
from ldm_jax.process.samplers import make_sampler
from ldm_jax.process.tabled import from_ratios, published_grid
from ldm_jax.types import UserError
from ldm_jax.weights.schedulers import SCHEDULERS, read_scheduler, sampling


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_defaults_of_every_scheduler_can_be_sampled(name):
    said = sampling({"_class_name": name})
    assert said.target in PARAMETERIZATIONS and make_sampler(said.sampler, **said.options)
    if said.abar is not None:
        beta = np.linspace(0.00085, 0.012, 1000) if name.startswith("Heun") else np.linspace(1e-4, 0.02, 1000)
        np.testing.assert_allclose(said.abar, np.cumprod(1 - beta))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_unknown_option_is_refused(name):
    with pytest.raises(UserError, match=f"this {name} has options that are not supported: use_magic=True"):
        sampling({"_class_name": name, "use_magic": True})


@pytest.mark.parametrize("name, config, message", [
    ("DDPMScheduler", dict(variance_type="learned"), "variance_type='learned' .supported: 'fixed_small'"),
    ("DDIMScheduler", dict(thresholding=True), "thresholding=True"),
    ("DDIMScheduler", dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"), "rescale_betas_zero_snr=True with pred"),
    ("PNDMScheduler", dict(prediction_type="v_prediction"), "prediction_type='v_prediction'"),
    ("EulerDiscreteScheduler", dict(use_beta_sigmas=True, timestep_type="continuous"), "use_beta_sigmas=True.*timestep_type="),
    ("EulerDiscreteScheduler", dict(use_karras_sigmas=True, use_exponential_sigmas=True), "together"),
    ("DPMSolverMultistepScheduler", dict(solver_order=3), "solver_order=3"),
    ("DPMSolverMultistepScheduler", dict(lambda_min_clipped=-5.1), "lambda_min_clipped=-5.1"),
    ("DPMSolverMultistepScheduler", dict(final_sigmas_type="sigma_min"), "final_sigmas_type='sigma_min' with lower_order_final"),
    ("UniPCMultistepScheduler", dict(disable_corrector=[0]), "disable_corrector="),
    ("DDIMScheduler", dict(trained_betas=[0.1, 0.2]), "betas of shape .2,., from 0.1 to 0.2, for 1000 steps"),
    ("DDIMScheduler", dict(beta_schedule="sigmoid"), "beta_schedule='sigmoid'"),
    ("ScoreSdeVeScheduler", dict(sigma_min=2.0, sigma_max=1.0), "sigma_min=2.0 with sigma_max=1.0"),
    ("ScoreSdeVeScheduler", dict(sampling_eps=1e-3), "sampling_eps=0.001, more than one of num_train_timesteps=2000 steps"),
    ("ScoreSdeVeScheduler", dict(correct_steps=-1), "correct_steps=-1"),
    ("KarrasVeScheduler", {}, "unknown published scheduler 'KarrasVeScheduler'; choose from: DDIMScheduler"),
])
def test_what_is_not_supported_is_refused_by_name(name, config, message):
    with pytest.raises(UserError, match=message):
        sampling({"_class_name": name, **config})


def test_zero_terminal_snr():
    """sqrt(abar) is stretched so that its first entry stays and its last is next to nothing (Lin et al. 2024)."""
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    plain, moved = (np.sqrt(sampling({**config, "rescale_betas_zero_snr": on}).abar) for on in (False, True))
    np.testing.assert_allclose(moved[:-1], ((plain - plain[-1]) * plain[0] / (plain[0] - plain[-1]))[:-1])
    assert 0 < moved[-1] < 1e-6
    euler = sampling({**config, "_class_name": "EulerDiscreteScheduler", "rescale_betas_zero_snr": True}).abar
    assert euler[-1] == 2.0**-24 and np.all(np.diff(euler) < 0)


@pytest.mark.parametrize("log_between", [False, True])
def test_the_table_between_its_steps(log_between):
    """sigma / alpha halfway between two steps is their mean, or their geometric mean; and its inverse."""
    abar = np.array([0.9, 0.5, 0.2])
    ratio, schedule = np.sqrt((1 - abar) / abar), from_ratios(abar, log_between)
    t = np.array([1 / 3, 1 / 2, 2 / 3, 5 / 6, 1], np.float32)
    middle = [np.sqrt(a * b) if log_between else (a + b) / 2 for a, b in zip(ratio, ratio[1:])]
    want = np.array([ratio[0], middle[0], ratio[1], middle[1], ratio[2]])
    np.testing.assert_allclose(schedule.sigma(t) / schedule.alpha(t), want, rtol=1e-5)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, rtol=1e-6)
    np.testing.assert_allclose(schedule.t_of_logsnr(schedule.logsnr(t)), t, rtol=1e-5)
    assert schedule.sigma(np.float32(0)) == 0
    with pytest.raises(UserError, match="decreasing"):
        from_ratios(abar[::-1])


def test_grids():
    """Stable Diffusion's steps, 1 more than multiples of 20; levels between those steps' own; and an end above data."""
    schedule = from_ratios(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2), True)
    k = np.asarray(published_grid(schedule, 50, 52, offset=1, last=0)) * 1000 - 1
    np.testing.assert_allclose(k, [*range(981, 0, -20), 0, 0, 0], atol=1e-3)
    t = np.asarray(published_grid(schedule, 5, 6, spacing="leading", offset=1, levels="exponential"))
    np.testing.assert_allclose(t[[0, 4, 5, 6]] * 1000 - 1, [801, 1, -1, -1], atol=0.02)
    q = np.log(schedule.sigma(t[:5]) / schedule.alpha(t[:5]))
    np.testing.assert_allclose(np.diff(q), (q[4] - q[0]) / 4, rtol=1e-3)


@pytest.mark.parametrize("text, message", [(None, "no file"), ("{", "cannot read"), ("[]", "not a JSON object")])
def test_files_that_cannot_be_read(text, message, tmp_path):
    if text is not None:
        (tmp_path / "scheduler_config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_scheduler(str(tmp_path))


def test_a_file(tmp_path):
    config = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    said = read_scheduler(str(tmp_path))
    assert (said.sampler, said.options, said.offset, said.last) == ("pndm", {"start": "heun"}, 1, 0)
