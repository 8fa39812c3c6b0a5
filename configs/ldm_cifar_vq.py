"""Latent diffusion on CIFAR-10 with a vector-quantised first stage: configs/ldm_cifar.py with a codebook in place of the KL term.

    python -m ldm_jax.main --config=configs/ldm_cifar_vq.py --workdir=runs/ldm_cifar_vq

The variants are those of configs/ldm_cifar.py. Time and result on a GPU: not yet measured. The first stage of `:laptop` keeps 64 codes of a
picture, at 23.6 dB.
"""
import os
import runpy

from ml_collections import ConfigDict

BASE = runpy.run_path(os.path.join(os.path.dirname(__file__), "ldm_cifar.py"))


def get_config(variant: str = "") -> ConfigDict:
    config = BASE["get_config"](variant)
    config.first_stage.autoencoder.name = "vq"
    return config
