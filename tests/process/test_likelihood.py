"""Likelihoods against known densities and bounds: of Gaussian and mixture data, and of denoisers that always answer the same."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from ldm_jax.process.likelihood import LOGSNR_MIN, PROBES, bits_per_dim, dequantize, ode_logp, vlb_bpd, vlb_limit_bpd
from ldm_jax.process.schedules import SCHEDULES
from ldm_jax.types import UserError, expand
from tests.oracle import GAUSSIAN, MIXTURE

KEY = jax.random.key(21)
FLOW, VP = SCHEDULES["rectified_flow"](), SCHEDULES["vp_sde"]()
SHORT = SCHEDULES["linear"](timesteps=8, beta_start=0.01, beta_end=0.6)
C, M = np.linalg.eigvalsh(GAUSSIAN.covs[0]), GAUSSIAN.means[0]
BITS = 2 * math.log(2)


def points(data, n):
    rng = np.random.default_rng(3)
    k = rng.choice(len(data.weights), n, p=data.weights)
    return np.stack([rng.multivariate_normal(data.means[i], data.covs[i]) for i in k]).astype(np.float32)


def log_density(data, x, tau=0.0):
    """float64: log p of the data with noise of standard deviation tau."""
    parts = [w * multivariate_normal(m, c + tau**2 * np.eye(2)).pdf(np.asarray(x, float))
             for w, m, c in zip(data.weights, data.means, data.covs)]
    return np.log(np.sum(parts, 0))


# The flow's density

@pytest.mark.parametrize("name", ["linear", "rectified_flow", "edm", "sub_vp"])
def test_ode_logp_is_the_analytic_log_density(name):
    """Within 1e-3 nats: of the data, or where the process starts with visible noise tau, of the data with that noise."""
    schedule = SCHEDULES[name]()
    end = schedule.t_of_logsnr(jnp.maximum(schedule.logsnr(jnp.float32(1.0)), LOGSNR_MIN))

    @jax.jit
    def run(*xs):
        return [ode_logp(data.denoiser(schedule), schedule, x, KEY, probe="exact", steps=120,
                         prior_logp=lambda x_1: data.log_prob(schedule, x_1, end)) for data, x in zip((GAUSSIAN, MIXTURE), xs)]

    xs = points(GAUSSIAN, 64), points(MIXTURE, 64)
    t_0 = jnp.float32(1 / schedule.timesteps if schedule.timesteps else 1e-6)
    tau = math.exp(-0.5 * min(float(schedule.logsnr(t_0)), 13.8))
    for data, x, found in zip((GAUSSIAN, MIXTURE), xs, run(*xs)):
        np.testing.assert_allclose(found, log_density(data, x, tau), atol=1e-3)
        if tau < 2e-3:
            np.testing.assert_allclose(found, log_density(data, x), atol=1e-3)


def test_ode_logp_with_the_samplers_prior():
    """The model starts from N(0, sigma(1)^2): its density is that of m + S^-1 (x_1 - alpha_1 m), S = std_1 / std_0."""
    schedule = SCHEDULES["scaled_linear"]()  # alpha(1) = 0.07: the two differ visibly
    x = points(GAUSSIAN, 64)
    found = jax.jit(lambda x: ode_logp(GAUSSIAN.denoiser(schedule), schedule, x, KEY, probe="exact"))(x)
    alpha, sigma = (np.float64(f(jnp.float32(1.0))) for f in (schedule.alpha, schedule.sigma))
    tau2 = np.exp(-np.float64(schedule.logsnr(jnp.float32(1e-3))))
    basis = np.linalg.eigh(GAUSSIAN.covs[0])[1]
    scale = np.sqrt((alpha**2 * C + sigma**2) / (C + tau2))
    x_1 = alpha * (M @ basis) + scale * ((x - M) @ basis)
    expected = norm(0, sigma).logpdf(x_1).sum(-1) + np.log(scale).sum()
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(expected - log_density(GAUSSIAN, x)).max() > 0.1


@pytest.mark.parametrize("probe", sorted(set(PROBES) - {"exact"}))
def test_random_probes_are_unbiased(probe):
    """The mean over many keys is the exact trace's answer; two probes have half the variance of one."""
    n, x = 4000, points(GAUSSIAN, 1)

    @jax.jit
    def run(x):
        many = jnp.broadcast_to(x, (n, 2))
        one, two = (ode_logp(GAUSSIAN.denoiser(FLOW), FLOW, many, KEY, probe=probe, probes=p, steps=30) for p in (1, 2))
        return one, two, ode_logp(GAUSSIAN.denoiser(FLOW), FLOW, x, KEY, probe="exact", steps=30)

    one, two, exact = (np.asarray(a, float) for a in run(x))
    assert one.std() > 0.01
    for found in (one, two):
        assert abs(found.mean() - exact[0]) < 4.5 * found.std() / np.sqrt(n)
    assert abs(two.var() / one.var() - 0.5) < 0.08


