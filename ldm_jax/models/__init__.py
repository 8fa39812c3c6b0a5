"""The networks, the only part that knows Flax: builders by name; what they build is pure functions over dicts of parameters."""
from ldm_jax.models.autoencoder import AUTOENCODERS, Autoencoder
from ldm_jax.models.classifier import ADM_CLASSIFIERS, CLASSIFIERS, Classifier, noisy_classifier
from ldm_jax.models.discriminator import DISCRIMINATORS
from ldm_jax.models.dit import dit
from ldm_jax.models.features import PERCEPTUALS
from ldm_jax.models.net import Net
from ldm_jax.models.tiling import tiled
from ldm_jax.models.unet import UNETS, unet

NETS = {"unet": unet, "dit": dit}

__all__ = ["ADM_CLASSIFIERS", "AUTOENCODERS", "CLASSIFIERS", "DISCRIMINATORS", "NETS", "PERCEPTUALS", "UNETS", "Autoencoder",
           "Classifier", "Net", "dit", "noisy_classifier", "tiled", "unet"]
