"""Latent diffusion on CIFAR-10 in two stages in one run: a KL autoencoder (32x32x3 -> 16x16x4), then a class-conditional
denoiser in its latents.

    python -m ldm_jax.main --config=configs/ldm_cifar.py --workdir=runs/ldm_cifar

Sized for one GPU or a TPU pod; time and result there: not yet measured. The first use downloads CIFAR-10 and prepares it.
`:smoke` runs both stages, small: 3 min 37 s on two cores of an AMD EPYC virtual machine, compilation included; the first stage
reaches 25.6 dB on its training batches, the second sees 12,800 pictures, which gives colours and textures but no objects.
"""
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ldm_jax.recipe import cifar10_or_shapes


def get_first_stage(data: dict) -> ConfigDict:
    config = ConfigDict()
    config.system = "autoencoder"
    config.seed = 0
    config.data = data
    config.autoencoder = dict(name="kl",
                              kl=dict(factor=2, latent_channels=4, width=128, mults=(1, 2), num_res_blocks=2, mid_attention=True))
    config.loss = dict(kl_weight=1e-4)
    config.optimizer = dict(name="adam", learning_rate=2e-4, warmup_steps=500, decay="cosine", clip_norm=1.0)
    config.train = dict(batch_size=128, steps=50_000, accumulate=1, ema_decay=0.999, log_every=100, save_every=5_000, keep=1)
    config.mesh = dict(data=-1, fsdp=1)
    config.eval = dict(samples=1000, real=1000, seed=1)
    return config


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"unknown variant {variant!r} of configs/ldm_cifar.py; there is 'smoke'")
    source = cifar10_or_shapes() if variant == "smoke" else dict(name="tfds", tfds=dict(name="cifar10", data_dir=placeholder(str)))
    data = dict(**source, image_shape=(32, 32, 3), num_classes=10, flip=True)
    config = ConfigDict()
    config.system = "latent"
    config.seed = 0
    config.first_stage = get_first_stage(data)
    config.first_stage_dir = ""  # the workdir of a finished first stage, to be used in place of training one
    config.data = data
    config.process = dict(schedule=dict(name="cosine"), parameterization="v", times="uniform", weight="simple", class_dropout=0.1,
                          learned_variance=False)
    config.net = dict(
        name="unet",
        unet=dict(width=128, mults=(1, 2, 2), num_res_blocks=2, attention=(8,), num_heads=4, dropout=0.1),
        dit=dict(size="S", patch=2))
    config.optimizer = dict(name="adamw", learning_rate=2e-4, warmup_steps=1000, decay="constant", clip_norm=1.0,
                            adamw=dict(weight_decay=0.0))
    config.train = dict(batch_size=256, steps=200_000, accumulate=1, ema_decay=0.9999, log_every=100, save_every=10_000, keep=2)
    config.sampler = dict(name="ddim", steps=50, guidance=1.5, grid="uniform", batch_size=250,
                          ddim=dict(eta=0.0), ddpm=dict(variance="small"))
    config.mesh = dict(data=-1, fsdp=1)
    config.eval = dict(samples=1000, real=5000, seed=1)
    if variant == "smoke":
        first = config.first_stage
        first.autoencoder.kl.update(width=16, mults=(1, 2), num_res_blocks=1, mid_attention=False)
        first.optimizer.update(learning_rate=3e-3, warmup_steps=20)
        first.train.update(batch_size=16, steps=500, ema_decay=0.98, log_every=20, save_every=500)
        config.net.unet.update(width=32, mults=(1, 2, 2), num_res_blocks=1, attention=(4,), dropout=0.0)
        config.net.dit.update(width=128, depth=4, num_heads=4)
        config.optimizer.update(learning_rate=1e-3, warmup_steps=20)
        config.train.update(batch_size=32, steps=400, ema_decay=0.99, log_every=20, save_every=400)
        config.sampler.steps = 20
        config.eval.update(samples=200, real=2000)
    return config
