"""Editing: exact answers for Gaussians and mixtures, orders of the round trips, and what is promised of the known region."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.process import SCHEDULES, prior, sample
from ldm_jax.process.editing import ENCODERS, encode, inpaint, noised, resampling_path, sdedit, slerp, translate
from ldm_jax.process.samplers import make_sampler
from ldm_jax.types import UserError, example_keys, fold_in, normal
from tests.oracle import MIXTURE, gaussian, operation_by_operation

KEY = jax.random.key(0)


def test_sdedit_keeps_the_law():
    """Noising data to any time and sampling back gives data again."""
    schedule, n = SCHEDULES["vp_sde"](), 3000
    x0 = MIXTURE.draw(jax.random.key(5), n).astype(jnp.float32)
    strength = jnp.repeat(jnp.asarray([0.3, 0.9]), n // 2)
    out = np.asarray(jax.jit(lambda x0: sdedit(MIXTURE.denoiser(schedule), schedule, x0, KEY, strength=strength, steps=100,
                                               capacity=100, sampler="ddpm", grid="logsnr_uniform"))(x0))
    std = np.sqrt(np.diag(MIXTURE.cov()))
    for part in out.reshape(2, -1, 2):
        np.testing.assert_allclose(part.mean(0), MIXTURE.mean(), atol=4.5 * std.max() / len(part) ** 0.5)
        np.testing.assert_allclose(np.cov(part.T), MIXTURE.cov(), atol=(4.5 * (2 / len(part)) ** 0.5 + 0.03) * std.max() ** 2)
    moved = np.abs(out - np.asarray(x0)).mean(1).reshape(2, -1).mean(1)
    assert moved[0] < 0.5 * moved[1]


def test_sdedit_runs_the_last_part_of_the_grid():
    schedule = SCHEDULES["linear"]()
    denoise, x0 = jax.jit(MIXTURE.denoiser(schedule)), normal(KEY, (2, 2))
    with operation_by_operation():
        _sdedit_runs(schedule, denoise, x0)


def _sdedit_runs(schedule, denoise, x0):
    out, path = sdedit(denoise, schedule, x0, KEY, strength=0.4, steps=10, trajectory=True)
    np.testing.assert_allclose(path["t"][:5], [0.4, 0.3, 0.2, 0.1, 0.0], atol=1e-6)
    keys = example_keys(KEY, 2)
    start = noised(schedule, x0, jnp.float32(0.4), fold_in(keys, 0))
    np.testing.assert_allclose(path["x"][0], start, atol=1e-6)
    want = sample(denoise, schedule, start, KEY, steps=4, grid=jnp.asarray([0.4, 0.3, 0.2, 0.1, 0.0]))
    np.testing.assert_allclose(out, want, atol=1e-5)
    each = sdedit(denoise, schedule, x0, KEY, strength=jnp.asarray([0.4, 1.0]), steps=10)
    np.testing.assert_allclose(each[0], out[0], atol=1e-5)
    np.testing.assert_allclose(each[1], sdedit(denoise, schedule, x0, KEY, strength=1.0, steps=10)[1], atol=1e-5)


def test_inpainting():
    """The known coordinate is returned as given; the other's mean tends to the conditional one with the passes of RePaint."""
    schedule, n, steps = SCHEDULES["cosine"](), 3000, 30
    data = gaussian([0.2, -0.3], [[0.5, 0.4], [0.4, 0.5]])
    known, mask = jnp.asarray([[1.1, 0.0]]), jnp.asarray([[1.0, 0.0]])
    mean = -0.3 + 0.8 * (1.1 - 0.2)
    bias = []
    for resamples, jump in ((1, 1), (8, 1), (4, 3)):
        out = np.asarray(jax.jit(lambda x: inpaint(data.denoiser(schedule), schedule, x, KEY, known=known, mask=mask, steps=steps,
                                                   resamples=resamples, jump=jump))(prior(schedule, KEY, (n, 2))))
        np.testing.assert_allclose(out[:, 0], 1.1, rtol=1e-6)
        bias.append(abs(out[:, 1].mean() - mean))
    assert bias[1] < 0.5 * bias[0] and bias[2] < 0.7 * bias[0]
    assert bias[1] < 0.1


def test_resampling_path():
    assert resampling_path(4, 1, 1) == [0, 1, 2, 3, 4]
    assert resampling_path(3, 1, 2) == [0, 1, 0, 1, 2, 1, 2, 3]
    assert resampling_path(5, 2, 2) == [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, 4, 5]


def test_the_way_up_keeps_the_law():
    """On a point mass, where a step down is exact, x at each visited time is N(alpha x0, sigma^2) however often it went up."""
    schedule, n = SCHEDULES["rectified_flow"](), 20000
    data = gaussian([0.5, -0.5], np.zeros((2, 2)))
    nothing = jnp.zeros((1, 2))
    _, path = jax.jit(lambda x: inpaint(data.denoiser(schedule), schedule, x, KEY, known=nothing, mask=nothing, steps=4,
                                        resamples=2, jump=2, trajectory=True))(prior(schedule, KEY, (n, 2)))
    assert np.any(np.diff(path["t"]) > 0)
    for x, t in zip(path["x"], np.asarray(path["t"])):
        np.testing.assert_allclose(x.mean(0), (1 - t) * data.mean(), atol=4.5 * t / n**0.5 + 1e-6)
        np.testing.assert_allclose(x.std(0), t, rtol=4.5 / (2 * n) ** 0.5, atol=1e-6)