def test_dequantisation_and_bits():
    """Noise fills each bin; and the uniform density over all bins costs exactly 8 bits."""
    levels = np.arange(256) / 127.5 - 1
    x0 = jnp.asarray(np.tile(levels, (200, 1)), jnp.float32)
    x = np.asarray(dequantize(x0, KEY), float)
    np.testing.assert_array_equal(np.clip(np.round((x + 1) * 127.5), 0, 255), np.round((np.asarray(x0) + 1) * 127.5))
    offset = (x - np.asarray(x0)) * 127.5
    assert abs(offset.mean()) < 5 / np.sqrt(12 * offset.size) and abs(offset.var() - 1 / 12) < 1e-3
    uniform = 5 * -math.log(2 * 256 / 255)
    np.testing.assert_allclose(bits_per_dim(jnp.float32(uniform), 5, 256), 8.0, rtol=1e-6)
    np.testing.assert_allclose(bits_per_dim(jnp.float32(-7.0), 2), 7.0 / BITS, rtol=1e-6)


# The variational bound

@pytest.mark.parametrize("variance", ["small", "large", 0.3])
def test_vlb_terms_against_the_papers_formulas(variance):
    """A denoiser that always answers c frees all terms of noise: Ho et al. 2020, eqs. 5, 7; Nichol & Dhariwal 2021, eq. 15."""
    T, c = 8, 0.1
    x0 = np.array([[0, 255, 102, 140]]) / 127.5 - 1

    def denoise(x_t, t):
        x = jnp.full_like(x_t, c)
        return (x, jnp.full_like(x_t, variance)) if isinstance(variance, float) else x

    options = {"variance": variance} if isinstance(variance, str) else {}
    bound = jax.jit(lambda x0: vlb_bpd(denoise, SHORT, x0, KEY, **options))(jnp.asarray(x0, jnp.float32))

    betas = np.linspace(0.01, 0.6, T)
    abar = np.cumprod(1 - betas)
    before = np.concatenate([[1.0], abar[:-1]])
    small = betas * (1 - before) / (1 - abar)
    log_small, log_large = np.log(np.concatenate([small[1:2], small[1:]])), np.log(betas)
    frac = {"small": 0.0, "large": 1.0}.get(variance, variance)
    logvar = frac * log_large + (1 - frac) * log_small
    shift = np.sqrt(before) * betas / (1 - abar)  # d posterior mean / d x0
    bits = 4 * math.log(2)
    for k in range(1, T):
        d = log_small[k] - logvar[k]
        kl = 0.5 * (np.exp(d) - 1 - d + (shift[k] * (x0 - c)) ** 2 * np.exp(-logvar[k]))
        np.testing.assert_allclose(bound.diffusion[0, k - 1], kl.sum() / bits, rtol=2e-4)
    std, half = np.exp(0.5 * logvar[0]), 1 / 255
    high = np.where(x0 > 0.999, np.inf, (x0 + half - c) / std)
    low = np.where(x0 < -0.999, -np.inf, (x0 - half - c) / std)
    sign = np.where(low > 0, -1, 1)  # the bin in the lower tail, so that float64 does not cancel
    nats = -np.log(np.where(sign > 0, norm.cdf(high) - norm.cdf(low), norm.cdf(-low) - norm.cdf(-high)))
    np.testing.assert_allclose(bound.decoder[0], nats.sum() / bits, rtol=2e-4)
    np.testing.assert_allclose(bound.prior[0], 0.5 * abar[-1] / (1 - abar[-1]) * np.sum(x0**2) / bits, rtol=2e-4)
    np.testing.assert_allclose(bound.total, bound.prior + bound.decoder + bound.diffusion.sum(1), rtol=1e-5)


