"""Sampling methods against the schedulers of diffusers, on the exact denoiser of a mixture as the network.

Each scheduler is walked as it means to be, with the network asked at the noise level that it then holds x to have, and this
library's method is given the same noise levels as an explicit grid, and the same noise. Where a scheduler is wrong, a test states
which identity it breaks, and that the method here keeps it.
"""
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.process import SCHEDULES, sample
from ldm_jax.process.samplers import make_sampler
from ldm_jax.process.schedules import from_betas
from ldm_jax.types import example_keys, fold_in, normal
from tests.oracle import MIXTURE, ode_solution, point_mass

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

T, B = 1000, 3
KEY = jax.random.key(7)
SCALED = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
START = np.array([[0.9, -1.3], [-0.4, 0.6], [1.7, 0.2]])


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


class Noise:
    """The draw of step i, that of the methods here, in place of a scheduler's own."""
    def __init__(self, scheduler, monkeypatch):
        self.i, keys = 0, example_keys(KEY, B)

        def draw(*args, **kwargs):
            return torch.from_numpy(np.array(normal(fold_in(keys, self.i), (B, 2)), np.float32))

        monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", draw, raising=False)


def exact(data):
    """D(y, tau) = E[x0 | x / alpha = y] as numpy."""
    class VE:
        alpha, sigma = staticmethod(jnp.ones_like), staticmethod(lambda tau: tau)

    denoise = jax.jit(data.denoiser(VE))
    return lambda y, tau: np.asarray(denoise(jnp.asarray(y), jnp.full(len(y), tau)))


D = exact(MIXTURE)


def ratios(scheduler):
    """sigma / alpha of the integer steps."""
    abar = scheduler.alphas_cumprod.numpy().astype(np.float64)
    return np.sqrt((1 - abar) / abar)


def walk(scheduler, taus, scaled, monkeypatch, D=D, frac=None, **step_options):
    """The states that a scheduler visits, as x / alpha, when call i is made at the noise ratio taus[i].

    scaled: whether its x is x / alpha; otherwise alpha^2 + sigma^2 = 1.
    """
    noise, states = Noise(scheduler, monkeypatch), []
    x = START * np.hypot(1, taus[0]) * (1.0 if scaled else 1 / np.hypot(1, taus[0]))
    x = torch.from_numpy(x.astype(np.float32))
    for i, t in enumerate(scheduler.timesteps):
        noise.i = i
        scheduler.scale_model_input(x, t)
        y = x.numpy().astype(np.float64) * (1.0 if scaled else np.hypot(1, taus[i]))
        eps = (y - D(y, taus[i])) / taus[i]
        eps = eps if frac is None else np.concatenate([eps, np.full_like(eps, 2 * frac - 1)], axis=1)
        x = scheduler.step(torch.from_numpy(eps.astype(np.float32)), t, x, **step_options).prev_sample
        states.append(x.numpy().astype(np.float64))
    return states


@functools.lru_cache(None)
def runner(name, options, steps, betas, frac):
    schedule = from_betas(np.frombuffer(betas)) if isinstance(betas, bytes) else SCHEDULES[betas]()

    def run(taus, x):
        taus = jnp.where(taus > 0, taus, 1.0), taus > 0
        grid = jnp.where(taus[1], schedule.t_of_logsnr(-2 * jnp.log(taus[0])), 0.0)

        def denoise(x_t, t):
            x0 = MIXTURE.denoiser(schedule)(x_t, t)
            return x0 if frac is None else (x0, jnp.full_like(x0, frac))

        alpha = schedule.alpha(grid)
        sampler = make_sampler(name, **dict(options))
        x = alpha[-1 if sampler.upwards else 0] * x
        _, path = sample(denoise, schedule, x, KEY, sampler=sampler, steps=steps, grid=grid, trajectory=True)
        return path["x"][1:] / schedule.alpha(path["t"])[1:, None, None]

    return jax.jit(run)


def ours(name, taus, betas, frac=None, **options):
    """The states of a method here, as x / alpha, on the grid of noise ratios `taus`, from the same start."""
    betas = betas if isinstance(betas, str) else np.asarray(betas, np.float64).tobytes()
    first = taus[-1] if name == "ddim_inversion" else taus[0]
    run = runner(name, tuple(sorted(options.items())), len(taus) - 1, betas, frac)
    return np.asarray(run(jnp.asarray(taus), jnp.asarray(START) * np.hypot(1, first)))


def compare(peer, own, taus, scaled=True):
    """Agreement of every visited x, in units of a process with alpha^2 + sigma^2 = 1."""
    peer = np.stack(peer) * (1.0 if scaled else np.hypot(1, taus[1:])[:, None, None])
    np.testing.assert_allclose(peer / np.hypot(1, taus[1:])[:, None, None], own / np.hypot(1, taus[1:])[:, None, None], atol=1e-4)


