"""Published schedulers as they are read and sampled here against diffusers walking them, with a known function as the net."""
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.net import Net
from ldm_jax.pipelines.wiring import published, schedule_and_grid, told
from ldm_jax.process.samplers import make_sampler
from ldm_jax.systems.base import diffusion
from ldm_jax.types import example_keys, fold_in, normal
from ldm_jax.weights.schedulers import SCHEDULERS, sampling

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SHAPE, B = (2, 3, 1), 2
KEYS = example_keys(jax.random.key(5), B)
NOISE = np.random.default_rng(0).standard_normal((B, *SHAPE)).astype(np.float32)


class Function:
    """0.8 tanh(x (1 + cos(k / 70) / 4)) + 0.2 sin(k / 300), bounded and moving with x and with the step k that it is told."""
    def apply(self, variables, x, k, cond, train, rngs=None):
        k = k[:, None, None, None]
        return 0.8 * jnp.tanh(x * (1 + jnp.cos(k / 70) / 4)) + 0.2 * jnp.sin(k / 300)


def peer_net(x, k):
    return 0.8 * torch.tanh(x * (1 + torch.cos(k / 70) / 4)) + 0.2 * torch.sin(k / 300)


def walk(scheduler, n, monkeypatch):
    """The peer's end from NOISE, its draws replaced by those made here."""
    i = 0

    def draw(*args, **kwargs):
        return torch.from_numpy(np.array(normal(fold_in(KEYS, i), (B, *SHAPE))))

    monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", draw, raising=False)
    scheduler.set_timesteps(n)
    if scheduler.config.get("use_exponential_sigmas") and scheduler.timesteps[0] == 998:
        scheduler.timesteps[0] = 999  # what its floor makes of 999 less a rounding error
    x = torch.from_numpy(NOISE) * getattr(scheduler, "init_noise_sigma", 1.0)
    for i, k in enumerate(scheduler.timesteps):
        asked = scheduler.scale_model_input(x, k) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(peer_net(asked, k.to(torch.float32)), k, x, return_dict=False)[0]
    return x.numpy()


def ours(config, n, chosen=None):
    said = sampling(config)
    schedule, grid = schedule_and_grid(said)
    net = told(Net(Function(), SHAPE, SHAPE[-1], timesteps=1000), said)
    system = published(diffusion(net, image_shape=SHAPE, schedule=schedule, parameterization=said.target), schedule, grid, said)
    run = jax.jit(lambda x, steps: system.sample({"net": {}}, x, KEYS, None, sampler=make_sampler(said.sampler, **said.options),
                                                 steps=steps, capacity=n + 1, grid=chosen or grid))
    return np.asarray(run(NOISE, jnp.int32(n)))


SCALED = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ZERO = dict(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
KARRAS, EXPONENTIAL = dict(SCALED, use_karras_sigmas=True), dict(SCALED, use_exponential_sigmas=True)
LEADING = dict(timestep_spacing="leading", steps_offset=1)
CASES = [
    ("DDPMScheduler", 7, dict(SCALED, timestep_spacing="linspace", clip_sample=False, prediction_type="sample")),
    ("DDPMScheduler", 6, dict(beta_end=0.015, clip_sample_range=0.3, variance_type="fixed_small_log", num_train_timesteps=400)),
    ("DDPMScheduler", 6, dict(thresholding=True, dynamic_thresholding_ratio=0.8, sample_max_value=1.1,
                              variance_type="fixed_large")),
    ("DDIMScheduler", 7, dict(SCALED, **LEADING, prediction_type="v_prediction", set_alpha_to_one=False, clip_sample_range=0.4)),
    ("DDIMScheduler", 10, dict(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", clip_sample=False)),
    ("DDIMScheduler", 5, dict(ZERO, clip_sample=False)),
    ("DDIMScheduler", 7, dict(SCALED, timestep_spacing="linspace", clip_sample_range=0.5)),
    ("DDIMScheduler", 7, dict(SCALED, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False)),
    ("PNDMScheduler", 7, dict(SCALED, skip_prk_steps=True, steps_offset=1)),
    ("PNDMScheduler", 10, dict(trained_betas=[1e-3 + 4e-5 * i for i in range(500)], num_train_timesteps=500)),
    ("LMSDiscreteScheduler", 7, EXPONENTIAL),
    ("EulerDiscreteScheduler", 7, dict(SCALED)),
    ("EulerDiscreteScheduler", 7, dict(KARRAS, **LEADING)),
    ("EulerDiscreteScheduler", 5, ZERO),
    ("EulerAncestralDiscreteScheduler", 7, dict(SCALED, prediction_type="v_prediction")),
    ("HeunDiscreteScheduler", 6, dict(SCALED, timestep_spacing="trailing", clip_sample=True, clip_sample_range=0.5)),
    ("DPMSolverMultistepScheduler", 7, dict(KARRAS, solver_type="heun")),
    ("DPMSolverMultistepScheduler", 7, dict(SCALED, final_sigmas_type="sigma_min", lower_order_final=False)),
    ("DPMSolverMultistepScheduler", 7, dict(SCALED, algorithm_type="sde-dpmsolver++", thresholding=True, sample_max_value=1.2)),
    ("DPMSolverMultistepScheduler", 7, dict(SCALED, solver_order=1, **LEADING)),
    ("UniPCMultistepScheduler", 7, EXPONENTIAL),
    ("UniPCMultistepScheduler", 7, ZERO),
    ("FlowMatchEulerDiscreteScheduler", 6, dict(shift=3.0)),
]


def test_strides_belong_to_the_schedulers_own_grid(monkeypatch):
    """On another grid the steps go from one of its times to the next."""
    config = dict(SCALED, clip_sample=False)
    want = walk(diffusers.DDIMScheduler(**config, timestep_spacing="trailing"), 10, monkeypatch)
    got = ours({"_class_name": "DDIMScheduler", **config, "timestep_spacing": "linspace"}, 10, "trailing")
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("name, n, config", CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_end_of_sampling(name, n, config, monkeypatch):
    peer = getattr(diffusers, name)(**config)
    want, got = walk(peer, n, monkeypatch), ours({**peer.config, "_class_name": name}, n)
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max(), rtol=0)


def test_every_scheduler_is_tried():
    assert {name for name, _, _ in CASES} == set(SCHEDULERS) - {"ScoreSdeVeScheduler"}  # in test_more_pipelines.py, with its net