def mean_error(snr, x):
    """E_eps |x - x0_hat(x_t)|^2 of the exact Gaussian denoiser, float64, summed over the two dimensions."""
    d = ((x - M) @ np.linalg.eigh(GAUSSIAN.covs[0])[1]) ** 2
    snr = np.asarray(snr)[..., None]
    return np.sum((d + snr * C**2) / (1 + snr * C) ** 2, -1)


def limit(low, high, x):
    """1/2 int_low^high E|x - x0_hat|^2 dSNR: with w = 1 + c SNR, (log w + 1/w - d / (c w)) / 2 in each dimension."""
    d = ((x - M) @ np.linalg.eigh(GAUSSIAN.covs[0])[1]) ** 2
    primitive = [0.5 * np.sum(np.log(1 + C * s) + (1 - d / C) / (1 + C * s)) for s in (low, high)]
    return primitive[1] - primitive[0]


def test_discrete_bound_tends_to_the_limit_from_above():
    """Each term is (SNR_s - SNR_t) / 2 E|x - x0_hat|^2; their sum from t = 1/16 to 1 exceeds the limit there by O(1 / T)."""
    n, x = 3000, points(GAUSSIAN, 1)
    denoise, gaps = GAUSSIAN.denoiser(VP), {}
    for T in (16, 64, 256):
        bound = jax.jit(lambda x0: vlb_bpd(denoise, VP, x0, KEY, steps=T, bins=None))(jnp.broadcast_to(jnp.asarray(x), (n, 2)))
        snr = np.exp(np.asarray(VP.logsnr(jnp.arange(1, T + 1) / jnp.float32(T)), float))
        terms = 0.5 * (snr[:-1] - snr[1:]) * mean_error(snr[1:], x[0]) / BITS
        found = np.asarray(bound.diffusion, float)
        assert np.all(np.abs(found.mean(0) - terms) < 5 * found.std(0) / np.sqrt(n) + 1e-3 * terms)
        first, total = T // 16 - 1, found[:, T // 16 - 1:].sum(1)
        infinite = limit(snr[-1], snr[first], x[0]) / BITS
        gaps[T], gap = terms[first:].sum() - infinite, total.mean() - infinite
        assert abs(gap - gaps[T]) < 5 * total.std() / np.sqrt(n)
        if T == 16:
            assert gap > 5 * total.std() / np.sqrt(n)  # above, and by more than the sampling error
    assert gaps[16] > gaps[64] > gaps[256] > 0
    assert gaps[256] < 0.1 * gaps[16]


