"""Systems: nets and process wired into init, loss_fn and sample."""
from ldm_jax.systems.autoencoding import autoencoding
from ldm_jax.systems.base import System, diffusion
from ldm_jax.systems.classifying import classifying
from ldm_jax.systems.latent import latent

__all__ = ["System", "autoencoding", "classifying", "diffusion", "latent"]
