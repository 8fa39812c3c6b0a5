"""Stable Diffusion XL, from a published checkpoint's directory: configs/sd15.py at 1024 x 1024, and with the checkpoint's own guidance.

    python -m ldm_jax.main --config=configs/sdxl.py --mode=sample --workdir=runs/sdxl --weights=DIR --prompt="a red fox in the snow"

For SDXL-Turbo add --config.size="(512,512)" --config.sampler.steps=1 --config.sampler.guidance=1. The refiner is used from Python, on
what the base leaves at 0.8 of the way: see the README. `:lora` as in configs/sd15.py. Time and result: not yet measured.
"""
import os
import runpy

from ml_collections import ConfigDict

BASE = runpy.run_path(os.path.join(os.path.dirname(__file__), "sd15.py"))


def get_config(variant: str = "") -> ConfigDict:
    config = BASE["get_config"](variant)
    config.data.folder.image_size = 1024
    config.data.image_shape = (1024, 1024, 3)
    config.sampler.update(guidance=5.0, batch_size=1)
    return config