def test_limit_against_its_closed_form_and_the_entropy():
    """With the exact denoiser, averaged over the data, SNR from S0 to S1:

        prior      S0 (c + m^2) / 2            decoder   (log(2 pi / S1) + c S1 / (1 + c S1)) / 2
        diffusion  log((1 + c S1) / (1 + c S0)) / 2

    a sum that tends to the entropy log(2 pi e c) / 2 as S0 -> 0, S1 -> inf; for one x, `limit` in place of the average."""
    n = 4000
    run = jax.jit(lambda x0: vlb_limit_bpd(GAUSSIAN.denoiser(VP), VP, x0, KEY, samples=40, bins=None))
    x = points(GAUSSIAN, 1)
    s0, s1 = math.exp(float(VP.logsnr(jnp.float32(1.0)))), math.exp(min(13.8, float(VP.logsnr(jnp.float32(1e-6)))))
    one = np.asarray(run(jnp.broadcast_to(jnp.asarray(x), (n, 2))).diffusion, float).sum(1)
    assert abs(one.mean() - limit(s0, s1, x[0]) / BITS) < 4.5 * one.std() / np.sqrt(n)

    bound = run(points(GAUSSIAN, n))
    m = M @ np.linalg.eigh(GAUSSIAN.covs[0])[1]
    expected = {"prior": np.sum(0.5 * s0 * (C + m**2)), "decoder": np.sum(0.5 * (np.log(2 * np.pi / s1) + C * s1 / (1 + C * s1))),
                "diffusion": np.sum(0.5 * np.log((1 + C * s1) / (1 + C * s0)))}
    for name, value in expected.items():
        found = np.asarray(getattr(bound, name), float)
        found = found.sum(1) if name == "diffusion" else found
        assert abs(found.mean() - value / BITS) < 4.5 * found.std() / np.sqrt(n) + 1e-6, name
    entropy = np.sum(0.5 * np.log(2 * np.pi * np.e * C)) / BITS
    total = np.asarray(bound.total, float)
    assert abs(total.mean() - entropy) < 4.5 * total.std() / np.sqrt(n) + 1e-3


def test_limit_ignores_the_schedule_between_its_ends():
    """The same logsnr ends give the same diffusion under another schedule, family and parameterisation of time."""
    n, x0 = 4000, points(MIXTURE, 4000)
    edm = SCHEDULES["edm"](sigma_max=50.0)
    schedules = (edm, SCHEDULES["ve"](sigma_min=0.001, sigma_max=50.0))

    @jax.jit
    def run(x0):
        return [vlb_limit_bpd(MIXTURE.denoiser(s), s, x0, jax.random.key(i), samples=20, bins=None, logsnr_max=9.0).diffusion
                for i, s in enumerate(schedules)]

    found = [np.asarray(terms, float).sum(1) for terms in run(x0)]
    difference = found[0] - found[1]
    assert abs(difference.mean()) < 4.5 * difference.std() / np.sqrt(n)


def test_zero_terminal_snr_and_key_per_example():
    """alpha(1) = 0 leaves no prior term and nothing infinite; what example i gets depends on its index alone."""
    x0 = jnp.asarray(np.round((points(GAUSSIAN, 6).clip(-1, 1) + 1) * 127.5) / 127.5 - 1)

    @jax.jit
    def run(x0):
        denoise = GAUSSIAN.denoiser(FLOW)
        return (vlb_bpd(denoise, FLOW, x0, KEY, steps=10), vlb_limit_bpd(denoise, FLOW, x0, KEY, samples=10),
                ode_logp(denoise, FLOW, x0, KEY, steps=10))

    whole, part = run(x0), run(x0[:3])
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part)):
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a[:3], b, rtol=1e-4, atol=1e-6)
    assert np.all(whole[0].prior == 0) and whole[0].diffusion.shape == (6, 9) and whole[1].diffusion.shape == (6, 10)


def test_mistakes_are_named():
    x0, denoise = jnp.zeros((1, 2)), lambda x_t, t: x_t * expand(t, x_t)
    with pytest.raises(UserError, match="steps"):
        vlb_bpd(denoise, FLOW, x0, KEY)
    with pytest.raises(UserError, match="large, small"):
        vlb_bpd(denoise, FLOW, x0, KEY, steps=2, variance="learned")
    with pytest.raises(UserError, match="rademacher"):
        ode_logp(denoise, FLOW, x0, KEY, probe="hutchinson")
    for function in (ode_logp, vlb_limit_bpd):
        with pytest.raises(UserError, match="logsnr_max"):
            function(denoise, FLOW, x0, KEY, logsnr_max=math.inf)
