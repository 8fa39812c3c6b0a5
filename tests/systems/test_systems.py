"""The wiring: what each system hands to its net, its process and its codec."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import process
from ldm_jax.systems.autoencoding import autoencoding
from ldm_jax.systems.base import diffusion
from ldm_jax.systems.conditioners import CONDITIONERS
from ldm_jax.systems.conditions import Space
from ldm_jax.systems.latent import latent, measure
from ldm_jax.types import UserError, normal

SHAPE = (4, 4, 1)


@dataclasses.dataclass(frozen=True)
class ExactNet:
    """A net for data that is one constant picture per class, and 0 for the null class: predicts v of rectified flow exactly."""
    values: tuple
    shape: tuple = SHAPE
    num_classes: int = None

    def init(self, key):
        return {"w": jnp.ones(())}

    def apply(self, params, x_t, t, cond=None, train=False, rngs=None):
        table = jnp.asarray(self.values + (0.0,))
        x0 = table[cond["class"]].reshape(-1, 1, 1, 1) if cond else jnp.full((len(x_t), 1, 1, 1), self.values[0])
        return params["w"] * (x_t - x0) / t.reshape(-1, 1, 1, 1)  # eps - x0 = (x_t - x0) / t


@dataclasses.dataclass(frozen=True)
class HalfCodec:
    """An "autoencoder" that keeps every second pixel, doubled; its posterior has no width to speak of."""
    latent_shape = (2, 2, 1)
    codes = None

    def init(self, key):
        return {"gain": jnp.float32(2.0)}

    def encode(self, params, x, train=False, rngs=None):
        return params["gain"] * x[:, ::2, ::2], jnp.full((len(x), 2, 2, 1), -30.0)

    def posterior(self, params, x):
        return self.encode(params, x)

    def draw(self, mean, logvar, key):
        return mean + jnp.exp(0.5 * logvar) * normal(key, mean.shape)

    def decode(self, params, z, train=False, rngs=None):
        return jnp.repeat(jnp.repeat(z / params["gain"], 2, 1), 2, 2)


def flow(net, **options):
    return diffusion(net, image_shape=SHAPE, schedule=process.SCHEDULES["rectified_flow"](), parameterization="flow", **options)


def by_class(drop):
    space = Space(SHAPE, SHAPE, num_classes=2)
    return flow(ExactNet((0.5, -0.25), num_classes=2), conditioners={"class": CONDITIONERS["class"](space, drop=drop)})


def draw(system, params, cond, guidance=None, n=3):
    x = jax.random.normal(jax.random.key(0), (n, *system.sample_shape))
    return system.sample(params, x, jax.random.split(jax.random.key(1), n), cond, sampler=process.SAMPLERS["euler"](), steps=4,
                         capacity=8, guidance=guidance)


def test_an_exact_net_has_no_loss_and_samples_its_picture():
    system = by_class(drop=0.0)
    params = system.init(jax.random.key(0))
    labels = jnp.array([0, 1, 1])
    image = jnp.broadcast_to(jnp.array([0.5, -0.25, -0.25]).reshape(3, 1, 1, 1), (3, *SHAPE))
    loss, metrics = system.loss_fn(params, {"image": image, "class": labels}, jax.random.key(3))
    assert loss.shape == (3,)
    np.testing.assert_allclose(loss, 0.0, atol=1e-9)
    np.testing.assert_allclose(draw(system, params, {"class": labels}), image, atol=1e-5)


def test_guidance_extrapolates_from_the_null_class():
    system = by_class(drop=0.1)
    params = system.init(jax.random.key(0))
    scale = jnp.array([1.0, 2.0, 3.0])
    out = draw(system, params, {"class": jnp.array([0, 0, 1])}, scale)  # the null class is 0, so guided x0 = scale * value
    np.testing.assert_allclose(out[:, 0, 0, 0], [0.5, 1.0, -0.75], atol=1e-5)


def test_an_impossible_combination_is_refused_when_built():
    with pytest.raises(UserError, match="alpha\\(1\\) = 0"):
        diffusion(ExactNet((0.0,)), image_shape=SHAPE, schedule=process.SCHEDULES["rectified_flow"](), parameterization="eps")


def test_latents_are_measured_normalised_and_undone():
    images = (np.random.default_rng(0).normal(0.3, 0.2, (64, *SHAPE)) * 127.5 + 127.5).clip(0, 255).astype(np.uint8)
    codec = HalfCodec()
    params = codec.init(None)
    statistics = measure(codec, params, [images[:32], images[32:]], jax.random.key(0))
    z = 2.0 * (images[:, ::2, ::2].astype(np.float64) / 127.5 - 1.0)
    np.testing.assert_allclose(statistics["shift"], [z.mean()], rtol=1e-4)
    np.testing.assert_allclose(statistics["scale"], [z.std()], rtol=1e-4)

    x0 = (0.25 * 2.0 - z.mean()) / z.std()  # the normalised latent of a picture of 0.25
    system = latent(ExactNet((float(x0),), (2, 2, 1)), codec, image_shape=SHAPE, schedule=process.SCHEDULES["rectified_flow"](),
                    parameterization="flow")
    assert system.trained == ("net",) and system.sample_shape == (2, 2, 1)
    everything = {**system.init(jax.random.key(0)), "latent": statistics}
    np.testing.assert_allclose(draw(system, everything, None), 0.25, atol=1e-4)
    loss, _ = system.loss_fn(everything, {"image": jnp.full((3, *SHAPE), 0.25)}, jax.random.key(0))
    np.testing.assert_allclose(loss, 0.0, atol=1e-8)

    mean = jnp.full((3, 2, 2, 1), 0.5, jnp.float16)  # what a cache holds of that picture
    for cached in ({"mean": mean}, {"mean": mean, "logvar": jnp.full_like(mean, -60.0)}):
        np.testing.assert_allclose(system.loss_fn(everything, cached, jax.random.key(0))[0], 0.0, atol=1e-8)
    wide, _ = system.loss_fn(everything, {"mean": mean, "logvar": jnp.zeros_like(mean)}, jax.random.key(0))
    assert wide.min() > 0.1


def test_autoencoder_terms():
    system = autoencoding(HalfCodec(), image_shape=SHAPE, kl_weight=0.1)
    params = system.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (5, *SHAPE))
    loss, metrics = system.loss_fn(params, {"image": jnp.asarray(image, jnp.float32)}, jax.random.key(0))
    kept = image[:, ::2, ::2].repeat(2, 1).repeat(2, 2)
    mae = np.abs(image - kept).mean((1, 2, 3))
    kl = 0.5 * ((2 * image[:, ::2, ::2]) ** 2 + np.exp(-30.0) - 1 + 30.0).sum((1, 2, 3))
    np.testing.assert_allclose(metrics["mae"], mae, rtol=1e-4)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(loss, mae + 0.1 * kl / 16, rtol=1e-4)
    np.testing.assert_allclose(metrics["psnr"], 10 * np.log10(4 / ((image - kept) ** 2).mean((1, 2, 3))), rtol=1e-4)


def test_a_net_for_other_latents_is_refused():
    from ldm_jax.models import NETS
    net = NETS["unet"]((2, 2, 3), width=8, mults=(1,), num_res_blocks=1)
    with pytest.raises(UserError, match=r"\(2, 2, 3\), the autoencoder's latents are \(2, 2, 1\)"):
        latent(net, HalfCodec(), image_shape=SHAPE, schedule=process.SCHEDULES["rectified_flow"](), parameterization="flow")
