"""The first stage of latent diffusion: an autoencoder with a small pull of its latents towards N(0, I).

    L = ||x - decode(z)||_1 / D + kl_weight KL( N(mean, var) || N(0, I) ) / D,   z = mean + std eps      (Rombach et al. 2022, appendix G)

with D the number of values in a picture, so that both terms are per value.
"""
from typing import Any

import jax.numpy as jnp
import numpy as np

from ldm_jax.systems.base import System
from ldm_jax.types import Array, PyTree, example_keys, fold_in, normal, to_signed


def posterior_sample(autoencoder: Any, params: PyTree, image: Array, key: Array) -> Array:
    """z ~ N(mean, var) of the encoder's answer to images [B, H, W, C] in [-1, 1]."""
    mean, logvar = autoencoder.encode(params, image)
    return mean + jnp.exp(0.5 * logvar) * normal(key, mean.shape)


def autoencoding(autoencoder: Any, *, image_shape, kl_weight: float = 1e-6) -> System:
    """Training of a KL autoencoder, named "autoencoder"."""
    values = float(np.prod(image_shape))

    def loss_fn(params, batch, key):
        image = to_signed(batch["image"])
        keys = example_keys(key, image.shape[0])
        mean, logvar = autoencoder.encode(params["autoencoder"], image)
        z = mean + jnp.exp(0.5 * logvar) * normal(fold_in(keys, 0), mean.shape)
        error = image - autoencoder.decode(params["autoencoder"], z)
        kl = 0.5 * jnp.sum(mean**2 + jnp.expm1(logvar) - logvar, axis=(1, 2, 3))
        mae, mse = jnp.mean(jnp.abs(error), axis=(1, 2, 3)), jnp.mean(error**2, axis=(1, 2, 3))
        return mae + kl_weight * kl / values, {"mae": mae, "kl": kl, "psnr": 10 * jnp.log10(4.0 / mse)}

    def reconstruct(params, image, key):
        return autoencoder.decode(params["autoencoder"], autoencoder.encode(params["autoencoder"], image)[0])

    return System(nets={"autoencoder": autoencoder}, trained=("autoencoder",), loss_fn=loss_fn, image_shape=tuple(image_shape),
                  init=lambda key: {"autoencoder": autoencoder.init(key)}, reconstruct=reconstruct)