def integer_grid(scheduler, k, last=None):
    """Noise ratios of integer steps and then 0, or what the scheduler ends with."""
    tau = ratios(scheduler)
    end = 0.0 if last is None else tau[last]
    return np.concatenate([tau[np.asarray(k)], [end]])


# ---- on integer steps ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spacing, n, train", [("leading", 10, T), ("leading", 7, T), ("trailing", 10, T), ("linspace", 10, 10)])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm(spacing, n, train, variance, monkeypatch):
    peer = diffusers.DDPMScheduler(**SCALED, num_train_timesteps=train, variance_type=variance, clip_sample=False,
                                   timestep_spacing=spacing)
    peer.set_timesteps(n)
    taus = integer_grid(peer, peer.timesteps)
    frac = 0.3 if variance == "learned_range" else None
    name = {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned"}[variance]
    found = walk(peer, taus, False, monkeypatch, frac=frac)
    wanted = ours("ddpm", taus, peer.betas, frac=frac, variance=name)
    compare(found[:-1], wanted[:-1], taus[:-1], scaled=False)
    if variance == "fixed_large" and int(peer.timesteps[-1]) > 0:
        # unless its last step is k = 0, the peer adds noise to the finished picture: data at one point is not recovered
        assert np.abs(found[-1] - wanted[-1]).max() > 1e-3
        single = exact(point_mass([0.3, -0.8]))
        peer.set_timesteps(n)
        assert np.abs(walk(peer, taus, False, monkeypatch, D=single, frac=frac)[-1] - [[0.3, -0.8]]).max() > 1e-3
    else:
        compare(found[-1:], wanted[-1:], taus[-2:], scaled=False)


@pytest.mark.parametrize("spacing, n, offset, to_one", [
    ("leading", 10, 0, True), ("leading", 10, 1, False), ("leading", 7, 0, True), ("trailing", 10, 0, True),
    ("trailing", 8, 0, True)])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim(spacing, n, offset, to_one, eta, monkeypatch):
    peer = diffusers.DDIMScheduler(**SCALED, clip_sample=False, timestep_spacing=spacing, steps_offset=offset,
                                   set_alpha_to_one=to_one)
    peer.set_timesteps(n)
    taus = integer_grid(peer, peer.timesteps, None if to_one else 0)
    compare(walk(peer, taus, False, monkeypatch, eta=eta), ours("ddim", taus, peer.betas, eta=eta), taus, scaled=False)


@pytest.mark.parametrize("spacing, n", [("linspace", 10), ("trailing", 7)])
def test_ddim_whose_strides_are_uneven_is_wrong(spacing, n, monkeypatch):
    """The peer steps T // n down, but asks the network next at another step: x does not have the noise level it is held to have.

    For data at one point every step of DDIM ends at alpha x0 + sigma eps with the eps it started with; the peer's does not.
    """
    peer = diffusers.DDIMScheduler(**SCALED, clip_sample=False, timestep_spacing=spacing)
    peer.set_timesteps(n)
    taus, centre = integer_grid(peer, peer.timesteps), np.array([[0.3, -0.8]])
    assert np.any(-np.diff(peer.timesteps.numpy()) != T // n)
    eps = (START * np.hypot(1, taus[0]) - centre) / taus[0]
    states = walk(peer, taus, False, monkeypatch, D=exact(point_mass(centre[0])))
    drift = [np.abs((x * np.hypot(1, tau) - centre) / tau - eps).max() for x, tau in zip(states[:-1], taus[1:-1])]
    assert max(drift) > 1e-2
    own = ours("ddim", taus, peer.betas)
    end = np.asarray(ode_solution(MIXTURE, jnp.asarray(START * np.hypot(1, taus[0])), -np.log(taus[0]), 6.0))
    assert np.isfinite(own).all() and np.abs(own[-1] - end).max() < 0.5


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_inverse(spacing, monkeypatch):
    """The peer asks the network at the step it goes to, as `ddim_inversion` with one iteration; from alpha = 1."""
    n = 10
    peer = diffusers.DDIMInverseScheduler(**SCALED, clip_sample=False, timestep_spacing=spacing)
    peer.set_timesteps(n)
    tau = ratios(peer)[peer.timesteps.numpy()]
    x, states = torch.from_numpy(START.astype(np.float32)), []
    for i, t in enumerate(peer.timesteps):
        y = x.numpy().astype(np.float64) * np.hypot(1, tau[i])
        x = peer.step(torch.from_numpy(((y - D(y, tau[i])) / tau[i]).astype(np.float32)), t, x).prev_sample
        states.append(x.numpy())
    assert int(peer.timesteps[0]) - T // n < 0  # the first step is from the data
    own = ours("ddim_inversion", np.concatenate([tau[::-1], [0.0]]), peer.betas)
    compare(states, own, np.concatenate([[0.0], tau]), scaled=False)


@pytest.mark.parametrize("spacing, skip, n, to_one", [
    ("leading", True, 10, False), ("leading", True, 10, True), ("leading", False, 10, False), ("trailing", True, 10, True)])
def test_pndm(spacing, skip, n, to_one, monkeypatch):
    peer = diffusers.PNDMScheduler(**SCALED, skip_prk_steps=skip, timestep_spacing=spacing, set_alpha_to_one=to_one)
    peer.set_timesteps(n)
    # the last calls are one to a step; the first steps take 2 (skip) or 4 calls
    if skip:
        k = np.concatenate([peer.timesteps.numpy()[:1], peer.timesteps.numpy()[2:]])
    else:
        k = np.concatenate([peer.timesteps.numpy()[[0, 4, 8]], peer.timesteps.numpy()[12:]])
    assert len(k) == n and np.all(-np.diff(k) == T // n)
    taus = integer_grid(peer, k, None if to_one else 0)
    calls = ratios(peer)[peer.timesteps.numpy()]
    ends = np.concatenate([[1], np.arange(2, n + 1)]) if skip else np.concatenate([[3, 7, 11], np.arange(12, 12 + n - 3)])
    states = walk(peer, calls, False, monkeypatch)
    own = ours("pndm", taus, peer.betas, start="heun" if skip else "runge_kutta")
    compare([states[i] for i in ends], own, taus, scaled=False)


# ---- on noise levels -----------------------------------------------------------------------------------------------

SPACINGS = [dict(timestep_spacing="leading", steps_offset=1), dict(timestep_spacing="linspace"),
            dict(timestep_spacing="trailing"), dict(use_karras_sigmas=True), dict(use_exponential_sigmas=True)]


def levels(peer, n):
    peer.set_timesteps(n)
    return peer.sigmas.numpy().astype(np.float64)


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
def test_euler(spacing, monkeypatch):
    """Euler's method in sigma on x / alpha is `ddim`."""
    peer = diffusers.EulerDiscreteScheduler(**SCALED, **spacing)
    taus = levels(peer, 10)
    compare(walk(peer, taus, True, monkeypatch), ours("ddim", taus, peer.betas), taus)


@pytest.mark.parametrize("spacing", SPACINGS[:3], ids=str)
def test_euler_ancestral(spacing, monkeypatch):
    peer = diffusers.EulerAncestralDiscreteScheduler(**SCALED, **spacing)
    taus = levels(peer, 10)
    compare(walk(peer, taus, True, monkeypatch), ours("euler_ancestral", taus, peer.betas), taus)


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
def test_heun(spacing, monkeypatch):
    """Algorithm 1 of Karras et al. 2022 in sigma on x / alpha is `edm` without churn."""
    peer = diffusers.HeunDiscreteScheduler(**SCALED, **spacing)
    calls = levels(peer, 10)
    taus = np.concatenate([calls[0:1], calls[1:-1:2], [0.0]])
    states = walk(peer, calls, True, monkeypatch)
    compare(states[1::2] + states[-1:], ours("edm", taus, peer.betas), taus)


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
def test_lms(spacing, monkeypatch):
    peer = diffusers.LMSDiscreteScheduler(**SCALED, **spacing)
    taus = levels(peer, 10)
    compare(walk(peer, taus, True, monkeypatch), ours("lms", taus, peer.betas), taus)


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize("options, name, own", [
    (dict(solver_order=1), "ddim", {}),
    (dict(solver_order=2, solver_type="midpoint"), "dpmpp_2m", {}),
    (dict(solver_order=2, solver_type="heun"), "dpmpp_2m", dict(solver="heun")),
    (dict(solver_order=1, algorithm_type="sde-dpmsolver++"), "ddpm", {}),
    (dict(solver_order=2, algorithm_type="sde-dpmsolver++", solver_type="midpoint"), "dpmpp_2m_sde", {}),
    (dict(solver_order=2, algorithm_type="sde-dpmsolver++", solver_type="heun"), "dpmpp_2m_sde", dict(solver="heun"))], ids=str)
def test_dpm_solver_multistep(spacing, options, name, own, monkeypatch):
    peer = diffusers.DPMSolverMultistepScheduler(**SCALED, **spacing, **options)
    taus = levels(peer, 10)
    compare(walk(peer, taus, False, monkeypatch), ours(name, taus, peer.betas, **own), taus, scaled=False)


def test_dpm_solver_multistep_ending_above_zero(monkeypatch):
    peer = diffusers.DPMSolverMultistepScheduler(**SCALED, final_sigmas_type="sigma_min", lower_order_final=False)
    taus = levels(peer, 10)
    compare(walk(peer, taus, False, monkeypatch), ours("dpmpp_2m", taus, peer.betas), taus, scaled=False)


def flow_order(steps_of):
    """-slope of log error against log steps of (steps -> end as x / alpha), from lambda = -2.4 to 2.4."""
    start = START * np.hypot(1, np.exp(2.4))
    want = np.asarray(ode_solution(MIXTURE, jnp.asarray(start), -2.4, 2.4))
    error = [np.abs(steps_of(n) - want).max() for n in (32, 64)]
    return np.log2(error[0] / error[1])


def test_dpm_solver_multistep_of_third_order_is_wrong(monkeypatch):
    """Its second derivative is half of what it should be, so it is of second order only; `dpmpp_3m` is of third."""
    betas = diffusers.DPMSolverMultistepScheduler(**SCALED).betas

    def grid(n):
        return np.exp(-(-2.4 + 4.8 * (np.arange(n + 1) / n) ** 1.5))

    def peer_end(n):
        peer = diffusers.DPMSolverMultistepScheduler(**SCALED, solver_order=3, lower_order_final=False)
        peer.set_timesteps(n)
        peer.sigmas = torch.from_numpy(grid(n))
        return walk(peer, grid(n), False, monkeypatch)[-1] * np.hypot(1, grid(n)[-1])

    assert flow_order(peer_end) < 2.4
    assert flow_order(lambda n: ours("dpmpp_3m", grid(n), betas)[-1]) > 2.75


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize("order, variant", [(1, "bh2"), (2, "bh2"), (2, "bh1"), (3, "bh2")])
def test_unipc(spacing, order, variant, monkeypatch):
    options = dict(lower_order_final=False) if order == 3 else {}
    peer = diffusers.UniPCMultistepScheduler(**SCALED, **spacing, solver_order=order, solver_type=variant, **options)
    if order == 3:
        peer.register_to_config(final_sigmas_type="sigma_min")  # at sigma = 0 its equations of third order are singular
    taus = levels(peer, 10)
    if order == 3 and taus[-1] >= taus[-2]:
        taus = np.concatenate([taus[:-1], [0.5 * taus[-2]]])
        peer.sigmas = torch.from_numpy(taus.astype(np.float32))
    found, own = walk(peer, taus, False, monkeypatch), ours("unipc", taus, peer.betas, order=order, variant=variant)
    compare(found[:-1], own[:-1], taus[:-1], scaled=False)
    if variant == "bh1":  # B(h) = h is infinite in the step into sigma = 0, where the peer has no number
        assert np.isnan(found[-1]).all() and np.isfinite(own).all()
    else:
        compare(found[-1:], own[-1:], taus[-2:], scaled=False)


# ---- other processes -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_flow_match_euler(shift, name):
    peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    peer.set_timesteps(10)
    t = peer.sigmas.numpy().astype(np.float64)
    schedule = SCHEDULES["rectified_flow"]()
    denoise = MIXTURE.denoiser(schedule)
    x, states = torch.from_numpy(START.astype(np.float32)), []
    for i, step in enumerate(peer.timesteps):
        y = jnp.asarray(x.numpy(), jnp.float64)
        flow = (y - denoise(y, jnp.full(B, t[i]))) / t[i]
        x = peer.step(torch.from_numpy(np.asarray(flow, np.float32)), step, x).prev_sample
        states.append(x.numpy())
    _, path = sample(denoise, schedule, jnp.asarray(START), KEY, sampler=name, steps=10, grid=jnp.asarray(t), trajectory=True)
    np.testing.assert_allclose(path["x"][1:], np.stack(states), atol=1e-4)


def test_edm_euler():
    """The peer applies the preconditioning of Karras et al. 2022 itself; Euler's method in sigma is `ddim` on x0 + sigma eps."""
    peer = diffusers.EDMEulerScheduler(sigma_min=0.02, sigma_max=20.0)
    peer.set_timesteps(10)
    tau, d = peer.sigmas.numpy().astype(np.float64), 0.5
    x, states = torch.from_numpy((START * np.hypot(1, tau[0])).astype(np.float32)), []
    for i, step in enumerate(peer.timesteps):
        peer.scale_model_input(x, step)
        y = x.numpy().astype(np.float64)
        skip, out = d**2 / (tau[i]**2 + d**2), tau[i] * d / np.hypot(tau[i], d)
        x = peer.step(torch.from_numpy(((D(y, tau[i]) - skip * y) / out).astype(np.float32)), step, x).prev_sample
        states.append(x.numpy())
    compare(states, ours("ddim", tau, "ve"), tau)
