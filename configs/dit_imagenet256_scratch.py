"""DiT-XL/2 on ImageNet at 256 x 256 from nothing (Peebles & Xie 2023): a KL autoencoder (256x256x3 -> 32x32x4), then 675 million parameters
in its latents, which are encoded once and kept on disk.

    python -m ldm_jax.main --config=configs/dit_imagenet256_scratch.py --workdir=gs://BUCKET/dit --config.mesh.fsdp=8
    python -m ldm_jax.main --config=configs/dit_imagenet256_scratch.py --dry-run --devices=8 --config.mesh.fsdp=8

Sized for a pod; ImageNet must be prepared for TFDS. Time and result there: not yet measured. --config.net.dit.size=B is a smaller one.
`:smoke` shows the path in minutes on two CPU cores, with CIFAR-10 or drawn shapes.
"""
import os
import runpy

from ml_collections import ConfigDict

CIFAR = runpy.run_path(os.path.join(os.path.dirname(__file__), "ldm_cifar.py"))["get_config"]


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"unknown variant {variant!r} of configs/dit_imagenet256_scratch.py; there is 'smoke'")
    config = CIFAR(variant)
    config.process.update(schedule=dict(name="linear"), parameterization="eps", learned_variance=True)
    config.net.name = "dit"
    if variant:
        config.net.dit.update(scan_layers=True, remat="dots")
        return config
    first = config.first_stage
    first.data = config.data = ConfigDict(dict(name="tfds", tfds=dict(name="imagenet2012", data_dir=None, image_size=256),
                                               folder=dict(path="", image_size=256), image_shape=(256, 256, 3),
                                               num_classes=1000, flip=True, num_workers=0))
    first.autoencoder.kl.update(factor=8, mults=(1, 2, 4, 4))
    first.autoencoder.vq.update(factor=8, mults=(1, 2, 4, 4))
    first.discriminator.patchgan.update(layers=3)
    first.train.update(batch_size=96, steps=250_000, save_every=10_000)
    config.net.dit.update(size="XL", patch=2, scan_layers=True, remat="dots", dtype="bfloat16")
    config.optimizer.update(learning_rate=1e-4, warmup_steps=0)
    config.train.update(batch_size=256, steps=400_000)
    config.sampler.update(name="ddpm", steps=250, guidance=1.5, batch_size=64)
    return config
