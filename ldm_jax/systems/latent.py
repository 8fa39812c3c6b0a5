"""Latent diffusion (Rombach et al. 2022): diffusion of x0 = (z - shift) / scale, z the latents of a trained first stage.

shift and scale [C] are the mean and standard deviation of each latent channel over the training data, so that x0 has zero mean
and unit variance, as the noise schedules assume; with a codebook the scale is one for all channels, under which the nearest code
stays the nearest. They are part of the parameters ("latent") and saved with them.
"""
import dataclasses
from typing import Any, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.systems.base import Codec, System, diffusion
from ldm_jax.types import Array, PyTree, UserError, to_host, to_signed


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The parameters {"shift": [C], "scale": [C]} of the latents' normalisation, shaped like a net so that it inits like one."""
    channels: int

    def init(self, key: Array) -> PyTree:
        return {"shift": jnp.zeros((self.channels,)), "scale": jnp.ones((self.channels,))}


def latent(net: Any, autoencoder: Any, *, image_shape, **options) -> System:
    """Diffusion in the latents of `autoencoder`; options as for `systems.base.diffusion`.

    A batch with "mean", and "logvar" where the latents have a spread, [B, h, w, c], has been encoded already; another one's
    "image" is.

    Raises:
      UserError: for a net of another size or number of channels, and as `systems.base.diffusion` does.
    """
    def encode(params, batch, key):
        if "mean" not in batch:
            z = autoencoder.draw(*autoencoder.posterior(params["autoencoder"], to_signed(batch["image"])), key)
        elif "logvar" in batch:
            z = autoencoder.draw(batch["mean"].astype(jnp.float32), batch["logvar"].astype(jnp.float32), key)
        else:
            z = batch["mean"].astype(jnp.float32)
        return (z - _row(params["latent"]["shift"])) / _row(params["latent"]["scale"])

    def decode(params, x0):
        z = x0 * _row(params["latent"]["scale"]) + _row(params["latent"]["shift"])
        return autoencoder.decode(params["autoencoder"], z)

    wanted = getattr(net, "image_shape", autoencoder.latent_shape)
    if tuple(wanted) != tuple(autoencoder.latent_shape):
        raise UserError(f"the net was built for x_t of shape {tuple(wanted)}, the autoencoder's latents are "
                        f"{tuple(autoencoder.latent_shape)}; make them equal")
    others = {"autoencoder": autoencoder, "latent": Statistics(autoencoder.latent_shape[-1])}
    return diffusion(net, image_shape=image_shape, codec=Codec(encode, decode), sample_shape=autoencoder.latent_shape,
                     others=others, **options)


def _row(channels: Array) -> Array:
    return channels.reshape(1, 1, 1, -1)


def measure(autoencoder: Any, params: PyTree, batches: Iterable[Array], key: Array) -> PyTree:
    """The mean and standard deviation of the latent channels, {"shift": [C], "scale": [C]}, over batches of uint8 images."""
    @jax.jit
    def moments(params, image, key):
        z = autoencoder.draw(*autoencoder.posterior(params, to_signed(image)), key)
        return jnp.mean(z, (0, 1, 2)), jnp.mean(z**2, (0, 1, 2))

    sums = [moments(params, image, jax.random.fold_in(key, i)) for i, image in enumerate(batches)]
    first, second = (np.mean(np.asarray(m, np.float64), axis=0) for m in zip(*to_host(sums)))
    variance = second - first**2
    variance = np.full_like(variance, np.mean(variance)) if autoencoder.codes else variance
    return {"shift": jnp.asarray(first, jnp.float32), "scale": jnp.asarray(np.sqrt(variance), jnp.float32)}
