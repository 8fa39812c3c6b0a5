"""The networks, the only part that knows Flax: builders by name; what they build is pure functions over dicts of parameters."""
from ldm_jax.models.autoencoder import AUTOENCODERS, Autoencoder
from ldm_jax.models.dit import dit
from ldm_jax.models.net import Net
from ldm_jax.models.unet import UNETS, unet

NETS = {"unet": unet, "dit": dit}

__all__ = ["AUTOENCODERS", "NETS", "UNETS", "Autoencoder", "Net", "dit", "unet"]