def test_slerp():
    a, b = normal(KEY, (3, 4, 4)), normal(jax.random.key(1), (3, 4, 4))
    b = b / jnp.linalg.norm(b, axis=(1, 2), keepdims=True) * jnp.linalg.norm(a, axis=(1, 2), keepdims=True)
    w = jnp.asarray([0.0, 0.3, 1.0])
    out = slerp(a, b, w)
    np.testing.assert_allclose(jnp.linalg.norm(out, axis=(1, 2)), jnp.linalg.norm(a, axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(out[0], a[0], atol=1e-6)
    np.testing.assert_allclose(out[2], b[2], atol=1e-6)

    def angle(x, y):
        return np.arccos(np.sum(np.asarray(x, np.float64) * np.asarray(y)) / np.linalg.norm(x) / np.linalg.norm(y))

    np.testing.assert_allclose(angle(a[1], out[1]), 0.3 * angle(a[1], b[1]), rtol=1e-4)
    np.testing.assert_allclose(slerp(a, 2 * a, 0.5), 1.5 * a, rtol=1e-5)  # parallel: a straight line


@pytest.mark.parametrize("encoder, options, decoder, order", [
    ("ddim_inversion", {}, "ddim", 1), ("ddim_inversion", dict(iterations=2), "ddim", 2),
    ("ddim_inversion", dict(iterations=3), "ddim", 3), ("heun", {}, "heun", 2)])
def test_round_trip(encoder, options, decoder, order):
    """Encoding and decoding again returns the start at the stated order."""
    with jax.enable_x64(True):
        schedule = SCHEDULES["linear"]()
        denoise, x0 = MIXTURE.denoiser(schedule), jnp.asarray([[0.9, -0.4], [-0.3, 1.2]])

        def trip(n):
            part = jnp.minimum(jnp.arange(129) / n, 1.0)
            grid = schedule.t_of_logsnr(-4.0 + 8.0 * part)
            x_1 = encode(denoise, schedule, x0, sampler=encoder, steps=n, grid=grid, capacity=128, **options)
            return sample(denoise, schedule, x_1, KEY, sampler=decoder, steps=n, grid=grid, capacity=128)

        trip = jax.jit(trip)
        errors = [float(jnp.abs(trip(n) - x0).max()) for n in (32, 64, 128)]
    assert -np.diff(np.log2(errors))[-1] > order - 0.15, errors


@pytest.mark.parametrize("schedule", ["linear", "rectified_flow"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_encode_from_the_very_data(encoder, schedule):
    """From t = 0 to t = 1, where the ODE's map of N(m, C) is x_1 = alpha m + sqrt((alpha^2 C + sigma^2) / C) (x - m)."""
    if encoder == "ode":
        pytest.importorskip("diffrax")
    schedule = SCHEDULES[schedule]()
    data = gaussian([0.2, -0.3], np.diag([0.5, 0.2]))
    x0 = jnp.asarray([[0.9, -0.4], [-0.3, 0.2]], jnp.float32)
    steps = 1 if encoder == "ode" else 200
    x_1 = encode(data.denoiser(schedule), schedule, x0, sampler=encoder, steps=steps)
    a, s = float(schedule.alpha(jnp.float32(1))), float(schedule.sigma(jnp.float32(1)))
    c = np.diag(data.cov())
    want = a * data.mean() + np.sqrt((a**2 * c + s**2) / c) * (np.asarray(x0, np.float64) - data.mean())
    np.testing.assert_allclose(x_1, want, atol=dict(ddim_inversion=0.12, heun=0.02, ode=2e-3)[encoder])


def test_translate():
    """Between two isotropic Gaussians the exact map is m2 + (s2 / s1) (x - m1); with one denoiser twice it is the identity."""
    schedule = SCHEDULES["rectified_flow"]()
    one, two = (gaussian(m, v * np.eye(2)).denoiser(schedule) for m, v in (([0.5, 0.0], 0.25), ([-1.0, 1.0], 0.04)))
    x0 = jnp.asarray([[0.9, -0.4]], jnp.float32)
    out = translate(one, two, schedule, x0, encoder="heun", decoder="heun", steps=100)
    np.testing.assert_allclose(out, [[-1.0 + 0.4 * 0.4, 1.0 - 0.4 * 0.4]], atol=5e-3)
    encoder = make_sampler("ddim_inversion", iterations=6)
    np.testing.assert_allclose(translate(one, one, schedule, x0, encoder=encoder, steps=100), x0, atol=5e-4)


def test_errors():
    schedule = SCHEDULES["linear"]()
    denoise, x = MIXTURE.denoiser(schedule), jnp.zeros((1, 2))
    with pytest.raises(UserError, match="cannot start from data"):
        encode(denoise, schedule, x, sampler="ddim")
    with pytest.raises(UserError, match="remembers nothing"):
        inpaint(denoise, schedule, x, KEY, known=x, mask=x, sampler="unipc", resamples=2)
    with pytest.raises(UserError, match="as an int"):
        inpaint(denoise, schedule, x, KEY, known=x, mask=x, steps=jnp.asarray(3), resamples=2)
    with pytest.raises(UserError, match="at least 1"):
        inpaint(denoise, schedule, x, KEY, known=x, mask=x, resamples=0)
